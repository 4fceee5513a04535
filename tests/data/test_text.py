"""Plain text: its documents, its sequences, and the synthetic one."""

import itertools
import json

import numpy as np
import pytest

from l2m_jax.data.batches import micro_batches
from l2m_jax.data.packing import Shape
from l2m_jax.data.synthetic import synthetic_rows, synthetic_text
from l2m_jax.data.text import TextExamples, encode_text, read_documents
from l2m_jax.data.tokenizer import train_tokenizer
from l2m_jax.errors import InputError

DOCUMENTS = ["a boat and a cat", "two lines\nof one text", "the end"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(DOCUMENTS, 300)


@pytest.mark.parametrize(("size", "length"), [(23, 8), (22, 8), (2, 8), (9, 2)])
def test_every_token_is_a_target_once_in_order(size, length):
    tokens = np.arange(100, 100 + size, dtype=np.int32)
    examples = TextExamples(tokens, length)
    (batch,) = micro_batches(examples, np.arange(len(examples)), (Shape(size, length),))
    labels, weights = batch.labels_T[0], batch.weights_T[0]
    np.testing.assert_array_equal(np.sort(labels[weights > 0]), tokens[1:])
    read = [examples.example_tokens(i) for i in range(len(examples))]
    np.testing.assert_array_equal(np.concatenate([each[1:] for each in read]), tokens[1:])
    assert examples.lengths.tolist() == [len(each) for each in read] and max(examples.lengths) <= length
    # A target is predicted from the token before it.
    before = np.asarray(batch.tokens_RxL[0]).ravel()[batch.target_index_T[0][weights > 0]]
    np.testing.assert_array_equal(before + 1, labels[weights > 0])


def test_documents_end_with_the_end_of_sequence(tokenizer):
    tokens = encode_text(DOCUMENTS, tokenizer, 0)
    assert tokenizer.decode(tokens) == "".join(f"<|endoftext|>{text}" for text in [*DOCUMENTS, ""])
    np.testing.assert_array_equal(encode_text(DOCUMENTS, tokenizer, 7), tokens[:8])


def test_files_of_both_forms_have_the_same_documents(tmp_path):
    plain, lines = tmp_path / "text.txt", tmp_path / "text.jsonl"
    plain.write_text("\n" + "\n\n \n".join(DOCUMENTS) + "\n")
    lines.write_text("".join(json.dumps({"title": "x", "text": text}) + "\n\n" for text in DOCUMENTS))
    assert list(read_documents(plain)) == list(read_documents(lines)) == DOCUMENTS


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.txt", " \n\n", "x.txt has no text"),
        ("x.jsonl", '{"words": "a"}\n', "x.jsonl, line 1: expected a JSON object with 'text'"),
        ("x.jsonl", '{"text": 1}\n', "x.jsonl, line 1: 'text' must be a string"),
        ("x.jsonl", '{"text": "a"}\nno\n', "x.jsonl, line 2: not JSON"),
        ("x.txt", "caf\xe9", "x.txt cannot be read as UTF-8"),
        ("x.txt", None, "no such file"),
    ],
)
def test_what_is_no_text_is_named(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=said):
        list(read_documents(tmp_path / name))


def test_synthetic_text_has_the_words_of_the_tasks_and_none_of_their_prompts():
    lines = list(itertools.islice(synthetic_text(0), 3000))
    assert lines == list(itertools.islice(synthetic_text(0), 3000))
    assert lines[:20] != list(itertools.islice(synthetic_text(1), 20))
    rows = synthetic_rows(0, 1300, 1, 1).train
    asked = {row.instruction for row in rows}
    assert not any(instruction in line for instruction in asked for line in lines)
    # Each skill is there: "boat apple in order is apple boat".
    sorted_lists = [line.split(" in order is ") for line in lines if " in order is " in line]
    assert len(sorted_lists) > 100
    assert all(sorted(given.split()) == answer.split() for given, answer in sorted_lists)
    backwards = [line.split(" backwards is ") for line in lines if " backwards is " in line]
    assert all(given.split()[::-1] == answer.split() for given, answer in backwards)
    # Large sums are rare.
    words = {
        word for row in rows if row.category != "add" for word in f"{row.input} {row.references[0]}".split()
    }
    assert words <= {word for line in lines for word in line.split()}
