"""Sampling: tokens a second, ours and Hugging Face `generate` on PyTorch, from the same weights and prompts.

The model has GPT-2's size and random weights, which would hardly ever end an answer. So the bias of its last norm
points a little towards the end of sequence: answers then have Dolly's mean length on both sides, with no rule that
one side would have to add.
"""

import dataclasses
import json
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l2m_jax import models
from l2m_jax.data.prompts import format_prompt
from l2m_jax.data.sources import read_file
from l2m_jax.data.tokenizer import load_tokenizer
from l2m_jax.errors import InputError
from l2m_jax.generation import Engine, Generator, SamplingRules
from l2m_jax.models import DecoderConfig
from l2m_jax.models.hf import gpt2
from l2m_jax.parallel import Placement
from l2m_jax.types import Params

RULES = SamplingRules(temperature=1.0, top_k=50, max_new_tokens=128)
SEEDS = (10, 20, 30, 40, 50)
_PEER = Path(__file__).with_name("peer_generate.py")


def run(
    data: Path,
    tokenizer: Path,
    *,
    peer_python: str | None = None,
    config: DecoderConfig | None = None,
    prompts: int = 48,
    seeds: Sequence[int] = SEEDS,
    slots: int | None = None,
    repeats: int = 1,
    peer_batch: int = 32,
    threads: int | None = None,
) -> dict[str, Any]:
    """Answers the first prompts of `data` with each seed: top-k 50, temperature 1, 128 new tokens at most.

    Args:
        data: JSON lines, for instance Dolly's test split.
        tokenizer: of GPT-2.
        peer_python: a Python with PyTorch and transformers; without one, ours alone is measured.
        config: another model than GPT-2's smallest.
        slots: sequences that ours decodes side by side; None for its own choice.
        repeats: runs of each side, in turn; the figures are their medians.
        peer_batch: prompts that the peer pads to one length.
        threads: of the peer; None for its own choice.

    Returns:
        `tokens_per_second` (without ends of sequence): `ours`, `ours_first_run` (its compilation included),
        `transformers` (prompts in the file's order) and `transformers_sorted` (by length); `ratio_vs_...` of the
        latter two; `slot_utilisation`: the part of ours' slots times steps that made a token of an answer; and
        counts of prompts, answers and their mean tokens.
    """
    tokens, eos, mean_answer = _read(data, tokenizer, prompts)
    config = config or gpt2.read_config({})
    params = ending_model(config, tokens, eos, mean_answer)
    wanted = [(p, seed) for p in range(len(tokens)) for seed in seeds]
    config = dataclasses.replace(config, eos_token_id=eos)
    placement = Placement("pmap", tuple(jax.devices()))
    engine = Engine(Generator(config, placement.place(params), placement, slots=slots or 0), RULES)

    def ours() -> dict[str, float]:
        start = time.perf_counter()
        made = [answer for ended in engine.run(tokens, wanted) for _, _, answer in ended]
        return {"tokens": sum(map(len, made)), "seconds": time.perf_counter() - start}

    first = ours()
    runs: dict[str, list[dict[str, float]]] = {"ours": []}
    with tempfile.TemporaryDirectory() as folder:
        if peer_python:
            models.save(folder, config, params)
        for _ in range(repeats):
            runs["ours"].append(ours())
            if peer_python:
                peer = _peer(peer_python, Path(folder), tokens, seeds, eos, peer_batch, threads)
                for name, result in peer["results"].items():
                    runs.setdefault(name, []).append(result)
    rates = {name: float(np.median([r["tokens"] / r["seconds"] for r in of])) for name, of in runs.items()}
    return {
        "prompts": len(tokens),
        "answers": len(wanted),
        "mean_prompt_tokens": float(np.mean([len(t) for t in tokens])),
        "mean_answer_tokens": {name: of[0]["tokens"] / len(wanted) for name, of in runs.items()},
        "slot_utilisation": engine.utilisation,
        "tokens_per_second": rates | {"ours_first_run": first["tokens"] / first["seconds"]},
        "runs": runs,
        **{f"ratio_vs_{name}": rates["ours"] / rate for name, rate in rates.items() if name != "ours"},
    }


