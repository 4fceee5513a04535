"""Wrong settings, flags and judges: the rest of the table in `bad_inputs`, in the same form."""

import json
import os

from bad_inputs import ROOT, TINY, case, json_lines

# --- Overrides on the command line -----------------------------------------------------------------------------------

OVERRIDES = {
    "seed=abc": "config.seed: expected a whole number, got 'abc'",
    "seed=1.5": "config.seed: expected a whole number, got '1.5'",
    "seed=": "config.seed: expected a whole number, got ''",
    "seed=-1": "config.seed: -1 must be 0 or more",
    "seed=" + "9" * 30: "config.seed: 9+.*9 must be 0 or more and below 2..32",
    "seed=" + "9" * 5000: "config.seed: expected a whole number, got '9+",
    "sede=1": "config.sede: no such setting .did you mean 'seed'",
    "data=1": "config.data: a group of settings.*set config.data.source, say",
    "data.nothing=1": "config.data.nothing: no such setting .known: source",
    "seed.x=1": "config.seed.x: no such setting .config.seed is a single setting",
    "=1": "config.: no such setting .known: seed",
    ".=1": "config.: no such setting",
    "method=l2n": "config.method: no method 'l2n' .did you mean 'l2m'",
    "method=": "config.method: no method '' .known: ",
    "baselines=sft,x": "config.baselines: no method 'x' .*known: ",
    "baselines=sft,sft": "config.baselines: 'sft' is named twice; each method is trained once",
    "baselines=" + "(" * 3000: "config.baselines: no method|named twice|no such",
    "training.learning_rate=fast": "config.training.learning_rate: expected a number, got 'fast'",
    "training.learning_rate=nan": "config.training.learning_rate: nan must be a finite number",
    "training.learning_rate=inf": "config.training.learning_rate: inf must be a finite number",
    "training.learning_rate=0": "config.training.learning_rate: 0.0 must be greater than 0",
    "training.learning_rate=1e30": r"config.training.learning_rate: 1e\+30 must be greater than 0 and below",
    "training.batch_size=0": "config.training.batch_size: 0 must be greater than 0",
    "training.warmup_fraction=2": "config.training.warmup_fraction: 2.0 must be between 0 and 1",
    "training.dropout=1": "config.*dropout: 1.0 must be below 1",
    "training.adam_b1=1": "config.training.adam_b1: 1.0 must be at least 0 and below 1",
    "data.truncate=maybe": "config.data.truncate: expected true or false, got 'maybe'",
    "data.source=nowhere": "config.data.source: 'nowhere' is not one of files, synthetic",
    "data.max_length=2": "config.data.max_length: 2 must be 3 or more",
    "data.max_prompt_length=5000": "config.data.max_prompt_length: 5000 must be below max_length",
    "data.bos=always": "config.data.bos: 'always' is not one of none, training",
    "data.synthetic.train=0": "config.data.synthetic.train: 0 must be 1 or more",
    "data.synthetic.tokenizer_size=5": "config.data.synthetic.tokenizer_size: 5 must be",
    "curriculum.stages=0": "config.curriculum.stages: 0 must be",
    "curriculum.alpha=2": "config.curriculum.alpha: 2.0 must be between 0 and 1|config.curriculum.alpha",
    "curriculum.subsets=(9,)": "config.curriculum.subsets: 9",
    "curriculum.subsets=a,b": "config.curriculum.subsets: expected a whole number, got 'a'",
    "curriculum.ranking=size": "config.curriculum.ranking: 'size' is not one of fusion",
    "overrides.alpha=0.5": "config.overrides.alpha: l2m is staged.*set that",
    "overrides.divergence=js": "config.overrides.divergence: 'js' is not one of|config.overrides",
    "teacher.signal=loud": "config.teacher.signal: 'loud' is not one of store, live",
    "teacher.store_dtype=int4": "config.teacher.store_dtype: 'int4' is not one of float32",
    "teacher.store_top_k=-1": "config.teacher.store_top_k: -1 must be 0 or more",
    "teacher.store_top_k=100000": "config.teacher.store_top_k: 100000 is not below the \\d+ tokens",
    "teacher.model.init=teacher_layers": "config.teacher.model.*layers: empty|teacher_layers",
    "teacher.compute.dtype=fp8": "config.teacher.compute.dtype: 'fp8' is not one of auto",
    "teacher.compute.remat=all": "config.teacher.compute.remat: 'all' is not one of none",
    "student.model.architecture.hidden_size=15": "hidden_size: 15 must be a multiple of num_heads 2",
    "student.model.architecture.num_layers=" + "9" * 12: "num_layers: 9+ must be greater than 0 and below",
    "student.model.architecture.num_layers=100000": "num_layers: 100000 must be at most 16384",
    "student.model.architecture.family=bert": "config.student.model.architecture.family: 'bert' is not one of",
    "student.model.architecture.num_kv_heads=3": "num_kv_heads: 3 must divide num_heads 2",
    "student.model.path=owner/name": "cannot download|config.student.model",
    "student.seed=-2": "config.student.seed: -2 must be -1 or more",
    "sampling.top_p=0": "config.sampling.top_p: 0.0 must be greater than 0 and at most 1",
    "sampling.temperature=-1": "config.sampling.temperature: -1.0 must be 0 or more",
    "sampling.min_new_tokens=9": "config.sampling.max_new_tokens: 4 must be at least min_new_tokens",
    "sampling.max_new_tokens=192": "config.sampling.max_new_tokens: 192 leaves no room .*lower it",
    "evaluation.seeds=1,1": "config.evaluation.seeds: 1 is given twice; each seed must be different",
    "evaluation.seeds=": "config.evaluation.seeds: empty; give at least one seed",
    "evaluation.seeds=4294967296": "config.evaluation.seeds: 4294967296 must be at least 0 and below",
    "evaluation.rows=-1": "config.evaluation.rows: -1 must be 0 or more",
    "evaluation.validations=0": "config.evaluation.validations: 0 must be 1 or more",
    "evaluation.select=worst": "config.evaluation.select: 'worst' is not one of best, last",
    "devices.mapping=tp": "config.devices.mapping: 'tp' is not one of pmap, fsdp",
    "devices.count=99": "config.devices.count: 99 devices requested",
    "devices.coordinator=node1": "config.devices.coordinator: 'node1' is not host:port, as in",
    "chunk_size=0": "config.chunk_size: 0 must be greater than 0",
    "max_shapes=-3": "config.max_shapes: -3 must be greater than 0",
    "checkpoint_minutes=-1": "config.checkpoint_minutes: -1.0 must be 0 or more",
    "data.max_length=1000": "config.data.max_length: 1000 exceeds the teacher's 192 positions; lower it",
}
for _override, _says in OVERRIDES.items():
    case(f"flag: --config.{_override[:40]}", lambda w, o=_override: w.train(f"--config.{o}"), _says)

