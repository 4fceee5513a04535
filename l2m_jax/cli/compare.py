"""Compare a run with another run, or with a reference such as a published log.

    l2m compare runs/pocl configs/references/pocl_gpt2_120m.json
    l2m compare runs/first runs/second --rouge-l 0.5

The validations at the end of each stage and the scores of the main student are compared, as far as both sides have
them. The exit status is 0 if all of them agree within the tolerance, and 1 if not.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from l2m_jax.cli.common import Parser, run


def _tolerance(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError
    return value


_tolerance.__name__ = "tolerance of at least 0"


def _parser() -> Parser:
    parser = Parser("compare", __doc__)
    parser.add_argument("first", type=Path, metavar="A", help="the workdir of a run, or a reference file")
    parser.add_argument("second", type=Path, metavar="B", help="another one")
    parser.add_argument(
        "--rouge-l",
        type=_tolerance,
        default=1.5,
        metavar="POINTS",
        help="the largest difference in Rouge-L × 100 (default: %(default)s)",
    )
    parser.add_argument(
        "--nats",
        type=_tolerance,
        default=0.2,
        metavar="NATS",
        help="the largest difference of losses and entropies a token (default: %(default)s)",
    )
    return parser


def _compare(options: argparse.Namespace) -> None:
    from l2m_jax.reporting import compare

    (first, one), (second, other) = compare.read(options.first), compare.read(options.second)
    tolerance = compare.Tolerance(options.rouge_l, options.nats)
    found = compare.differences(one, other, tolerance)
    print(compare.table(found, (first, second)), end="")
    if not all(difference.within for difference in found):
        sys.exit(1)


def main(arguments: Sequence[str] | None = None) -> None:
    run(_parser(), _compare, arguments)


if __name__ == "__main__":
    main()
