import dataclasses
import itertools
import json
from pathlib import Path

import pytest

from l2m_jax.data import shards
from l2m_jax.data.encoding import Counts, Encoder
from l2m_jax.data.prompts import format_prompt
from l2m_jax.data.settings import Data, SyntheticData
from l2m_jax.data.shards import Tokeniser
from l2m_jax.data.splits import check_sources, part_examples, token_limits
from l2m_jax.data.synthetic import synthetic_rows
from l2m_jax.data.tokenizer import train_tokenizer
from l2m_jax.errors import InputError

PARTS = ("train", "validation", "test")
# Every fourth of 40 rows is too long, whatever comes before it.
LONG = {f"r{i}" for i in range(0, 40, 4)}
MAX_LENGTH = 40


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([format_prompt("say", "") + "it"], 300)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Data:
    """40 rows to be split into 5 for test, 4 for validation and the rest, 10 of which are too long."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    write(path, [f"r{i}" for i in range(40)])
    return Data(train=str(path), validation_rows=4, test_rows=5, max_length=MAX_LENGTH)


def write(path: Path, ids: list[str], long: set[str] = LONG) -> None:
    rows = [{"id": i, "instruction": "say", "output": "it " * (MAX_LENGTH if i in long else 2)} for i in ids]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def others(tmp_path) -> dict[str, str]:
    """Separate files of 6 validation and 6 test rows."""
    for name in ("validation", "test"):
        write(tmp_path / f"{name}.jsonl", [f"{name[0]}{i}" for i in range(6)])
    return {name: str(tmp_path / f"{name}.jsonl") for name in ("validation", "test")}


@pytest.fixture
def tokeniser(tokenizer, tmp_path):
    """A new folder for each call: nothing is known from another split."""
    numbers = itertools.count()
    return lambda: Tokeniser(tokenizer, "alpaca", tmp_path / f"tokenised{next(numbers)}", processes=1)


@pytest.fixture
def ids(tokeniser):
    """The ids of a part's rows."""

    def of_part(data, part, world=0) -> list[str]:
        return [example.row.id for example in part_examples(data, part, tokeniser(), Counts(), world)]

    return of_part


def test_parts_share_no_row_and_leave_none_out(data, ids):
    found = {part: ids(data, part) for part in PARTS}
    assert {part: len(rows) for part, rows in found.items()} == {"train": 21, "validation": 4, "test": 5}
    together = [row for rows in found.values() for row in rows]
    assert len(set(together)) == 30 and set(together) == {f"r{i}" for i in range(40)} - LONG


@pytest.mark.parametrize("train_rows", [1, 7, 21])
def test_the_split_does_not_depend_on_how_many_rows_are_trained_on(data, ids, train_rows):
    fewer = dataclasses.replace(data, train_rows=train_rows)
    for part in ("validation", "test"):
        assert ids(fewer, part) == ids(data, part)
    chosen, all_rows = ids(fewer, "train"), ids(data, "train")
    assert len(chosen) == train_rows and set(chosen) <= set(all_rows)
    more = ids(dataclasses.replace(data, train_rows=min(train_rows + 5, 21)), "train")
    assert set(chosen) <= set(more)


def test_a_part_does_not_depend_on_later_sizes(data, ids):
    larger = dataclasses.replace(data, validation_rows=8)
    assert ids(larger, "test") == ids(data, "test")
    assert ids(larger, "validation")[:4] == ids(data, "validation")
    assert set(ids(data, "train")) - set(ids(larger, "train")) == set(ids(larger, "validation")[4:])


def test_the_draw_follows_its_seed(data, ids):
    other = dataclasses.replace(data, split_seed=7)
    assert ids(data, "test") == ids(data, "test")
    assert set(ids(other, "test")) != set(ids(data, "test"))
    # The first rows of a part are a random sample too: an evaluation may use only these.
    assert ids(data, "test") != sorted(ids(data, "test"), key=lambda i: int(i[1:]))


def test_training_rows_keep_the_order_of_the_source(data, ids):
    found = ids(dataclasses.replace(data, train_rows=12), "train")
    assert found == sorted(found, key=lambda i: int(i[1:]))


def test_many_rounds_draw_the_same_rows(data, ids, tmp_path):
    """Rows are tokenised in rounds until enough of them fit."""
    path = tmp_path / "rows.jsonl"
    names = [f"r{i}" for i in range(400)]
    write(path, names, long=LONG | set(names[20:]))
    scarce = dataclasses.replace(data, train=str(path))
    found = [set(ids(scarce, part)) for part in PARTS]
    assert [len(rows) for rows in found] == [6, 4, 5]
    assert set.union(*found) == set(names[:20]) - LONG


