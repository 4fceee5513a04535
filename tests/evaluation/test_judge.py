import contextlib
import json
import math
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from l2m_jax.errors import InputError
from l2m_jax.evaluation.judge import (
    Comparison,
    Judge,
    read_comparisons,
    read_verdict,
    score,
    summarise,
    win_rates,
)

KEY = "sk-very-secret"


class Endpoint:
    """A judge over HTTP that prefers the longer answer, with failures and odd replies on demand."""

    def __init__(self):
        self.requests, self.failures, self.override, self.authorization = [], [], lambda a, b: None, set()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.requests.append(request)
                endpoint.authorization.add(self.headers["Authorization"])
                status = endpoint.failures.pop(0) if endpoint.failures else 200
                text = request["messages"][1]["content"]
                a, b = (
                    text.split(f"[Start of assistant {x}'s response]\n")[1].split(f"\n[End of assistant {x}")[
                        0
                    ]
                    for x in "AB"
                )
                reply = endpoint.override(a, b)
                if reply is None:
                    reply = f"Because. [[{'C' if len(a) == len(b) else 'A' if len(a) > len(b) else 'B'}]]"
                body = {"choices": [{"index": 0, "message": {"role": "assistant", "content": reply}}]}
                if status != 200:
                    body = {"error": {"message": f"refused {self.headers['Authorization']}"}}
                elif reply == "no choices":
                    body = {"choices": []}
                payload = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(payload)))
                self.send_header("retry-after-ms", "1")
                self.end_headers()
                with contextlib.suppress(BrokenPipeError):
                    self.wfile.write(payload)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()
        self.judge = Judge("tester", f"http://127.0.0.1:{self.server.server_port}/v1", at_once=2)

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def endpoint():
    started = Endpoint()
    yield started
    started.close()


def comparisons(*pairs, set="dolly"):
    return [Comparison(set, str(i), f"Task {i}", *pair) for i, pair in enumerate(pairs)]


def test_wins_losses_and_ties_in_both_orders(endpoint, tmp_path):
    asked = comparisons(("longer", "long"), ("short", "shorter"), ("same", "also"), ("longest", "x"))
    asked += comparisons(("ab", "a"), set="vicuna")
    rates = win_rates(asked, endpoint.judge, tmp_path / "verdicts.jsonl", api_key=KEY)
    dolly = rates["dolly"]
    assert (dolly.wins, dolly.ties, dolly.losses, dolly.unparsed, dolly.rate) == (2, 1, 1, 0, 62.5)
    assert 0 <= dolly.low < 62.5 < dolly.high <= 100
    assert (rates["vicuna"].wins, rates["vicuna"].rate, rates["vicuna"].low) == (1, 100.0, 100.0)
    assert len(endpoint.requests) == 10
    assert all(request["model"] == "tester" and request["temperature"] == 0 for request in endpoint.requests)


def test_a_judge_that_always_prefers_the_first_sees_ties(endpoint, tmp_path):
    endpoint.override = lambda a, b: "[[A]]"
    rates = win_rates(comparisons(("a", "b"), ("c", "d")), endpoint.judge, tmp_path / "v.jsonl", api_key=KEY)
    assert (rates["dolly"].ties, rates["dolly"].rate) == (2, 50.0)


def test_verdicts_that_cannot_be_read_are_counted_not_guessed(endpoint, tmp_path):
    endpoint.override = lambda a, b: "A is better, I think" if "odd" in (a, b) else None
    rates = win_rates(
        comparisons(("odd", "longer one"), ("won", "x")), endpoint.judge, tmp_path / "v.jsonl", api_key=KEY
    )
    assert (rates["dolly"].wins, rates["dolly"].losses, rates["dolly"].unparsed) == (1, 0, 1)
    assert rates["dolly"].rate == 100.0


def test_failures_that_pass_are_retried(endpoint, tmp_path):
    endpoint.failures = [500, 429, 503]
    rates = win_rates(comparisons(("ab", "a")), endpoint.judge, tmp_path / "v.jsonl", api_key=KEY)
    assert rates["dolly"].wins == 1
    assert len(endpoint.requests) == 5


def test_what_was_judged_is_kept_and_asked_only_once(endpoint, tmp_path):
    cache = tmp_path / "deep" / "verdicts.jsonl"
    win_rates(comparisons(("ab", "a")), endpoint.judge, cache, api_key=KEY)
    cache.write_text(cache.read_text(encoding="utf-8") + '{"key": "cut sh', encoding="utf-8")
    rates = win_rates(comparisons(("ab", "a"), ("c", "cd")), endpoint.judge, cache, api_key=KEY)
    assert (rates["dolly"].wins, rates["dolly"].losses, len(endpoint.requests)) == (1, 1, 4)
    # Everything is known now: neither key nor endpoint is needed.
    endpoint.failures = [401] * 100
    assert win_rates(comparisons(("ab", "a"), ("c", "cd")), endpoint.judge, cache) == rates
    assert len(endpoint.requests) == 4


