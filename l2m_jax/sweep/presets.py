"""The paper's tables as sweeps.

Run each preset once for each pair of teacher and student, with the config of the pair:
`l2m sweep --config configs/gpt2_small.py --preset table1 --workdir runs/table1_gpt2_small`.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple


class Row(NamedTuple):
    """
    Attributes:
        method: its name in `methods.METHODS`.
        changes: settings of this row, such as `{"curriculum.alpha": 0.3}`. Only those of the student's training can
            differ, because the rows share everything before it.
    """

    method: str
    changes: dict[str, Any] = {}  # noqa: RUF012


def rows_of(methods: Iterable[str]) -> dict[str, Row]:
    """One row for each method, unchanged."""
    return {name: Row(name) for name in methods}


_PARTS = {"easy": (1,), "hard": (4,), "both": (1, 4)}
_LOSSES = {
    "kld": Row("kld"),
    "skl": Row("skl"),
    "kld_on_policy": Row("kld", {"overrides.policy": "on"}),
    "skl_on_policy": Row("skl_on_policy"),
}

PRESETS: dict[str, dict[str, Row]] = {
    "table1": rows_of(("sft", "seqkd", "kld", "skl", "skl_on_policy", "l2m")),
    "table2": rows_of(("skl", "l2m_no_beta", "l2m")),
    "table3": rows_of(("skl", "m2l", "l2m")),
    "table4": {
        f"l2m_alpha_{alpha:.2f}": Row("l2m", {"curriculum.alpha": alpha})
        for alpha in (0.15, 0.30, 0.45, 0.60, 0.75, 0.90)
    },
    "table5": rows_of(("l2m", "distillm2", "distillm2_on_policy")),
    # The easiest and the hardest quarter; and two stages: KLD on the easiest, then SKL on both.
    "figure3": {
        f"{part}_{loss}": Row(row.method, {"curriculum.subsets": subsets, **row.changes})
        for part, subsets in _PARTS.items()
        for loss, row in _LOSSES.items()
    }
    | {"two_stage": Row("l2m_no_beta", {"curriculum.subsets": (1, 4), "curriculum.alpha": 0.5})},
}