def _read(data: Path, tokenizer_folder: Path, count: int) -> tuple[list[list[int]], int, float]:
    """(prompts as tokens, end of sequence, mean tokens of the reference answers cut at the most new tokens)."""
    tokenizer = load_tokenizer(tokenizer_folder)
    rows = list(read_file(data))[:count]
    prompts = [
        tokenizer.encode(format_prompt(r.instruction, r.input), add_special_tokens=False) for r in rows
    ]
    answers = [tokenizer.encode(r.references[0], add_special_tokens=False) for r in rows]
    mean = float(np.mean([min(len(answer), RULES.max_new_tokens) for answer in answers]))
    eos: Any = tokenizer.eos_token_id
    return prompts, eos, mean


def ending_model(
    config: DecoderConfig, prompts: Sequence[Sequence[int]], eos: int, mean_answer: float
) -> Params:
    """Random weights whose answers have about `mean_answer` tokens under `RULES`.

    Raises:
        InputError: the model has no last norm with a bias.
    """
    if config.norm != "layer" or not config.norm_affine or not config.final_norm:
        raise InputError(
            f"a {config.family} model without a bias in its last norm: measure with a GPT-2 or OPT config"
        )
    params = models.init(config, jax.random.key(0))
    contexts = [prompt[-16:] for prompt in prompts if len(prompt) >= 16][:16]
    logits, towards_eos = jax.jit(_calibration, static_argnums=(0, 3))(
        config, params, jnp.asarray(contexts), eos
    )
    logits_TxV, towards_eos_V = np.asarray(logits).reshape(-1, config.vocab_size), np.asarray(towards_eos)
    chance = _bisect(lambda h: -_mean_length(h), -mean_answer, 1e-6, 1.0)
    strength = _bisect(lambda c: _chance_of(eos, logits_TxV + c * towards_eos_V), chance, -20.0, 40.0)
    direction_E = params["embeddings"]["tokens"]["embedding"][eos]
    norm = params["output"]["norm"]
    norm["bias"] = norm["bias"] + strength * direction_E / jnp.sum(direction_E**2)
    return params


def _calibration(config: DecoderConfig, params: Params, tokens_BxL: jax.Array, eos: int):
    """Logits of some contexts, and what a unit of bias towards the end of sequence adds to each entry."""
    head_VxE = models.head(config, params)
    return models.logits(config, params, tokens_BxL), head_VxE @ head_VxE[eos] / jnp.sum(head_VxE[eos] ** 2)


def _mean_length(chance: float) -> float:
    """Mean tokens before the end, when it comes with the same chance at each token."""
    return sum((1 - chance) ** k for k in range(1, RULES.max_new_tokens + 1))


def _chance_of(token: int, logits_TxV: np.ndarray) -> float:
    """Mean probability of `token` among the top k."""
    largest = -np.sort(-np.partition(logits_TxV, -RULES.top_k, axis=1)[:, -RULES.top_k :], axis=1)
    chance = np.exp(logits_TxV[:, token] - largest[:, 0]) / np.exp(largest - largest[:, :1]).sum(axis=1)
    return float(np.mean(np.where(logits_TxV[:, token] >= largest[:, -1], chance, 0)))


def _bisect(increasing, target: float, low: float, high: float) -> float:
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if increasing(middle) < target else (low, middle)
    return (low + high) / 2


def _peer(
    python: str, model: Path, prompts, seeds, eos: int, batch_size: int, threads: int | None
) -> dict[str, Any]:
    request = {
        "model": str(model),
        "prompts": prompts,
        "seeds": list(seeds),
        "eos": eos,
        "temperature": RULES.temperature,
        "top_k": RULES.top_k,
        "max_new_tokens": RULES.max_new_tokens,
        "batch_size": batch_size,
        "threads": threads,
    }
    file = model / "request.json"
    file.write_text(json.dumps(request))
    try:
        done = subprocess.run([python, str(_PEER), str(file)], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        raise InputError(f"--peer-python {python} cannot run transformers on PyTorch: {reason}") from error
    return json.loads(done.stdout.strip().splitlines()[-1])
