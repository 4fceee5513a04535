"""Plans of stages, and re-ranking within the training loop, with a real model's cross-entropy."""

import jax
import numpy as np
import pytest

from l2m_jax import methods, models
from l2m_jax.curriculum import Curriculum, Difficulty
from l2m_jax.data.batches import ListedExamples
from l2m_jax.data.packing import Shape
from l2m_jax.errors import InputError
from l2m_jax.evaluation.cross_entropy import cross_entropy_by_example
from l2m_jax.losses import Objective
from l2m_jax.models import DecoderConfig
from l2m_jax.parallel import Placement
from l2m_jax.run.stages import Plan, Reranking, exposures, read_exposures, strata_of, write_exposures
from l2m_jax.training.checkpoint import Checkpoints
from l2m_jax.training.loop import Task, Term, Trainer
from l2m_jax.training.metrics import MetricsLog
from l2m_jax.training.optimizer import OptimizerSettings
from l2m_jax.training.step import StepSettings

CONFIG = DecoderConfig(
    family="gpt2", vocab_size=60, valid_vocab_size=60, hidden_size=16, embed_size=16, num_layers=1, num_heads=2,
    num_kv_heads=2, head_dim=8, intermediate_size=32, max_positions=32, init_std=0.3,
)  # fmt: skip
COUNT, BATCH, SEED = 24, 4, 3
CURRICULUM = Curriculum(epochs_per_stage=1.5, mix=0.25, rerank=True, stratify="category")


class Corpus(ListedExamples):
    """What of a corpus the stages need; its categories are a, b and c in turn."""

    def __len__(self):
        return len(self.tokens)

    @property
    def response_lengths(self):
        return self.lengths - self.prompt_lengths

    @property
    def categories(self):
        return ["a", "b", "c"], np.arange(len(self)) % 3


def _corpus() -> Corpus:
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, 60, size=n).astype(np.int32) for n in rng.integers(6, 30, COUNT)]
    return Corpus(tokens, np.full(COUNT, 3, np.int32))


def _plan(name: str = "l2m", curriculum: Curriculum = CURRICULUM) -> Plan:
    order = np.random.default_rng(1).permutation(COUNT)
    rouge = np.linspace(1, 0, COUNT)[np.argsort(order)]
    ranking = Difficulty.of([str(i) for i in range(COUNT)], rouge, 1 - rouge)
    return Plan.of(methods.get(name), curriculum, SEED, _corpus(), ranking)  # type: ignore[arg-type]


class Killed(Exception):
    pass


class Training:
    """One start of a training in `folder`, and what it drew and measured."""

    def __init__(self, folder, kill_at: tuple[int, int] | None = None):
        placement, corpus = Placement("pmap", (jax.devices()[0],)), _corpus()
        self.plan, self.drawn, self.measured = _plan(), [], []

        def data(part, params):
            if (part.stage.index, part.epoch) == kill_at:
                raise Killed
            self.drawn.append((part.stage.index, part.indices))
            return [Term(Objective(beta=0.0), corpus)]

        def cross_entropy(params, indices):
            self.measured.append(indices.tolist())
            found = cross_entropy_by_example(CONFIG, params, corpus, placement, indices=indices)  # type: ignore[arg-type]
            assert (found[np.setdiff1d(np.arange(COUNT), indices)] == 0).all()
            return found[indices]

        def changed(plan):
            self.plan = plan

        task = Task(
            phase="test",
            settings=StepSettings(CONFIG, None, 60, chunk_size=16),
            stages=self.plan.stages,
            shapes=(Shape(2, 32),),
            optimizer=OptimizerSettings(learning_rate=3e-2),
            batch_size=BATCH,
            seed=SEED,
        )
        checkpoints = Checkpoints(folder / "checkpoints", placement, 10.0 if kill_at is None else 0.0)
        begin = Reranking(self.plan, folder / "rerankings", cross_entropy, changed).begin
        metrics = MetricsLog(folder / "metrics.jsonl")
        trainer = Trainer(task, placement, data, None, checkpoints, metrics, begin=begin)
        self.params = None
        try:
            initial = models.init(CONFIG, jax.random.key(0))
            self.params = placement.to_host(trainer.run(lambda: placement.place(initial)))
        except Killed:
            pass
        checkpoints.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, Training(folder)


def _bytes(folder):
    return {file.name: file.read_bytes() for file in sorted((folder / "rerankings").iterdir())}


