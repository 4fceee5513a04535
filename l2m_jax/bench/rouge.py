"""Rouge-L: ours against `rouge-score`, on the same answers, the values compared bit for bit."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rouge_score.rouge_scorer import RougeScorer

from l2m_jax.errors import InputError
from l2m_jax.evaluation import rouge

# Enough text on Dolly's training split for more processes to pay for their start.
_ROUNDS = 20


def answers(data: Path) -> list[str]:
    """The reference answers of a JSON-lines file (`output` or `response`; the first where there are several).

    Raises:
        InputError: no such file, or fewer than two answers in it.
    """
    if not data.is_file():
        raise InputError(f"--data {data}: no such file (JSON lines with output or response, such as Dolly's)")
    found = []
    for line in data.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        answer = row.get("output", row.get("response", ""))
        found.append(answer if isinstance(answer, str) else answer[0])
    if len(found) < 2:
        raise InputError(f"--data {data}: {len(found)} answers, at least 2 are needed")
    return found


def _pairs_per_second(score: Callable[[], Any], pairs: int, repeats: int) -> dict[str, float]:
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        score()
        rates.append(pairs / (time.perf_counter() - start))
    return {"median": statistics.median(rates), "min": min(rates), "max": max(rates)}


def run(data: Path, *, repeats: int = 3, peer_pairs: int = 1000) -> dict[str, Any]:
    """Scores each answer of `data` against those of the next 20 rows.

    Args:
        data: JSON lines, for instance Dolly's training split.
        repeats: runs of each figure; `rouge-score` and the first pass are run on `peer_pairs` pairs.

    Returns:
        Pairs a second (median, min and max of `repeats`): `rouge_score` (one thread), `first_pass` (one
        thread, no stem known yet), `one_thread`, `all_cores` (the start of the processes included); the
        medians over `rouge_score`'s as `ratio_...`; and `identical`: whether all values agree to the last bit.
    """
    texts = answers(data)
    predictions = [text for shift in range(1, _ROUNDS + 1) for text in texts[shift:] + texts[:shift]]
    references = texts * _ROUNDS
    few = slice(0, peer_pairs)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)

    def peer() -> list[float]:
        pairs = zip(references[few], predictions[few], strict=True)
        return [scorer.score(reference, prediction)["rougeL"].fmeasure for reference, prediction in pairs]

    def first_pass() -> list[float]:
        rouge.forget_stems()
        return rouge.rouge_l_many(predictions[few], references[few], processes=1)

    identical = peer() == first_pass()  # warms both up as well
    pairs, few_pairs = len(predictions), len(predictions[few])
    cores = rouge.cores()
    rates = {
        "rouge_score": _pairs_per_second(peer, few_pairs, repeats),
        "first_pass": _pairs_per_second(first_pass, few_pairs, repeats),
        "one_thread": _pairs_per_second(
            lambda: rouge.rouge_l_many(predictions, references, processes=1), pairs, repeats
        ),
        "all_cores": _pairs_per_second(
            lambda: rouge.rouge_l_many(predictions, references, processes=cores), pairs, repeats
        ),
    }
    ratios = {
        f"ratio_{name}": rate["median"] / rates["rouge_score"]["median"]
        for name, rate in rates.items()
        if name != "rouge_score"
    }
    return {"pairs": pairs, "cores": cores, "identical": identical, "pairs_per_second": rates, **ratios}
