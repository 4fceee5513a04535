import matplotlib.image
import numpy as np
import pytest

from l2m_jax.curriculum import Difficulty, Exposure
from l2m_jax.reporting import figures


def line(phase, step, stage=1, **values):
    return {"phase": phase, "step": step, "stage": stage, "alpha": 0.1 * stage, "beta": 1.0, **values}


METRICS = [
    line("student", 2, loss=2.0, cross_entropy=3.0, divergence=1.0),
    line("student", 1, loss=3.0, cross_entropy=4.0, divergence=2.0),
    line("student", 3, 2, loss=1.0, cross_entropy=2.0, divergence=0.5),
    {"phase": "student", "step": 2, "stage": 1, "validation_rouge_l": 20.0},
    {"phase": "student", "step": 3, "stage": 2, "validation_rouge_l": 30.0},
    line("student:sft", 1, loss=2.0, cross_entropy=2.0, divergence=0.0),
    {"phase": "student:sft", "step": 1, "validation_rouge_l": 25.0},
]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, to look into."""
    found = []
    save = figures.Figure.savefig
    monkeypatch.setattr(
        figures.Figure, "savefig", lambda self, *a, **k: found.append(self) or save(self, *a, **k)
    )
    return found


def texts(axes):
    return [text.get_text() for text in axes.texts]


def is_picture(path):
    pixels = matplotlib.image.imread(path)
    return min(pixels.shape[:2]) > 200 and np.ptp(pixels[..., :3]) > 0.5


def test_lines_are_told_apart_and_sorted():
    assert [m["step"] for m in figures.steps_of(METRICS, "student")] == [1, 2, 3]
    assert [m["step"] for m in figures.validations_of(METRICS, "student")] == [2, 3]
    assert figures.stage_spans(figures.steps_of(METRICS, "student")) == [
        (1, 1, 2, 0.1, 1.0),
        (2, 3, 3, 0.2, 1.0),
    ]


def test_running_mean_by_hand():
    assert figures._running_mean(np.array([1.0, 3.0, 5.0, 1.0]), 2).tolist() == [1.0, 2.0, 4.0, 3.0]


def test_training_shows_losses_validations_and_stages(tmp_path, drawn):
    figures.training(tmp_path / "training.png", METRICS, label="l2m")
    upper, lower = drawn[0].axes
    assert {"loss", "cross-entropy", "divergence", "stage 1\nα 0.1\nβ 1", "stage 2\nα 0.2\nβ 1"} == set(
        texts(upper)
    )
    assert set(texts(lower)) == {"l2m", "sft"}
    curves = {tuple(curve.get_ydata()) for curve in lower.lines}
    assert {(20.0, 30.0), (25.0,)} <= curves
    boundary = [curve.get_xdata()[0] for curve in lower.lines if tuple(curve.get_ydata()) == (0, 1)]
    assert 2.5 in boundary
    assert is_picture(tmp_path / "training.png")
    assert [path.name for path in tmp_path.iterdir()] == ["training.png"]


def test_what_was_not_measured_is_not_drawn(tmp_path, drawn):
    figures.training(
        tmp_path / "training.png", [line("student", 1, loss=2.0, cross_entropy=2.0, divergence=0.0)]
    )
    (panel,) = drawn[0].axes
    assert set(texts(panel)) == {"loss", "cross-entropy"}


def test_names_of_close_lines_do_not_overlap(tmp_path, drawn):
    phases = ("student", "student:a", "student:b", "student:c")
    metrics = [line(phase, 1, loss=2.0) for phase in phases]
    metrics += [
        {"phase": phase, "step": 1, "validation_rouge_l": 50 + i / 1e3} for i, phase in enumerate(phases)
    ]
    metrics += [{"phase": "student", "step": 0, "validation_rouge_l": 0.0}]
    figures.training(tmp_path / "training.png", metrics)
    lower = drawn[0].axes[1]
    heights = np.array([text.get_window_extent().bounds[1::2] for text in lower.texts])
    order = heights[:, 0].argsort()
    assert (np.diff(heights[order, 0]) > 0.8 * heights[:, 1].max()).all()


def test_schedule_writes_each_stages_value(tmp_path, drawn):
    figures.schedule(tmp_path / "schedule.png", METRICS)
    alpha, beta = drawn[0].axes
    assert texts(alpha) == ["0.1", "0.2"] and texts(beta) == ["1", "1"]
    values, edges, _ = alpha.patches[0].get_data()
    assert values.tolist() == [0.1, 0.2] and edges.tolist() == [0, 2, 3]
    assert is_picture(tmp_path / "schedule.png")


def test_difficulty_shows_the_median_of_each_subset(tmp_path, drawn):
    graded = Difficulty.of("abcdef", np.array([0.9, 0.8, 0.5, 0.4, 0.0, 0.1]), np.arange(6.0), subsets=3)
    figures.difficulty(tmp_path / "difficulty.png", graded)
    rouge, cross_entropy = drawn[0].axes
    assert texts(rouge) == ["85", "45", "5"] and texts(cross_entropy) == ["0.5", "2.5", "4.5"]
    assert [tick.get_text() for tick in rouge.get_xticklabels()] == ["1", "2", "3"]
    assert is_picture(tmp_path / "difficulty.png")


def test_a_figure_that_fails_leaves_the_old_one(tmp_path):
    path = tmp_path / "schedule.png"
    path.write_bytes(b"old")
    with pytest.raises(TypeError):
        figures.schedule(path, [{"phase": "student", "step": 1, "loss": 1.0, "alpha": "x"}])
    assert path.read_bytes() == b"old"


def test_exposure_stacks_the_shares_of_each_span(tmp_path, drawn):
    stage, end, seen = np.array([1, 1, 2]), np.array([2, 4, 8]), np.array([[4, 0], [3, 1], [2, 6]])
    subsets = Exposure(("1", "2"), (4, 4), stage, end, seen)
    path = tmp_path / "exposure.png"
    figures.exposure(path, {"subset": subsets, "category": subsets})
    upper, lower = drawn[0].axes
    assert is_picture(path) and upper.get_ylim() == (0, 100) and lower.get_xlim() == (0, 8)
    lowest = upper.collections[0].get_paths()[0].vertices
    heights = {x: sorted(set(lowest[lowest[:, 0] == x, 1])) for x in (0, 2, 4, 8)}
    assert (
        heights[0] == [0, 100]
        and heights[2] == [0, 75, 100]
        and heights[4] == [0, 25, 75]
        and heights[8] == [0, 25]
    )
    assert [line.get_xdata()[0] for line in upper.lines] == [4]  # where the second stage begins
    assert [text.get_text() for text in upper.get_legend().get_texts()] == ["2", "1"]
