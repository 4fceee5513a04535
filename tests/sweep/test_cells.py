"""The grid and how it is gone through, with a stand-in for the runs themselves."""

import json

import pytest

from l2m_jax.config import change, defaults, parse
from l2m_jax.data.tokenizer import train_tokenizer
from l2m_jax.errors import InputError
from l2m_jax.evaluation.protocol import Results, Score, SetResult
from l2m_jax.generation import SamplingRules
from l2m_jax.run import pipeline
from l2m_jax.sweep.cells import finished, grid, run
from l2m_jax.sweep.presets import Row, rows_of
from l2m_jax.sweep.table import write_table

CONFIG = change(parse(defaults()), {"data.source": "synthetic"})
ROWS = rows_of(("sft", "l2m"))


def results(*per_seed, title="test"):
    exact = Score.of([0.0] * len(per_seed))
    found = SetResult("test", title, 4, 0, False, Score.of(per_seed), exact, 3.0, {})
    return Results("model", (10, 20), SamplingRules(), (found,))


class Runs:
    """What the pipeline would be asked for, and answers by method and seed; `broken` maps a run to its error."""

    def __init__(self):
        self.prepared, self.ran, self.broken = [], [], {}

    def prepare(self, config, shared):
        self.prepared.append((config, shared))

    def run(self, config, workdir, shared):
        key = config.method, config.student_seed
        self.ran.append(key)
        if key in self.broken:
            raise self.broken[key]
        value = {"sft": 30.0, "l2m": 50.0}[config.method] + config.student_seed
        return {
            "teacher": results(40.0, 42.0),
            "student before": results(10.0, 10.0),
            config.method: results(value - 1, value + 1),
        }


@pytest.fixture
def runs(monkeypatch):
    found = Runs()
    monkeypatch.setattr(pipeline, "run", found.run)
    monkeypatch.setattr(pipeline, "prepare", found.prepare)
    monkeypatch.setattr(pipeline, "check", lambda config, shared: None)
    return found


def test_the_grid_goes_seed_by_seed_and_varies_the_students_seed_alone():
    rows = {"plain": Row("kld"), "steep": Row("l2m", {"curriculum.alpha": 0.9})}
    cells = grid(change(CONFIG, {"baselines": ("sft",)}), rows, [3, 0])
    assert [cell.name for cell in cells] == ["plain/seed3", "steep/seed3", "plain/seed0", "steep/seed0"]
    assert cells[3].config == change(
        CONFIG, {"method": "l2m", "curriculum.alpha": 0.9, "student.seed": 0, "baselines": ()}
    )
    assert {cell.config.seed for cell in cells} == {CONFIG.seed}


def test_unknown_methods_and_odd_seeds_are_refused():
    with pytest.raises(InputError, match=r"no method 'l2n' .*did you mean 'l2m'"):
        grid(CONFIG, rows_of(["l2n"]), [0])
    with pytest.raises(InputError, match="training seed -1"):
        grid(CONFIG, ROWS, [-1])


def test_a_second_call_runs_nothing_nor_do_other_devices(tmp_path, runs):
    cells = grid(CONFIG, ROWS, [0, 1])
    assert run(cells, tmp_path) == {}
    assert runs.ran == [("sft", 0), ("l2m", 0), ("sft", 1), ("l2m", 1)]
    (config, shared), *others = runs.prepared
    assert not others and shared == tmp_path / "shared"
    assert (config.method, config.baselines, config.student.seed) == ("sft", ("l2m",), -1)
    assert run(cells, tmp_path) == {} and len(runs.ran) == 4 and len(runs.prepared) == 1
    other_devices = grid(change(CONFIG, {"devices.count": 2, "chunk_size": 64}), ROWS, [0, 1])
    assert all(finished(cell, tmp_path) is not None for cell in other_devices)


def test_a_failing_cell_is_reported_and_does_not_stop_the_others(tmp_path, runs):
    cells = grid(CONFIG, ROWS, [0, 1])
    runs.broken = {("sft", 0): InputError("config.x: bad"), ("l2m", 1): MemoryError("full")}
    failures = run(cells, tmp_path)
    assert failures == {"sft/seed0": "config.x: bad", "l2m/seed1": "MemoryError('full')"}
    assert "Missing, 2 of 4 runs: sft/seed0, l2m/seed1." in write_table(cells, tmp_path)
    runs.broken, runs.ran = {}, []
    assert run(cells, tmp_path) == {}
    assert runs.ran == [("sft", 0), ("l2m", 1)]
    assert "Missing" not in write_table(cells, tmp_path)


