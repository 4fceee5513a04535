"""Memory is a contract: what a whole run holds on each of 4 devices, outside activations, at every moment of it."""

from pathlib import Path

import jax

from l2m_jax import models

MOMENTS = ("start", "training", "checkpoint", "validation", "resume", "best")


def _sizes(folder: Path) -> tuple[int, int]:
    """Parameters of a model, and numbers in its largest one."""
    _, params = models.load(folder)
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    return sum(sizes), max(sizes)


def test_no_device_holds_more_than_the_training_state_and_a_leaf(sampled):
    """16 bytes a parameter (parameters, Adam's two moments, gradient sums), a quarter of it when sharded over 4."""
    mapping, folder, most = sampled
    (teacher, leaf), (student, _) = (
        _sizes(folder / "pretrained" / "teacher"),
        _sizes(folder / "pretrained" / "student"),
    )
    share = 4 if mapping == "fsdp" else 1
    head = 4 * models.load_head(folder / "pretrained" / "teacher", dtype="float32").size / share
    limits = {"teacher": 16 * teacher / share, "student": 16 * student / share + head}
    for name, held in most.items():
        # Elsewhere models are frozen: their weights, and the layers taken apart for decoding.
        limit = limits.get(name.split(":")[0], 8 * teacher / share)
        assert max(held) <= 1.05 * limit + 4 * leaf, f"{mapping}, {name}: {max(held):,} of {limit:,.0f}"


def test_every_moment_was_seen(sampled):
    _, _, most = sampled
    for moment in MOMENTS:
        assert min(most[f"student: {moment}"]) > 0, moment
    assert min(most["teacher: training"]) > 0


def test_the_first_device_is_like_the_others(sampled):
    _, folder, most = sampled
    _, leaf = _sizes(folder / "pretrained" / "teacher")
    for name, held in most.items():
        assert max(held) - min(held) <= 4 * leaf + 0.05 * max(held), f"{name}: {held}"


def test_a_state_in_training_is_held_whole(sampled):
    """The sampler sees what there is: a contract that nothing is measured against would always hold."""
    mapping, folder, most = sampled
    student, _ = _sizes(folder / "pretrained" / "student")
    assert min(most["student: training"]) >= 0.95 * 16 * student / (4 if mapping == "fsdp" else 1)
