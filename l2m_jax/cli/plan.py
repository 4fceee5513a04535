"""Estimate what a run needs on given hardware, without that hardware, weights or data.

    l2m plan --config configs/gpt2_small.py --target a100_80gb --devices 4 --json plan.json

Any setting can be changed with a flag such as --config.devices.mapping=fsdp. The exit status is 0 whether or not
the run fits: `fits` in the output says so.
"""

import argparse
import os
from collections.abc import Sequence

from l2m_jax.cli.common import Parser, add_config, output_file, run
from l2m_jax.errors import InputError

_MOST_DEVICES = 8192  # of the largest TPU slice


def _parser() -> Parser:
    parser = Parser("plan", __doc__)
    add_config(parser)
    parser.add_argument(
        "--target",
        default="a100_80gb",
        help="the device: a100_80gb, h100_80gb, a TPU such as v5e:4x4, or cpu (default: %(default)s)",
    )
    parser.add_argument("--devices", type=int, default=1, help="the number of devices (default: %(default)s)")
    parser.add_argument(
        "--programs", action="store_true", help="also show what each compiled program is made of"
    )
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="also write all figures to this file"
    )
    return parser


def _plan(options: argparse.Namespace) -> None:
    # Read when jax starts: nothing here runs on an accelerator, and compiler warnings about missing ones help nobody.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

    if not 1 <= options.devices <= _MOST_DEVICES:
        raise InputError(f"--devices: {options.devices} must be between 1 and {_MOST_DEVICES}")

    from l2m_jax.cli import config_file

    config = config_file.read(options.config, options.overrides)

    import jax

    from l2m_jax import files
    from l2m_jax.plan import plan, report

    if options.target == "cpu":
        jax.config.update("jax_num_cpu_devices", max(1, options.devices))
    found = plan.make(config, options.target, options.devices)
    tried = [] if found.fits else plan.what_would_fit(config, found)
    document = {"config": options.config} | plan.document(found, tried)
    if options.json is not None:
        files.write_json(options.json, document)
    report.show(document)
    if options.programs:
        report.show_programs(document)


def main(arguments: Sequence[str] | None = None) -> None:
    run(_parser(), _plan, arguments)


if __name__ == "__main__":
    main()
