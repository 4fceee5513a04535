"""Room on the disk: what unfinished work takes already is not asked for again."""

from collections import namedtuple

import pytest

from l2m_jax.errors import InputError
from l2m_jax.run import checks


def test_what_is_there_already_needs_no_room(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: usage(100))
    sizes = {
        "teacher": 50,
        f"teacher{checks.CHECKPOINTS}": 40,
        f"l2m{checks.CHECKPOINTS}": 30,
        "teacher store": 60,
    }
    # The larger of the checkpoints, for they go with their finished model: 50 + 40 + 60.
    assert checks.peak_bytes(sizes) == 150
    folders = tmp_path / "shared", tmp_path / "work"
    with pytest.raises(InputError, match="make room, choose another --workdir"):
        checks._check_room(sizes, 0, *folders)
    checks._check_room(sizes, 50, *folders)
