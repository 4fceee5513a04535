"""Win rate by an LLM judge: pairs of answers, both orders (Zheng et al., 2023), any OpenAI-compatible endpoint.

An answer wins if the judge prefers it in both orders, and loses if the judge prefers the other one in both. Everything
else is a tie. Verdicts are kept on disk as they come, so that nothing is asked twice. The key is passed to the client
and never written.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import re
import threading
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from l2m_jax import progress
from l2m_jax.errors import InputError, reason, require_type, shown
from l2m_jax.files import fingerprint, json_lines, parse_json

if TYPE_CHECKING:
    import openai

_SYSTEM = (
    "Please act as an impartial judge of two AI assistants' responses to the task shown below. Choose the "
    "assistant that follows the instructions and solves the task better, considering helpfulness, relevance, "
    "accuracy, depth and level of detail. Neither the order in which the responses are shown, nor their length, nor "
    'the assistants\' names may influence you. Compare them briefly, then end with your verdict in this format: "[[A]]" '
    'if assistant A is better, "[[B]]" if assistant B is better, and "[[C]]" for a tie.'
)
_VERDICT = re.compile(r"\[\[([ABC])\]\]")
_RESAMPLES = 10_000
_RESPONSE = {"set": str, "id": str, "seed": int, "prompt": str, "response": str}  # a line of responses.jsonl


class Comparison(NamedTuple):
    """A prompt with the answer to be judged and the baseline's answer. All seeds of a prompt share its `id`."""

    set: str
    id: str
    prompt: str
    answer: str
    baseline: str


@dataclasses.dataclass(frozen=True)
class Judge:
    """Settings of a judge.

    Attributes:
        model: the judge's name at the endpoint.
        base_url: the endpoint; None for OPENAI_BASE_URL, or OpenAI's.
        temperature: None for the endpoint's default.
        retries: how often a request is repeated after a temporary failure, with increasing pauses.
        timeout: seconds until a request without an answer fails.
        at_once: the maximum number of requests in flight.
    """

    model: str
    base_url: str | None = None
    temperature: float | None = 0.0
    retries: int = 5
    timeout: float = 120.0
    at_once: int = 8

    def __post_init__(self):
        if not self.model.strip():
            raise InputError(f"judge: {self.model!r} is not the name of a model")
        url = self.base_url or os.environ.get("OPENAI_BASE_URL") or "https://"
        if not url.startswith(("http://", "https://")) or not _is_url(url):
            raise InputError(f"judge: {shown(url)} is not a URL such as http://localhost:8000/v1")

    def check(self, api_key: str | None = None) -> None:
        """Checks what can be checked without asking: the package and the key.

        Raises:
            InputError: one of them is missing, or the key is not one.
        """
        _client(self, api_key).close()


@dataclasses.dataclass(frozen=True)
class WinRate:
    """How often an answer beat the baseline's.

    Attributes:
        wins, ties, losses: comparisons.
        unparsed: comparisons with an unreadable verdict in at least one order; not counted elsewhere.
        rate: 100 · (wins + ties / 2) / (wins + ties + losses); NaN if no verdict could be read.
        low, high: 95% bootstrap interval of `rate`, drawn over prompts.
    """

    wins: int
    ties: int
    losses: int
    unparsed: int
    rate: float
    low: float
    high: float

    def __str__(self) -> str:
        counts = f"{self.wins} wins, {self.ties} ties, {self.losses} losses"
        if self.unparsed:
            counts += f", {self.unparsed} with a verdict that could not be read"
        return f"{self.rate:.1f}% (95% interval {self.low:.1f} to {self.high:.1f}): {counts}"


def read_comparisons(answers: Path, baseline: Path) -> list[Comparison]:
    """Pairs the lines of two `responses.jsonl` by set, id and seed.

    Raises:
        InputError: a file is missing, or the two do not contain answers to the same prompts.
    """
    ours, theirs = _read_responses(answers), _read_responses(baseline)
    if ours.keys() != theirs.keys():
        missing = sorted(ours.keys() ^ theirs.keys())[0]
        raise InputError(
            f"{answers} and {baseline} contain answers to different prompts (such as set, id and seed {missing}): "
            "evaluate both models on the same sets, rows and seeds"
        )
    return [
        Comparison(line["set"], line["id"], line["prompt"], line["response"], theirs[key]["response"])
        for key, line in ours.items()
    ]


