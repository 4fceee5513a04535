"""The teacher store: the same signal as a live teacher, whatever happens while it is written."""

import functools
from collections import namedtuple
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from l2m_jax import models
from l2m_jax.data.batches import ListedExamples, forward_batches, micro_batches
from l2m_jax.data.packing import Shape
from l2m_jax.errors import InputError
from l2m_jax.losses import Objective, SkewKL, token_loss, top_k
from l2m_jax.models import DecoderConfig
from l2m_jax.parallel import Placement
from l2m_jax.training import step, store
from l2m_jax.training.step import StepSettings, Teacher
from l2m_jax.training.store import TeacherStore
from l2m_jax.training.store_format import HiddenStates, TopKLogProbs

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
    def ids(self):
        return [f"row {i}" for i in range(len(self))]

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


def opened(folder, *, key="key", dtype="float32") -> TeacherStore:
    return TeacherStore(folder, corpus(), key=key, form=HiddenStates(24, dtype))


def build(folder, forward=None, *, key="key", dtype="float32", num_devices=1) -> TeacherStore:
    found = opened(folder, key=key, dtype=dtype)
    found.fill(placement(num_devices), forward or Forward(num_devices=num_devices))
    assert found.is_complete
    return found


def hidden(stored: TeacherStore) -> np.ndarray:
    """All targets of all examples, [T, E]."""
    return np.concatenate([stored.read(i)["teacher_hidden_TxE"] for i in range(COUNT)])


def content(folder) -> dict[str, bytes]:
    """Without the notes, which have modification times."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.suffix != ".json"}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Four shards, of 8, 8, 8 and 6 examples."""
    monkeypatch.setattr(store, "_SHARD_EXAMPLES", 8)


@pytest.mark.parametrize(
    ("dtype", "least", "most"), [("float32", 0, 1e-6), ("bfloat16", 1e-7, 1e-3), ("int8", 1e-6, 3e-3)]
)
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


def test_int8_is_off_by_at_most_half_a_step_of_its_block(tmp_path):
    """With a few entries many times the others, as trained models have."""
    random = np.random.default_rng(0)
    states = random.standard_normal((50, 150)).astype(np.float32)
    states[:, [3, 70]] *= 100
    states[7, :64] = 0
    form = HiddenStates(150, "int8")
    stored = form.encode(states)
    assert {name: (x.dtype, x.shape) for name, x in stored.items()} == {
        "hidden_states": (np.int8, (50, 150)),
        "scales": (np.float32, (50, 3)),
    }
    found = form.decode(stored)["teacher_hidden_TxE"]
    assert found.dtype == np.float32
    for start, end in ((0, 64), (64, 128), (128, 150)):
        block = states[:, start:end].astype(np.float64)
        step = np.abs(block).max(axis=1, keepdims=True) / 127
        assert np.all(np.abs(found[:, start:end] - block) <= step / 2 * (1 + 1e-5))
    assert not found[7, :64].any()


@pytest.mark.parametrize("tail", [True, False])
def test_a_store_of_the_top_k_gives_their_loss(tmp_path, tail):
    """That of dense logits, of which the k largest are taken; and no part of the teacher is needed for it."""
    form = TopKLogProbs(8, "float32", tail)
    stored = TeacherStore(tmp_path, corpus(), key="key", form=form)
    found = placement(1).map(step.top_k_pass)
    stored.fill(placement(1), lambda batch: found(TEACHER, 8, 64, placed_teacher(1), batch))
    student, live = params()
    settings = StepSettings(STUDENT, TEACHER, 61, chunk_size=64)
    indices = np.arange(6)
    [batch] = micro_batches(corpus(), indices, (Shape(8, 64),), teacher_rows=stored.read)
    assert (batch.teacher_log_tail_T is not None) == tail and batch.teacher_hidden_TxE is None
    batch = jax.tree.map(lambda x: x[0], batch)
    sums = jax.jit(step.loss_sums, static_argnums=(0, 1))(settings, OBJECTIVE, student, batch, None)
    tokens_BxL = np.stack([np.pad(t, (0, 64 - len(t))) for t in corpus().tokens[:6]])
    logits = jax.jit(models.logits, static_argnums=0)
    of_student, of_teacher = (
        logits(config, of, tokens_BxL) for config, of in ((STUDENT, student), (TEACHER, live))
    )
    known = top_k(of_teacher, 8)
    known = known if tail else known._replace(log_tail=None)
    losses_BxL = np.asarray(token_loss(of_student, known, np.roll(tokens_BxL, -1, axis=1), OBJECTIVE))
    expected = sum(losses_BxL[i, corpus().target_positions(i) - 1].sum() for i in indices)
    np.testing.assert_allclose(sums.loss, expected, rtol=1e-5)


