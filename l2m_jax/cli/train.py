"""Distil a student.

    l2m train --config configs/quickstart.py --workdir runs/quickstart

Any setting can be changed with a flag such as --config.training.learning_rate=5e-5. Run the same command again to
resume.
"""

import argparse
from collections.abc import Sequence

from l2m_jax.cli.common import Parser, add_config, output_folder, run


def _parser() -> Parser:
    parser = Parser("train", __doc__)
    add_config(parser)
    parser.add_argument(
        "--workdir", type=output_folder, required=True, help="where everything that the run makes is kept"
    )
    parser.add_argument(
        "--shared",
        type=output_folder,
        help="where data, teacher, initial student, ranking and teacher store are kept, for several runs to share; "
        "by default the workdir",
    )
    return parser


def _train(options: argparse.Namespace) -> None:
    from l2m_jax.cli import config_file

    config = config_file.read(options.config, options.overrides)

    from l2m_jax import multihost, preemption
    from l2m_jax.run import pipeline

    multihost.start(config.devices)
    preemption.follow()
    pipeline.run(config, options.workdir, options.shared)


def main(arguments: Sequence[str] | None = None) -> None:
    run(_parser(), _train, arguments)


if __name__ == "__main__":
    main()
