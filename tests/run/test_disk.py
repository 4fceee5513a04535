"""Room on the disk: what unfinished work takes already is not asked for again."""

from collections import namedtuple

import pytest

from l2m_jax.errors import InputError
from l2m_jax.run import disk


def test_what_is_there_already_needs_no_room(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage(100))
    sizes = {
        "teacher": 50,
        f"teacher{disk.CHECKPOINTS}": 40,
        f"l2m{disk.CHECKPOINTS}": 30,
        "teacher store": 60,
    }
    # The larger of the checkpoints, for they go with their finished model: 50 + 40 + 60.
    assert disk.peak_bytes(sizes) == 150
    folders = tmp_path, tmp_path
    with pytest.raises(InputError, match="make room, choose another --workdir"):
        disk.require_room(sizes, 0, *folders)
    disk.require_room(sizes, 50, *folders)