def test_a_world_that_cannot_be_prepared_is_tried_once_and_does_not_stop_the_others(
    tmp_path, runs, monkeypatch
):
    cells = [
        cell._replace(run=f"world{world}", config=change(cell.config, {"world": world}))
        for world in (1, 2)
        for cell in grid(CONFIG, ROWS, [0])
    ]
    prepared = []

    def prepare(config, shared):
        prepared.append(config.world)
        if config.world == 1:
            raise InputError("config.x: bad")

    monkeypatch.setattr(pipeline, "prepare", prepare)
    failures = run(cells, tmp_path)
    assert failures == {"sft/world1": "config.x: bad", "l2m/world1": "config.x: bad"}
    assert prepared == [1, 2] and [method for method, _ in runs.ran] == ["sft", "l2m"]


def test_an_interruption_stops_the_sweep_and_leaves_the_cell_unfinished(tmp_path, runs):
    cells = grid(CONFIG, ROWS, [0])
    runs.broken = {("l2m", 0): KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        run(cells, tmp_path)
    assert [finished(cell, tmp_path) is not None for cell in cells] == [True, False]


def test_a_task_runs_its_cell_alone(tmp_path, runs):
    cells = grid(CONFIG, ROWS, [0, 1])
    assert run(cells, tmp_path, 3) == {}
    assert runs.ran == [("l2m", 1)]
    # The store is needed by another cell than this task's, and all share what the first to come makes.
    assert runs.prepared[0][0].baselines == ("l2m",)
    with pytest.raises(InputError, match="numbered from 0 to 3"):
        run(cells, tmp_path, 4)


def test_the_table_takes_runs_as_values_and_single_models_over_their_sampling_seeds(tmp_path, runs):
    cells = grid(CONFIG, ROWS, [0, 2])
    with pytest.raises(InputError, match="none of the 4 runs"):
        write_table(cells, tmp_path)
    run(cells, tmp_path)
    lines = write_table(cells, tmp_path).splitlines()
    # Deviations by hand: (40, 42), (10, 10), (30, 32), (50, 52).
    assert lines[2:6] == [
        "| teacher | 41.0 ± 1.4 |",
        "| student before | 10.0 ± 0.0 |",
        "| sft | 31.0 ± 1.4 |",
        r"| l2m | **51.0 ± 1.4**\* |",
    ]
    assert (tmp_path / "table.md").read_text().splitlines() == lines
    assert r"l2m & \textbf{51.0 $\pm$ 1.4}$^{*}$" in (tmp_path / "table.tex").read_text()
    assert (tmp_path / "table.csv").read_text().splitlines()[4].startswith("l2m,51.0,1.41421")


def test_a_single_training_seed_is_shown_over_its_sampling_seeds(tmp_path, runs):
    cells = grid(CONFIG, ROWS, [0])
    run(cells, tmp_path)
    text = write_table(cells, tmp_path)
    assert "| sft | 30.0 ± 1.4 |" in text and "over 2 sampling seeds of one run" in text


def test_a_row_without_a_finished_run_is_dashes(tmp_path, runs):
    cells = grid(CONFIG, ROWS, [0, 1])
    run(cells, tmp_path, 1)
    text = write_table(cells, tmp_path)
    assert "| sft | – |" in text and "Missing, 3 of 4 runs" in text


def test_the_result_says_how_long_it_took(tmp_path, runs):
    cells = grid(CONFIG, ROWS, [0])
    run(cells, tmp_path, 0)
    assert json.loads((tmp_path / "sft/seed0/result.json").read_text())["seconds"] >= 0


def test_a_cell_of_other_data_is_not_finished(tmp_path, runs):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "say it", "output": "it"}\n')
    train_tokenizer(["say it"], 300).save_pretrained(tmp_path / "tokenizer")
    given = {"data.source": "files", "data.train": str(rows), "data.tokenizer": str(tmp_path / "tokenizer")}
    cells = grid(change(CONFIG, given), ROWS, [0])
    run(cells, tmp_path)
    assert all(finished(cell, tmp_path) for cell in cells)
    rows.write_text('{"instruction": "say that", "output": "that"}\n')
    assert not any(finished(cell, tmp_path) for cell in cells)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"made_from": 1}', b"\xff\x00"])
def test_a_damaged_result_is_made_again(runs, tmp_path, content):
    cells = grid(CONFIG, ROWS, [0])
    run(cells, tmp_path)
    (tmp_path / cells[0].name / "result.json").write_bytes(content)
    assert [finished(cell, tmp_path) is None for cell in cells] == [True, False]
    run(cells, tmp_path)
    assert runs.ran == [("sft", 0), ("l2m", 0), ("sft", 0)]
    assert finished(cells[0], tmp_path) is not None
