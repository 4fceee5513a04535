"""Outputs of other tools, matched by their tokens: what `transformers` has computed is what our own pass stores."""

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from l2m_jax import models
from l2m_jax.data.batches import ListedExamples
from l2m_jax.errors import InputError
from l2m_jax.parallel import Placement
from l2m_jax.training import step, store
from l2m_jax.training.distillkit import DistillKitFiles
from l2m_jax.training.imported import Imported, ImportedTeacher
from l2m_jax.training.outputs import RowFiles, VllmFiles
from l2m_jax.training.store import TeacherStore
from l2m_jax.training.store_format import HiddenStates, TopKLogProbs

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "models" / "golden"
PAGE = (ROOT / "docs" / "teacher_store.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Examples(ListedExamples):
    @property
    def ids(self):
        return [f"row {i}" for i in range(len(self))]


@functools.cache
def page_writer():
    """The function on the page that writes the project's layout."""
    [block] = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    found = {}
    exec(block, found)
    return found["write"]


def write_rows(corpus, folder, outputs, rows_per_file=1000):
    """By the page's function. `outputs` has arrays of each example, by name."""
    rows = folder.parent / f"{folder.name} rows"
    rows.mkdir()
    np.concatenate(corpus.tokens).astype(np.int32).tofile(rows / "tokens.int32")
    np.concatenate([[0], np.cumsum(corpus.lengths)]).astype(np.int64).tofile(rows / "offsets.int64")
    numbers = iter(range(len(corpus)))

    def run_teacher(token_ids):
        i = next(numbers)
        np.testing.assert_array_equal(token_ids, corpus.tokens[i])
        return {name: values[i] for name, values in outputs.items()}

    page_writer()(rows, folder, run_teacher, rows_per_file)
    return RowFiles(folder)


def write_vllm(corpus, folder, outputs):
    """A file for each request, with an earlier layer before the last one."""
    folder.mkdir()
    for i, tokens in enumerate(corpus.tokens):
        last = outputs["hidden_states"][i]
        states = np.stack([np.full_like(last, np.nan), last], axis=1)
        tensors = {"token_ids": tokens.astype(np.int64), "hidden_states": states}
        save_file(tensors, folder / f"request-{len(corpus) - i}.safetensors")
    return VllmFiles(folder)


def stored(folder, corpus, form, fill) -> list[dict[str, np.ndarray]]:
    """What the store has of each example after `fill(store)`."""
    made = TeacherStore(folder, corpus, key="key", form=form)
    fill(made)
    assert TeacherStore(folder, corpus, key="key", form=form).is_complete
    return [dict(made.read(i)) for i in range(len(corpus))]


def assert_equal(ours, theirs, tolerance):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name, values in one.items():
            np.testing.assert_allclose(values, other[name], rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "opt_350m"])
