"""Train methods over several seeds or worlds, and make the table.

    l2m sweep --config configs/gpt2_small.py --methods sft,l2m --seeds 0,1 --workdir runs/sweep
    l2m sweep --config configs/quickstart.py:lab --claims configs/claims/experiment_s.yaml --worlds 8 --workdir runs/s

A seed redraws the student's training; a world also redraws its training rows, initial weights and ranking. A file of
--claims names the arms and, before the runs, the contrasts that are then tested over the worlds. With --grid, each arm first
chooses a setting by validation in a world of its own.

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
from pathlib import Path

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
    rows.add_argument(
        "--preset", choices=PRESETS, help="instead of --methods: a table of the paper, controls or recipes"
    )
    rows.add_argument(
        "--claims",
        type=Path,
        metavar="FILE",
        help="instead of --methods: arms, and contrasts between them (YAML)",
    )
    runs = parser.add_mutually_exclusive_group()
    runs.add_argument(
        "--seeds",
        type=whole_numbers,
        default=[0, 1, 2],
        help="training seeds of the students (default: 0,1,2)",
    )
    runs.add_argument("--worlds", type=int, metavar="N", help="instead of --seeds: the number of worlds")
    parser.add_argument(
        "--redraw-teacher",
        action="store_true",
        help="with --worlds: a teacher for each world, from its training rows",
    )
    parser.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="NAME=A,B",
        help="with --worlds: values of a setting, of which each row chooses one by validation in world 0",
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


def _refuse_without_worlds(options: argparse.Namespace) -> None:
    for flag in ("claims", "redraw_teacher", "grid"):
        if options.worlds is None and getattr(options, flag):
            raise InputError(
                f"--{flag.replace('_', '-')}: needs --worlds, as in --worlds 8; seeds redraw the training alone"
            )


def _sweep(options: argparse.Namespace) -> None:
    task = _task(options.task)
    _refuse_without_worlds(options)

    from l2m_jax.cli import claims_file, config_file

    config = config_file.read(options.config, options.overrides)
    claims = claims_file.read(options.claims) if options.claims else None

    from l2m_jax import multihost
    from l2m_jax.progress import console
    from l2m_jax.sweep.cells import finished, prepare
    from l2m_jax.sweep.sweep import Sweep

    if claims is not None:
        rows = claims.arms
    else:
        rows = PRESETS[options.preset] if options.preset else rows_of(options.methods)
    sweep = Sweep(
        config,
        rows,
        options.workdir,
        seeds=options.seeds,
        worlds=options.worlds,
        redraw_teacher=options.redraw_teacher,
        grid=claims_file.grid(options.grid),
        claims=claims,
    )
    if options.list:
        for number, cell in enumerate(sweep.cells()):
            done = finished(cell, options.workdir) is not None
            console.print(f"{number:4}  {cell.name}{'  finished' * done}")
        return
    multihost.use_deterministic_kernels(config.devices)
    if options.prepare:
        prepare(sweep.cells(), options.workdir)
        return
    failures = {} if options.table else sweep.run(task)
    if options.table or (task is None and sweep.has_scores()):
        console.print(sweep.report(), markup=False)
    if failures:
        listed = "".join(f"\n  {name}: {what}" for name, what in failures.items())
        sys.exit(f"error: {len(failures)} of the runs failed:{listed}")


def main(arguments: Sequence[str] | None = None) -> None:
    run(_parser(), _sweep, arguments)


if __name__ == "__main__":
    main()