@pytest.mark.parametrize("bos", ["none", "training", "evaluation", "both"])
def test_parts_have_their_sizes_whichever_of_them_gets_a_bos(data, ids, tokenizer, tmp_path, bos):
    """A row that fits only without the token goes into no part where any part has the token."""
    path = tmp_path / "rows.jsonl"
    lines = [{"id": f"r{n}", "instruction": "say", "output": "it " * n} for n in range(1, 21)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    longest = len(tokenizer(format_prompt("say", "") + "it " * 20)["input_ids"]) + 1
    data = dataclasses.replace(data, train=str(path), max_length=longest, bos=bos)
    found = {part: ids(data, part) for part in PARTS}
    num_fitting = 20 if bos == "none" else 19
    assert [len(found[part]) for part in PARTS] == [num_fitting - 9, 4, 5]
    assert ("r20" in {row for rows in found.values() for row in rows}) == (bos == "none")


@pytest.mark.parametrize(
    ("bos", "begins"),
    [
        ("none", ""),
        ("training", "train"),
        ("evaluation", "validation test"),
        ("both", "train validation test"),
    ],
)
def test_bos_begins_the_rows_of_its_use_alone(data, bos, begins):
    data = dataclasses.replace(data, bos=bos)
    assert [part for part in PARTS if token_limits(data, part).bos] == begins.split()


def test_limits_of_the_settings(data):
    limits = token_limits(dataclasses.replace(data, max_prompt_length=20, truncate=True), "train")
    assert (limits.max_length, limits.max_prompt_length) == (MAX_LENGTH, 20)
    assert (limits.long_prompt, limits.long_response) == ("truncate", "truncate")
    assert token_limits(data, "test").max_prompt_length is None
    assert token_limits(data, "test").long_prompt == "drop"


def test_separate_files_and_training_rows_do_not_depend_on_each_other(data, ids, others, tmp_path):
    separate = dataclasses.replace(data, **others, train_rows=10)
    assert ids(separate, "train") == [f"r{i}" for i in range(10) if f"r{i}" not in LONG]
    assert ids(separate, "validation") == ["v0", "v1", "v2", "v3"]
    assert ids(separate, "test") == ["t0", "t1", "t2", "t3", "t4"]
    gone = {"validation": str(tmp_path / "gone.jsonl"), "test": str(tmp_path / "gone.jsonl")}
    assert len(ids(dataclasses.replace(separate, **gone), "train")) == 7
    without = dataclasses.replace(separate, train=str(tmp_path / "gone.jsonl"))
    assert len(ids(without, "test")) == 5


def test_one_separate_file(data, ids, others):
    """Only the other part is split off: its rows are those that it would have had, and the rest is trained on."""
    one = dataclasses.replace(data, validation=others["validation"])
    assert ids(one, "validation") == ["v0", "v1", "v2", "v3"]
    assert ids(one, "test") == ids(data, "test")
    assert len(ids(one, "train")) == 25


@pytest.mark.parametrize(
    ("changes", "part", "needed"),
    [
        ({"train_rows": 22}, "train", 31),
        ({"validation_rows": 25}, "train", 31),
        ({"test_rows": 31}, "test", 31),
    ],
)
def test_too_few_rows(data, ids, changes, part, needed):
    with pytest.raises(InputError, match=rf"data\.train: .* has 30 rows .* needs at least {needed};"):
        ids(dataclasses.replace(data, **changes), part)


@pytest.fixture
def seen(monkeypatch) -> list[str]:
    """The ids of all rows that are tokenised."""
    found: list[str] = []

    class Counting(Encoder):
        def __call__(self, rows):
            found.extend(row.id for row in rows)
            return super().__call__(rows)

    monkeypatch.setattr(shards, "Encoder", Counting)
    return found


def test_a_bad_row_is_refused_before_any_is_tokenised(data, ids, tmp_path, seen):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\nnot json\n')
    for part in PARTS:
        with pytest.raises(InputError, match="line 2: not JSON"):
            ids(dataclasses.replace(data, train=str(path)), part)
    assert not seen


def test_few_rows_are_tokenised_for_a_small_part(data, ids, tmp_path, seen):
    path = tmp_path / "rows.jsonl"
    write(path, [f"s{i}" for i in range(1_000)])
    large = dataclasses.replace(data, train=str(path))
    assert len(ids(large, "test")) == 5
    assert len(seen) < 100
    assert len(ids(dataclasses.replace(large, train_rows=20), "train")) == 20
    assert len(seen) < 250


@pytest.mark.parametrize("order", list(itertools.permutations(PARTS)))
@pytest.mark.parametrize("changes", [{}, {"train_rows": 9}, {"bos": "training"}, {"bos": "evaluation"}])
def test_parts_share_their_tokens(data, ids, tokeniser, seen, order, changes):
    """Each row is tokenised at most once for all parts, which are those of parts made by themselves."""
    data = dataclasses.replace(data, **changes)
    alone = {part: ids(data, part) for part in PARTS}
    seen.clear()
    shared = tokeniser()
    together = {
        part: [example.row.id for example in part_examples(data, part, shared, Counts())] for part in order
    }
    assert together == alone
    assert len(seen) == len(set(seen)) and set(seen) >= set(itertools.chain(*alone.values()))


def test_synthetic_parts(ids):
    data = Data(source="synthetic", synthetic=SyntheticData(train=30, validation=5, test=7, seed=3))
    expected = synthetic_rows(3, 30, 5, 7)
    assert [ids(data, part) for part in PARTS] == [[row.id for row in rows] for rows in expected]


def test_sources_are_checked_by_their_first_row(data, others, tmp_path):
    check_sources(data)
    check_sources(dataclasses.replace(data, **others))
    check_sources(Data())  # a name on the hub
    check_sources(Data(source="synthetic"))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"instruction": "a"}\n')
    for name in PARTS:
        with pytest.raises(InputError, match=rf"^data\.{name}: no such file '.*gone\.jsonl'"):
            check_sources(dataclasses.replace(data, **{name: str(tmp_path / "gone.jsonl")}))
        with pytest.raises(InputError, match=rf"^data\.{name}: .*bad\.jsonl, line 1: no field 'output'"):
            check_sources(dataclasses.replace(data, **{name: str(bad)}))