# --- Config files ----------------------------------------------------------------------------------------------------

HEAD = "from l2m_jax.config import defaults\n"
PYTHON = {
    "syntax": ("def get_config(:", "c.py: line 1: not valid Python"),
    "NUL": ("a = '\0'", "c.py: .*(not valid Python|null bytes)"),
    "raises": (f"{HEAD}def get_config():\n  1/0", "c.py: line 3: ZeroDivisionError: division by zero"),
    "exits": ("import sys\nsys.exit(0)", "c.py: line 2: SystemExit: 0"),
    "recurses": ("def get_config():\n  return get_config()", "c.py: line 2: RecursionError"),
    "no import": ("import nothing_like_this", "c.py: line 1: ModuleNotFoundError: No module named"),
    "no function": ("x = 1", r"c.py: no function get_config\(variant"),
    "no function but a value": ("get_config = 3", "c.py: .*not callable"),
    "returns None": ("def get_config(): pass", "c.py: get_config must return a ConfigDict.*got None"),
    "returns a dict": ("def get_config(): return {'a': 1}", "c.py: get_config must return a ConfigDict"),
    "unknown setting": (f"{HEAD}def get_config():\n  c = defaults()\n  c.sede = 1\n  return c", "config.sede: no such setting"),
    "unknown group": ("from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({'x': {}})", "config.x: no such setting .known"),
    "wrong type": ("from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({'seed': 'x'})", "config.seed: expected int, got 'x'"),
    "true for a number": ("from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({'seed': True})", "config.seed: expected int, got True"),
    "a list for a group": ("from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({'data': [1]})", "config.data: expected settings by name, got"),
    "text for a tuple": ("from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({'baselines': 'sft'})", "config.baselines: expected a tuple such as"),
    "a huge value": ("from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({'seed': 'x' * 10**7})", "config.seed: expected int, got 'xxx"),
    "infinite": ("from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({'checkpoint_minutes': float('inf')})", "config.checkpoint_minutes: inf must be a finite number"),
    "a huge number": ("from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({'checkpoint_minutes': 10**400})", "config.checkpoint_minutes: "),
    "empty": ("", r"c.py: no function get_config\(variant"),
}  # fmt: skip
for _name, (_text, _says) in PYTHON.items():
    case(f"Python config: {_name}", lambda w, t=_text: w.train(config=w.file("c.py", t)), _says)