def test_outputs_of_transformers_are_what_our_own_pass_stores(tmp_path, name):
    golden, folder = load_file(GOLDEN / f"{name}.safetensors"), tmp_path / "model"
    folder.mkdir()
    tensors = {n.removeprefix("weight/"): x for n, x in golden.items() if n.startswith("weight/")}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(json.loads((GOLDEN / "cases.json").read_text())[name]))
    config, params = models.load(folder)
    corpus = Examples(list(golden["tokens"].astype(np.int32)), np.array([3, 6]))
    teacher = ImportedTeacher(config, config.vocab_size, models.load_output(folder), None, 0)
    placement = Placement("pmap", tuple(jax.devices()[:1]))
    placed = placement.place(params)

    hidden = placement.map(step.hidden_pass)
    form = HiddenStates(config.embed_size, "float32")
    expected = stored(
        tmp_path / "own", corpus, form, lambda s: s.fill(placement, lambda b: hidden(config, placed, b))
    )
    outputs = [write_rows(corpus, tmp_path / "rows", {"hidden_states": golden["out/output"]})]
    if "in/output" in golden:  # OPT's has no module of its own
        outputs.append(write_vllm(corpus, tmp_path / "vllm", {"hidden_states": golden["in/output"]}))
    for output in outputs:
        read = Imported(output, corpus, teacher).read
        found = stored(tmp_path / type(output).__name__, corpus, form, lambda s, read=read: s.fill_from(read))
        assert_equal(found, expected, 1e-5)

    top_k = placement.map(step.top_k_pass)
    form, k = TopKLogProbs(5, "float32"), 5
    expected = stored(
        tmp_path / "own_k",
        corpus,
        form,
        lambda s: s.fill(placement, lambda b: top_k(config, k, 64, placed, b)),
    )
    logits = golden["logits"].astype(np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    # More tokens than are kept, in another order. Indexing makes arrays that are not contiguous.
    ids = np.argsort(-log_probs, axis=-1)[..., [6, 2, 0, 3, 1, 5, 4]]
    log_probs = np.take_along_axis(log_probs, ids, axis=-1).astype(np.float32)
    output = write_rows(corpus, tmp_path / "top", {"top_ids": ids.astype(np.int32), "log_probs": log_probs})
    teacher = ImportedTeacher(config, config.vocab_size, models.load_output(folder), None, k)
    read = Imported(output, corpus, teacher).read
    assert_equal(stored(tmp_path / "k", corpus, form, lambda s: s.fill_from(read)), expected, 1e-5)


COUNT, WIDTH, VOCABULARY = 20, 6, 50
CONFIG = models.DecoderConfig(
    family="llama", vocab_size=VOCABULARY, valid_vocab_size=VOCABULARY - 2, hidden_size=WIDTH, embed_size=WIDTH, num_layers=1,
    num_heads=1, num_kv_heads=1, head_dim=WIDTH, intermediate_size=8, max_positions=64, norm="rms",
)  # fmt: skip
SCALE = np.array([0.5, 1, 2, -1, 3, 0.1], np.float32)
OUTPUT = {"norm": {"scale": SCALE}}


@functools.cache
def corpus() -> Examples:
    """Of a chat: parts with loss. Two rows have the same tokens and other targets."""
    random = np.random.default_rng(0)
    tokens = [random.integers(0, 48, n).astype(np.int32) for n in random.integers(6, 30, COUNT)]
    tokens[13] = tokens[4]
    targets = [np.sort(random.permutation(np.arange(1, len(t)))[: len(t) // 2]) for t in tokens]
    return Examples(tokens, np.ones(COUNT, np.int32), targets)


def normalised_states() -> list[np.ndarray]:
    """RMS-normalised, scaled, and a function of the tokens alone."""
    found = []
    for tokens in corpus().tokens:
        x = np.stack([np.sin((tokens + 1.0) * (j + 1)) for j in range(WIDTH)], axis=1)
        x += np.arange(len(tokens))[:, None] % 5
        found.append((x / np.sqrt(np.square(x).mean(axis=1, keepdims=True)) * SCALE).astype(np.float32))
    return found


def imported(output, k=0) -> Imported:
    return Imported(output, corpus(), ImportedTeacher(CONFIG, VOCABULARY, OUTPUT, None, k))


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(store, "_SHARD_EXAMPLES", 6)


def content(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


def test_each_example_gets_the_positions_before_its_targets(tmp_path, small_shards):
    states = normalised_states()
    output = write_rows(corpus(), tmp_path / "rows", {"hidden_states": states}, rows_per_file=3)
    form = HiddenStates(WIDTH, "float32")
    found = stored(tmp_path / "store", corpus(), form, lambda s: s.fill_from(imported(output).read))
    for i in range(COUNT):
        expected = states[i][corpus().target_positions(i) - 1]
        np.testing.assert_array_equal(found[i]["teacher_hidden_TxE"], expected)


def test_an_interrupted_import_resumes_to_the_same_bytes(tmp_path, small_shards):
    output = write_rows(corpus(), tmp_path / "rows", {"hidden_states": normalised_states()}, rows_per_file=3)
    form, seen = HiddenStates(WIDTH, "float32"), []

    def interrupted(examples):
        for found in imported(output).read(examples):
            if len(seen) == 8:
                raise KeyboardInterrupt
            seen.append(found[0])
            yield found

    stored(tmp_path / "whole", corpus(), form, lambda s: s.fill_from(imported(output).read))
    with pytest.raises(KeyboardInterrupt):
        stored(tmp_path / "resumed", corpus(), form, lambda s: s.fill_from(interrupted))
    assert len(content(tmp_path / "resumed")) == 1
    seen[:] = range(9)  # no further interruption
    stored(tmp_path / "resumed", corpus(), form, lambda s: s.fill_from(interrupted))
    assert sorted(seen[9:]) == list(range(6, COUNT))
    assert content(tmp_path / "resumed") == content(tmp_path / "whole")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["recommended", "bins", "deltas"])
def test_distillkit_files_are_read_as_distillkit_reads_them(tmp_path, name, padded):
    """golden/distillkit.json: what its LogprobCompressor packs of random logits, and unpacks again.

    Its files have no position for the last token, and end rows with a padding token.
    """
    golden = json.loads((Path(__file__).parent / "golden" / "distillkit.json").read_text())[name]
    (tmp_path / "compression_config.yaml").write_text(yaml.safe_dump(golden["settings"]))
    tokens = [np.array(row) for row in ([5, 6, 7, 8], [1, 2, 3, 9])]
    packed, ids = ([list(bytes.fromhex(x)) for x in golden[which]] for which in ("log_probs", "ids"))
    rows = [row[: len(row) - padded] for row in tokens]
    table = {
        "input_ids": tokens,
        "compressed_logprobs": [packed, packed[::-1]],
        "bytepacked_indices": [ids, ids[::-1]],
    }
    pq.write_table(pa.table(table), tmp_path / "data_0.parquet", row_group_size=1)
    examples = Examples(rows[::-1], np.array([1, 1], np.int32))
    k = golden["settings"]["k"]
    teacher = ImportedTeacher(CONFIG, VOCABULARY, OUTPUT, None, k)
    read = Imported(DistillKitFiles(tmp_path), examples, teacher).read
    found = stored(tmp_path / "store", examples, TopKLogProbs(k, "float32"), lambda s: s.fill_from(read))
    count = len(rows[0]) - 1
    for one, order in zip(found, (slice(None, None, -1), slice(None)), strict=True):
        ids, values = (np.array(golden[which])[order][:count] for which in ("top_ids", "values"))
        # A polynomial need not descend, and the store's order does.
        by_id = np.argsort(ids, axis=1), np.argsort(one["teacher_ids_TxK"], axis=1)
        expected, found_values = (
            np.take_along_axis(x, o, axis=1)
            for x, o in zip((values, one["teacher_log_probs_TxK"]), by_id, strict=True)
        )
        np.testing.assert_array_equal(np.sort(one["teacher_ids_TxK"], axis=1), np.sort(ids, axis=1))
        # DistillKit evaluates a float16 polynomial in float16.
        np.testing.assert_allclose(found_values, expected, atol=3e-3 if name == "bins" else 2e-6)


def test_distillkit_files_need_the_settings_of_their_compression(tmp_path):
    tokens = pa.array([[5, 6, 7]])
    table = {
        "input_ids": tokens,
        "compressed_logprobs": [[[0] * 8] * 2],
        "bytepacked_indices": [[[0] * 3] * 2],
    }
    pq.write_table(pa.table(table), tmp_path / "data_0.parquet")
    examples = Examples([np.array([5, 6, 7])], np.array([1], np.int32))
    read = Imported(DistillKitFiles(tmp_path), examples, ImportedTeacher(CONFIG, 50, OUTPUT, None, 2)).read
    with pytest.raises(InputError, match=r"data_0.parquet: row 0 .*compression_config.yaml \(No such file"):
        list(read(np.arange(1)))
    settings = {
        "d": 50,
        "k": 4,
        "exact_k": 4,
        "exact_dtype": "float32",
        "polynomial_terms": None,
        "term_dtype": "float32",
    }
    settings |= {"residual_bins": [], "delta_encoding": False}
    (tmp_path / "compression_config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(InputError, match="8 bytes a position, and not 16"):
        list(read(np.arange(1)))


def _top(k=4):
    ids = [np.tile(np.arange(k, dtype=np.int32), (len(t), 1)) for t in corpus().tokens]
    return {"top_ids": ids, "log_probs": [np.full(i.shape, np.log(0.2), np.float32) for i in ids]}


def _changed(i, values, change):
    """`values` with those of example i changed, at its first target."""
    values = [v.copy() for v in values]
    change(values[i], int(corpus().target_positions(i)[0]) - 1)
    return values


def _set(value):
    def change(rows, position):
        rows[position, 1] = value

    return change


def _write_hidden(folder, states):
    return write_rows(corpus(), folder, {"hidden_states": states})


def _without(folder, example):
    output = _write_hidden(folder, normalised_states())
    [file] = output.files
    tensors = load_file(file)
    start, end = np.cumsum(corpus().lengths)[[example - 1, example]]
    tensors = {
        name: np.delete(x, example if name == "lengths" else slice(start, end), axis=0)
        for name, x in tensors.items()
    }
    save_file(tensors, file)
    return output


def _rewritten(folder, change):
    """With tensors of the file replaced or, where None, left out."""
    output = _write_hidden(folder, normalised_states())
    [file] = output.files
    tensors = load_file(file)
    tensors |= change(tensors)
    save_file({name: x for name, x in tensors.items() if x is not None}, file)
    return output


def _vllm(folder, states):
    return write_vllm(corpus(), folder, {"hidden_states": states})


STATES = normalised_states()
ROW = r"00000.safetensors: row 7 \(training example row 7\) has "
WRONG = {
    "a row is missing": (lambda f: _without(f, 5), 0, r"example row 5 \(.*1 of 20 examples are missing; give"),
    "another tokenizer": (
        lambda f: _rewritten(f, lambda t: {"token_ids": np.where(t["token_ids"] == 47, 50, t["token_ids"])}),
        0, r"00000.safetensors: row \d+ has token 50, and the teacher's vocabulary has 50 entries; .*another tokenizer",
    ),
    "another width": (
        lambda f: _write_hidden(f, [s[:, :5] for s in STATES]), 0,
        r"00000.safetensors: row 0 \(training example row 0\) has hidden_states of width 5, and the teacher's is 6",
    ),
    "before the norm": (lambda f: _write_hidden(f, [3 * s for s in STATES]), 0, "from before the final norm; write those"),
    "not finite": (lambda f: _write_hidden(f, _changed(7, STATES, _set(np.nan))), 0, ROW + "hidden_states that are not finite"),
    "not finite, vLLM": (lambda f: _vllm(f, _changed(7, STATES, _set(np.inf))), 0, r"request-13.*row 7\) has .*not finite"),
    "too few tokens": (lambda f: write_rows(corpus(), f, _top(3)), 4, r"3\).*at least the 4 tokens of config.teacher.store_top_k"),
    "hidden states for top k": (lambda f: _write_hidden(f, STATES), 4, "and no top_ids; set config.teacher.store_top_k to 0"),
    "top k for hidden states": (lambda f: write_rows(corpus(), f, _top()), 0, "and no hidden_states; set .* to the number"),
    "not a token": (
        lambda f: write_rows(corpus(), f, _top() | {"top_ids": _changed(7, _top()["top_ids"], _set(48))}), 4,
        ROW + "48 among its top_ids, and the teacher has 48 tokens",
    ),
    "twice": (
        lambda f: write_rows(corpus(), f, _top() | {"top_ids": _changed(7, _top()["top_ids"], _set(0))}), 4,
        ROW + "a token twice among its top 4",
    ),
    "logits": (
        lambda f: write_rows(corpus(), f, _top() | {"log_probs": _changed(7, _top()["log_probs"], _set(3.0))}), 4,
        ROW + r"probabilities that add up to 20.7 .*not logits",
    ),
    "no lengths": (lambda f: _rewritten(f, lambda t: {"lengths": None}), 0, "00000.safetensors: cannot be read .*lengths"),
    "wrong lengths": (lambda f: _rewritten(f, lambda t: {"lengths": t["lengths"][1:]}), 0, "lengths add up to .*number of tokens"),
    "no signal": (lambda f: _rewritten(f, lambda t: {"hidden_states": None}), 0, "has lengths, token_ids; besides .* either"),
    "fewer positions": (
        lambda f: _rewritten(f, lambda t: {"hidden_states": t["hidden_states"][1:]}), 0, "hidden_states has shape .*one row for each"
    ),
    "no files": (RowFiles, 0, r"there is no \*.safetensors in this folder"),
    "rows as vLLM's": (lambda f: VllmFiles(_write_hidden(f, STATES).folder), 0, r"has shape \[\d+, 6\]; vLLM writes"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_outputs_are_refused_by_file_and_row(tmp_path, wrong):
    write, k, message = WRONG[wrong]
    form = TopKLogProbs(k, "float32") if k else HiddenStates(WIDTH, "float32")
    with pytest.raises(InputError, match=message):
        stored(
            tmp_path / "store",
            corpus(),
            form,
            lambda s: s.fill_from(imported(write(tmp_path / "rows"), k).read),
        )


def test_a_damaged_file_is_named(tmp_path):
    output = _write_hidden(tmp_path / "rows", STATES)
    output.files[0].write_bytes(output.files[0].read_bytes()[:-100])
    with pytest.raises(InputError, match=r"00000.safetensors: cannot be read .*write or copy it again"):
        imported(output)
