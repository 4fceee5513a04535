import numpy as np
import pytest

from l2m_jax import methods
from l2m_jax.config import change, defaults, parse
from l2m_jax.curriculum import examples_seen
from l2m_jax.errors import InputError
from l2m_jax.sweep.presets import PRESETS, Row

CONFIG = parse(defaults())
# The settings that nothing before the student's training depends on.
OF_THE_STUDENT = (
    "overrides.",
    "training.",
    *(
        f"curriculum.{name}"
        for name in ("alpha", "beta", "subsets", "mix", "stratify", "loss_by", "open_by", "rerank")
    ),
    "curriculum.weight",
)


def every_row():
    return [
        pytest.param(row, id=f"{table}:{name}") for table in PRESETS for name, row in PRESETS[table].items()
    ]


@pytest.mark.parametrize("row", every_row())
def test_rows_name_methods_and_settings_of_the_students_training(row):
    assert change(CONFIG, {"method": row.method, **row.changes}).method in methods.METHODS
    assert all(setting.startswith(OF_THE_STUDENT) for setting in row.changes)


def test_table4_is_the_papers_sweep_over_alpha():
    found = [change(CONFIG, row.changes).curriculum.alpha for row in PRESETS["table4"].values()]
    assert found == [0.15, 0.30, 0.45, 0.60, 0.75, 0.90]


def stages_of(row: Row):
    config = change(CONFIG, {"method": row.method, **row.changes, "curriculum.epochs_per_stage": 2})
    # 10 examples, the highest number the easiest: subsets 9 8 7, 6 5 4, 3 2, 1 0.
    return methods.stages(methods.get(row.method), config.curriculum, np.arange(10)[::-1])


def test_figure3_trains_on_quarters_and_in_two_stages():
    rows = PRESETS["figure3"]
    (easy,), (hard,), (both,) = (stages_of(rows[f"{part}_skl"]) for part in ("easy", "hard", "both"))
    assert easy.indices.tolist() == [7, 8, 9] and hard.indices.tolist() == [0, 1]
    assert both.indices.tolist() == [0, 1, 7, 8, 9] and both.alpha == 0.5
    first, second = stages_of(rows["two_stage"])
    assert (first.alpha, first.beta, first.indices.tolist()) == (0.0, 1.0, [9, 8, 7])
    assert (second.alpha, second.beta, sorted(second.indices.tolist())) == (0.5, 1.0, [0, 1, 7, 8, 9])
    assert examples_seen([both]) == examples_seen([first, second]) == 2 * 3 + 2 * 5


def test_a_subset_that_there_is_not():
    with pytest.raises(InputError, match=r"config\.curriculum\.subsets: 5 is not one of the 4 subsets"):
        change(CONFIG, {"curriculum.subsets": (1, 5)})