YAML = {
    "empty": ("", "c.yaml: expected settings by name, such as 'method: l2m', got"),
    "a list": ("- a", "c.yaml: expected settings by name, such as 'method: l2m', got"),
    "text": ("hello", "c.yaml: expected settings by name, such as 'method: l2m', got 'hello'"),
    "syntax": ("a: [1", "c.yaml: line 1: not valid YAML"),
    "tab": ("data:\n\tseed: 1", "c.yaml: line 2: not valid YAML"),
    "Latin-1": (b"method: caf\xe9", "c.yaml: 'utf-8' codec can't decode"),
    "UTF-16": ("method: l2m".encode("utf-16"), "c.yaml: 'utf-8' codec can't decode"),
    "NUL": ("method: \0", "c.yaml: .*not allowed"),
    "twice": ("seed: 1\nseed: 2", "c.yaml: line 2: 'seed' is set twice; keep one of them"),
    "no preset": ("preset: other", "c.yaml: preset: no preset 'other' .known: paper, minillm"),
    "preset is a list": ("preset: [a]", r"c.yaml: preset: no preset \['a'\] .known: paper"),
    "unknown setting": ("sede: 1", "config.sede: no such setting .did you mean 'seed'"),
    "wrong type": ("seed: [1]", r"config.seed: expected a whole number, got \['1'\]"),
    "a group with a value": ("data: 5", "config.data: a group of settings.*set config.data.source"),
    "nothing for a number": ("seed:", "config.seed: expected a whole number, got ''"),
    "a setting with names": ("seed: {a: 1}", "config.seed.a: no such setting .config.seed is a single"),
    "list as a name": ("? [a]\n: 1", "c.yaml: line 1: not valid YAML .found unhashable key"),
    "Python objects": ("seed: !!python/object/apply:os.system ['touch pwned']", "config.seed: expected a whole number"),
    "deep": ("[" * 2_000, "c.yaml: nested too deeply; settings have at most"),
    "aliases by the billion": (
        "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
        + "seed: *a11",
        "config.(seed: expected a whole number|a0: no such setting)",
    ),
    "an alias of itself": ("seed: &a [*a]", "c.yaml: |config.seed: expected a whole number"),
    "unknown alias": ("seed: *nothing", "c.yaml: line 1: not valid YAML .found undefined alias"),
    "two documents": ("seed: 1\n---\nseed: 2", "c.yaml: line 2: not valid YAML"),
    "1 MB": ("#" * 1_000_000, "c.yaml: 1,000,000 bytes; a file of settings has at most"),
    "binary": (bytes(range(256)), "c.yaml: 'utf-8' codec can't decode|c.yaml: .*not allowed"),
}  # fmt: skip
for _name, (_text, _says) in YAML.items():
    case(f"YAML config: {_name}", lambda w, t=_text: w.train(config=w.file("c.yaml", t)), _says)


def _yaml_of_tiny(text: str) -> str:
    return (
        "data: {source: synthetic, max_length: 160, synthetic: {train: 48, validation: 4, test: 4, tokenizer_size: 400}}\n"
        "sampling: {max_new_tokens: 4}\ndevices: {count: 1}\n" + text
    )


case("YAML config: a byte order mark", lambda w: w.train(config=w.file("c.yaml", "\ufeff" + _yaml_of_tiny(""))), "", tolerated=True)  # fmt: skip
case("YAML config: CRLF", lambda w: w.train(config=w.file("c.yaml", _yaml_of_tiny("").replace("\n", "\r\n"))), "", tolerated=True)  # fmt: skip