@pytest.mark.parametrize("separate", [False, True])
def test_worlds_train_on_rows_of_their_own_and_share_the_others(data, ids, others, separate):
    limited = dataclasses.replace(data, train_rows=6)
    if separate:  # where long rows are dropped after the worlds have theirs
        limited = dataclasses.replace(limited, max_length=400, **others)
    trained = [ids(limited, "train", world) for world in range(3)]
    assert trained[0] == ids(limited, "train")  # world 0 is the data without worlds
    assert [len(found) for found in trained] == [6, 6, 6]
    assert len({row for found in trained for row in found}) == 18
    for part in ("validation", "test"):
        assert ids(limited, part, 2) == ids(limited, part)
        assert not {row for found in trained for row in found} & set(ids(limited, part))


def test_a_world_beyond_the_rows_is_refused(data, ids):
    limited = dataclasses.replace(data, train_rows=6)
    with pytest.raises(InputError, match=r"data\.train: .* the split needs at least 33"):
        ids(limited, "train", 3)


def test_a_folder_with_a_test_split_alone_is_one_of_test_rows(data, tmp_path):
    held = tmp_path / "held"
    held.mkdir()
    write(held / "test.jsonl", ["t0", "t1"])
    check_sources(dataclasses.replace(data, test=str(held)))


def test_a_folder_gives_validation_and_test_rows_of_their_own(data, ids, tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    for split in PARTS:
        write(folder / f"{split}.jsonl", [f"{split}{i}" for i in range(3)])
    whole = dataclasses.replace(data, **dict.fromkeys(PARTS, str(folder)), train_rows=0)
    check_sources(whole)
    assert [ids(whole, part) for part in PARTS] == [[f"{part}{i}" for i in range(3)] for part in PARTS]


@pytest.mark.parametrize("part", ["validation", "test"])
def test_parts_that_would_be_the_same_rows_are_refused(data, part):
    same = dataclasses.replace(data, **{part: data.train})
    with pytest.raises(InputError, match=rf"data\.{part}: '.*' would have the same rows as data\.train"):
        check_sources(same)


@pytest.mark.parametrize("separate", [False, True])
def test_more_rows_of_a_world_begin_with_its_own(data, ids, tokeniser, others, separate):
    """As a teacher has that is tuned on more rows than its student."""
    small = dataclasses.replace(data, train_rows=4, **(others if separate else {}))
    own = set(ids(small, "train", 2))
    large = dataclasses.replace(small, train_rows=9)
    found = [e.row.id for e in part_examples(large, "train", tokeniser(), Counts(), 2, world_rows=4)]
    assert own and own < set(found)
    assert not set(found) & set(ids(small, "train", 1))
