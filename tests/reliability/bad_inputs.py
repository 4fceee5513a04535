"""The table of wrong inputs: what a user may get wrong, and what the command must say.

A case is a function of a `World`, which writes what is wrong and gives the command line, with a pattern that the one
sentence must contain: the place, and the way out. Cases with `tolerated=True` must be read correctly instead.
"""

import dataclasses
import gzip
import io
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file

from l2m_jax import models
from l2m_jax.data.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "configs" / "tiny.py"
ROW = {"instruction": "Name a fruit.", "input": "", "output": "an apple"}
ROWS = [{**ROW, "instruction": f"Name fruit {i}.", "id": str(i)} for i in range(12)]
_CONFIG = models.DecoderConfig(
    family="gpt2",
    vocab_size=300,
    valid_vocab_size=300,
    hidden_size=8,
    embed_size=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=16,
    max_positions=96,
)


def json_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    written = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), written)
    return written.getvalue()


@dataclasses.dataclass
class World:
    """Sound files in `good`, and a folder of the case's own.

    Attributes:
        server: the URL of a judge that behaves as its path says: /500/v1, /hang/v1, ...
    """

    good: Path
    own: Path
    server: str = ""

    @property
    def workdir(self) -> Path:
        return self.own / "run"

    def file(self, name: str, content: bytes | str) -> Path:
        path = self.own / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def train(self, *flags: str, config: str | Path = TINY) -> list[str]:
        return ["train", f"--config={config}", f"--workdir={self.workdir}", *flags]

    def train_on(self, rows: str | Path, *flags: str) -> list[str]:
        given = {"source": "files", "train": rows, "tokenizer": self.good / "model", "validation_rows": 2}
        data = [f"--config.data.{name}={value}" for name, value in given.items()]
        return self.train(*data, "--config.data.test_rows=2", *flags)

    def eval(self, *flags: str, model: str | Path | None = None, sets: str | Path = "") -> list[str]:
        sets = sets or self.good / "rows.jsonl"
        given = [f"--model={model or self.good / 'model'}", f"--sets={sets}", f"--output={self.workdir}"]
        return ["eval", *given, "--max-new-tokens=4", "--seeds=1", "--devices=1", *flags]

    def judge(self, url: str, *flags: str, baseline: str | Path = "") -> list[str]:
        baseline = baseline or self.good / "scores"
        return self.eval("--judge-model=tester", f"--judge-url={url}", f"--baseline={baseline}", *flags)

    def model(self, **changes: Any) -> Path:
        """A copy of the sound model with changed keys of config.json; None removes a key."""
        folder = self.own / "model"
        folder.mkdir(parents=True, exist_ok=True)
        for file in (self.good / "model").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        described = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(described))
        return folder

    def llama(self, **changes: Any) -> Path:
        folder = self.model()
        described = {
            "model_type": "llama",
            "vocab_size": 300,
            "hidden_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "max_position_embeddings": 96,
        }
        (folder / "config.json").write_text(json.dumps(described | changes))
        return folder


