"""Rouge-L, bit for bit equal to that of the `rouge-score` package but faster; and exact match.

`rouge-score` spends its time on stemming the same words repeatedly, and on the longest common subsequence in Python.
Here stems are cached, and `rapidfuzz` finds the subsequence with bit-parallel arithmetic.
"""

import concurrent.futures
import functools
import json
import os
import re
import string
import subprocess
import sys
from collections.abc import Callable, Sequence

from rapidfuzz.distance import LCSseq

# A process scores about 20 million characters per second, and takes about a second to start.
_CHARACTERS_WORTH_A_POOL = 50_000_000

_words = re.compile(r"[a-z0-9]+").findall
_without_punctuation = str.maketrans("", "", string.punctuation)


@functools.cache
def _porter() -> Callable[[str], str]:
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer().stem


@functools.lru_cache(maxsize=1 << 20)
def _stem(word: str) -> str:
    return _porter()(word) if len(word) > 3 else word


def forget_stems() -> None:
    """Clears the cached stems, as in a new process."""
    _stem.cache_clear()


def _tokens(text: str) -> list[str]:
    return [_stem(word) for word in _words(text.lower())]


def _all_of(references: str | Sequence[str]) -> Sequence[str]:
    references = [references] if isinstance(references, str) else references
    if not references:
        raise ValueError("a prediction needs at least one reference to be compared with")
    return references


def rouge_l(prediction: str, references: str | Sequence[str]) -> float:
    """The F-measure of the longest common subsequence (Lin, 2004), the maximum over `references`.

    Words are lower-cased runs of ASCII letters and digits, Porter-stemmed if longer than 3. Equals
    `RougeScorer(["rougeL"], use_stemmer=True).score_multi(references, prediction)["rougeL"].fmeasure`.

    Returns:
        A number in [0, 1]; 0 if either text has no words. The paper's tables show 100 times this.

    Raises:
        ValueError: `references` is empty.

    Example:
        >>> rouge_l("the cats sat", ["a cat sat down", "the dog"])
        0.5714285714285715
    """
    predicted = _tokens(prediction)
    best = 0.0
    for reference in _all_of(references):
        expected = _tokens(reference)
        common = LCSseq.similarity(expected, predicted)
        if common:
            precision, recall = common / len(predicted), common / len(expected)
            best = max(best, 2 * precision * recall / (precision + recall))
    return best


def rouge_l_many(
    predictions: Sequence[str], references: Sequence[str | Sequence[str]], *, processes: int | None = None
) -> list[float]:
    """`rouge_l` of each pair, in order.

    Args:
        predictions: one text per pair.
        references: a text, or several, for each prediction.
        processes: None for all cores if there is enough text to be worth starting them, otherwise one.
    """
    if processes is None:
        size = sum(map(len, predictions)) + sum(len(text) for some in references for text in _all_of(some))
        processes = worthwhile_processes(size)
    with Pool(min(processes, len(predictions))) as pool:
        return pool.rouge_l(predictions, references)


def worthwhile_processes(characters: int) -> int:
    """All cores if there is enough text to be worth starting them, otherwise one."""
    return cores() if characters > _CHARACTERS_WORTH_A_POOL else 1


class Pool:
    """Processes that score one batch of pairs after another. Use it in a `with` statement, which ends them.

    Args:
        processes: with fewer than two, this process scores.
    """

    def __init__(self, processes: int):
        self._processes = processes

    def __enter__(self) -> "Pool":
        self._workers = [_Worker() for _ in range(self._processes)] if self._processes > 1 else []
        self._threads = concurrent.futures.ThreadPoolExecutor(max(self._processes, 1))
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown()
        for worker in self._workers:
            worker.close()

    def rouge_l(self, predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> list[float]:
        """`rouge_l` of each pair, in order."""
        pairs = list(zip(predictions, references, strict=True))
        if not self._workers:
            return [rouge_l(*pair) for pair in pairs]
        scores, step = [0.0] * len(pairs), len(self._workers)
        asked = [self._threads.submit(w.rouge_l, pairs[k::step]) for k, w in enumerate(self._workers)]
        for k, share in enumerate(asked):
            scores[k::step] = share.result()
        return scores


def cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Worker:
    """Another process that scores pairs: a line of JSON each way."""

    # Not multiprocessing: forking a process with JAX's threads can hang, and a spawned worker would run the caller's
    # script again unless the script guards against it.

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import _answer_parent; _answer_parent()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )

    def rouge_l(self, pairs: list[tuple[str, str | Sequence[str]]]) -> list[float]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(pairs).encode() + b"\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise RuntimeError(f"a process that computes Rouge-L ended with status {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self._process.communicate()


def _answer_parent() -> None:
    # nltk would spend seconds on importing SciPy, which stemming does not need.
    sys.modules.setdefault("scipy", None)  # pyright: ignore[reportArgumentType]
    for line in sys.stdin.buffer:
        print(json.dumps([rouge_l(*pair) for pair in json.loads(line)]), flush=True)


def exact_match(prediction: str, references: str | Sequence[str]) -> bool:
    """Whether the prediction equals a reference apart from case, ASCII punctuation and white space."""
    predicted = _normalised(prediction)
    return any(predicted == _normalised(reference) for reference in _all_of(references))


def _normalised(text: str) -> str:
    return " ".join(text.lower().translate(_without_punctuation).split())
