import pytest

from l2m_jax.data.prompts import format_prompt
from l2m_jax.data.synthetic import synthetic_rows
from l2m_jax.data.tokenizer import train_tokenizer

NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def rows():
    return synthetic_rows(0, 650, 65, 130)


def test_sizes_and_seed(rows):
    assert [len(part) for part in rows] == [650, 65, 130]
    assert rows == synthetic_rows(0, 650, 65, 130)
    assert rows.train[0] != synthetic_rows(1, 650, 65, 130).train[0]


def test_splits_share_no_row(rows):
    texts = [(row.instruction, row.input) for part in rows for row in part]
    assert len(set(texts)) == len(texts)
    ids = [row.id for part in rows for row in part]
    assert len(set(ids)) == len(ids)


def test_more_training_rows_leave_the_test_as_it_is(rows):
    more = synthetic_rows(0, 700, 65, 130)
    assert more.test == rows.test
    assert more.train[:650] == rows.train


def test_kinds_are_many_and_equally_frequent(rows):
    kinds = [row.category for row in rows.train]
    assert len(set(kinds)) >= 10
    assert {kinds.count(kind) for kind in set(kinds)} == {650 // len(set(kinds))}


def test_a_kind_that_runs_out_gives_way():
    rows = synthetic_rows(0, 8000, 1, 1).train
    assert len(rows) == len({(row.instruction, row.input) for row in rows}) == 8000


def test_kinds_are_graded(rows):
    """Within a kind some rows are short and others long, so that there is something to rank."""
    for kind in {row.category for row in rows.train}:
        asked = [len(f"{r.instruction} {r.input}".split()) for r in rows.train if r.category == kind]
        assert max(asked) >= min(asked) + 3


ANSWERS = {
    "copy": lambda w: w,
    "reverse": lambda w: w[::-1],
    "sort": sorted,
    "repeat": lambda w: [x for x in w for _ in "12"],
    "drop last": lambda w: w[:-1],
    "swap": lambda w: [w[-1], *w[1:-1], w[0]],
    "every second": lambda w: [x for i, x in enumerate(w) if i % 2],
    "colours": lambda w: [x for i, x in enumerate(w) if i % 2],
    "count": lambda w: ["there", "are", NUMBERS[len(w)], "words"],
    "first": lambda w: ["first", w[0], "and", "last", w[-1]],
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_answers_are_right(rows, kind):
    of_kind = [row for row in rows.train if row.category == kind]
    assert of_kind
    for row in of_kind:
        assert row.references == (" ".join(ANSWERS[kind](row.input.split())),)


def test_sums_are_right(rows):
    for row in (row for row in rows.train if row.category == "add"):
        terms, total = row.references[0].split(" is ")
        assert row.instruction == f"What is {terms}?"
        assert sum(map(NUMBERS.index, terms.split(" plus "))) == NUMBERS.index(total)


def test_look_ups_are_given(rows):
    for row in (row for row in rows.train if row.category == "look up"):
        assert row.references[0] in row.input.split(", ")
        assert row.instruction == f"What does {row.references[0].split()[0]} have?"


def test_left_out_words(rows):
    for row in (row for row in rows.train if row.category == "without"):
        gone = row.instruction.removeprefix("Leave out ").removesuffix(".")
        assert row.references[0].split() == [word for word in row.input.split() if word != gone]


def test_examples_are_short_with_a_trained_tokenizer(rows):
    tokenizer = train_tokenizer((f"{r.instruction}\n{r.input}\n{r.references[0]}" for r in rows.train), 1024)
    texts = [format_prompt(row.instruction, row.input) + row.references[0] for row in rows.test]
    assert sum(len(tokenizer.encode(text)) + 1 for text in texts) / len(texts) < 32


def test_worlds_have_other_training_rows_and_the_same_validation_and_test_rows(rows):
    other = synthetic_rows(0, 650, 65, 130, world=1)
    assert (other.validation, other.test) == (rows.validation, rows.test)

    def asked(found):
        return {(row.instruction, row.input) for row in found}

    shared = asked(rows.train) & asked(other.train)
    assert len(shared) < 0.1 * len(rows.train)
    assert not asked(other.train) & asked([*rows.validation, *rows.test])
