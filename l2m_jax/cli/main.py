"""The console command `l2m`; also `python -m l2m_jax.cli.main`."""

import importlib
import sys
from collections.abc import Sequence

from l2m_jax import __version__
from l2m_jax.cli.common import Parser, use_huge_pages

COMMANDS = {
    "train": "distil a student",
    "eval": "score a model folder",
    "data": "show rows as a run will train on them",
    "sweep": "train methods over seeds or worlds, and make tables and verdicts",
    "store": "make, import or check a teacher store ahead of training",
    "plan": "estimate memory and time of a run on hardware you don't have",
    "push": "upload a student with its model card to the hub",
    "compare": "compare a run with another one, or with a published log",
    "bench": "measure speed, memory and what a run survives",
}


def main(arguments: Sequence[str] | None = None) -> None:
    if arguments is None:
        use_huge_pages()
    listed = "\n".join(f"  {name:7} {what}" for name, what in COMMANDS.items())
    parser = Parser("", f"Staged knowledge distillation of language models.\n\ncommands:\n{listed}")
    parser.usage = "l2m COMMAND [FLAGS]"
    parser.add_argument(
        "command", choices=COMMANDS, metavar="COMMAND", help="l2m COMMAND --help lists its flags"
    )
    parser.add_argument("--version", action="version", version=f"l2m_jax {__version__}")
    given = list(sys.argv[1:] if arguments is None else arguments)
    # The command parses its own flags, so that only its own modules are imported.
    options = parser.parse_args(given[:1])
    importlib.import_module(f"l2m_jax.cli.{options.command}").main(given[1:])


if __name__ == "__main__":
    main()
