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
    # What separates the effects of the order, of the weight of easy examples, of β and of α.
    "controls": {
        **rows_of(
            ("sft", "kld", "kld_beta09", "skl", "l2m", "random_order", "hard_first", "shuffled_multiset")
        ),
        "skl_alpha_0.1": Row("skl", {"overrides.alpha": 0.1}),
        "l2m_falling_beta": Row("l2m", {"curriculum.beta_first": 1.0, "curriculum.beta_last": 0.7}),
        **rows_of(("l2m_no_beta", "l2m_beta09", "m2l")),
        "l2m_constant_alpha": Row("l2m", {"curriculum.alphas": (0.05,)}),
        "l2m_alpha_0": Row("l2m", {"curriculum.alpha": 0.0}),
    },
    # Changes to the curriculum that may beat it, beside what they have to beat.
    "recipes": {
        **rows_of(("l2m", "random_order", "kld_beta09")),
        "kld_beta09_temperature_2": Row("kld_beta09", {"overrides.temperature": 2.0}),
        "l2m_mix": Row("l2m", {"curriculum.mix": 0.25}),
        "l2m_by_category": Row("l2m", {"curriculum.stratify": "category"}),
        "l2m_by_length": Row("l2m", {"curriculum.stratify": "length"}),
        "l2m_by_sample": Row("l2m", {"curriculum.loss_by": "sample"}),
        "l2m_open_by_0.4": Row("l2m", {"curriculum.open_by": 0.4}),
        "l2m_temperature_2": Row("l2m", {"overrides.temperature": 2.0}),
        "l2m_reranked": Row("l2m", {"curriculum.rerank": True}),
        "l2m_paced": Row("l2m", {"curriculum.weight": "p(1-p)"}),
    },
}
