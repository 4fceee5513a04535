"""What the suite observes, of a process that plays a run; and its arithmetic."""

import json
import subprocess
import sys

import pytest

from l2m_jax.bench import scale
from l2m_jax.bench.scale import _Phase
from l2m_jax.data.rows import Row
from l2m_jax.data.sources import read_file

# Holds 100 MB in its first phase and 300 MB in its second, then writes the student's first update and waits.
_RUN = """
import sys, time
print("data " + "─" * 40, flush=True)
held = b"x" * 100_000_000
time.sleep(0.3)
print("teacher store " + "─" * 40, flush=True)
more = b"x" * 200_000_000
time.sleep(0.3)
print("student " + "─" * 40, flush=True)
with open(sys.argv[1], "a") as file:
    file.write('{"phase": "student", "step": 1}' + chr(10))
time.sleep(600)
"""


def test_time_and_memory_belong_to_the_phase(tmp_path):
    for _ in range(2):  # the second time, the line of the first is there already
        found = scale._observe([sys.executable, "-c", _RUN, str(tmp_path / "metrics.jsonl")], tmp_path)
        assert list(found) == ["start", "data", "teacher store", "student"]
        assert 100e6 < found["data"].memory < 200e6 < 300e6 < found["teacher store"].memory < 400e6
        assert found["data"].seconds > 0.2 and found["teacher store"].seconds > 0.2


def test_a_run_that_ends_early_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="the run ended with 3: no rows"):
        scale._observe([sys.executable, "-c", "print('no rows'); raise SystemExit(3)"], tmp_path)


def test_memory_counts_the_processes_that_a_process_starts():
    held = "import time; held = b'x' * 100_000_000; print(flush=True); time.sleep(600)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {held!r}])"
    with subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        children = scale._children(process.pid)
        assert len(children) == 1 and scale._memory(process.pid) > 100e6 > scale._memory(children[0]) - 50e6
        subprocess.run(["kill", "-9", *map(str, children)], check=True)


def test_rows_are_all_different(tmp_path):
    given = [Row("a", "say", "", ("yes",)), Row("b", "add", "1 1", ("2",))]
    scale._write_rows(given, tmp_path / "rows.jsonl", 5)
    found = list(read_file(tmp_path / "rows.jsonl"))
    assert len({row.id for row in found}) == len({row.instruction for row in found}) == 5
    assert [row.references for row in found] == [("yes",), ("2",), ("yes",), ("2",), ("yes",)]


def test_growth_is_that_of_the_worst_phase():
    line = {n: _Phase(seconds=2 + n / 1000, memory=300 + 4 * n, bytes=n) for n in (1000, 10_000)}
    steep = {n: _Phase(seconds=n**2, memory=100, bytes=0) for n in line}
    observed = {n: dict.fromkeys(scale._GROWING, line[n]) | {"difficulty": steep[n]} for n in line}
    found = scale._ratios(observed)
    assert found == pytest.approx({"memory_ratio": 40_300 / 4300, "time_ratio": 10})
    assert scale._fit(line) == {"seconds": "2 s + 0.001 s a row", "memory": "300 B + 4 B a row"}
    json.dumps(found)
