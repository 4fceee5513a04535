"""Train methods over several seeds, and make the table.

    l2m sweep --config configs/gpt2_small.py --methods sft,l2m --seeds 0,1 --workdir runs/sweep

Any setting can be changed for all runs with a flag such as --config.training.learning_rate=5e-5. Run the same
command again to resume. As a SLURM array, with one task per run:

    l2m sweep ... --list        # the runs and their numbers
    l2m sweep ... --prepare     # optional: build what the runs share before the array takes its devices
    l2m sweep ...               # in a job of the array: the run numbered $SLURM_ARRAY_TASK_ID
    l2m sweep ... --table       # the table of the finished runs
"""

import argparse
import os
import sys
from collections.abc import Sequence

from l2m_jax.cli.common import Parser, add_config, comma_separated, output_folder, run, whole_numbers
from l2m_jax.errors import InputError
from l2m_jax.sweep.presets import PRESETS, rows_of


def _parser() -> Parser:
    parser = Parser("sweep", __doc__)
    add_config(parser)
    rows = parser.add_mutually_exclusive_group(required=True)
    rows.add_argument(
        "--methods", type=comma_separated, help="methods by name, such as sft,l2m: one row each"
    )
    rows.add_argument("--preset", choices=PRESETS, help="instead of --methods: a table of the paper")
    parser.add_argument(
        "--seeds",
        type=whole_numbers,
        default=[0, 1, 2],
        help="training seeds of the students (default: 0,1,2)",
    )
    parser.add_argument(
        "--workdir", type=output_folder, required=True, help="where all runs and the table are kept"
    )
    parser.add_argument(
        "--task", type=int, help="run only the run of this number (default: $SLURM_ARRAY_TASK_ID, if set)"
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--list", action="store_true", help="only list the runs with their numbers")
    action.add_argument("--prepare", action="store_true", help="only build what the runs share")
    action.add_argument("--table", action="store_true", help="only make the table of the finished runs")
    return parser


def _task(given: int | None) -> int | None:
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    if given is not None or task is None:
        return given
    try:
        return int(task)
    except ValueError:
        raise InputError(
            f"$SLURM_ARRAY_TASK_ID: {task!r} is not a whole number; unset it, or choose a run with --task"
        ) from None


def _sweep(options: argparse.Namespace) -> None:
    task = _task(options.task)

    from l2m_jax.cli import config_file

    config = config_file.read(options.config, options.overrides)

    from l2m_jax.progress import console
    from l2m_jax.sweep.cells import finished, grid, prepare, run
    from l2m_jax.sweep.table import write_table

    rows = PRESETS[options.preset] if options.preset else rows_of(options.methods)
    cells, workdir = grid(config, rows, options.seeds), options.workdir
    if options.list:
        for number, cell in enumerate(cells):
            console.print(f"{number:4}  {cell.name}{'  finished' * (finished(cell, workdir) is not None)}")
        return
    if options.prepare:
        prepare(cells, workdir)
        return
    failures = {} if options.table else run(cells, workdir, task)
    if options.table or (task is None and len(failures) < len(cells)):
        console.print(write_table(cells, workdir), markup=False)
    if failures:
        listed = "".join(f"\n  {name}: {what}" for name, what in failures.items())
        sys.exit(f"error: {len(failures)} of the runs failed:{listed}")


def main(arguments: Sequence[str] | None = None) -> None:
    run(_parser(), _sweep, arguments)


if __name__ == "__main__":
    main()
