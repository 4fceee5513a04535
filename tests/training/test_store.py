"""The teacher store: the same signal as a live teacher, whatever happens while it is written."""

import functools
import json
from collections import namedtuple
from dataclasses import dataclass

import jax
import numpy as np
import pytest

from l2m_jax import models
from l2m_jax.data.batches import ListedExamples, micro_batches
from l2m_jax.data.packing import Shape
from l2m_jax.errors import InputError
from l2m_jax.losses import Objective, SkewKL
from l2m_jax.models import DecoderConfig
from l2m_jax.parallel import Placement
from l2m_jax.training import step, store
from l2m_jax.training.step import StepSettings, Teacher
from l2m_jax.training.store import TeacherStore

STUDENT, TEACHER = (
    DecoderConfig(
        family="gpt2", vocab_size=61, valid_vocab_size=61, hidden_size=width, embed_size=width, num_layers=2,
        num_heads=2, num_kv_heads=2, head_dim=width // 2, intermediate_size=32, max_positions=64, init_std=0.3,
    )
    for width in (16, 24)
)  # fmt: skip
OBJECTIVE = Objective(SkewKL(0.1), beta=0.7)
COUNT = 30


@dataclass(frozen=True)
class Examples(ListedExamples):
    """What the store needs to know of a corpus."""

    def __len__(self):
        return len(self.tokens)

    @property
    def response_lengths(self):
        return self.lengths - self.prompt_lengths


@functools.cache
def corpus() -> Examples:
    random = np.random.default_rng(0)
    lengths = random.integers(4, 60, COUNT)
    prompts = np.array([random.integers(1, n) for n in lengths], np.int32)
    return Examples([random.integers(0, 61, n).astype(np.int32) for n in lengths], prompts)


@functools.cache
def params():
    return models.init(STUDENT, jax.random.key(0)), models.init(TEACHER, jax.random.key(1))


@functools.cache
def placement(num_devices: int) -> Placement:
    return Placement("pmap", tuple(jax.devices()[:num_devices]))


@functools.cache
def placed_teacher(num_devices: int):
    return placement(num_devices).place(params()[1])


class Forward:
    """A forward pass that counts its calls, and fails at one of them."""

    def __init__(self, fail_at: int = -1, num_devices: int = 1):
        self.calls, self.fail_at, self.num_devices = 0, fail_at, num_devices

    def __call__(self, batch):
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        self.calls += 1
        hidden = placement(self.num_devices).map(step.hidden_pass)
        return hidden(TEACHER, placed_teacher(self.num_devices), batch)


def build(folder, forward=None, *, key="key", dtype="float32", num_devices=1) -> TeacherStore:
    found = TeacherStore(folder, corpus(), key=key, width=24, dtype=dtype)
    found.fill(placement(num_devices), forward or Forward(num_devices=num_devices))
    assert found.is_complete
    return found