def test_rows_are_in_the_stores_dtype(tmp_path):
    for dtype in ("float32", "float16", "bfloat16"):
        stored = build(tmp_path / dtype, dtype=dtype)
        rows = stored.read(7)["teacher_hidden_TxE"]
        assert rows.shape == (corpus().response_lengths[7], 24) and str(rows.dtype) == dtype
        assert hidden(stored).shape == (corpus().response_lengths.sum(), 24)


def test_devices_share_the_pass(tmp_path):
    one, four = build(tmp_path / "1"), build(tmp_path / "4", num_devices=4)
    np.testing.assert_allclose(hidden(four), hidden(one), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shards_together_are_the_flat_array_of_all_targets(tmp_path, dtype):
    """Each shard is packed by itself, and another library reads it."""
    stored = build(tmp_path, dtype=dtype)
    flat = np.zeros((int(stored.offsets[-1]), 24), jnp.dtype(dtype))
    for start in range(0, COUNT, 8):
        for batch in forward_batches(corpus(), np.arange(start, min(start + 8, COUNT))):
            found = np.asarray(Forward()(placement(1).feed(batch.micro_batch)))
            for a, t in zip(*np.nonzero(batch.example_AxT >= 0), strict=True):
                flat[stored.offsets[batch.example_AxT[a, t]] + batch.target_AxT[a, t]] = found[a, t]
    assert hidden(stored).tobytes() == flat.tobytes()
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.name for file in files] == [f"{number:05}.safetensors" for number in range(4)]
    for shard, rows in zip(files, np.split(flat, stored.offsets[[8, 16, 24]]), strict=True):
        with safe_open(shard, framework="flax") as file:
            read = np.asarray(file.get_tensor("hidden_states"))
        assert read.dtype == rows.dtype and read.tobytes() == rows.tobytes()