CONFIG_FLAG = {
    "missing": (lambda w: ["train", f"--workdir={w.workdir}"], "required: --config .see l2m train --help"),
    "no file": (lambda w: w.train(config=w.own / "no.py"), "--config .*no.py: no such file"),
    "a folder": (lambda w: w.train(config=w.good), "--config .*: no such file"),
    "another kind": (lambda w: w.train(config=w.file("c.json", "{}")), "expected a Python file .*YAML"),
    "a variant of YAML": (lambda w: w.train(config=f"{w.file('c.yaml', 'seed: 1')}:x"), "a YAML file has no variants"),
    "an unknown variant": (lambda w: w.train(config=f"{ROOT / 'configs/quickstart.py'}:x"), "no variant 'x' of .*known: compare"),
    "a variant without a parameter": (lambda w: w.train(config=f"{w.file('c.py', 'def get_config(): pass')}:x"), "has no parameter, so there are no variants"),
    "empty": (lambda w: w.train(config=""), "--config : no such file"),
    "unreadable YAML": (lambda w: (os.symlink("/proc/self/mem", w.own / "c.yaml"), w.train(config=w.own / "c.yaml"))[1], "c.yaml: Input/output error"),
}  # fmt: skip
for _name, (_make, _says) in CONFIG_FLAG.items():
    case(f"--config: {_name}", _make, _says)

# --- Flags of the commands -------------------------------------------------------------------------------------------

