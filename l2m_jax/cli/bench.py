"""`python -m l2m_jax.bench --suite loss,store`: measures, prints tables, and writes JSON.

A suite is a module with a function `run` that returns a dictionary for JSON; its `rows` become a table. It gets
those of the options below that it has parameters for.
"""

import argparse
import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

from l2m_jax import files
from l2m_jax.bench import common
from l2m_jax.errors import InputError
from l2m_jax.progress import console

SUITES = {
    "loss": "fused against plain loss: time and memory",
    "step": "the training step by its parts (--data, --tokenizer)",
    "store": "the teacher store: size, speed, and what its dtype does to the loss",
    "peers": "distillation against PyTorch and TRL (--data, --tokenizer, --peer-python)",
    "generate": "the decode engine against transformers (--data, --tokenizer, --peer-python)",
    "rouge": "Rouge-L against rouge-score (--data)",
}


def _options(arguments: list[str] | None) -> argparse.Namespace:
    suites = "\n".join(f"  {name:10} {what}" for name, what in SUITES.items())
    parser = argparse.ArgumentParser(
        prog="python -m l2m_jax.bench",
        description=f"Measures throughput and memory. Suites:\n{suites}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--suite", required=True, help="one or more, with commas in between")
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    parser.add_argument("--repeats", type=int, help="timed runs of each figure, after one to warm up")
    parser.add_argument("--data", type=Path, help="JSON lines with instruction, input and output")
    parser.add_argument("--tokenizer", type=Path, help="folder of a Hugging Face tokenizer")
    parser.add_argument("--peer-python", help="a Python with the peers' packages (torch, transformers, trl)")
    return parser.parse_args(arguments)


def _run(name: str, options: dict[str, Any]) -> dict[str, Any]:
    run = importlib.import_module(f"l2m_jax.bench.{name}").run
    parameters = inspect.signature(run).parameters
    given = {key: value for key, value in options.items() if value is not None and key in parameters}
    for key, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and key not in given:
            raise InputError(f"--{key.replace('_', '-')}: suite {name} needs it")
    return run(**given)


def main(arguments: list[str] | None = None) -> None:
    options = vars(_options(arguments))
    names, file = options.pop("suite").split(","), options.pop("json")
    if unknown := [name for name in names if name not in SUITES]:
        raise InputError(f"--suite {unknown[0]}: no such suite (there are {', '.join(SUITES)})")
    if options["repeats"] is not None and options["repeats"] < 1:
        raise InputError(f"--repeats {options['repeats']}: at least 1")
    document: dict[str, Any] = {"machine": common.machine(), "suites": {}}
    common.show("machine", document["machine"])
    for name in names:
        result = _run(name, options)
        document["suites"][name] = result
        # The ratios of all suites stand at the top as well, where a script finds them by name.
        document |= {key: value for key, value in result.items() if "ratio" in key}
        document["peak_rss_mb"] = common.peak_rss_bytes() / 1e6
        common.show(name, result)
        if file is not None:
            files.write_json(file, document)
    console.print(f"  peak resident memory: {document['peak_rss_mb']:,.0f} MB")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
