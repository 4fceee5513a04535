"""Every case of the table ends in one sentence with status 2, or is read correctly, and nothing is trained."""

import functools
import json
import os
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import bad_chats  # noqa: F401
import bad_settings  # noqa: F401  (adds its cases to the table)
from bad_inputs import CASES, ROOT, Case, World, make_good

from l2m_jax.cli.main import main

SENTINEL = "sk-sentinel-7b1f"
HANG = 0.2  # seconds that a judge may take in these tests
SCORES = {"mean": 1.0, "std": 0.0, "per_seed": [1.0]}
RESULTS = {
    "made_from": "x",
    "seeds": [1],
    "rules": {},
    "sets": [
        {
            "name": "s",
            "title": "s",
            "rows": 2,
            "left_out": 0,
            "unreportable": False,
            "rouge_l": SCORES,
            "exact_match": SCORES,
            "response_tokens": 1.0,
            "categories": {},
        }
    ],
}
REPLIES = {
    "good": {"content": "[[A]]"},
    "refusal": {"content": None, "refusal": "I cannot judge this."},
    "prose": {"content": "Both are fine."},
    "surrogate": {"content": "A \ud800 reply"},
    "number": {"content": 5},
    "object": {"content": {"verdict": "[[A]]"}},
}
BODIES = {
    "empty": b"",
    "text": b'"fine"',
    "html": b"<html>504</html>",
    "list": b"[1, 2]",
    "null": b"null",
    "no_choices": b'{"choices": []}',
    "deep": b"[" * 100_000,
}


class Reached(BaseException):
    """A command got as far as training or answering."""


class _Judge(BaseHTTPRequestHandler):
    requests: ClassVar[list[str]] = []

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        kind = self.path.split("/")[1]
        self.requests.append(kind)
        if kind == "hang":
            time.sleep(3 * HANG)
        if kind in ("closes", "hang"):
            self.connection.close()
            return
        if kind in REPLIES:
            body = json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", **REPLIES[kind]}}]})
            self._answer(200, body.encode())
        elif kind in BODIES:
            self._answer(200, BODIES[kind])
        else:
            self._answer(
                302 if kind == "redirect" else int(kind), f"no: {self.headers['Authorization']}".encode()
            )

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("retry-after-ms", "1")
        if status == 302:
            self.send_header("Location", "http://127.0.0.1:9/v1")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format, *args):
        pass


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    make_good(folder)
    return folder


@pytest.fixture(scope="module")
def server():
    started = ThreadingHTTPServer(("127.0.0.1", 0), _Judge)
    started.daemon_threads = True
    threading.Thread(target=started.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{started.server_port}"
    started.shutdown()
    started.server_close()


@pytest.fixture
def world(good, server, tmp_path, monkeypatch, request) -> World:
    """No training and no generation: reaching either is noted instead."""
    from l2m_jax import multihost
    from l2m_jax.evaluation.judge import Judge
    from l2m_jax.evaluation.protocol import Results
    from l2m_jax.run import evaluation, folder_evaluation, pipeline

    reached = {}

    def prepare(config, artefacts, context):
        reached["rows"] = [
            row for c in artefacts.corpora.values() for row in _texts(pipeline.data.open_corpus(c))
        ]
        raise Reached

    def evaluate(generator, sets, *args, **kwargs):
        reached["rows"] = [text for found in sets for text in found.texts]
        raise Reached

    def evaluated(asked, devices, output):
        output.mkdir(parents=True)
        (output / "responses.jsonl").write_bytes((good / "scores" / "responses.jsonl").read_bytes())
        return Results.from_json(RESULTS)

    monkeypatch.setattr(multihost, "start", lambda devices: None)
    monkeypatch.setattr(pipeline, "_prepare", prepare)
    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    timeout = HANG if "hang" in request.node.name else 60.0
    monkeypatch.setattr(folder_evaluation, "Judge", functools.partial(Judge, timeout=timeout, retries=1))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", SENTINEL)
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    world = World(good, tmp_path, server)
    world.reached = reached  # pyright: ignore[reportAttributeAccessIssue]
    world.answer = lambda: monkeypatch.setattr(folder_evaluation, "evaluate_folder", evaluated)  # pyright: ignore
    return world


def _texts(corpus) -> list[str]:
    return [f"{row.id} {row.instruction} {row.input}" for row in map(corpus.row, range(len(corpus)))]


def _finish(arguments: list[str]) -> int | str | None:
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code
    except Reached:
        return "reached"
    return 0


def _trained(folder: Path) -> list[Path]:
    """Weights and checkpoints below a work directory."""
    return [p for p in folder.rglob("*") if p.name == "model.safetensors" or "checkpoints" in p.parts]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case, world: World, capsys):
    if case.name.startswith("judge: "):
        world.answer()
    _Judge.requests.clear()
    arguments = case.make(world)
    capsys.readouterr()
    status = _finish(arguments)
    said = capsys.readouterr()
    assert not _trained(world.workdir)
    assert SENTINEL not in said.out + said.err
    assert not any(
        SENTINEL.encode() in p.read_bytes()
        for p in world.own.rglob("*")
        if p.is_file() and not p.is_symlink()
    )
    if case.tolerated:
        assert status in (0, "reached"), said.err
        read = "\n".join(world.reached.get("rows", [said.out]))
        assert case.says in read
        return
    assert status == 2, said.err or status
    lines = said.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), said.err
    assert re.search(case.says, lines[0]), lines[0]
    assert len(lines[0]) < 2100 and "Traceback" not in said.out
    assert len(_Judge.requests) <= 8  # four questions, each asked twice


def test_there_are_200_cases_with_different_names():
    assert len(CASES) >= 200 and len({case.name for case in CASES}) == len(CASES)
    assert sum(not case.tolerated for case in CASES) >= 200


@pytest.mark.parametrize("name", ["row: not JSON", "flags: workdir is a file"])
def test_in_a_process_of_its_own(name, good, tmp_path):
    (case,) = [case for case in CASES if case.name == name]
    arguments = case.make(World(good, tmp_path))
    command = [sys.executable, "-m", "l2m_jax.cli.main", *map(str, arguments)]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and re.fullmatch(f"error: .*{case.says}.*\n", done.stderr), done.stderr


@pytest.mark.parametrize("key", ["", "sk-two\nlines", "sk-cl\u00e9"])
def test_a_wrong_key_is_refused_and_not_shown(key, world, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    url = [f"--judge-url={world.server}/good/v1"] if key else []
    arguments = world.eval("--judge-model=tester", f"--baseline={world.good / 'scores'}", *url)
    assert _finish(arguments) == 2
    said = capsys.readouterr().err
    assert re.fullmatch("error: (OPENAI_API_KEY: .*set it to the key alone|.*set OPENAI_API_KEY.*)\n", said)
    assert not key or key not in said
