"""Mutated inputs for every parser of files that a user gives: each must be read or refused with an InputError.

    python tests/reliability/fuzz.py --parser yaml --inputs 100000 --seed 0

prints counts as JSON and exits with status 1 if an input ended in another error, took longer than 5 CPU seconds, or needed
more memory than `--memory` MiB.
"""

import argparse
import collections
import contextlib
import importlib.util
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

SECONDS = 5.0  # of CPU that one input may take
_NUMBER = re.compile(rb"-?\d+(\.\d+)?")
_EXTREMES = (
    b"-1", b"0", b"1e999", b"-1e999", b"NaN", b"null", b"true", b"4294967296", b"9223372036854775808", b"1" + b"0" * 40,
    b"9" * 5000, b"1e-320", b"0x10", b"1_0", b'"1"', b"[]", b"{}",
)  # fmt: skip
_PIECES = (
    b"\0", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\\ud800", b"\r\n", b"\n", b"[" * 3000, b'{"a":' * 1500, b"'", b'"',
    b"../", b"/etc/passwd", b"&a", b"*a", b"!!python/object:os.system ", b"<<: ", b"\t", b"%", b": ", b"\xe2\x80\xa8",
    b"A" * 4096,
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 2**31, 2**32, 2**63, 10**40, 1.5, float("inf"), float("nan"), "", "x" * 500, "\ud800", "../x",
    "/etc/passwd", "a\0b", [], {}, [[]], {"a": {"b": []}}, ["F32", 1], "F32", "I8",
)  # fmt: skip


class Parser(NamedTuple):
    """
    Attributes:
        seeds: sound inputs.
        read: raises InputError for a wrong one.
        structured: a mutation that knows the format.
    """

    seeds: list[bytes]
    read: Callable[[bytes], Any]
    structured: Callable[[random.Random, bytes], bytes]


class Hang(BaseException):
    pass


# --- Mutations -------------------------------------------------------------------------------------------------------


def mutate(generator: random.Random, parser: Parser) -> bytes:
    """One to four mutations of a seed."""
    data = generator.choice(parser.seeds)
    for _ in range(generator.choice((1, 1, 1, 2, 2, 3, 4))):
        kind = generator.random()
        if kind < 0.45:
            with contextlib.suppress(ValueError, struct.error, IndexError, TypeError, RecursionError):
                data = parser.structured(generator, data)
        else:
            data = _bytes(generator, data, parser.seeds)
    return data


def _bytes(generator: random.Random, data: bytes, seeds: list[bytes]) -> bytes:
    at = generator.randrange(len(data) + 1)
    kind = generator.randrange(7)
    if kind == 0 and data:  # flips
        changed = bytearray(data)
        for _ in range(generator.choice((1, 1, 2, 8))):
            changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
        return bytes(changed)
    if kind == 1:
        return data[:at]
    if kind == 2:  # splice
        other = generator.choice(seeds)
        return data[:at] + other[generator.randrange(len(other) + 1) :]
    if kind == 3:
        return data[:at] + generator.choice(_PIECES) + data[at:]
    if kind == 4 and (found := list(_NUMBER.finditer(data))):
        number = generator.choice(found)
        return data[: number.start()] + generator.choice(_EXTREMES) + data[number.end() :]
    if kind == 5:  # a part again, or left out
        end = min(len(data), at + generator.randrange(1, 64))
        return data[:end] + data[at:] if generator.random() < 0.5 else data[:at] + data[end:]
    return data[:at] + generator.randbytes(generator.randrange(1, 16)) + data[at + 8 :]


def json_mutation(generator: random.Random, data: bytes) -> bytes:
    """One value of a JSON document replaced, left out, renamed, moved or nested."""
    document = json.loads(data)
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            places.append((value, key))
            walk(value[key])

    walk(document)
    if not places:
        return json.dumps(generator.choice(_VALUES)).encode()
    inside, key = generator.choice(places)
    kind = generator.randrange(5)
    if kind == 0:
        del inside[key]
    elif kind == 1 and isinstance(inside, dict):
        inside[str(generator.choice(_VALUES))] = inside.pop(key)
    elif kind == 2:
        other, name = generator.choice(places)
        inside[key] = json.loads(json.dumps(other[name]))
    elif kind == 3:
        inside[key] = [inside[key]] if generator.random() < 0.5 else {"a": inside[key]}
    else:
        inside[key] = generator.choice(_VALUES)
    return json.dumps(document).encode()


def lines_mutation(generator: random.Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    at = generator.randrange(len(lines))
    lines[at] = json_mutation(generator, lines[at])
    return b"\n".join(lines)


def numbers_mutation(generator: random.Random, data: bytes) -> bytes:
    """A binary number replaced by an extreme one, mostly in the header."""
    changed = bytearray(data)
    code, bits = generator.choice((("I", 32), ("Q", 64), ("Q", 64)))
    value = generator.choice(
        (0, 1, 2**bits - 1, 2 ** (bits - 1), 2 ** (bits // 2), generator.randrange(64), len(data))
    )
    struct.pack_into(f"<{code}", changed, generator.randrange(max(1, min(len(data) - 8, 600))), value)
    return bytes(changed)


def safetensors_mutation(generator: random.Random, data: bytes) -> bytes:
    """The header as JSON, with its length put right."""
    (length,) = struct.unpack_from("<Q", data)
    header = json_mutation(generator, data[8 : 8 + length])
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def yaml_mutation(generator: random.Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    at = generator.randrange(len(lines))
    name, colon, _ = lines[at].partition(b":")
    value = json.dumps(generator.choice(_VALUES)).encode()
    changed = generator.choice((name + colon + b" " + value, b"  " + lines[at], name + colon + b" *a", name + colon + b" &a [*a]", name + colon + b" !!binary " + value, lines[at] + b"\n" + lines[at]))  # fmt: skip
    return b"\n".join([*lines[:at], changed, *lines[at + 1 :]])


# --- Parsers ---------------------------------------------------------------------------------------------------------


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _rows(folder: Path) -> Parser:
    from l2m_jax.data.sources import read_file

    rows = [
        {"id": "1", "instruction": "Name a fruit.", "input": "", "output": "an apple", "category": "x"},
        {
            "instruction": "näïve \u2028 🍐",
            "context": "b",
            "response": ["a", "b"],
            "topic": None,
            "x": {"y": [1]},
        },
    ]
    texts = [json.dumps(row, ensure_ascii=i % 2 == 0) for i, row in enumerate(rows * 2)]
    seeds = ["\n".join(texts).encode(), b"\xef\xbb\xbf" + "\r\n".join(texts).encode()]
    file = folder / "rows.jsonl"

    def read(data: bytes) -> None:
        for row in read_file(_write(file, data)):
            "".join((row.id, row.instruction, row.input, *row.references, row.category)).encode()

    return Parser(seeds, read, lines_mutation)


def _tensor_file(names: list[str]) -> bytes:
    header, end = {}, 0
    for name in names:
        header[name] = {"dtype": "F32", "shape": [2, 3], "data_offsets": [end, end + 24]}
        end += 24
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


def _safetensors(folder: Path) -> Parser:
    import numpy as np

    from l2m_jax.models.hf.safetensors_folder import SafetensorsFolder

    seeds = [_tensor_file(["wte.weight", "h.0.ln_1.weight"]), _tensor_file(["a"]), _tensor_file([])]

    def read(data: bytes) -> None:
        _write(folder / "model.safetensors", data)
        source = SafetensorsFolder(folder, "transformer.", None)
        for name, shape in source.shapes.items():
            if np.prod(shape, dtype=float) < 1000 and shape:
                source.read(name, tuple(slice(0, n) for n in shape))

    return Parser(seeds, read, safetensors_mutation)


def _index(folder: Path) -> Parser:
    from l2m_jax.models.hf.safetensors_folder import INDEX, SafetensorsFolder

    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name in names:
        _write(folder / name, _tensor_file([f"{name[6:11]}.weight"]))
    index = {"metadata": {"total_size": 48}, "weight_map": {f"{name[6:11]}.weight": name for name in names}}

    def read(data: bytes) -> None:
        _write(folder / INDEX, data)
        SafetensorsFolder(folder, "transformer.", None)

    return Parser([json.dumps(index).encode()], read, json_mutation)


def _gguf(folder: Path) -> Parser:
    import gguf
    import numpy as np

    from l2m_jax.models.hf.gguf import GgufFile

    writer = gguf.GGUFWriter(folder / "seed.gguf", "llama")
    for add, value in (
        (writer.add_block_count, 1),
        (writer.add_context_length, 32),
        (writer.add_embedding_length, 8),
        (writer.add_feed_forward_length, 16),
        (writer.add_head_count, 2),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_token_list, ["a", "b"]),
        (writer.add_token_types, [1, 3]),
        (writer.add_bos_token_id, 1),
    ):
        add(value)
    for name in ("token_embd.weight", "output_norm.weight"):
        writer.add_tensor(name, np.zeros((4, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = folder / "m.gguf"

    def read(data: bytes) -> None:
        GgufFile(_write(file, data)).config()

    return Parser([(folder / "seed.gguf").read_bytes()], read, numbers_mutation)


def _config_json(folder: Path) -> Parser:
    from l2m_jax.models.hf.folder import read_config

    sizes = {"vocab_size": 300, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    rope = {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}}
    gpt2 = {"vocab_size": 300, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 96, "eos_token_id": 0}
    seeds = [
        {"model_type": "gpt2", "layerdrop": 0, **gpt2},
        {"model_type": "opt", "ffn_dim": 16, "dropout": 0.1, **sizes},
        {"model_type": "llama", "intermediate_size": 16, "eos_token_id": [1, 2], **sizes, **rope},
    ]

    def read(data: bytes) -> None:
        _write(folder / "config.json", data)
        read_config(folder)

    return Parser([json.dumps(seed).encode() for seed in seeds], read, json_mutation)


def _yaml(folder: Path) -> Parser:
    from l2m_jax.cli import config_file

    seeds = [
        b"preset: minillm\nseed: 3\nmethod: l2m\nevaluation: {sets: [test], seeds: [1, 2]}\n",
        b"data:\n  source: synthetic\n  max_length: 160\ntraining:\n  learning_rate: 1e-4\nbaselines: sft,kld\n",
        b"teacher:\n  model: {architecture: {num_layers: 1, num_heads: 2}}\ncheckpoint_minutes: 0\ntracking: [wandb]\n",
    ]
    file = folder / "c.yaml"
    return Parser(seeds, lambda data: config_file.read(str(_write(file, data))), yaml_mutation)


def _verdicts(folder: Path) -> Parser:
    """The same bytes as an answer over HTTP and as the file of kept verdicts."""
    import openai

    # The client's own library, which newer versions have replaced.
    httpx = importlib.import_module("httpx2" if importlib.util.find_spec("httpx2") else "httpx")

    from l2m_jax.errors import InputError
    from l2m_jax.evaluation import judge

    message = {"role": "assistant", "content": "Because. [[A]]", "refusal": None}
    answer = {
        "id": "x",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message}],
        "usage": {},
    }
    kept = {"key": "0123456789abcdef", "reply": "[[B]]"}
    body = b""
    transport = httpx.MockTransport(
        lambda request: httpx.Response(200, content=body, headers={"content-type": "application/json"})
    )
    client = openai.OpenAI(
        api_key="k",
        base_url="http://localhost/v1",
        max_retries=0,
        http_client=httpx.Client(transport=transport),
    )
    settings = judge.Judge("tester", "http://localhost/v1")

    def read(data: bytes) -> None:
        nonlocal body
        body = data
        for reply in judge._read_cache(_write(folder / "verdicts.jsonl", data)).values():
            judge.read_verdict(reply)
        try:
            judge.read_verdict(judge._reply(client, settings, [{"role": "user", "content": "x"}]))
        except judge._NoAnswer as error:
            raise InputError(str(error)) from None

    return Parser([json.dumps(answer).encode(), json.dumps(kept).encode()], read, json_mutation)


def _baseline(folder: Path) -> Parser:
    from l2m_jax.evaluation import judge

    line = {
        "set": "s",
        "id": "1",
        "seed": 10,
        "prompt": "p",
        "response": "r",
        "references": ["a"],
        "rouge_l": 0.5,
    }
    seed = "\n".join(json.dumps(line | {"seed": i}) for i in range(3)).encode()
    return Parser([seed], lambda data: judge.check_baseline(_write(folder / "r.jsonl", data)), lines_mutation)


def _responses(folder: Path) -> Parser:
    from l2m_jax.generation.responses import ResponseFile

    lines = [{"key": "k"}, *({"prompt": i, "seed": 1, "tokens": [1, 2], "text": "a"} for i in range(3))]
    file = ResponseFile(folder / "responses.jsonl", "k")

    def read(data: bytes) -> None:
        _write(file.path, data)
        file.read()

    return Parser(["".join(json.dumps(line) + "\n" for line in lines).encode()], read, lines_mutation)


def _record(folder: Path) -> Parser:
    from l2m_jax.run.artefacts import Artefact

    artefact = Artefact(Path("x"), folder)
    record = {"key": artefact.key, "finished": True, "inputs": {"a": 1}, "files": {"x.bin": [0, 1, "ab"]}}

    def read(data: bytes) -> None:
        _write(folder / "inputs.json", data)
        assert artefact.is_finished_here in (True, False)

    return Parser([json.dumps(record).encode()], read, json_mutation)


PARSERS: dict[str, Callable[[Path], Parser]] = {
    "rows": _rows,
    "safetensors": _safetensors,
    "index": _index,
    "gguf": _gguf,
    "config_json": _config_json,
    "yaml": _yaml,
    "verdicts": _verdicts,
    "baseline": _baseline,
    "responses": _responses,
    "record": _record,
}


# --- Running ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def limited(mebibytes: int) -> Iterator[None]:
    """At most so much more address space than now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (mebibytes << 20), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def fuzz(name: str, inputs: int, seed: int, memory: int = 1024) -> dict[str, Any]:
    """Counts of what was read and refused, and the first failures with their inputs."""
    from l2m_jax.errors import InputError

    def hang(*_):
        raise Hang

    generator = random.Random(f"{name} {seed}")
    counts: collections.Counter[str] = collections.Counter()
    failures: list[dict[str, str]] = []
    # In memory, where the machine has such a place: the disk would take most of the time.
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    before = signal.signal(signal.SIGPROF, hang)
    try:
        parser = PARSERS[name](folder)
        for sound in parser.seeds:
            with contextlib.suppress(InputError):
                parser.read(sound)
        start, resident, slowest = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0.0
        with limited(memory):
            for _ in range(inputs):
                data = mutate(generator, parser)
                begun = time.monotonic()
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
                try:
                    parser.read(data)
                    counts["read"] += 1
                except InputError:
                    counts["refused"] += 1
                except (Exception, Hang) as error:
                    counts["failed"] += 1
                    if len(failures) < 5:
                        place = traceback.format_exc().strip().splitlines()[-3:]
                        failures.append(
                            {
                                "error": repr(error)[:300],
                                "at": " ".join(place)[:600],
                                "input": repr(data)[:600],
                            }
                        )
                finally:
                    signal.setitimer(signal.ITIMER_PROF, 0)
                slowest = max(slowest, time.monotonic() - begun)
    finally:
        signal.signal(signal.SIGPROF, before)
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "parser": name,
        "inputs": inputs,
        "seed": seed,
        **{kind: counts[kind] for kind in ("read", "refused", "failed")},
        "seconds": round(time.monotonic() - start, 1),
        "slowest_seconds": round(slowest, 3),
        "more_resident_mib": round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident) / 1024, 1),
        "failures": failures,
    }


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--parser", choices=[*PARSERS, "all"], default="all")
    arguments.add_argument("--inputs", type=int, default=100_000)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--memory", type=int, default=1024, help="MiB beyond those of the start")
    options = arguments.parse_args()
    failed = 0
    for name in PARSERS if options.parser == "all" else [options.parser]:
        found = fuzz(name, options.inputs, options.seed, options.memory)
        failed += found["failed"]
        print(json.dumps(found), flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