def _read_responses(path: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    if not path.is_file():
        raise InputError(f"{path}: no such file (responses.jsonl of an evaluation)")
    found: dict[tuple[str, str, int], dict[str, Any]] = {}
    for place, line in json_lines(path):
        require_type(place, line, dict)
        for name, kind in _RESPONSE.items():
            require_type(f"{place}: {name}", line.get(name), kind)
        key = line["set"], line["id"], line["seed"]
        if key in found:
            raise InputError(
                f"{place}: several answers to one prompt with one seed (set, id and seed {key}); give the "
                "responses.jsonl of one model, as in evaluation/teacher/responses.jsonl, and different ids to rows"
            )
        found[key] = line
    if not found:
        raise InputError(f"{path} has no answers; give responses.jsonl of an evaluation")
    return found


def check_baseline(path: Path) -> None:
    """Raises InputError unless `path` is a responses.jsonl."""
    _read_responses(path)


def win_rates(
    comparisons: Sequence[Comparison], judge: Judge, cache: Path, *, api_key: str | None = None
) -> dict[str, WinRate]:
    """The win rate of each set.

    Args:
        cache: JSON lines with the verdicts; read first, then appended to.
        api_key: None for OPENAI_API_KEY, which may be unset if `base_url` needs no key.

    Raises:
        InputError: the `openai` package or the key is missing, or the judge does not answer. Verdicts received until
            then are in `cache`.
    """
    asked = [
        question
        for c in comparisons
        for question in (_messages(c.prompt, c.answer, c.baseline), _messages(c.prompt, c.baseline, c.answer))
    ]
    replies = _ask(asked, judge, cache, api_key)
    outcomes: dict[str, list[tuple[str, float | None]]] = defaultdict(list)
    for i, comparison in enumerate(comparisons):
        outcome = score(read_verdict(replies[2 * i]), read_verdict(replies[2 * i + 1]))
        outcomes[comparison.set].append((comparison.id, outcome))
    return {name: summarise(scores) for name, scores in outcomes.items()}


def read_verdict(reply: str) -> str | None:
    """ "A", "B" or "C" (a tie); None if the reply contains no verdict, or different ones."""
    found = set(_VERDICT.findall(reply))
    return found.pop() if len(found) == 1 else None


def score(answer_first: str | None, answer_second: str | None) -> float | None:
    """1 for a win, 0 for a loss, ½ for a tie: from the verdicts with the answer as A, and as B."""
    if answer_first is None or answer_second is None:
        return None
    return {("A", "B"): 1.0, ("B", "A"): 0.0}.get((answer_first, answer_second), 0.5)


def summarise(scores: Iterable[tuple[str, float | None]], *, seed: int = 0) -> WinRate:
    """The win rate of scored comparisons: pairs of a prompt's id and the result of `score`."""
    scores = list(scores)
    by_id: dict[str, list[float]] = defaultdict(list)
    for id, value in scores:
        if value is not None:
            by_id[id].append(value)
    values = np.array([value for group in by_id.values() for value in group])
    unparsed = len(scores) - len(values)
    if len(values) == 0:
        return WinRate(0, 0, 0, unparsed, *[float("nan")] * 3)
    # Answers to the same prompt are correlated, so whole prompts are resampled.
    sums, counts = np.array([(sum(group), len(group)) for group in by_id.values()]).T
    generator = np.random.default_rng(seed)
    drawn = (generator.integers(len(sums), size=len(sums)) for _ in range(_RESAMPLES))
    low, high = np.percentile([sums[rows].sum() / counts[rows].sum() for rows in drawn], [2.5, 97.5])
    return WinRate(
        wins=int((values == 1).sum()),
        ties=int((values == 0.5).sum()),
        losses=int((values == 0).sum()),
        unparsed=unparsed,
        rate=100 * float(values.mean()),
        low=100 * float(low),
        high=100 * float(high),
    )


def _messages(prompt: str, a: str, b: str) -> list[dict[str, str]]:
    shown = (
        f"[Task]\n{prompt}\n\n[Start of assistant A's response]\n{a}\n[End of assistant A's response]\n\n"
        f"[Start of assistant B's response]\n{b}\n[End of assistant B's response]"
    )
    return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": shown}]


def _ask(questions: Sequence[Any], judge: Judge, cache: Path, api_key: str | None) -> list[str]:
    url = judge.base_url or os.environ.get("OPENAI_BASE_URL")  # as the client chooses
    keys = [fingerprint(judge.model, url, judge.temperature, question) for question in questions]
    replies = _read_cache(cache)
    waiting = {key: question for key, question in zip(keys, questions, strict=True) if key not in replies}
    if waiting:
        client = _client(judge, api_key)
        lock = threading.Lock()
        with (
            _appending(cache) as file,
            progress.bar(f"judge {judge.model}", len(waiting)) as bar,
            concurrent.futures.ThreadPoolExecutor(judge.at_once) as pool,
        ):

            def ask(key: str, question: Any) -> None:
                reply = _reply(client, judge, question)
                with lock:
                    replies[key] = reply
                    if reply.strip():  # an empty reply is no verdict: the next call asks again
                        file.write(json.dumps({"key": key, "reply": reply}) + "\n")
                        file.flush()
                    bar.advance()

            futures = [pool.submit(ask, *item) for item in waiting.items()]
            try:
                for future in concurrent.futures.as_completed(futures):
                    future.result()
            except _NoAnswer as error:
                pool.shutdown(cancel_futures=True)
                kept = sum(key in replies for key in keys)
                raise InputError(
                    f"judge '{judge.model}' at {_host(client)} does not answer ({error}): check its model name, URL "
                    f"and key, then start again; {kept} of {len(keys)} verdicts are kept in {cache}"
                ) from None
            finally:
                pool.shutdown(cancel_futures=True)
    return [replies[key] for key in keys]


class _NoAnswer(Exception):
    pass


def _client(judge: Judge, api_key: str | None) -> "openai.OpenAI":
    try:
        import openai
    except ImportError:
        raise InputError("the judge needs the openai package: pip install 'l2m_jax[judge]'") from None
    own = judge.base_url is None and not os.environ.get("OPENAI_BASE_URL")
    api_key = (api_key or os.environ.get("OPENAI_API_KEY") or "").strip()
    if not api_key.isascii() or not api_key.isprintable():
        # Refused here, because the client would quote it.
        raise InputError("OPENAI_API_KEY: holds characters that no key has; set it to the key alone")
    if not api_key and own:
        raise InputError(
            "the judge needs a key: set OPENAI_API_KEY, or pass the URL of an endpoint without one"
        )
    return openai.OpenAI(
        api_key=api_key or "none", base_url=judge.base_url, max_retries=judge.retries, timeout=judge.timeout
    )


def _reply(client: "openai.OpenAI", judge: Judge, messages: Any) -> str:
    import openai

    options: dict[str, Any] = {} if judge.temperature is None else {"temperature": judge.temperature}
    try:
        answer = client.chat.completions.create(model=judge.model, messages=messages, **options)
    except (openai.OpenAIError, ValueError, RecursionError) as error:
        # An endpoint may quote the key that it rejects.
        raise _NoAnswer(reason(error).replace(client.api_key, "***")[:300]) from None
    try:
        content = answer.choices[0].message.content or ""
    except (AttributeError, IndexError, KeyError, TypeError):
        content = None
    if not isinstance(content, str):
        raise _NoAnswer("its reply is not a chat completion")
    return content


def _is_url(text: str) -> bool:
    try:
        urlsplit(text).port  # noqa: B018  (raises ValueError for a wrong port)
        return True
    except ValueError:
        return False


def _host(client: "openai.OpenAI") -> str:
    return urlsplit(str(client.base_url)).netloc.rpartition("@")[2]


def _read_cache(path: Path) -> dict[str, str]:
    replies: dict[str, str] = {}
    if path.is_file():
        for line in path.read_bytes().split(b"\n"):
            # An incomplete last line, after a kill, or a damaged one: this verdict is asked for again.
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = parse_json(line)
                if isinstance(entry["key"], str) and isinstance(entry["reply"], str):
                    replies[entry["key"]] = entry["reply"]
    return replies


@contextlib.contextmanager
def _appending(path: Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    complete = not path.is_file() or path.read_bytes()[-1:] in (b"", b"\n")
    with path.open("a", encoding="utf-8") as file:
        if not complete:
            file.write("\n")
        yield file
