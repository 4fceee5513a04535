"""Make the teacher store ahead of training, import what another tool has written of the teacher, or check a store.

    l2m store build --config configs/gpt2_small.py --workdir runs/l2m
    l2m store rows --config configs/gpt2_small.py --workdir runs/l2m
    l2m store import --config configs/gpt2_small.py --workdir runs/l2m --from outputs --format vllm
    l2m store check --folder runs/l2m/teacher_store

`build` makes what `l2m train` with the same flags would make up to the store, and nothing else: rows, teacher, store. Run
it again to resume. `rows` makes the rows alone, for another tool to run the teacher on, and `import` fills the store from
its files instead of running the teacher. `check` reads every shard and compares it with its checksum.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from l2m_jax.cli.common import Parser, add_config, output_folder, run
from l2m_jax.errors import InputError

_NEEDED = {
    "build": ("config", "workdir"),
    "rows": ("config", "workdir"),
    "import": ("config", "workdir", "from"),
    "check": ("folder",),
}
_FORMATS = ("rows", "vllm", "distillkit")


def _parser() -> Parser:
    parser = Parser("store", __doc__)
    parser.add_argument("action", choices=_NEEDED, metavar="|".join(_NEEDED))
    add_config(parser, required=False)
    parser.add_argument(
        "--workdir", type=output_folder, help="work directory of the run that will read the store"
    )
    parser.add_argument("--shared", type=output_folder, help="the run's --shared (default: the workdir)")
    parser.add_argument("--from", type=Path, metavar="FOLDER", help="the outputs to import")
    parser.add_argument(
        "--format",
        choices=_FORMATS,
        default="rows",
        help="of the outputs: the project's own layout, vLLM's extract_hidden_states, or DistillKit's (default: %(default)s)",
    )
    parser.add_argument("--folder", type=Path, help="the store to check")
    return parser


def _store(options: argparse.Namespace) -> None:
    for name in _NEEDED[options.action]:
        if getattr(options, name) is None:
            raise InputError(f"--{name}: l2m store {options.action} needs it")
    if options.action == "check":
        _check(options.folder)
    else:
        _make(options)


def _make(options: argparse.Namespace) -> None:
    from l2m_jax.cli import config_file

    config = config_file.read(options.config, options.overrides)

    from l2m_jax import multihost, preemption
    from l2m_jax.progress import console
    from l2m_jax.run import pipeline
    from l2m_jax.training.distillkit import DistillKitFiles
    from l2m_jax.training.outputs import RowFiles, VllmFiles

    multihost.start(config.devices)
    preemption.follow()
    if options.action == "rows":
        console.print(
            f"{pipeline.check(config, options.shared or options.workdir)}: the training rows", markup=False
        )
        return
    outputs, folder = None, getattr(options, "from")
    if options.action == "import":
        if not folder.is_dir():
            raise InputError(
                f"--from: there is no folder '{folder}'; name the one with the teacher's outputs"
            )
        read_by = dict(zip(_FORMATS, (RowFiles, VllmFiles, DistillKitFiles), strict=True))
        outputs = read_by[options.format](folder)
    pipeline.build_store(config, options.workdir, options.shared, outputs)


def _check(folder: Path) -> None:
    from l2m_jax.progress import console
    from l2m_jax.training import shards

    problems = shards.check(folder)
    for problem in problems:
        console.print(problem, markup=False)
    if problems:
        sys.exit(1)
    console.print(f"{folder}: all shards are as they were written", markup=False)


def main(arguments: Sequence[str] | None = None) -> None:
    run(_parser(), _store, arguments)


if __name__ == "__main__":
    main()