FLAGS = {
    "no command": (lambda w: [], "required: COMMAND .see l2m --help"),
    "unknown command": (lambda w: ["trian"], "invalid choice: 'trian'.*see l2m --help"),
    "unknown flag": (lambda w: w.train("--sed=1"), "unrecognized arguments: --sed=1 .see l2m train --help"),
    "no workdir": (lambda w: ["train", f"--config={TINY}"], "required: --workdir .see l2m train --help"),
    "workdir is a file": (lambda w: [*w.train(), f"--workdir={w.good / 'rows.jsonl'}"], "--workdir: '.*rows.jsonl' is a file, not a folder; choose another"),
    "workdir below a file": (lambda w: [*w.train(), f"--workdir={w.good / 'rows.jsonl'}/run"], "--workdir: .*is a file, not a folder; choose another"),
    "shared is a file": (lambda w: w.train(f"--shared={w.good / 'rows.jsonl'}"), "--shared: .*is a file, not a folder; choose another"),
    "not UTF-8": (lambda w: w.train("--shared=a\udcff"), "not UTF-8; rename the file"),
    "override without value": (lambda w: w.train("--config.seed"), "--config.seed: has no value; give one"),
    "work of other settings": (lambda w: (w.file("run/teacher/inputs.json", json.dumps({"key": "x", "finished": False, "inputs": {}, "files": {}})), w.train())[1], "Choose another --workdir .*move these away"),
    "a record that is cut off": (lambda w: (w.file("run/teacher/inputs.json", '{"key"'), w.train())[1], "teacher/inputs.json: cannot read what .*delete"),
    "a record of another kind": (lambda w: (w.file("run/teacher/inputs.json", "[]"), w.train())[1], "teacher/inputs.json: cannot read what .*delete"),
    "a record with wrong types": (lambda w: (w.file("run/teacher/inputs.json", '{"key": 1, "finished": 2, "inputs": 3, "files": 4}'), w.train())[1], "teacher/inputs.json: cannot read what .*delete"),
    "work without a record": (lambda w: (w.file("run/teacher/x.bin", "x"), w.train())[1], "no record of its inputs .*move these away"),
    "eval, no model": (lambda w: ["eval", f"--output={w.workdir}"], "required: --model .see l2m eval --help"),
    "eval, an unknown set": (lambda w: w.eval(sets="nothing"), "'nothing' is neither an evaluation set .*JSON lines"),
    "eval, a set twice": (lambda w: w.eval(f"--sets={w.good / 'rows.jsonl'}"), "--sets: two of them are called 'rows'; name one"),
    "eval, no seeds": (lambda w: w.eval("--seeds="), "--seeds: expected whole numbers such as 0,1,2, got ''"),
    "eval, negative seed": (lambda w: w.eval("--seeds=-4"), "--seeds: -4 must be at least 0 and below"),
    "eval, negative rows": (lambda w: w.eval("--rows=-1"), "--rows: -1 must be 0 or more"),
    "eval, too many rows": (lambda w: w.eval(f"--rows={10**30}"), "--rows: 10+ must be 0 or more and below"),
    "eval, rows are text": (lambda w: w.eval("--rows=all"), "argument --rows: invalid int value: 'all' .see l2m eval"),
    "eval, top_p": (lambda w: w.eval("--top-p=7"), "--top_p: 7.0 must be greater than 0 and at most 1"),
    "eval, no room": (lambda w: w.eval("--max-new-tokens=96"), "max_new_tokens: 96 leaves no room .*lower it"),
    "eval, prompt length": (lambda w: w.eval("--max-prompt-length=-1"), "--max_prompt_length: -1 must be 0 or more"),
    "eval, dtype": (lambda w: w.eval("--dtype=int4"), "argument --dtype: invalid choice: 'int4'"),
    "eval, devices": (lambda w: w.eval("--devices=-1"), "--devices: -1 must be 0 or more"),
    "eval, output is a file": (lambda w: w.eval(f"--output={w.good / 'rows.jsonl'}"), "--output: .*is a file, not a folder; choose another"),
    "eval, tokenizer": (lambda w: w.eval("--tokenizer=/none"), "--tokenizer: no such folder '/none': pass a folder"),
    "eval, a judge alone": (lambda w: w.eval("--judge-model=x"), "--judge-model and --baseline: a win rate needs both"),
    "sweep, an unknown method": (lambda w: ["sweep", f"--config={TINY}", "--methods=l2n", f"--workdir={w.workdir}"], "no method 'l2n' .did you mean"),
    "sweep, no methods": (lambda w: ["sweep", f"--config={TINY}", f"--workdir={w.workdir}"], "one of the arguments --methods --preset --claims is required"),
    "sweep, empty methods": (lambda w: ["sweep", f"--config={TINY}", "--methods=,", f"--workdir={w.workdir}"], "argument --methods: expected one or more.*see l2m sweep"),
    "sweep, a seed": (lambda w: ["sweep", f"--config={TINY}", "--methods=sft", "--seeds=-1", f"--workdir={w.workdir}"], "training seed -1: must be 0 or more"),
    "sweep, a task": (lambda w: ["sweep", f"--config={TINY}", "--methods=sft", "--task=9", f"--workdir={w.workdir}"], "--task 9: the runs are numbered from 0 to 2"),
    "sweep, a preset": (lambda w: ["sweep", f"--config={TINY}", "--preset=table9", f"--workdir={w.workdir}"], "argument --preset: invalid choice: 'table9'"),
    "sweep, no table yet": (lambda w: ["sweep", f"--config={TINY}", "--methods=sft", "--table", f"--workdir={w.workdir}"], "none of the 3 runs is finished"),
    "sweep, a result that is cut off": (lambda w: (w.file("run/sft/seed0/result.json", "{"), ["sweep", f"--config={TINY}", "--methods=sft", "--table", f"--workdir={w.workdir}"])[1], "none of the 3 runs is finished"),
    "sweep, a result of another kind": (lambda w: (w.file("run/sft/seed0/result.json", "[]"), ["sweep", f"--config={TINY}", "--methods=sft", "--table", f"--workdir={w.workdir}"])[1], "none of the 3 runs is finished"),
    "plan, a target": (lambda w: ["plan", f"--config={TINY}", "--target=a100"], "--target: no target 'a100' .did you mean 'a100_80gb'"),
    "plan, no devices": (lambda w: ["plan", f"--config={TINY}", "--target=cpu", "--devices=0"], "--devices: 0 must be between 1 and"),
    "plan, a billion devices": (lambda w: ["plan", f"--config={TINY}", "--target=cpu", "--devices=1000000000"], "--devices: 1000000000 must be between"),
    "plan, output is a folder": (lambda w: ["plan", f"--config={TINY}", f"--json={w.good}"], "--json: .*is a folder; name a file"),
    "bench, a suite": (lambda w: ["bench", "--suite=speed"], "--suite speed: no such suite .known: loss"),
    "bench, no suite": (lambda w: ["bench"], "required: --suite .see l2m bench --help"),
    "bench, empty suite": (lambda w: ["bench", "--suite="], "argument --suite: expected one or more.*see l2m bench"),
    "bench, repeats": (lambda w: ["bench", "--suite=loss", "--repeats=0"], "--repeats 0: must be at least 1"),
    "bench, no data": (lambda w: ["bench", "--suite=rouge"], "--data: suite rouge needs it"),
    "bench, data that is missing": (lambda w: ["bench", "--suite=rouge", "--data=/none.jsonl"], "--data /none.jsonl: no such file .JSON lines"),
}  # fmt: skip
for _name, (_make, _says) in FLAGS.items():
    case(f"flags: {_name}", _make, _says)