def make_good(folder: Path) -> None:
    """A model with its tokenizer, rows, a GGUF file, and the responses of an evaluation."""
    import gguf

    tokenizer = train_tokenizer(["Name a fruit, an apple and a pear"] * 3, 300)
    config = dataclasses.replace(_CONFIG, vocab_size=len(tokenizer), valid_vocab_size=len(tokenizer))
    models.save(folder / "model", config, models.init(config, jax.random.key(0)), tokenizer=tokenizer)
    models.save(folder / "shards", config, models.init(config, jax.random.key(0)), shard_bytes=4096)
    (folder / "rows.jsonl").write_bytes(json_lines(ROWS))
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((300, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    lines = [
        {"set": "s", "id": r["id"], "seed": 1, "prompt": r["instruction"], "response": "a"} for r in ROWS[:2]
    ]
    (folder / "scores").mkdir()
    (folder / "scores" / "responses.jsonl").write_bytes(json_lines(lines))


class Case(NamedTuple):
    """
    Attributes:
        make: writes the case's files; gives the command line.
        says: a pattern of the sentence; for a tolerated case, of the text that is read.
    """

    name: str
    make: Callable[[World], list[str]]
    says: str
    tolerated: bool = False


CASES: list[Case] = []


def case(name: str, make: Callable[[World], list[str]], says: str, tolerated: bool = False) -> None:
    CASES.append(Case(name, make, says, tolerated))


# --- Rows of the training data ---------------------------------------------------------------------------------------

GOOD = json.dumps(ROW).encode()
LINE_2 = {
    "not JSON": (b"not json", "line 2: not JSON .*expected one object per line"),
    "cut off": (GOOD[:-5], "line 2: not JSON .*expected one object per line"),
    "two objects": (GOOD + GOOD, "line 2: not JSON .*expected one object per line"),
    "single quotes": (b"{'instruction': 'a'}", "line 2: not JSON .*expected one object per line"),
    "NUL bytes": (b"\0" * 40, "line 2: not JSON .*expected one object per line"),
    "NUL in text": (GOOD.replace(b"apple", b"ap\0ple"), "line 2: not JSON .*expected one object per line"),
    "Latin-1": (GOOD.replace(b"apple", b"caf\xe9"), "line 2: not JSON .*utf-8.*in UTF-8"),
    "lone surrogate": (GOOD.replace(b"apple", b"\\ud800"), "line 2: not JSON .*surrogates not allowed"),
    "raw surrogate": (GOOD.replace(b"apple", b"\xed\xa0\x80"), "line 2: not JSON .*utf-8.*in UTF-8"),
    "deep": (b"[" * 100_000, "line 2: not JSON .nested too deeply.; expected one object"),
    "deep and closed": (b"[" * 50_000 + b"]" * 50_000, "line 2: not JSON .nested too deeply"),
    "huge number": (b'{"instruction": ' + b"9" * 5000 + b"}", "line 2: not JSON .*expected one object"),
    "10 MB of rubbish": (b"x" * 10_000_000, "line 2: not JSON .*expected one object per line"),
    "a list": (b'["a", "b"]', r"line 2: expected a JSON object, not \[\"a\", \"b\"\]"),
    "a string": (b'"text"', 'line 2: expected a JSON object, not "text"'),
    "a number": (b"7", "line 2: expected a JSON object, not 7"),
    "null": (b"null", "line 2: expected a JSON object, not null"),
    "NaN": (b"NaN", "line 2: expected a JSON object, not NaN"),
    "no instruction": (b'{"output": "b"}', r"line 2: no field 'instruction' \(fields: output\)"),
    "no output": (b'{"instruction": "b"}', r"line 2: no field 'output' \(or 'response'; fields: instruction"),
    "no fields": (b"{}", r"line 2: columns none are of no known format \(known: instr"),
    "null instruction": (b'{"instruction": null, "output": "b"}', "line 2: no field 'instruction'"),
    "null output": (b'{"instruction": "a", "output": null}', "line 2: no field 'output'"),
    "instruction is a number": (b'{"instruction": 1, "output": "b"}', "line 2: 'instruction' must be a string"),
    "instruction is a list": (b'{"instruction": ["a"], "output": "b"}', "line 2: 'instruction' must be a str"),
    "input is an object": (b'{"instruction": "a", "input": {}, "output": "b"}', "line 2: 'input' must be a st"),
    "output is a number": (b'{"instruction": "a", "output": 5}', "line 2: 'output' must be a string or a list"),
    "output is an object": (b'{"instruction": "a", "output": {"x": 1}}', "line 2: 'output' must be a string"),
    "outputs of numbers": (b'{"instruction": "a", "output": ["b", 1]}', "line 2: 'output' must be a string or"),
    "category is a number": (b'{"instruction": "a", "output": "b", "category": 3}', "'category' must be a str"),
    "true": (b"true", "line 2: expected a JSON object, not true"),
}  # fmt: skip
for _name, (_line, _says) in LINE_2.items():
    case(
        f"row: {_name}",
        lambda w, line=_line: w.train_on(w.file("rows.jsonl", GOOD + b"\n" + line + b"\n" + GOOD)),
        r"rows\.jsonl, " + _says if _says.startswith("line") else _says,
    )

FILES = {
    "empty": (b"", "config.data.train: .*rows.jsonl has no rows .JSON lines with instruction"),
    "blank lines": (b"\n\r\n  \n", "config.data.train: .*rows.jsonl has no rows .JSON lines with"),
    "UTF-16": ('{"instruction": "a"}\n'.encode("utf-16"), "config.data.train: .*line 1: not JSON .*in UTF-8"),
    "gzip": (b"\x1f\x8b\x08\x00\x00\x00", "config.data.train: .*line 1: not JSON .*in UTF-8"),
    "a JSON array": (json.dumps(ROWS, indent=1).encode(), "config.data.train: .*line 1: not JSON"),
    "CSV": (b"instruction,output\na,b\n", "config.data.train: .*line 1: not JSON .*one object per line"),
    "old Mac line ends": (GOOD + b"\r" + GOOD + b"\r", "config.data.train: .*line 1: not JSON .*one object"),
    "only empty responses": (json_lines([{**ROW, "output": " "}] * 9), "has 0 rows within the token limits.*lower"),
    "only long prompts": (json_lines([{**ROW, "instruction": "pear " * 999}] * 9), "has 0 rows within .*raise data.max_length"),
    "too few rows": (json_lines(ROWS[:3]), "has 3 rows within the token limits, but the split needs at least 5"),
    "a wrong row at the end": (json_lines(ROWS) + b"{", r"line 13: not JSON .*expected one object per line"),
}  # fmt: skip
for _name, (_content, _says) in FILES.items():
    case(f"rows: {_name}", lambda w, c=_content: w.train_on(w.file("rows.jsonl", c)), _says)

READ = {
    "byte order mark": (b"\xef\xbb\xbf" + json_lines(ROWS), "Name fruit 0"),
    "CRLF": (json_lines(ROWS).replace(b"\n", b"\r\n"), "Name fruit 11"),
    "no last line end": (json_lines(ROWS).rstrip(b"\n"), "Name fruit 11"),
    "blank lines between": (json_lines(ROWS).replace(b"\n", b"\n\n"), "Name fruit 11"),
    "duplicate ids": (json_lines([{**row, "id": "same"} for row in ROWS]), "same"),
    "null ids": (json_lines([{**row, "id": None} for row in ROWS]), "rows/"),
    "number ids": (json_lines([{**row, "id": i} for i, row in enumerate(ROWS)]), "7"),
    "unknown columns": (json_lines([{**row, "x": [1, {"y": None}]} for row in ROWS]), "Name fruit"),
    "escaped NUL": (json_lines([{**row, "instruction": f"nul \0 {i}"} for i, row in enumerate(ROWS)]), "nul \0"),
    "surrogate pairs": (json_lines([{**row, "instruction": "pear 🍐"} for row in ROWS]), "🍐"),
    "line separators": (json_lines([{**row, "instruction": "a\u2028b"} for row in ROWS]), "a\u2028b"),
    "some empty responses": (json_lines([*ROWS, {**ROW, "output": ""}]), "Name fruit"),
    "one long prompt": (json_lines([*ROWS, {**ROW, "instruction": "pear " * 999}]), "Name fruit"),
    "a prompt of 200 kB": (json_lines([*ROWS, {**ROW, "instruction": "pear " * 40_000}]), "Name fruit"),
    "Dolly's names": (json_lines([{"instruction": r["instruction"], "context": "", "response": "b"} for r in ROWS]), "fruit"),
    "duplicate keys": (b'{"instruction": "x", "instruction": "Name", "output": "b"}\n' * 12, "Name"),
}  # fmt: skip
for _name, (_content, _says) in READ.items():
    case(f"rows: {_name}", lambda w, c=_content: w.train_on(w.file("rows.jsonl", c)), _says, tolerated=True)

case(
    "rows: Parquet", lambda w: w.train_on(w.file("rows.parquet", parquet(ROWS))), "Name fruit", tolerated=True
)
case(
    "rows: compressed",
    lambda w: w.train_on(w.file("rows.jsonl.gz", gzip.compress(json_lines(ROWS)))),
    "Name fruit",
    tolerated=True,
)

case(
    "rows: no file",
    lambda w: w.train_on(w.own / "none.jsonl"),
    "config.data.train: no such file .*none.jsonl.*JSON lines",
)
case(
    "rows: a folder without files",
    lambda w: w.train_on(w.own),
    "config.data.train: .*is a folder without files of rows .*; or a file .JSON lines",
)
case(
    "rows: no Parquet",
    lambda w: w.train_on(w.file("rows.parquet", GOOD)),
    "config.data.train: .*rows.parquet cannot be read as Parquet .*check the file",
)
case(
    "rows: a cut Parquet file",
    lambda w: w.train_on(w.file("rows.parquet", parquet(ROWS)[:-40])),
    "config.data.train: .*rows.parquet cannot be read as Parquet .*check the file",
)
case(
    "rows: Parquet with numbers for answers",
    lambda w: w.train_on(w.file("rows.parquet", parquet([{"instruction": "a", "output": 3}]))),
    "config.data.train: .*rows.parquet, row 1: 'output' must be a string or a list of strings, not 3",
)
case(
    "rows: no Arrow",
    lambda w: w.train_on(w.file("rows.arrow", GOOD)),
    "config.data.train: .*rows.arrow cannot be read as Arrow .*check the file",
)
case(
    "rows: no gzip",
    lambda w: w.train_on(w.file("rows.jsonl.gz", GOOD)),
    "config.data.train: .*rows.jsonl.gz cannot be read .*check the file",
)
case(
    "rows: cut gzip",
    lambda w: w.train_on(w.file("rows.jsonl.gz", gzip.compress(json_lines(ROWS * 2000))[:-900])),
    "config.data.*: .*rows.jsonl.gz cannot be read .*check the file",
)
for _name, (_mixture, _says) in {
    "one source": ("0.5*{good}", "config.data.train: the mixture .* has one source; add another"),
    "no weight": ("0.5*{good} + {good}", "config.data.train: .*rows.jsonl' in the mixture .* is not WEIGHT.SOURCE"),
    "weight 0": ("0*{good} + 1*{good}", "config.data.train: weight: 0.0 must be greater than 0"),
    "no file": ("1*{good} + 1*none.jsonl", "config.data.train: no such file 'none.jsonl'"),
}.items():  # fmt: skip
    case(
        f"rows: mixture, {_name}",
        lambda w, m=_mixture: w.train_on(m.format(good=w.good / "rows.jsonl")),
        _says,
    )
case(
    "rows: a hub name offline",
    lambda w: w.train_on("owner/name"),
    "cannot download 'owner/name' .*pass a file",
)
case(
    "rows: unreadable",
    lambda w: w.train_on("/proc/self/mem"),
    "/proc/self/mem cannot be read .*check the file",
)
case("rows: name too long", lambda w: w.train_on("/x" + "y" * 300), "File name too long; check this path")
case(
    "rows: below a file", lambda w: w.train_on(w.good / "rows.jsonl" / "x.jsonl"), "no such file .*JSON lines"
)
case(
    "rows: a loop of links",
    lambda w: (os.symlink("loop.jsonl", w.own / "loop.jsonl"), w.train_on(w.own / "loop.jsonl"))[1],
    "loop.jsonl.*JSON lines|check this path",
)
case(
    "rows: the tokenizer's folder is missing",
    lambda w: w.train_on(w.good / "rows.jsonl", f"--config.data.tokenizer={w.own / 'no'}"),
    "config.data.tokenizer: no such folder .*pass a folder",
)
case(
    "rows: more stages than rows",
    lambda w: w.train_on(w.good / "rows.jsonl", "--config.curriculum.stages=50"),
    "50 difficulty subsets of 8 .*fewer subsets",
)
case(
    "rows: validation file with no rows",
    lambda w: w.train_on(w.good / "rows.jsonl", f"--config.data.validation={w.file('v.jsonl', '')}"),
    "config.data.validation: .*has no rows .JSON",
)
case(
    "rows: test file is missing",
    lambda w: w.train_on(w.good / "rows.jsonl", "--config.data.test=none.jsonl"),
    "config.data.test: no such file 'none.jsonl' .JSON",
)
case(
    "rows: prompts longer than the model",
    lambda w: w.train_on(
        w.file("r.jsonl", json_lines([{**ROW, "instruction": "q" * 50}] * 12)),
        f"--config.student.model.path={w.good / 'model'}",
        "--config.data.max_length=96",
        "--config.sampling.max_new_tokens=60",
    ),
    "config.data.validation: none of 2 prompts has at most 36 tokens; set data.truncate",
)

# --- Evaluation sets -------------------------------------------------------------------------------------------------

SETS = {
    "unknown": ("dollly", "config.evaluation.sets: 'dollly' is neither .*did you mean 'dolly'"),
    "no file": ("mine=none.jsonl", "config.evaluation.sets: no such file 'none.jsonl' .JSON lines"),
    "no name": ("=rows.jsonl", "evaluation.sets: evaluation set '=rows.jsonl': expected name=file"),
    "no path": ("mine=", "evaluation.sets: evaluation set 'mine=': expected name=file"),
    "parent folder": ("../x=rows.jsonl", "evaluation.sets: evaluation set '../x=rows.jsonl': expected name=file"),
    "absolute": ("/etc/x=rows.jsonl", "evaluation.sets: evaluation set '/etc/x=rows.jsonl': expected name=file"),
    "dots": ("..=rows.jsonl", "evaluation.sets: evaluation set '..=rows.jsonl': expected name=file"),
    "hidden": (".x=rows.jsonl", "evaluation.sets: evaluation set '.x=rows.jsonl': expected name=file"),
    "long name": ("n" * 300 + "=rows.jsonl", "evaluation.sets: evaluation set 'nnn.*: expected name=file"),
    "line end in the name": ("a\nb=rows.jsonl", r"evaluation.sets: evaluation set 'a\\nb=rows.jsonl': expected"),
    "twice": ("test,test", "config.evaluation.sets: two of them are called 'test'; name one differently"),
    "none": ("", "config.evaluation.sets: empty; give at least one set"),
    "a folder": ("mine=/tmp", "config.evaluation.sets: '/tmp' is a folder; give a file .JSON lines"),
}  # fmt: skip
for _name, (_sets, _says) in SETS.items():
    case(f"set: {_name}", lambda w, s=_sets: w.train(f"--config.evaluation.sets={s}"), _says)

SET_FILES = {
    "empty": (b"", "has no rows .JSON lines"),
    "a wrong row at the end": (json_lines(ROWS) + b"[]", "line 13: expected a JSON object"),
    "no references": (json_lines([{**ROW, "output": []}] * 3), "no example is left: .*3 empty response"),
    "only long prompts": (json_lines([{**ROW, "instruction": "pear " * 999}] * 3), "no example is left: .*3 long prompt"),
}  # fmt: skip
for _name, (_content, _says) in SET_FILES.items():
    case(
        f"set of a run: {_name}",
        lambda w, c=_content: w.train(f"--config.evaluation.sets=mine={w.file('s.jsonl', c)}"),
        f"config.evaluation.sets: .*{_says}",
    )
    case(f"set: {_name}", lambda w, c=_content: w.eval(sets=f"mine={w.file('s.jsonl', c)}"), _says)

# --- Model folders ---------------------------------------------------------------------------------------------------

CONFIG_JSON = {
    "negative width": ({"n_embd": -8}, "2 attention heads of a width of -8; both must be 1 or more"),
    "no heads": ({"n_head": 0}, "0 attention heads of a width of 8; both must be 1 or more"),
    "heads do not divide": ({"n_head": 3}, "the width 8 is not a multiple of the 3 attention heads"),
    "negative layers": ({"n_layer": -1}, "num_layers: -1 must be greater than 0"),
    "too many layers": ({"n_layer": 10**9}, "num_layers: 1000000000 must be at most"),
    "more layers than tensors": ({"n_layer": 5000}, "too few for the 5000 layers of its config"),
    "one more layer": ({"n_layer": 3}, r"lacks 12 tensors \(transformer.h.2.*belongs to another model"),
    "one layer less": ({"n_layer": 1}, r"12 tensors \(transformer.h.1.*belong to different models"),
    "another width": ({"n_embd": 16}, "has shape .* requires .*belong to different models"),
    "text for a number": ({"n_embd": "8"}, "config.json: n_embd: expected a whole number, got '8'"),
    "a fraction": ({"n_layer": 2.5}, "config.json: n_layer: expected a whole number, got 2.5"),
    "true for a number": ({"n_layer": True}, "config.json: n_layer: expected a whole number, got True"),
    "null for a number": ({"n_head": None}, "config.json: n_head: expected a whole number, got None"),
    "a list for a number": ({"n_positions": [1]}, r"config.json: n_positions: expected a whole number, got \(1"),
    "huge vocabulary": ({"vocab_size": 10**30}, "vocab_size: 1.*0 must .*32"),
    "tiny vocabulary": ({"vocab_size": 3}, "vocab_size 3; a tokenizer with more tokens"),
    "no vocabulary": ({"vocab_size": 0}, "vocab_size: 0 must be greater than 0"),
    "NaN rate": ({"attn_pdrop": float("nan")}, "config.json: attn_pdrop: expected a finite number, got nan"),
    "rate above 1": ({"resid_pdrop": 1.5}, "residual_dropout: 1.5 must be at least 0 and below 1"),
    "negative epsilon": ({"layer_norm_epsilon": -1.0}, "norm_eps: -1.0 must be 0 or more"),
    "unknown activation": ({"activation_function": "softsign"}, "activation: 'softsign' is not one of"),
    "activation is a list": ({"activation_function": ["gelu"]}, "activation_function: expected text, got"),
    "huge token id": ({"eos_token_id": 2**40}, "eos_token_id: 1099511627776 must fit into 32 bits"),
    "token id is text": ({"bos_token_id": "<s>"}, "config.json: bos_token_id: expected a whole number or null"),
    "unknown family": ({"model_type": "bert"}, "model_type 'bert' is not supported; choose one of gpt2"),
    "family is a list": ({"model_type": ["gpt2"]}, r"model_type \['gpt2'\] is not supported; choose one of"),
    "no family": ({"model_type": None}, "model_type None is not supported; choose one of gpt2"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantised weights are not supported; choose a"),
    "cross attention": ({"add_cross_attention": True}, "add_cross_attention = True is not supported"),
    "negative positions": ({"n_positions": -5}, "max_positions: -5 must be greater than 0"),
}  # fmt: skip
for _name, (_changes, _says) in CONFIG_JSON.items():
    case(
        f"config.json: {_name}",
        lambda w, c=_changes: w.eval(model=w.model(**c)),
        rf"model(/config.json|/model.safetensors)?\b.*{_says}",
    )

LLAMA = {
    "rope is a number": ({"rope_scaling": 5}, "config.json: rope_scaling: expected an object with names or null, got 5"),
    "unknown rope": ({"rope_scaling": {"type": "yarn"}}, "rope type 'yarn' is not supported"),
    "rope type is a list": ({"rope_scaling": {"type": []}}, r"rope type \[\] is not supported"),
    "theta is text": ({"rope_theta": "big"}, "rope: theta: expected a finite number, got 'big'"),
    "theta is 0": ({"rope_theta": 0}, "rope: theta: 0 must be greater than 0"),
    "factor is text": ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope: factor: expected a finite number"),
    "odd heads": ({"head_dim": 3}, "head_dim: 3 must be even"),
    "kv heads": ({"num_key_value_heads": 3}, "num_kv_heads: 3 must divide num_heads 2"),
    "negative kv heads": ({"num_key_value_heads": -1}, "num_kv_heads: -1 must be greater than 0"),
    "the weights of another family": ({}, "lacks .*belongs to another model"),
}  # fmt: skip
for _name, (_changes, _says) in LLAMA.items():
    case(f"llama: {_name}", lambda w, c=_changes: w.eval(model=w.llama(**c)), f"model.*{_says}")


def _with(world: World, name: str, content: bytes | str) -> list[str]:
    """The sound model with one file replaced."""
    folder = world.model()
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return world.eval(model=folder)


def _without(world: World, name: str) -> list[str]:
    folder = world.model()
    (folder / name).unlink()
    return world.eval(model=folder)


MODEL_FILES = {
    "config.json: not JSON": ("config.json", "{", "config.json is not JSON .*fetch it again"),
    "config.json: empty": ("config.json", "", "config.json is not JSON .*fetch it again"),
    "config.json: a list": ("config.json", "[]", r"config.json: expected an object with names, got \[\]"),
    "config.json: null": ("config.json", "null", "config.json: expected an object with names, got None"),
    "config.json: binary": ("config.json", b"\xff\xfe\0", "config.json is not JSON .*fetch it again"),
    "config.json: deep": ("config.json", "[" * 99999, "config.json is not JSON .nested too deeply.; fetch"),
    "weights: empty": ("model.safetensors", b"", "model.safetensors is cut off or not a saf.*fetch it again"),
    "weights: text": ("model.safetensors", "version https://git-lfs", "cut off or not a safetensors.*fetch it again"),
    "weights: terabytes of header": ("model.safetensors", struct.pack("<Q", 1 << 42) + b"{}", "cut off or not.*fetch it again"),
    "weights: largest header": ("model.safetensors", b"\xff" * 16, "cut off or not a safetensors.*fetch it again"),
    "weights: header is no JSON": ("model.safetensors", struct.pack("<Q", 4) + b"{{{{", "cut off or not.*fetch it again"),
    "weights: terabytes of tensor": (
        "model.safetensors",
        (lambda h: struct.pack("<Q", len(h)) + h)(json.dumps({"wte.weight": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()),
        "cut off or not a safetensors.*fetch it again",
    ),
    "weights: negative offsets": (
        "model.safetensors",
        (lambda h: struct.pack("<Q", len(h)) + h)(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}'),
        "cut off or not a safetensors.*fetch it again",
    ),
    "tokenizer: not JSON": ("tokenizer.json", "{", "tokenizer.json is not JSON .*fetch it again"),
    "tokenizer: a list": ("tokenizer.json", "[]", "not a tokenizer .*fetch it again"),
    "tokenizer: an empty object": ("tokenizer.json", "{}", "not a tokenizer .*fetch it again"),
    "tokenizer: unknown model": ("tokenizer.json", '{"model": {"type": "Magic", "vocab": {}}}', "cannot load a tokenizer"),
    "tokenizer: empty": ("tokenizer.json", "", "tokenizer.json is not JSON .*fetch it again"),
    "tokenizer: its config is broken": ("tokenizer_config.json", "{", "--model: .*tokenizer_config.json is not JSON .*fetch it again"),
    "tokenizer: its config is a list": ("tokenizer_config.json", "[1]", "--model: .*tokenizer_config.json: expected an object with names"),
    "tokenizer: no end of sequence": ("tokenizer_config.json", '{"tokenizer_class": "PreTrainedTokenizerFast"}', "has no eos_token in its tokenizer_config.json"),
}  # fmt: skip
for _name, (_file, _content, _says) in MODEL_FILES.items():
    case(f"model, {_name}", lambda w, f=_file, c=_content: _with(w, f, c), _says)


def _tensors(world: World, change: Callable[[dict[str, np.ndarray]], None]) -> list[str]:
    from safetensors.numpy import load_file

    folder = world.model()
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return world.eval(model=folder)


WTE = "transformer.wte.weight"
TENSORS = {
    "missing": (lambda t: t.pop(WTE), f"model.safetensors|model lacks 1 tensor .{WTE}.*incomplete"),
    "all missing": (lambda t: t.clear(), "too few for the 2 layers of its config"),
    "extra": (lambda t: t.update(x=np.zeros(1, np.float32)), "has 1 tensor .transformer.x. .*different models"),
    "transposed": (lambda t: t.update({WTE: t[WTE].T.copy()}), f"tensor {WTE} has shape .* requires"),
    "one axis": (lambda t: t.update({WTE: t[WTE].ravel().copy()}), f"tensor {WTE} has shape .* requires"),
    "whole numbers": (lambda t: t.update({WTE: t[WTE].astype(np.int8)}), "dtype I8, which is not supported"),
    "complex": (lambda t: t.update({WTE: t[WTE].astype(np.int64)}), "dtype I64, which is not supported"),
    "twice": (lambda t: t.update({"wte.weight": t[WTE].copy()}), "has tensor 'wte.weight'|has tensor 'transformer"),
    "of PyTorch's own names": (lambda t: t.update({"module.x": np.zeros(1, np.float32)}), "different models"),
}  # fmt: skip
for _name, (_change, _says) in TENSORS.items():
    case(f"tensors: {_name}", lambda w, c=_change: _tensors(w, c), _says)


def _index(world: World, change: Callable[[dict[str, Any]], Any]) -> list[str]:
    folder = world.model()
    (folder / "model.safetensors").unlink()
    for file in (world.good / "shards").glob("*.safetensors*"):
        (folder / file.name).write_bytes(file.read_bytes())
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    changed = change(index)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index if changed is None else changed))
    return world.eval(model=folder)


def _first_shard(name: Any) -> Callable[[dict[str, Any]], None]:
    return lambda index: index["weight_map"].update({WTE: name})


NO_INDEX = "index.json is not a safetensors index .*fetch it again"
WRONG_SHARD = "index.json names the shard .*in the same folder; fetch it again"
INDEX = {
    "a missing shard": (_first_shard("model-00009-of-00009.safetensors"), "lacks model-00009.*fetch the missing shards"),
    "a shard above": (_first_shard("../model.safetensors"), WRONG_SHARD),
    "a shard elsewhere": (_first_shard("/etc/passwd"), WRONG_SHARD),
    "a shard below": (_first_shard("sub/model.safetensors"), WRONG_SHARD),
    "a shard of another kind": (_first_shard("pytorch_model.bin"), WRONG_SHARD),
    "a shard with NUL": (_first_shard("a\0.safetensors"), WRONG_SHARD),
    "a shard that is a number": (_first_shard(7), f"{NO_INDEX}|{WRONG_SHARD}"),
    "a shard that is a list": (_first_shard(["a"]), NO_INDEX),
    "no map": (lambda index: {"metadata": {}}, NO_INDEX),
    "a map of another kind": (lambda index: {"weight_map": 3}, NO_INDEX),
    "an empty map": (lambda index: {"weight_map": {}}, "too few|lacks"),
    "a list": (lambda index: [], NO_INDEX),
    "null": (lambda index: "text", NO_INDEX),
}  # fmt: skip
for _name, (_change, _says) in INDEX.items():
    case(f"index: {_name}", lambda w, c=_change: _index(w, c), _says)
case("index: sound", lambda w: _index(w, lambda index: None), "Name fruit", tolerated=True)

OWN_CODE = '{"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", null]}, "eos_token": "<|endoftext|>"}'
case(
    "model: code of its own, which is not run",
    lambda w: (
        w.file("model/own.py", "raise SystemExit('ran')"),
        _with(w, "tokenizer_config.json", OWN_CODE),
    )[1],
    "Name fruit",
    tolerated=True,
)
case(
    "model: no config.json",
    lambda w: _without(w, "config.json"),
    "has no config.json; pass a folder in Hugging Face",
)
case(
    "model: no weights",
    lambda w: _without(w, "model.safetensors"),
    "has no model.safetensors .*pass a folder",
)
case(
    "model: no folder",
    lambda w: w.eval(model=w.own / "none"),
    "--model: no such folder .*none': pass a folder",
)
case(
    "model: PyTorch weights",
    lambda w: (w.file("model/pytorch_model.bin", "x"), _without(w, "model.safetensors"))[1],
    "has only PyTorch weights .*convert them",
)
case(
    "model: a file", lambda w: w.eval(model=w.good / "rows.jsonl"), "--model: no such folder .*pass a folder"
)
case(
    "model: cut off",
    lambda w: _with(w, "model.safetensors", (w.good / "model/model.safetensors").read_bytes()[:-9]),
    "cut off .*fetch it again",
)
case(
    "model: a cut header",
    lambda w: _with(w, "model.safetensors", (w.good / "model/model.safetensors").read_bytes()[:99]),
    "cut off .*fetch it again",
)
case(
    "model: a folder for its weights",
    lambda w: (
        _without(w, "model.safetensors"),
        (w.own / "model/model.safetensors").mkdir(),
        w.eval(model=w.own / "model"),
    )[2],
    "has no model.safetensors .*pass a folder",
)
case(
    "model: a tokenizer too large",
    lambda w: w.eval(f"--tokenizer={_big(w)}"),
    "the tokenizer has 40. tokens, but the model's vocabulary only .*own",
)
case(
    "model: no tokenizer", lambda w: w.eval(model=_bare(w)), "--model: .*contains no tokenizer: pass a folder"
)
case(
    "run: a student that cannot be read",
    lambda w: w.train_on(w.good / "rows.jsonl", f"--config.student.model.path={w.model(n_layer=3)}"),
    "config.student.model.path: .*lacks 12 tensors",
)
case(
    "run: a teacher that cannot be read",
    lambda w: w.train_on(w.good / "rows.jsonl", f"--config.teacher.model.path={w.model(n_embd=4)}"),
    "config.teacher.model.path: .*has shape",
)
case(
    "run: a tokenizer of another vocabulary",
    lambda w: w.train_on(
        w.good / "rows.jsonl",
        f"--config.data.tokenizer={_big(w)}",
        f"--config.teacher.model.path={w.good / 'model'}",
    ),
    "config.teacher.model.*(other ids|tokenizer has)",
)
case(
    "run: a ranking model that is missing",
    lambda w: w.train("--config.curriculum.ranking_model=/none"),
    "config.curriculum.ranking_model: no such folder",
)
case(
    "run: a layer that the teacher lacks",
    lambda w: w.train("--config.student.model.init=teacher_layers", "--config.student.model.layers=7"),
    "config.student.model: layers: 7 is not among the teacher's 1",
)


def _big(world: World) -> Path:
    train_tokenizer([" ".join(f"w{i}x{i * 7}" for i in range(400))], 405).save_pretrained(world.own / "big")
    return world.own / "big"


def _bare(world: World) -> Path:
    folder = world.model()
    for file in folder.glob("tokenizer*"):
        file.unlink()
    return folder


# --- GGUF ------------------------------------------------------------------------------------------------------------


def _gguf(change: Callable[[bytearray], bytes | bytearray | None]) -> Callable[[World], list[str]]:
    def make(world: World) -> list[str]:
        data = bytearray((world.good / "model.gguf").read_bytes())
        changed = change(data)
        return world.eval(model=world.file("m.gguf", bytes(data if changed is None else changed)))

    return make


def _pack(at: int, code: str, value: int) -> Callable[[bytearray], None]:
    return lambda data: struct.pack_into(f"<{code}", data, at, value)


NOT_GGUF = "m.gguf is cut off or not a GGUF file .*fetch it again"
GGUF = {
    "empty": (lambda d: b"", NOT_GGUF),
    "wrong magic": (_pack(0, "I", 7), NOT_GGUF),
    "version 99": (_pack(4, "I", 99), "version 99 is not supported.*fetch it again"),
    "another byte order": (_pack(4, "I", 3 << 24), "version 50331648 is not supported.*fetch it again"),
    "2^63 tensors": (_pack(8, "Q", 1 << 63), NOT_GGUF),
    "2^63 fields": (_pack(16, "Q", 1 << 63), NOT_GGUF),
    "no tensors": (_pack(8, "Q", 0), "lacks token_embd.weight; convert the model again"),
    "a name of 2^60 bytes": (_pack(24, "Q", 1 << 60), NOT_GGUF),
    "an unknown type": (_pack(24 + 8 + 20, "I", 77), "unknown type 77 at byte .*fetch it again"),
    "cut in the header": (lambda d: d[:100], "ends within its header, at byte 100.*fetch it again"),
    "cut in the tensors": (lambda d: d[:-100], "its tensors end at byte .*fetch it again"),
    "only the magic": (lambda d: d[:4], NOT_GGUF),
    "zeros": (lambda d: bytes(len(d)), NOT_GGUF),
    "an unknown architecture": (lambda d: d.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0ggg\xc3\xa4"), "holds a 'gggä' model; only llama, qwen2, qwen3"),
    "text that is not UTF-8": (lambda d: d.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0\xff\xff\xff\xff\xff"), "cannot read general.architecture .*convert|cut off or not"),
    "no sizes": (lambda d: None, "lacks llama.embedding_length in its metadata; convert the model again"),
}  # fmt: skip
for _name, (_change, _says) in GGUF.items():
    # The tokenizer is the folder's, because the file has none.
    case(
        f"gguf: {_name}",
        lambda w, c=_change: [*_gguf(c)(w), f"--tokenizer={w.good / 'model'}"],
        _says,
    )
case(
    "gguf: no tokenizer",
    _gguf(lambda d: None),
    "--model: .*m.gguf has a None tokenizer .*name the model's tokenizer folder",
)
case("gguf: no file", lambda w: w.eval(model=w.own / "none.gguf"), "none.gguf.*(cut off|no such)")
