"""Rows × seeds, and the table: `python -m l2m_jax.sweep --config FILE --methods sft,l2m --seeds 0,1 --workdir W`.

Settings are changed for all runs as in train.py (`--config.training.learning_rate=5e-5`). The same command again
goes on where the first one stopped. As a SLURM array, one task a run:

    python -m l2m_jax.sweep ... --list        # the runs and their numbers
    python -m l2m_jax.sweep ... --prepare     # optional: what they share, before the array takes its devices
    python -m l2m_jax.sweep ...               # in a job of the array: the run of $SLURM_ARRAY_TASK_ID
    python -m l2m_jax.sweep ... --table       # the table from what is finished
"""

import os
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from l2m_jax.cli.common import parse_flags, refuse, whole_numbers
from l2m_jax.errors import InputError
from l2m_jax.sweep.presets import PRESETS, rows_of

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file of configs/, as in configs/gpt2_small.py:minillm"
)
_METHODS = flags.DEFINE_list("methods", None, "Names of l2m_jax/methods.py, one row each")
_PRESET = flags.DEFINE_enum("preset", None, list(PRESETS), "In place of --methods: a table of the paper")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Of the students' training")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where all runs and the table are kept", required=True)
_TASK = flags.DEFINE_integer("task", None, "Only the run of this number; by default $SLURM_ARRAY_TASK_ID")
_LIST = flags.DEFINE_bool("list", False, "Only list the runs with their numbers")
_PREPARE = flags.DEFINE_bool("prepare", False, "Only make what the runs share")
_TABLE = flags.DEFINE_bool("table", False, "Only make the table from what is finished")
flags.mark_flag_as_required("config")
flags.mark_flags_as_mutual_exclusive(["methods", "preset"], required=True)
flags.mark_bool_flags_as_mutual_exclusive(["list", "prepare", "table"])


def _task() -> int | None:
    if _TASK.value is not None:
        return _TASK.value
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    return None if task is None else int(task)


def _sweep() -> None:
    from l2m_jax import config
    from l2m_jax.progress import console
    from l2m_jax.sweep.cells import finished, grid, prepare, run
    from l2m_jax.sweep.table import write_table

    workdir = Path(_WORKDIR.value)
    rows = PRESETS[_PRESET.value] if _PRESET.value else rows_of(_METHODS.value or [])
    cells = grid(config.parse(_CONFIG.value), rows, whole_numbers("seeds", _SEEDS.value))
    if _LIST.value:
        for number, cell in enumerate(cells):
            console.print(f"{number:4}  {cell.name}{'  finished' * (finished(cell, workdir) is not None)}")
        return
    if _PREPARE.value:
        prepare(cells, workdir)
        return
    failures, task = {}, _task()
    if not _TABLE.value:
        failures = run(cells, workdir, task)
    if _TABLE.value or (task is None and len(failures) < len(cells)):
        console.print(write_table(cells, workdir), markup=False)
    if failures:
        listed = "".join(f"\n  {name}: {what}" for name, what in failures.items())
        sys.exit(f"error: {len(failures)} of the runs failed:{listed}")


def _main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected argument {arguments[1]!r}")
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every checkpoint otherwise
    try:
        _sweep()
    except InputError as error:
        refuse(str(error))
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on from the last checkpoint")


def main() -> None:
    app.run(_main, flags_parser=parse_flags)


if __name__ == "__main__":
    main()
