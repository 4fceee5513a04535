"""The script on a small model with random weights: what it leaves, and that its figures are those of its answers."""

import json
import os
import statistics
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jax
import pytest
from rouge_score.rouge_scorer import RougeScorer

from l2m_jax import models
from l2m_jax.data.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
ROWS = [
    {"instruction": "Name a fruit.", "output": "the old apple", "category": "fruit"},
    {"instruction": "Name two fruits.", "output": ["an apple and a pear", "plums"], "category": "fruit"},
    {"instruction": "Say hello.", "output": "hello to you"},
]


def evaluate(folder: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "eval.py"), f"--model={folder / 'model'}", *flags]
    command += [f"--sets=mine={folder / 'rows.jsonl'}"]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=600, env={**os.environ, **environment}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a model, a set, and the model's evaluation in `scores`."""
    folder = tmp_path_factory.mktemp("eval")
    tokenizer = train_tokenizer(["the old apple and a pear, hello to you, name two fruits, plums"] * 3, 300)
    config = models.DecoderConfig(
        family="gpt2",
        vocab_size=len(tokenizer),
        valid_vocab_size=len(tokenizer),
        hidden_size=16,
        embed_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        intermediate_size=32,
        max_positions=320,
    )
    models.save(folder / "model", config, models.init(config, jax.random.key(0)), tokenizer=tokenizer)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    done = evaluate(folder, "--max_new_tokens=6", f"--output={folder / 'scores'}")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_scores_are_those_of_the_answers(folder):
    (found,) = json.loads((folder / "scores" / "results.json").read_text())["sets"]
    answers = [json.loads(line) for line in (folder / "scores" / "responses.jsonl").read_text().splitlines()]
    assert sorted({line["seed"] for line in answers}) == [10, 20, 30, 40, 50] and len(answers) == 3 * 5
    scorer = RougeScorer(["rougeL"], use_stemmer=True)

    def rouge_l(chosen):
        best = [
            max(scorer.score(r, a["response"])["rougeL"].fmeasure for r in a["references"]) for a in chosen
        ]
        return pytest.approx(100 * statistics.fmean(best))

    def of_seed(seed):
        return [line for line in answers if line["seed"] == seed]

    assert found["rouge_l"]["per_seed"] == [rouge_l(of_seed(seed)) for seed in (10, 20, 30, 40, 50)]
    assert set(found["categories"]) == {"fruit"}
    fruit = found["categories"]["fruit"]
    assert fruit["rows"] == 2 and fruit["exact_match"]["mean"] == 0.0
    assert fruit["rouge_l"]["mean"] == rouge_l([line for line in answers if line["category"] == "fruit"])
    assert f"{found['rouge_l']['mean']:.1f}" in (folder / "scores" / "report.md").read_text()


def test_the_win_rate_stands_in_the_report_and_the_key_nowhere(folder):
    """The judge always prefers A, so that every pair of verdicts is a tie."""
    keys = set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            keys.add(self.headers["Authorization"])
            payload = json.dumps(
                {"choices": [{"message": {"role": "assistant", "content": "[[A]]"}}]}
            ).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        done = evaluate(
            folder,
            "--max_new_tokens=6",
            f"--output={folder / 'scores'}",
            f"--baseline={folder / 'scores'}",
            "--judge_model=tester",
            f"--judge_url=http://127.0.0.1:{server.server_port}/v1",
            OPENAI_API_KEY="sk-secret",
        )
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stdout + done.stderr
    rate = json.loads((folder / "scores" / "win_rates.json").read_text())["mine"]
    assert (rate["wins"], rate["ties"], rate["losses"], rate["rate"]) == (0, 15, 0, 50.0)
    assert (
        "50.0% (95% interval 50.0 to 50.0): 0 wins, 15 ties" in (folder / "scores" / "report.md").read_text()
    )
    assert keys == {"Bearer sk-secret"}
    files = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert not any(b"sk-secret" in content for content in files)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--max_new_tokens=320",), "--max_new_tokens 320: the model's 320 positions leave no room"),
        (("--judge_model=x",), "--judge_model and --baseline: a win rate needs both"),
        (("--max_new_tokens=6", "--seeds=ten"), "--seeds ten: expected whole numbers"),
    ],
)
def test_bad_input_ends_in_one_sentence(folder, tmp_path, flags, said):
    done = evaluate(folder, *flags, f"--output={tmp_path}")
    assert done.returncode != 0 and said in done.stderr and "Traceback" not in done.stderr