# --- Judges ----------------------------------------------------------------------------------------------------------

NO_ANSWER = "judge 'tester' at 127.0.0.1:.* does not answer .*check its model name, URL and key"
JUDGES = {
    "500": NO_ANSWER,
    "401": NO_ANSWER,
    "404": NO_ANSWER,
    "hang": NO_ANSWER,
    "closes": NO_ANSWER,
    "empty": NO_ANSWER,
    "text": NO_ANSWER,
    "html": NO_ANSWER,
    "list": NO_ANSWER,
    "null": NO_ANSWER,
    "no_choices": f"not a chat completion.*{NO_ANSWER[-20:]}",
    "number": f"not a chat completion.*{NO_ANSWER[-20:]}",
    "object": f"not a chat completion.*{NO_ANSWER[-20:]}",
    "deep": NO_ANSWER,
    "redirect": NO_ANSWER,
}
for _path, _says in JUDGES.items():
    case(f"judge: {_path}", lambda w, p=_path: w.judge(f"{w.server}/{p}/v1"), _says)
for _path, _says in {
    "good": "0 wins, 2 ties",
    "refusal": "2 with a verdict that could not be read",
    "prose": "2 with a verdict that could not be read",
    "surrogate": "2 with a verdict that could not be read",
}.items():
    case(f"judge: {_path}", lambda w, p=_path: w.judge(f"{w.server}/{p}/v1"), _says, tolerated=True)


def _baseline(content: bytes) -> "object":
    return lambda w: w.judge(w.server, baseline=w.file("base/responses.jsonl", content).parent)


LINE = {"set": "s", "id": "0", "seed": 1, "prompt": "Name fruit 0.", "response": "a"}
JUDGE_FLAGS = {
    "refused connection": (lambda w: w.judge("http://127.0.0.1:9/v1"), NO_ANSWER.replace("127.0.0.1:.*", "127.0.0.1:9")),
    "no URL": (lambda w: w.judge("localhost:8000/v1"), "judge: 'localhost:8000/v1' is not a URL such as http"),
    "a wrong port": (lambda w: w.judge("http://localhost:x/v1"), "judge: 'http://localhost:x/v1' is not a URL such as"),
    "another scheme": (lambda w: w.judge("file:///etc/passwd"), "judge: 'file:///etc/passwd' is not a URL such as"),
    "no name": (lambda w: w.judge(w.server, "--judge-model="), "judge: '' is not the name of a model"),
    "no baseline": (lambda w: w.judge(w.server, baseline=w.own), "responses.jsonl: no such file; give responses.jsonl"),
    "an empty baseline": (_baseline(b""), "responses.jsonl has no answers; give responses.jsonl"),
    "a baseline that is cut off": (_baseline(b'{"set": "s"'), "line 1: not JSON"),
    "a baseline of numbers": (_baseline(b"1\n2\n"), "line 1: expected an object with names, got 1"),
    "a baseline without responses": (_baseline(b'{"set": "s", "id": "0", "seed": 1, "prompt": "p"}'), "line 1: response: expected text, got None"),
    "a baseline with another id": (_baseline(json_lines([{**LINE, "id": 5}])), "line 1: id: expected text, got 5"),
    "a baseline with an answer twice": (_baseline(json_lines([LINE, LINE])), "line 2: several answers to one prompt .*different ids"),
    "another baseline": (_baseline(json_lines([{**LINE, "set": "t"}])), "contain answers to different prompts .*same sets, rows and seeds"),
}  # fmt: skip
for _name, (_make, _says) in JUDGE_FLAGS.items():
    case(f"judge: {_name}", _make, _says)
