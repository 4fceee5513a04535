"""Show rows as a run will train on them.

    l2m data --config configs/chat_smollm2.yaml --show 3

Tokens that carry loss are green in a terminal, and between ⟦ and ⟧ in a file. It first prints how many rows
were kept in each part, and why others were dropped. Nothing is written.
"""

import argparse
from collections.abc import Sequence

from l2m_jax.cli.common import Parser, add_config, run


def _number(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError
    return value


_number.__name__ = "number of rows"


def _parser() -> Parser:
    parser = Parser("data", __doc__)
    add_config(parser)
    parser.add_argument(
        "--show", type=_number, default=3, metavar="N", help="the first N rows (default: %(default)s)"
    )
    parser.add_argument(
        "--part",
        choices=("train", "validation", "test"),
        default="train",
        help="the part to show (default: %(default)s)",
    )
    return parser


def _show(options: argparse.Namespace) -> None:
    from l2m_jax.cli import config_file

    config = config_file.read(options.config, options.overrides)

    from rich.text import Text

    from l2m_jax.progress import console
    from l2m_jax.run.preview import preview

    with preview(config) as found:
        console.print(f"  responses end with {found.end_of_response!r}", markup=False)
        for i in range(min(options.show, len(found.corpora[options.part]))):
            example = found.example(options.part, i)
            console.print(
                f"\n{options.part} row {example.id}: {example.length} tokens, {example.prompt_length} of them before the "
                f"last response, {example.targets} with loss",
                markup=False,
            )
            marked = Text()
            for text, loss in example.segments:
                if console.is_terminal:
                    marked.append(text, style="bold green" if loss else "")
                else:
                    marked.append(f"⟦{text}⟧" if loss else text)
            console.print(marked)


def main(arguments: Sequence[str] | None = None) -> None:
    run(_parser(), _show, arguments)


if __name__ == "__main__":
    main()
