"""Upload a student with its model card to the Hugging Face hub.

    l2m push --model runs/quickstart/student --repo me/student --dry-run
    l2m push --model runs/quickstart/student --repo me/student --private

Log in with `hf auth login` first, or set HF_TOKEN. With --dry-run, nothing is sent: it lists the files and checks the
card's metadata without a network.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from l2m_jax.cli.common import Parser, run


def _parser() -> Parser:
    parser = Parser("push", __doc__)
    parser.add_argument(
        "--model", type=Path, required=True, help="a saved model, such as runs/quickstart/student"
    )
    parser.add_argument("--repo", required=True, metavar="OWNER/NAME", help="the repository on the hub")
    parser.add_argument("--private", action="store_true", help="create the repository as a private one")
    parser.add_argument(
        "--dry-run", action="store_true", help="show what would be uploaded, and send nothing"
    )
    return parser


def _push(options: argparse.Namespace) -> None:
    from l2m_jax.progress import console
    from l2m_jax.reporting import upload

    prepared = upload.prepare(options.model, options.repo)
    console.print(f"{prepared.repo}: {len(prepared.files)} files of {options.model}", markup=False)
    for name, size in prepared.files.items():
        console.print(f"  {size:>15,}  {name}", markup=False)
    console.print(
        f"  {sum(prepared.files.values()):>15,}  bytes in total\n\n{prepared.card.to_yaml()}", markup=False
    )
    if options.dry_run:
        console.print("\nnothing was sent (--dry-run)", markup=False)
        return
    console.print(f"\nuploaded: {upload.push(prepared, private=options.private)}", markup=False)


def main(arguments: Sequence[str] | None = None) -> None:
    run(_parser(), _push, arguments)


if __name__ == "__main__":
    main()
