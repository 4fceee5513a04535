import os
import signal
import subprocess
import sys

import pytest

from l2m_jax.run import locks

HOLDS = """
import sys
from pathlib import Path
from l2m_jax.run import locks
with locks.held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_is_refused_while_its_process_lives_and_free_once_it_is_killed(tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(locks.InUse, match=f"in use by process {other.pid} on .* since "),
            locks.held(tmp_path),
        ):
            pass
    finally:
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
    with locks.held(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".lock_owner.json").read_text()
    assert not (tmp_path / ".lock_owner.json").exists()


def test_a_process_may_hold_a_folder_twice_and_the_outer_block_keeps_it(tmp_path):
    with locks.held(tmp_path):
        with locks.held(tmp_path):
            pass
        done = subprocess.run(
            [sys.executable, "-c", HOLDS, str(tmp_path)],
            input="",
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert "InUse" in done.stderr and "held" not in done.stdout