def content(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(store, "_BLOCK", 8)


@pytest.mark.parametrize(("dtype", "least", "most"), [("float32", 0, 1e-6), ("bfloat16", 1e-7, 1e-3)])
def test_losses_equal_the_live_teachers(tmp_path, dtype, least, most):
    stored = build(tmp_path, dtype=dtype)
    student, live = params()
    settings = StepSettings(STUDENT, TEACHER, 61, chunk_size=16)
    sums = jax.jit(step.loss_sums, static_argnums=(0, 1))

    def divergence(indices, rows, signal):
        batches = micro_batches(corpus(), indices, (Shape(2, 64),), teacher_rows=rows)
        found = [
            sums(settings, OBJECTIVE, student, jax.tree.map(lambda x: x[0], batch), signal)
            for batch in batches
        ]
        return np.sum([f.divergence for f in found]) / np.sum([f.weight for f in found])

    head = models.head(TEACHER, live)
    differences = []
    # Neither the order nor the batch that the store was written in.
    for indices in np.random.default_rng(1).permutation(COUNT).reshape(5, 6):
        expected = divergence(indices, None, Teacher(head, live))
        differences.append(abs(divergence(indices, stored.read, Teacher(head)) - expected) / expected)
    assert least <= np.mean(differences) and np.max(differences) <= most


def test_rows_are_in_the_stores_dtype(tmp_path):
    for dtype in ("float32", "float16", "bfloat16"):
        stored = build(tmp_path / dtype, dtype=dtype)
        rows = stored.read(7)
        assert rows.shape == (corpus().response_lengths[7], 24) and str(rows.dtype) == dtype
        assert stored.hidden_TxE.shape == (corpus().response_lengths.sum(), 24)


def test_devices_share_the_pass(tmp_path):
    one, four = build(tmp_path / "1"), build(tmp_path / "4", num_devices=4)
    np.testing.assert_allclose(four.hidden_TxE, one.hidden_TxE, rtol=1e-5, atol=1e-5)


def test_interrupted_equals_uninterrupted(tmp_path):
    whole = Forward()
    build(tmp_path / "whole", whole)
    resumed = tmp_path / "resumed"
    with pytest.raises(KeyboardInterrupt):
        build(resumed, Forward(fail_at=whole.calls // 2))
    done = json.loads((resumed / "store.json").read_text())["examples"]
    assert 0 < done < COUNT
    # What lies behind the last note of progress may be half-written.
    hidden = np.memmap(resumed / "hidden.bin", np.float32, mode="r+")
    hidden[24 * corpus().response_lengths[:done].sum() :] = np.nan
    hidden.flush()
    rest = Forward()
    build(resumed, rest)
    assert rest.calls < whole.calls
    assert content(resumed) == content(tmp_path / "whole")

    again = Forward()
    build(resumed, again)
    assert again.calls == 0


@pytest.mark.parametrize("size", [0, 1000, None])
def test_data_cut_short_or_gone_is_computed_again(tmp_path, size):
    build(tmp_path)
    expected = content(tmp_path)
    if size is None:
        (tmp_path / "hidden.bin").unlink()
    else:
        with (tmp_path / "hidden.bin").open("r+b") as file:
            file.truncate(size)
    build(tmp_path)
    assert content(tmp_path) == expected


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"key": "other"}, "another key;"),
        ({"dtype": "float16"}, "another dtype;"),
        ({"key": "other", "dtype": "bfloat16"}, "another key and dtype;"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_store_of_something_else_is_refused(tmp_path, options, what, finished):
    if finished:
        build(tmp_path)
    else:
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path, Forward(fail_at=0))
    expected = content(tmp_path)
    with pytest.raises(InputError, match=what):
        build(tmp_path, **options)
    assert content(tmp_path) == expected


def test_disk_use_is_announced_before_it_is_spent(tmp_path, monkeypatch, capsys):
    size = 24 * 4 * int(corpus().response_lengths.sum())
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: usage(size - 1))
    forward = Forward()
    with pytest.raises(InputError, match="make room"):
        build(tmp_path, forward)
    assert forward.calls == 0 and content(tmp_path) == {}
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: usage(size))
    build(tmp_path, forward)
    assert f"takes {size / 1e9:.3f} GB on disk" in capsys.readouterr().out


def test_devices_compute_a_batch_while_the_one_before_is_written(tmp_path, monkeypatch):
    """Gathering waits for the devices: each batch is dispatched before the one before it is gathered."""
    happened, gather = [], Placement.gather

    def forward(batch):
        happened.append("dispatched")
        return Forward()(batch)

    def gathered(self, tree):
        happened.append("gathered")
        return gather(self, tree)

    monkeypatch.setattr(store, "_BLOCK", COUNT)
    monkeypatch.setattr(Placement, "gather", gathered)
    # Small batches, so that there are several.
    small = functools.partial(store.forward_batches, slots=64, row_length=64)
    monkeypatch.setattr(store, "forward_batches", small)
    build(tmp_path, forward)
    count = happened.count("dispatched")
    assert count > 2 and happened == ["dispatched", *["dispatched", "gathered"] * (count - 1), "gathered"]