def test_an_empty_reply_is_asked_for_again(endpoint, tmp_path):
    cache = tmp_path / "verdicts.jsonl"
    endpoint.override = lambda a, b: ""
    rates = win_rates(comparisons(("ab", "a")), endpoint.judge, cache, api_key=KEY)
    assert rates["dolly"].unparsed == 1 and not cache.read_text()
    endpoint.override = lambda a, b: None
    rates = win_rates(comparisons(("ab", "a")), endpoint.judge, cache, api_key=KEY)
    assert (rates["dolly"].wins, rates["dolly"].unparsed, len(endpoint.requests)) == (1, 0, 4)


def test_a_judge_that_stops_answering_leaves_its_verdicts(endpoint, tmp_path):
    cache = tmp_path / "verdicts.jsonl"
    endpoint.failures = [200, 200, 200, 401, 401, 401, 401, 401]
    judge = Judge("tester", endpoint.judge.base_url, at_once=1)
    asked = comparisons(("ab", "a"), ("c", "cd"), ("e", "f"))
    with pytest.raises(
        InputError, match=r"'tester' at 127\.0\.0\.1:\d+ does not answer .*3 of 6 verdicts are kept"
    ) as e:
        win_rates(asked, judge, cache, api_key=KEY)
    assert KEY not in str(e.value) and "***" in str(e.value)
    endpoint.failures = []
    before = len(endpoint.requests)
    rates = win_rates(asked, judge, cache, api_key=KEY)
    assert (rates["dolly"].wins, rates["dolly"].ties, rates["dolly"].losses) == (1, 1, 1)
    assert len(endpoint.requests) == before + 3
    assert endpoint.authorization == {f"Bearer {KEY}"}
    assert KEY not in "".join(
        path.read_text(encoding="utf-8") for path in tmp_path.rglob("*") if path.is_file()
    )


def test_no_endpoint_at_all(tmp_path):
    judge = Judge("tester", "http://127.0.0.1:9/v1", retries=0, timeout=5)
    with pytest.raises(InputError, match=r"does not answer .*0 of 2 verdicts"):
        win_rates(comparisons(("a", "b")), judge, tmp_path / "v.jsonl", api_key=KEY)


def test_an_endpoint_of_another_kind(endpoint, tmp_path):
    endpoint.override = lambda a, b: "no choices"
    with pytest.raises(InputError, match="not a chat completion"):
        win_rates(comparisons(("a", "b")), endpoint.judge, tmp_path / "v.jsonl", api_key=KEY)


def test_a_missing_key_and_a_missing_package(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(InputError, match="set OPENAI_API_KEY"):
        win_rates(comparisons(("a", "b")), Judge("tester"), tmp_path / "v.jsonl")
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(InputError, match=r"l2m_jax\[judge\]"):
        win_rates(comparisons(("a", "b")), Judge("tester"), tmp_path / "v.jsonl", api_key=KEY)


@pytest.mark.parametrize(
    "reply, verdict",
    [
        ("[[A]]", "A"),
        ("first [[B]] and again [[B]]", "B"),
        ("[[C]]", "C"),
        ("[[A]] or [[B]]", None),
        ("[A]", None),
    ],
)
def test_reading_a_verdict(reply, verdict):
    assert read_verdict(reply) == verdict


def test_scores():
    outcomes = {
        ("A", "B"): 1,
        ("B", "A"): 0,
        ("A", "A"): 0.5,
        ("A", "C"): 0.5,
        ("C", "C"): 0.5,
        ("A", None): None,
    }
    assert {pair: score(*pair) for pair in outcomes} == outcomes


def test_the_interval_is_drawn_over_prompts():
    # Two prompts, five alike seeds each: the only resamples are 0, 50 and 100%, and each end has a share of 1/4.
    rate = summarise([("a", 1.0)] * 5 + [("b", 0.0)] * 5)
    assert (rate.rate, rate.low, rate.high) == (50.0, 0.0, 100.0)
    many = summarise([(str(i), float(i % 2)) for i in range(400)])
    # Standard error of 400 fair coins: 2.5 points.
    assert many.low == pytest.approx(50 - 1.96 * 2.5, abs=0.6) and many.high == pytest.approx(54.9, abs=0.6)


def test_nothing_readable():
    rate = summarise([("a", None)])
    assert rate.unparsed == 1 and math.isnan(rate.rate) and math.isnan(rate.low)


def test_responses_are_paired_by_set_id_and_seed(tmp_path):
    def line(seed, response):
        return json.dumps({"set": "s", "id": "i", "seed": seed, "prompt": "P", "response": response}) + "\n"

    ours, theirs = tmp_path / "ours.jsonl", tmp_path / "theirs.jsonl"
    ours.write_text(line(10, "a") + line(20, "b"), encoding="utf-8")
    theirs.write_text(line(20, "B") + line(10, "A"), encoding="utf-8")
    assert read_comparisons(ours, theirs) == [
        Comparison("s", "i", "P", "a", "A"),
        Comparison("s", "i", "P", "b", "B"),
    ]
    theirs.write_text(line(10, "A"), encoding="utf-8")
    with pytest.raises(InputError, match=r"different prompts .*'i', 20"):
        read_comparisons(ours, theirs)
    theirs.write_text(line(10, "A") + line(20, "B") + line(10, "C"), encoding="utf-8")
    with pytest.raises(InputError, match="several answers to one prompt with one seed"):
        read_comparisons(ours, theirs)
    with pytest.raises(InputError, match="no such file"):
        read_comparisons(ours, tmp_path / "none.jsonl")
