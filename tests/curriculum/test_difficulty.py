import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from l2m_jax.curriculum import difficulty
from l2m_jax.curriculum.difficulty import Difficulty, matched_rouge_l, rank
from l2m_jax.errors import InputError

ROUGE = [0.2, 0.9, 0.5, 0.2]
CROSS_ENTROPY = [1.0, 3.0, 2.0, 0.5]


def test_fusion_by_hand():
    # Standing by Rouge-L (high is easy): 3, 1, 2, 3. By cross-entropy (low is easy): 2, 4, 3, 1.
    # 1/63 + 1/62 = 0.032002, 1/61 + 1/64 = 0.032018, 1/62 + 1/63 = 0.032002, 1/63 + 1/61 = 0.032266.
    assert rank(ROUGE, CROSS_ENTROPY).tolist() == [3, 1, 0, 2]


def test_rouge_alone_leaves_ties_in_the_order_of_the_index():
    assert rank(ROUGE, CROSS_ENTROPY, "rouge").tolist() == [1, 2, 0, 3]


def test_cross_entropy_breaks_the_ties_of_rouge():
    assert rank(ROUGE, CROSS_ENTROPY, "rouge_then_cross_entropy").tolist() == [1, 2, 3, 0]


def test_without_any_rouge_fusion_falls_back_on_cross_entropy():
    # A student that answers nothing right scores 0 everywhere: the index must not decide.
    assert rank([0.0] * 4, CROSS_ENTROPY).tolist() == [3, 0, 2, 1]


def test_examples_without_an_answer_get_the_rouge_of_their_rank_by_cross_entropy():
    rng = np.random.default_rng(0)
    rouge_l, cross_entropy = rng.random(400).round(2), rng.random(400)
    measured = np.arange(400) % 4 == 0
    found = matched_rouge_l(np.where(measured, rouge_l, np.nan), cross_entropy, measured)
    np.testing.assert_array_equal(found[measured], rouge_l[measured])
    # Three others for each that was measured: its distribution three times, the highest where cross-entropy is lowest.
    by_cross_entropy = np.argsort(cross_entropy[~measured])
    np.testing.assert_array_equal(
        found[~measured][by_cross_entropy], np.repeat(np.sort(rouge_l[measured])[::-1], 3)
    )


def test_a_sample_of_all_examples_changes_nothing():
    found = matched_rouge_l(np.array(ROUGE), np.array(CROSS_ENTROPY), np.ones(4, bool))
    assert found.tolist() == ROUGE


def test_equal_examples_keep_their_order():
    for method in ("fusion", "rouge", "rouge_then_cross_entropy"):
        assert rank([0.5] * 50, [1.0] * 50, method).tolist() == list(range(50))


def test_random_order_depends_on_the_seed_alone():
    one = rank([0.1] * 30, [1.0] * 30, "random", seed=1)
    assert sorted(one.tolist()) == list(range(30)) and one.tolist() != list(range(30))
    np.testing.assert_array_equal(one, rank(np.linspace(0, 1, 30), [2.0] * 30, "random", seed=1))
    assert one.tolist() != rank([0.1] * 30, [1.0] * 30, "random", seed=2).tolist()


def test_an_unknown_method_lists_the_known_ones():
    with pytest.raises(InputError, match=r"'bleu'.*fusion, rouge, rouge_then_cross_entropy, random"):
        rank(ROUGE, CROSS_ENTROPY, "bleu")


def test_a_score_that_is_not_finite_is_named():
    with pytest.raises(InputError, match="cross-entropy of training example 2 is nan"):
        rank(ROUGE, [1.0, 3.0, float("nan"), 0.5])


def test_ranks_and_subsets():
    graded = Difficulty.of("abcd", np.array(ROUGE), np.array(CROSS_ENTROPY), subsets=3)
    assert graded.rank.tolist() == [2, 1, 3, 0]
    assert graded.subset.tolist() == [2, 1, 3, 1]
    assert graded.order.tolist() == [3, 1, 0, 2]
    assert [subset.tolist() for subset in graded.subsets] == [[3, 1], [0], [2]]


def test_more_subsets_than_examples():
    with pytest.raises(InputError, match="5 difficulty subsets of 4"):
        Difficulty.of("abcd", np.array(ROUGE), np.array(CROSS_ENTROPY), subsets=5)


def test_the_file_has_one_row_an_example_and_reads_back(tmp_path):
    path = tmp_path / "run" / "difficulty.parquet"
    graded = Difficulty.of(["é1", "b", "c", "d"], np.array(ROUGE), np.array(CROSS_ENTROPY), subsets=2)
    graded.write(path)
    rows = pq.read_table(path).to_pylist()
    assert rows[0] == {"id": "é1", "rouge_l": 0.2, "cross_entropy": 1.0, "rank": 2, "subset": 2}
    assert len(rows) == 4 and [p.name for p in path.parent.iterdir()] == ["difficulty.parquet"]
    again = Difficulty.read(path)
    assert again.ids == graded.ids
    for name in ("rouge_l", "cross_entropy", "rank", "subset"):
        read, written = getattr(again, name), getattr(graded, name)
        assert read.dtype == written.dtype
        np.testing.assert_array_equal(read, written)


@pytest.mark.parametrize("content", [None, b"not parquet"])
def test_an_unreadable_file_says_what_to_do(tmp_path, content):
    path = tmp_path / "difficulty.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match="delete it and rank the examples again"):
        Difficulty.read(path)


def test_a_file_without_the_columns_is_refused(tmp_path):
    path = tmp_path / "difficulty.parquet"
    pq.write_table(pa.table({"id": ["a"]}), path)
    with pytest.raises(InputError, match="difficulty file"):
        Difficulty.read(path)


def test_every_method_has_a_name():
    assert difficulty.RANKINGS == ("fusion", "rouge", "rouge_then_cross_entropy", "random")