def test_what_is_not_open_is_ranked_by_the_current_student(whole):
    folder, training = whole
    planned, final = _plan(), training.plan
    assert list(_bytes(folder)) == ["stage02.parquet", "stage03.parquet"]
    assert training.measured[0] == sorted(planned.unopened(1).tolist())
    assert len(training.measured[1]) == COUNT // 2
    first = [plan.subsets[1].tolist() for plan in (planned, final)]
    assert first[0] == first[1] and planned.subsets[2].tolist() != final.subsets[2].tolist()
    assert final.stages == planned.stages  # α, β and lengths
    for number, subset in final.subsets.items():
        assert np.bincount(_corpus().categories[1][subset]).tolist() == [2, 2, 2], number
    assert sorted(final.unopened(0).tolist()) == list(range(COUNT))
    known = Reranking(planned, folder / "rerankings", lambda *_: np.zeros(0), print).known()
    assert [s.tolist() for s in known.subsets.values()] == [s.tolist() for s in final.subsets.values()]


def test_subsets_that_are_divided_anew_are_as_large_as_planned():
    plan = _plan(curriculum=Curriculum(stages=7, subsets=(7, 6, 1), rerank=True))
    anew = plan.reranked(1, plan.unopened(1)[::-1])
    assert [len(subset) for subset in anew.subsets.values()] == [3, 3, 4]
    assert anew.stages == plan.stages


@pytest.mark.parametrize("kill_at", [(2, 1), (4, 1)])
def test_a_run_killed_in_a_reranked_stage_ends_as_one_that_was_not(whole, tmp_path, kill_at):
    folder, uninterrupted = whole
    killed = Training(tmp_path, kill_at)
    assert killed.params is None
    resumed = Training(tmp_path)
    assert len(killed.measured) + len(resumed.measured) == 2  # nothing is measured with later parameters
    assert _bytes(tmp_path) == _bytes(folder)
    jax.tree.map(np.testing.assert_array_equal, resumed.params, uninterrupted.params)


def test_exposure_is_what_the_loop_draws(whole, tmp_path):
    _, training = whole
    found = exposures(training.plan, _corpus(), BATCH)  # type: ignore[arg-type]
    groups = {"category": _corpus().categories[1], "subset": np.zeros(COUNT, int)}
    for number, subset in training.plan.subsets.items():
        groups["subset"][subset] = number - 1
    assert found["subset"].names == ("1", "2", "3", "4") and found["category"].names == ("a", "b", "c")
    for kind, seen in found.items():
        for stage in (1, 2, 3, 4):
            drawn = np.concatenate([indices for index, indices in training.drawn if index == stage])
            counted = np.bincount(groups[kind][drawn], minlength=len(seen.names))
            np.testing.assert_array_equal(seen.seen_KxG[seen.stage_K == stage].sum(axis=0), counted)
    write_exposures(tmp_path / "exposure" / "student.json", found)
    again = read_exposures(tmp_path / "exposure" / "student.json")
    np.testing.assert_array_equal(again["subset"].seen_KxG, found["subset"].seen_KxG)
    assert read_exposures(tmp_path / "none.json") == {}
    damaged = tmp_path / "exposure" / "student.json"
    for text in ("", '{"subset": {}}', "[]"):
        damaged.write_text(text)
        with pytest.raises(InputError, match=f"delete {damaged} to make the report without it"):
            read_exposures(damaged)


def test_a_missing_order_of_an_earlier_stage_is_refused(tmp_path):
    reranking = Reranking(_plan(), tmp_path, lambda params, indices: indices * 1.0, lambda plan: None)
    with pytest.raises(InputError, match=r"stage02\.parquet: missing"):
        reranking.begin(2, {})


def test_reranking_opens_the_hardest_first_where_the_method_does(tmp_path):
    curriculum = Curriculum(rerank=True)
    for name in ("l2m", "hard_first"):
        plan = _plan(name, curriculum)
        plans = []
        # The higher the number, the harder.
        reranking = Reranking(plan, tmp_path / name, lambda params, indices: indices * 1.0, plans.append)
        reranking.begin(1, {})
        (found,) = plans
        second = sorted(list(found.subsets.values())[1].tolist())
        rest = sorted(plan.unopened(1).tolist())
        assert second == (rest[:6] if name == "l2m" else rest[-6:])


def test_a_single_stage_has_no_subsets_to_expose():
    found = exposures(_plan("kld", Curriculum()), _corpus(), BATCH)  # type: ignore[arg-type]
    assert list(found) == ["category"]
    np.testing.assert_array_equal(found["category"].passes(), [20, 20, 20])


def test_strata_need_categories():
    class Plain(Corpus):
        @property
        def categories(self):
            return [""], np.zeros(len(self), int)

    corpus = Plain(_corpus().tokens, _corpus().prompt_lengths)
    with pytest.raises(
        InputError, match=r"config\.curriculum\.stratify: the training rows have no field 'category'"
    ):
        strata_of(corpus, "category")  # type: ignore[arg-type]
    assert strata_of(corpus, "") is None
    assert len(np.unique(strata_of(corpus, "length"))) == 4  # type: ignore[arg-type]
