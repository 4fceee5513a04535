"""What the compiled programs of a plan show: attention kernels, large buffers, logits, collectives, compilations."""

import collections
from typing import Any

from l2m_jax import methods
from l2m_jax.data.batches import forward_shapes
from l2m_jax.generation.engine import cache_size
from l2m_jax.models import DecoderConfig
from l2m_jax.models.attention import why_not_cudnn
from l2m_jax.plan.estimate import collective_seconds, wire_bytes
from l2m_jax.plan.phases import Phase, Training
from l2m_jax.plan.programs import Program
from l2m_jax.plan.targets import Target
from l2m_jax.plan.workload import Workload

_LISTED_BUFFERS = 8


def collectives(training: Training, target: Target, devices: int) -> dict[str, Any]:
    """Of one update: bytes, seconds on the wire, and each kind."""
    micro_batches = sum(training.batches.micro_batches.values())
    per_step = [(training.accumulate, micro_batches), (training.update, 1.0)]
    found = [(p, c, c.count * times) for p, times in per_step for c in p.module.collectives]
    return {
        "bytes": sum(c.bytes * count for _, c, count in found),
        "bytes_sent_by_a_device": sum(count * wire_bytes(c, devices) for _, c, count in found),
        "seconds": sum(times * collective_seconds(p, target, devices) for p, times in per_step),
        "list": [
            {"program": p.name, "kind": c.kind, "bytes": c.bytes, "count": count, "overlaps": c.overlaps}
            for p, c, count in found
        ],
    }


def compilations(w: Workload, phases: dict[str, Phase]) -> dict[str, int]:
    """Distinct programs of a run."""
    config, counts = w.config, {}
    for name, phase in phases.items():
        if phase.training is not None:
            objectives = 1
            if name.startswith("student"):
                method = w.method(name.partition(":")[2] or config.method)
                objectives = len({o for stage in w.stages(method) for o in methods.objectives(method, stage)})
            # With `update`, the optimiser's start and the zero sums.
            counts[f"{name}: objectives × shapes + 3"] = objectives * len(phase.training.batches.shapes) + 3
    passes = 1 + (int(w.lengths.max()) > forward_shapes(w.lengths, w.num_devices)[0].length)
    for name in ("difficulty", "teacher store"):
        if name in phases:
            counts[f"{name}: rows of the pass"] = passes
    if "diagnostics" in phases:
        counts["diagnostics: passes of teacher and students"] = 1 + len(config.method_names)
        counts["diagnostics: greedy decoding"] = 1
    for who, model in (("teacher", w.teacher), ("student", w.student)):
        longest = w.longest_prompt(model) + config.sampling.max_new_tokens
        sizes = {cache_size(model, n) for n in range(1, longest + 1)}
        counts[f"decoding of the {who}: at most cache lengths"] = len(sizes)
    return counts | {"total": sum(counts.values())}


def attention(config: DecoderConfig, platform: str, programs: tuple[Program, ...]) -> dict[str, Any]:
    """Whether cuDNN computes attention in these programs, or why it does not."""
    calls = {name: n for p in programs for name, n in p.module.custom_calls.items() if "fmha" in name}
    why = None if calls else _why_plain(config, platform)
    return {"cudnn": bool(calls), "custom_calls": calls, "why_not": why}


def _why_plain(config: DecoderConfig, platform: str) -> str:
    if platform != "cuda":
        return f"there is no cuDNN on {platform}"
    if reason := why_not_cudnn(config.dtype, 64, config.head_dim):
        return reason
    if config.attention_dropout:
        return "JAX's cuDNN attention has no dropout on attention probabilities, with which GPT-2 trains"
    return "the model's attention is set to 'xla', or none of its programs is compiled"


def buffers(program: Program) -> list[dict[str, Any]]:
    """The largest arrays that a program makes."""
    found = program.module.buffers()[:_LISTED_BUFFERS]
    return [{"shape": str(array), "bytes": array.bytes, "operation": name} for array, name in found]


def kernels(program: Program) -> dict[str, Any]:
    """What a program is made of: products by dtype, attention kernels, scatters, the largest array, collectives."""
    module = program.module
    by_dtype: dict[str, float] = collections.defaultdict(float)
    for product in module.products:
        by_dtype[product.dtype] += product.flops * product.count
    total = sum(by_dtype.values())
    return {
        "products": {dtype: flops / total for dtype, flops in by_dtype.items()},
        "attention_kernels": {name: n for name, n in module.custom_calls.items() if "fmha" in name},
        "scatters": [
            {"shape": str(array), "unique": unique, "operation": operation}
            for array, unique, operation in module.scatters
        ],
        "largest_buffers": buffers(program),
        "collectives": [
            {"kind": c.kind, "bytes": c.bytes, "count": c.count, "overlaps": c.overlaps}
            for c in module.collectives
        ],
    }


def largest_logits(w: Workload, training: Training) -> dict[str, Any] | None:
    """The most tokens whose logits an array of `accumulate` holds: a chunk's, never a batch's."""
    vocabularies = {n for c in (w.student, w.teacher) for n in (c.vocab_size, c.valid_vocab_size)}
    # Sharded, a device may hold its part of the vocabulary for the tokens of all.
    whole = {n // parts: n for parts in (1, w.num_devices) for n in vocabularies if n % parts == 0}
    widths = {n for c in (w.student, w.teacher) for n in (c.embed_size, c.hidden_size)}
    found = []
    for array, _ in training.accumulate.module.buffers():
        others = [d for d in array.dims[:-1] if d > 1]
        if not others or array.dims[-1] not in whole:
            continue
        tokens = array.size // whole[array.dims[-1]]
        # A transposed head ends in the vocabulary too.
        if tokens <= w.config.chunk_size or not widths & set(others):
            found.append((tokens, str(array)))
    if not found:
        return None
    tokens, shape = max(found)
    return {"tokens": tokens, "of": training.batches.largest.slots, "shape": shape}
