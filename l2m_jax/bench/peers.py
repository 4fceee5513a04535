"""The same distillation work through ours and through PyTorch: examples a second and peak memory."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from l2m_jax.bench.common import Spread
from l2m_jax.bench.workload import PASSES, ROW_LENGTH, STUDENT, TEACHER, Request, make_request, padded_flops
from l2m_jax.errors import InputError
from l2m_jax.models import DecoderConfig
from l2m_jax.progress import console

_PEER = Path(__file__).with_name("peer_distil.py")
_WAYS = {
    "padded_512": "rows padded to 512, live teacher, all logits",
    "padded_longest": "rows padded to the longest of the batch",
    "trl": "TRL GKDTrainer, off-policy",
}
_COMPARED = 3  # first steps whose losses must agree
_TOLERANCE = 1e-3  # relative; float32 and AdamW's first steps, which turn rounding into whole steps


def run(
    data: Path,
    tokenizer: Path,
    peer_python: str,
    *,
    batches: int = 12,
    peer_steps: int = 4,
    batch_size: int = 16,
    student: DecoderConfig = STUDENT,
    teacher: DecoderConfig = TEACHER,
) -> dict[str, Any]:
    """KL(teacher‖student) on response tokens, AdamW, float32; every way in a process of its own, one after another.

    Args:
        data: JSON lines, for instance Dolly's training split; rows of more than 512 tokens are left out.
        peer_python: a Python with PyTorch, transformers and trl.
        batches: that ours is timed on.
        peer_steps: of each peer, the first to warm up.

    Returns:
        `rows` with examples a second, the matrix products of a batch, which part of its own framework's matmul rate
        each way reaches with them, peak memory and the losses' largest relative difference from ours over the
        first steps. Ours twice: the steps after the first pass over the data, and the whole schedule of 20 passes,
        the store's building included. `ratio_vs_padded`, `ratio_vs_longest`, `ratio_vs_trl`: of the whole schedule;
        `ratio_normalised_vs_...`: the same, each rate divided by the matmul rate of its framework;
        `memory_ratio_vs_...`: ours by theirs, peak resident memory; `parts` of our step.

    Raises:
        InputError: the peer's Python cannot run them.
        RuntimeError: the losses of the first steps differ: figures of different work are worth nothing.
    """
    sizes: Any = {"batches": batches, "batch_size": batch_size, "student": student, "teacher": teacher}
    with tempfile.TemporaryDirectory() as folder:
        request = make_request(Path(folder), data, tokenizer, **sizes)
        ours, peers = _measure(request, Path(folder) / "request.json", peer_python, peer_steps)
    lengths = np.array([len(tokens) for tokens in request.tokens])
    in_order = np.array(request.batches)
    parts = {part.pop("part"): part for part in ours["parts"]}
    step, once = (parts[name]["gflop_a_batch"] for name in ("step", "teacher pass (once)"))
    step_seconds = sum(ours["step_seconds"]) / batches
    schedule_seconds = step_seconds + ours["store_seconds"] / batches / PASSES
    rows = [
        _row("ours, after the first pass", batch_size, step_seconds, step, ours, ours["losses"]),
        _row(
            f"ours, {PASSES} passes and the store",
            batch_size,
            schedule_seconds,
            step + once / PASSES,
            ours,
            ours["losses"],
        ),
    ]
    ratios: dict[str, float] = {}
    for way, peer in peers.items():
        took = float(np.median(peer["step_seconds"][1:]))
        padded_to = ROW_LENGTH if way == "padded_512" else 0
        work = padded_flops(student, teacher, lengths, in_order[1:peer_steps], padded_to) / 1e9
        rows.append(_row(_WAYS[way], batch_size, took, work, peer, ours["losses"]))
        ratios |= _ratios(way, took / schedule_seconds, ours, peer)
    return {
        "rows": rows,
        **ratios,
        "step_seconds": {
            "ours": Spread.of(ours["step_seconds"])._asdict(),
            **{way: Spread.of(peer["step_seconds"][1:])._asdict() for way, peer in peers.items()},
        },
        "store_seconds": ours["store_seconds"],
        "compile_seconds": ours["compile_seconds"],
        "parts": parts,
        "matmul_gflops": {"ours": ours["matmul_gflops"], **{w: p["matmul_gflops"] for w, p in peers.items()}},
        "threads": peers["trl"]["threads"],
        "torch": peers["trl"]["torch"],
    }


def _measure(
    request: Request, file: Path, peer_python: str, peer_steps: int
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What our side says, and each of the peers by its way; the request is written to `file`."""
    request.write(file)
    console.print("  ours ...")
    ours = _result([sys.executable, "-m", "l2m_jax.bench.distil", str(file)], "our own side")
    peers = {}
    for way in _WAYS:
        console.print(f"  {way} ...")
        command = [peer_python, str(_PEER), str(file), way, str(peer_steps)]
        peers[way] = _result(command, f"--peer-python {peer_python}")
        _check_losses(way, ours["losses"], peers[way]["losses"])
    return ours, peers


def _ratios(way: str, ratio: float, ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, float]:
    """Of a way that takes `ratio` times as long."""
    name = way.removeprefix("padded_") if way != "padded_512" else "padded"
    return {
        f"ratio_vs_{name}": ratio,
        f"ratio_normalised_vs_{name}": ratio * peer["matmul_gflops"] / ours["matmul_gflops"],
        f"memory_ratio_vs_{name}": ours["peak_rss_mb"] / peer["peak_rss_mb"],
    }


def _row(
    name: str, batch_size: int, took: float, gflop: float, side: dict[str, Any], expected: list[float]
) -> dict[str, Any]:
    """Of a way that takes so many seconds and 10⁹ flops a batch."""
    return {
        "way": name,
        "examples_a_second": batch_size / took,
        "gflop_a_batch": gflop,
        "of_matmul_rate": gflop / took / side["matmul_gflops"],
        "peak_rss_mb": side["peak_rss_mb"],
        "loss_difference": _difference(expected, side["losses"]),
    }


def _difference(expected: list[float], found: list[float]) -> float:
    pairs = list(zip(expected, found, strict=False))[:_COMPARED]
    return float(np.max([abs(b - a) / abs(a) for a, b in pairs]))  # NaN if any is


def _check_losses(way: str, expected: list[float], found: list[float]) -> None:
    if not _difference(expected, found) <= _TOLERANCE:
        raise RuntimeError(
            f"{way}: losses of the first steps {found[:_COMPARED]} differ from ours {expected[:_COMPARED]}: not the "
            "same work, so there is nothing to compare"
        )


def _result(command: list[str], what: str) -> dict[str, Any]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        raise InputError(f"{what}: cannot run {' '.join(command[1:])}: {reason}") from error
    return json.loads(done.stdout.strip().splitlines()[-1])
