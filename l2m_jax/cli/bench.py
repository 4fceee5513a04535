"""Measure speed, memory and what a run survives; print tables, and write JSON.

l2m bench --suite loss,store --json bench.json
l2m bench --suite throughput --config configs/gpt2_small.py --json bench.json
"""

import argparse
import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from l2m_jax.cli.common import Parser, add_config, comma_separated, output_file, run, whole_numbers
from l2m_jax.errors import InputError

# A suite is a module of `l2m_jax.bench` with a function `run`, which returns a dictionary for JSON; its `rows` become a
# table. It gets those of the options below that it has parameters for.
SUITES = {
    "loss": "fused against plain loss: time and memory",
    "step": "the training step by its parts (--data, --tokenizer)",
    "store": "the teacher store: size, speed, and the effect of its dtype on the loss",
    "peers": "distillation against PyTorch and TRL (--data, --tokenizer, --peer-python)",
    "generate": "the decode engine against transformers (--data, --tokenizer, --peer-python)",
    "rouge": "Rouge-L against rouge-score (--data)",
    "throughput": "the training of a config on the devices at hand, and how it scales (--config, --devices, --steps)",
    "scale": "the preparation of a run over more and more rows: time, memory and disk (--data, --rows, --workdir)",
    "faults": "what a run survives: kills, preemptions, damaged files, a full disk (--workdir, --kills, --seed, --only)",
}


def _parser() -> Parser:
    suites = "\n".join(f"  {name:10} {what}" for name, what in SUITES.items())
    parser = Parser("bench", f"{__doc__}\nsuites:\n{suites}")
    parser.add_argument(
        "--suite", type=comma_separated, required=True, help="one or more, separated by commas"
    )
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="also write all figures to this file"
    )
    add_config(parser, required=False)
    parser.add_argument(
        "--devices",
        type=whole_numbers,
        metavar="N,M",
        help="numbers of devices to train on (default: 1, 2, 4, ...)",
    )
    parser.add_argument("--steps", type=int, help="timed updates (default: 20)")
    parser.add_argument("--repeats", type=int, help="timed runs of each figure, after one to warm up")
    parser.add_argument("--data", type=Path, help="JSON lines with instruction, input and output")
    parser.add_argument("--tokenizer", type=Path, help="folder of a Hugging Face tokenizer")
    parser.add_argument(
        "--workdir", type=Path, help="where the runs of a suite are kept; trials of faults resume there"
    )
    parser.add_argument(
        "--rows",
        type=whole_numbers,
        metavar="N,M",
        help="numbers of training rows (default: 10000,100000,1000000)",
    )
    parser.add_argument("--kills", type=int, help="the minimum number of processes to kill (default: 50)")
    parser.add_argument("--seed", type=int, help="seed of the instants and places of faults (default: 0)")
    parser.add_argument("--only", metavar="KIND", help="try only this kind of fault")
    parser.add_argument("--peer-python", help="a Python with the peers' packages (torch, transformers, trl)")
    return parser


def _prepared(name: str, options: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """A suite with its options, checked before any of them takes its time."""
    run = importlib.import_module(f"l2m_jax.bench.{name}").run
    parameters = inspect.signature(run).parameters
    given = {key: value for key, value in options.items() if value is not None and key in parameters}
    for key, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and key not in given:
            raise InputError(f"--{key.replace('_', '-')}: suite {name} needs it")
    return functools.partial(run, **given)


def _bench(options: argparse.Namespace) -> None:
    if unknown := [name for name in options.suite if name not in SUITES]:
        raise InputError(f"--suite {unknown[0]}: no such suite (known: {', '.join(SUITES)})")
    for name in ("repeats", "steps"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise InputError(f"--{name} {value}: must be at least 1")
    if options.overrides and options.config is None:
        raise InputError(f"--config.{options.overrides[0][0]}: needs a --config whose setting it changes")
    if options.config is not None:
        from l2m_jax.cli import config_file

        options.config = config_file.read(options.config, options.overrides)

    from l2m_jax import files
    from l2m_jax.bench import common
    from l2m_jax.progress import console

    suites = {name: _prepared(name, vars(options)) for name in options.suite}
    document: dict[str, Any] = {"machine": common.machine(), "suites": {}}
    common.show("machine", document["machine"])
    for name, suite in suites.items():
        result = suite()
        document["suites"][name] = result
        # The ratios of all suites are also at the top level, where scripts find them by name.
        document |= {key: value for key, value in result.items() if "ratio" in key}
        document["peak_rss_mb"] = common.peak_rss_bytes() / 1e6
        common.show(name, result)
        if options.json is not None:
            files.write_json(options.json, document)
    console.print(f"  peak resident memory: {document['peak_rss_mb']:,.0f} MB")


def main(arguments: Sequence[str] | None = None) -> None:
    run(_parser(), _bench, arguments)


if __name__ == "__main__":
    main()
