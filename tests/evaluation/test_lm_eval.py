"""A saved student in lm-evaluation-harness, as docs/evaluation.md has it; skipped where that is not installed."""

import importlib.util
import json
import subprocess
import sys

import jax
import pytest

from l2m_jax import models
from l2m_jax.data.tokenizer import train_tokenizer

TASK = """
task: capitals
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "The capital of {{country}} is"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""
ROWS = [
    {"country": "France", "choices": ["Paris", "Rome"], "answer": 0},
    {"country": "Italy", "choices": ["Paris", "Rome"], "answer": 1},
]


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("lm_eval", "torch")),
    reason="lm_eval or torch is not installed",
)
def test_a_student_is_scored(tmp_path):
    tokenizer = train_tokenizer(["The capital of France is Paris, of Italy Rome"] * 3, 300)
    config = models.random_config(models.Architecture(num_layers=1, hidden_size=16, num_heads=2), tokenizer)
    models.save(tmp_path / "student", config, models.init(config, jax.random.key(0)), tokenizer=tokenizer)
    (tmp_path / "capitals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "capitals.yaml").write_text(TASK.replace("FILE", str(tmp_path / "capitals.jsonl")))
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "--model=hf",
        f"--model_args=pretrained={tmp_path / 'student'}",
    ]
    command += [f"--include_path={tmp_path / 'tasks'}", "--tasks=capitals", "--device=cpu"]
    command += [f"--output_path={tmp_path / 'scores'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (tmp_path / "scores").rglob("results_*.json")
    assert json.loads(file.read_text())["results"]["capitals"]["acc,none"] in (0.0, 0.5, 1.0)