def test_interrupted_equals_uninterrupted(tmp_path):
    whole = Forward()
    build(tmp_path / "whole", whole)
    resumed = tmp_path / "resumed"
    with pytest.raises(KeyboardInterrupt):
        build(resumed, Forward(fail_at=whole.calls // 2))
    assert 0 < len(content(resumed)) < 4
    # What a kill leaves of a shard, and a shard that it left without a note.
    (resumed / ".00002.safetensors.unfinished").write_bytes(b"half of it")
    (resumed / "00003.safetensors").write_bytes(b"of unknown origin")
    rest = Forward()
    build(resumed, rest)
    assert 0 < rest.calls < whole.calls
    assert content(resumed) == content(tmp_path / "whole")

    again = Forward()
    build(resumed, again)
    assert again.calls == 0


def fill_as_one_of_several(folder) -> tuple[int, str]:
    """How often this process ran the teacher, and the error of a second store, in which its last shard has a NaN."""
    store._SHARD_EXAMPLES = 8
    everywhere = Placement("pmap", tuple(jax.devices()))
    own, calls = everywhere.own, 0
    hidden_pass, teacher = own.map(step.hidden_pass), own.place(params()[1])

    def forward(batch):
        nonlocal calls
        calls += 1
        return hidden_pass(TEACHER, teacher, batch)

    opened(folder / "two").fill(everywhere, forward)
    broken = opened(folder / "broken")
    first_call = calls

    def broken_forward(batch):
        found = forward(batch)
        return found * np.float32(np.nan) if jax.process_index() == 1 and calls > first_call + 1 else found

    try:
        broken.fill(everywhere, broken_forward)
    except InputError as error:
        return first_call, str(error)
    return first_call, "no error"


def test_two_processes_write_what_one_writes_and_end_together(in_two_processes, tmp_path):
    one = build(tmp_path / "one", Forward(num_devices=4), num_devices=4)
    ended = in_two_processes(fill_as_one_of_several, tmp_path)
    assert all(calls > 0 for calls, _ in ended)
    assert ended[0][1] == ended[1][1] and "not finite" in ended[0][1]
    assert content(tmp_path / "two") == content(tmp_path / "one")
    assert opened(tmp_path / "two").is_complete and one.is_complete
    # What the others finished stays; the shard with the NaN is not there.
    assert 0 < len(content(tmp_path / "broken")) < 4


@pytest.mark.parametrize("damage", ["changed", "cut off", "gone", "without a note"])
def test_a_damaged_shard_is_computed_again_and_no_other(tmp_path, damage, capsys):
    whole = Forward()
    build(tmp_path, whole)
    expected = content(tmp_path)
    shard = tmp_path / "00001.safetensors"
    if damage == "changed":
        data = bytearray(expected[shard.name])
        data[-1] ^= 1
        shard.write_bytes(data)
    elif damage == "cut off":
        shard.write_bytes(expected[shard.name][:1000])
    elif damage == "gone":
        shard.unlink()
    else:
        shard.with_suffix(".json").unlink()
    rest = Forward()
    build(tmp_path, rest)
    assert 0 < rest.calls <= whole.calls - 3
    assert content(tmp_path) == expected
    assert ("00001.safetensors is damaged or missing" in capsys.readouterr().out) == (
        damage != "without a note"
    )


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"key": "other"}, "another key;"),
        ({"dtype": "float16"}, "another dtype and bytes;"),
        ({"key": "other", "dtype": "bfloat16"}, "another key and dtype and bytes;"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_store_of_something_else_is_refused(tmp_path, options, what, finished):
    if finished:
        build(tmp_path)
    else:
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path, Forward(fail_at=2))
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

    monkeypatch.setattr(store, "_SHARD_EXAMPLES", COUNT)
    monkeypatch.setattr(Placement, "gather", gathered)
    # Small batches, so that there are several.
    small = functools.partial(store.forward_batches, slots=64, row_length=64)
    monkeypatch.setattr(store, "forward_batches", small)
    build(tmp_path, forward)
    count = happened.count("dispatched")
    assert count > 2 and happened == ["dispatched", *["dispatched", "gathered"] * (count - 1), "gathered"]


@pytest.mark.parametrize("damaged", [b"", b"{", b"[]", b'{"examples": [8, 16]}', b"\xff\x00"])
def test_a_shard_with_a_damaged_note_is_computed_again(tmp_path, damaged):
    build(tmp_path)
    expected = content(tmp_path)
    (tmp_path / "00001.json").write_bytes(damaged)
    forward = Forward()
    build(tmp_path, forward)
    assert forward.calls > 0 and content(tmp_path) == expected


def test_a_store_of_an_earlier_version_is_refused(tmp_path):
    (tmp_path / "hidden.bin").touch()
    with pytest.raises(InputError, match=r"earlier version.*delete"):
        opened(tmp_path)


@pytest.mark.parametrize(("dtype", "value"), [("float32", np.nan), ("float16", 1e5), ("int8", np.inf)])
def test_hidden_states_that_are_not_finite_are_refused_by_the_name_of_their_example(tmp_path, dtype, value):
    def forward(batch):
        hidden = Forward()(batch)
        return hidden.at[0, 0, 0].set(value)

    with pytest.raises(
        InputError, match=rf"hidden states of training example row \d+ are not finite in {dtype}"
    ):
        build(tmp_path, forward, dtype=dtype)
