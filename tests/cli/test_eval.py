"""The command on a small model with random weights: what it leaves, and that its figures are those of its answers."""

import json
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
from l2m_jax.cli.main import main
from l2m_jax.data.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
ROWS = [
    {"instruction": "Name a fruit.", "output": "the old apple", "category": "fruit"},
    {"instruction": "Name two fruits.", "output": ["an apple and a pear", "plums"], "category": "fruit"},
    {"instruction": "Say hello.", "output": "hello to you"},
]


def arguments(folder: Path, *flags: str) -> list[str]:
    return [f"--model={folder / 'model'}", *flags, f"--sets=mine={folder / 'rows.jsonl'}", "--devices=2"]


@pytest.fixture(autouse=True)
def _one_process(monkeypatch):
    """JAX looks for other processes only before its first computation, which another test has done."""
    monkeypatch.setattr("l2m_jax.multihost.start", lambda devices: None)


def evaluate(folder: Path, output: Path, *flags: str) -> dict:
    """The scores of the only set."""
    main(["eval", *arguments(folder, *flags), f"--output={output}"])
    (found,) = json.loads((output / "results.json").read_text())["sets"]
    return found


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
    flags = arguments(folder, "--max_new_tokens=6", f"--output={folder / 'scores'}")
    command = [sys.executable, str(ROOT / "eval.py"), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
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


def test_a_sharded_model_gives_the_same_responses(folder, tmp_path):
    flags = "--temperature=0", "--max-new-tokens=6", "--seeds=10"
    for mapping in ("pmap", "fsdp"):
        evaluate(folder, tmp_path / mapping, *flags, f"--mapping={mapping}")
    found = [(tmp_path / mapping / "responses.jsonl").read_text() for mapping in ("pmap", "fsdp")]
    assert found[0] == found[1] and len(found[0].splitlines()) == 3


def test_long_prompts_are_left_out_unless_they_are_to_be_truncated(folder, tmp_path):
    long = {"instruction": "Name an apple. " * 100, "output": "a pear"}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, long]))
    (tmp_path / "model").symlink_to(folder / "model")
    flags = "--max-new-tokens=2", "--seeds=10"
    found = evaluate(tmp_path, tmp_path / "dropped", *flags)
    assert (found["rows"], found["left_out"]) == (3, 1)
    found = evaluate(tmp_path, tmp_path / "truncated", *flags, "--truncate")
    assert (found["rows"], found["left_out"]) == (4, 0)


def test_the_win_rate_stands_in_the_report_and_the_key_nowhere(folder, monkeypatch, capfd):
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
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    try:
        evaluate(
            folder,
            folder / "scores",
            "--max_new_tokens=6",
            f"--baseline={folder / 'scores'}",
            "--judge_model=tester",
            f"--judge_url=http://127.0.0.1:{server.server_port}/v1",
        )
    finally:
        server.shutdown()
        server.server_close()
    rate = json.loads((folder / "scores" / "win_rates.json").read_text())["mine"]
    assert (rate["wins"], rate["ties"], rate["losses"], rate["rate"]) == (0, 15, 0, 50.0)
    assert (
        "50.0% (95% interval 50.0 to 50.0): 0 wins, 15 ties" in (folder / "scores" / "report.md").read_text()
    )
    assert keys == {"Bearer sk-secret"}
    files = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert not any(b"sk-secret" in content for content in files)
    assert not any("sk-secret" in output for output in capfd.readouterr())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--max_new_tokens=320",), "max_new_tokens: 320 leaves no room for a prompt within the model's 320"),
        (("--judge_model=x",), "--judge-model and --baseline: a win rate needs both"),
        (("--judge-model=x", "--baseline=nowhere"), "nowhere: no such file; give responses.jsonl"),
        (("--seeds=ten",), "argument --seeds: expected whole numbers such as 0,1,2, got 'ten'"),
        (("--top_p=nan",), "--top_p"),
        (("--temperature=-1",), "--temperature"),
        (("--rows=-1",), "--rows: -1 must be 0 or more"),
        (("--devices=99",), "config.devices.count: 99 devices requested"),
        (("--mapping=tp",), "argument --mapping: invalid choice: 'tp'"),
    ],
)
def test_bad_input_ends_in_one_sentence(folder, tmp_path, refused, flags, said):
    given = arguments(folder, *flags, f"--output={tmp_path}")
    if any("devices" in flag for flag in flags):
        given.remove("--devices=2")
    assert refused("eval", *given).startswith(said)
