"""One sampled run for each mapping, shared by the tests of the run's memory and of the plan's, in all workers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

_SCRIPT = Path(__file__).parent / "run" / "sample_memory.py"
_KILLED_AT = 5  # before the best validation is known, between two checkpoints


@pytest.fixture(scope="session", params=["pmap", "fsdp"])
def sampled(request, tmp_path_factory):
    """The mapping, the folder of the pretrained models, and the most bytes of each moment on each device."""
    base, mapping = tmp_path_factory.getbasetemp(), request.param
    # Workers have folders of their own within a common one.
    folder = (base.parent if hasattr(request.config, "workerinput") else base) / f"sampled_{mapping}"
    folder.mkdir(exist_ok=True)
    most_file = folder / "most.json"
    with FileLock(folder / "lock"):
        if not most_file.is_file():
            most_file.write_text(json.dumps(_sample(mapping, folder)))
    return mapping, folder / "pretrained", json.loads(most_file.read_text())


def _sample(mapping: str, folder: Path) -> dict[str, list[int]]:
    """Runs once until it is killed, and again to the end."""
    most: dict[str, list[int]] = {}
    for kill in ([str(_KILLED_AT)], []):
        output = folder / "memory.json"
        output.unlink(missing_ok=True)
        command = [sys.executable, str(_SCRIPT), mapping, str(folder), str(output), *kill]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert output.is_file(), done.stdout + done.stderr
        for moment, held in json.loads(output.read_text()).items():
            most[moment] = [max(pair) for pair in zip(held, most.get(moment, held), strict=True)]
    return most
