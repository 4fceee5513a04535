"""Sweeps over worlds with a stand-in for the runs: their grid, the tuning, and the contrasts by hand."""

import json
import math

import pytest

from l2m_jax.config import change, defaults, parse
from l2m_jax.errors import InputError
from l2m_jax.evaluation.protocol import Results, Score, SetResult
from l2m_jax.generation import SamplingRules
from l2m_jax.run import pipeline
from l2m_jax.sweep.cells import world_grid
from l2m_jax.sweep.claims import Claims, Contrast
from l2m_jax.sweep.contrasts import outcomes
from l2m_jax.sweep.presets import Row
from l2m_jax.sweep.sweep import Sweep

CONFIG = change(parse(defaults()), {"data.source": "synthetic"})
ARMS = {"easy": Row("l2m"), "steep": Row("l2m", {"curriculum.alpha": 0.9}), "plain": Row("sft")}
RATES = {"training.learning_rate": [1e-3, 3e-3, 1e-2]}
# By world 1, 2, 3. Differences of easy and plain: 3, 4, 5; of steep and plain: 1, -1, 0.3.
VALUES = {"easy": (53.0, 55.0, 57.0), "steep": (51.0, 50.0, 52.3), "plain": (50.0, 51.0, 52.0)}
CONTRASTS = (
    Contrast("strong", "Easy is better.", "easy", "plain", paper=1.0),
    Contrast("weak", "Steep is better.", "steep", "plain", predicted="none"),
    Contrast("mixed", "Both are worse.", "(easy + steep) / 2", "plain", sign="negative", role="secondary"),
    Contrast("unknown", "Nobody measured it.", "easy", "plain", metric="validation_kl", role="secondary"),
)
CLAIMS = Claims("Claims", ARMS, CONTRASTS)


def results(value: float, made_from: str = "model") -> Results:
    score, exact = Score.of([value, value]), Score.of([0.0, 0.0])
    found = SetResult("test", "test", 2, 0, False, score, exact, 3.0, {})
    return Results(made_from, (10, 20), SamplingRules(), (found,))


class Runs:
    """Writes what a run leaves behind: two prompts, one of them above the run's score as far as the other is below."""

    def __init__(self):
        self.ran: list[str] = []
        self.prepared: list[int] = []
        self.broken: set[str] = set()

    def prepare(self, config, shared):
        self.prepared.append(config.world)

    def run(self, config, workdir, shared):
        arm, run = workdir.parts[-2:]
        self.ran.append(f"{arm}/{run}")
        if f"{arm}/{run}" in self.broken:
            raise InputError("broken")
        # The best learning rates are 3e-3, and 1e-2 for plain.
        rate = config.training.learning_rate
        validation = rate if arm == "plain" else -abs(rate - 3e-3)
        value = VALUES[arm][config.world - 1] if config.world else 0.0
        prompts = workdir / "evaluation" / config.method / "responses.jsonl"
        prompts.parent.mkdir(parents=True)
        lines = [
            {"set": "test", "id": prompt, "seed": seed, "rouge_l": (value + sign * 4) / 100}
            for prompt, sign in (("p", 1), ("q", -1))
            for seed in (10, 20)
        ]
        prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
        validations = [(10, validation - 1), (20, validation), (30, validation - 2)]
        (workdir / "metrics.jsonl").write_text(
            "".join(
                json.dumps({"phase": "student", "step": step, "validation_rouge_l": score}) + "\n"
                for step, score in validations
            )
        )
        return {
            "teacher": results(60.0),
            "student before": results(10.0 + config.world, f"world{config.world}"),
            config.method: results(value),
        }


@pytest.fixture
def runs(monkeypatch):
    found = Runs()
    monkeypatch.setattr(pipeline, "run", found.run)
    monkeypatch.setattr(pipeline, "prepare", found.prepare)
    monkeypatch.setattr(pipeline, "check", lambda config, shared: None)
    return found


def sweep(tmp_path, **options) -> Sweep:
    return Sweep(CONFIG, ARMS, tmp_path, worlds=3, **options)


def test_the_arms_of_a_world_share_it_and_differ_in_their_settings_alone():
    cells = world_grid(CONFIG, ARMS, 2)
    assert [c.name for c in cells] == [f"{arm}/world{world}" for world in (1, 2) for arm in ARMS]
    assert [c.config.world for c in cells] == [1, 1, 1, 2, 2, 2]
    assert len({c.config.student_seed for c in cells[:3]}) == 1 != len({c.config.student_seed for c in cells})
    assert cells[4].config == change(CONFIG, {"world": 2, "curriculum.alpha": 0.9})
    assert {c.config.teacher_world for c in cells} == {0}
    assert [c.config.teacher_world for c in world_grid(CONFIG, ARMS, 2, redraw_teacher=True)] == [1] * 3 + [
        2
    ] * 3


def test_arms_that_cannot_be_are_refused_by_name():
    with pytest.raises(InputError, match=r"odd: .*overrides\.beta: l2m takes"):
        world_grid(CONFIG, {"odd": Row("l2m", {"overrides.beta": 0.5})}, 1)
    with pytest.raises(InputError, match="odd: method: no method 'l2n'"):
        world_grid(CONFIG, {"odd": Row("l2n")}, 1)
    with pytest.raises(InputError, match="--worlds 0"):
        world_grid(CONFIG, ARMS, 0)


@pytest.mark.parametrize(
    ("changes", "contrast", "said"),
    [
        ({}, {"sets": ("tests",)}, r"contrasts\.odd\.sets: 'tests' is not in evaluation\.sets \(test\)"),
        (
            {"evaluation.diagnostic_rows": 0},
            {"metric": "validation_kl"},
            "validation_kl is not measured with",
        ),
    ],
)
def test_contrasts_of_what_is_not_measured_are_refused(tmp_path, changes, contrast, said):
    claims = Claims("Claims", ARMS, (Contrast("odd", "Odd.", "easy", "plain", **contrast),))
    with pytest.raises(InputError, match=said):
        Sweep(change(CONFIG, changes), ARMS, tmp_path, worlds=1, claims=claims)


def test_what_is_shared_is_made_world_by_world_and_contrasts_are_paired(tmp_path, runs):
    made = sweep(tmp_path, claims=CLAIMS)
    assert made.run() == {} and runs.prepared == [1, 1, 2, 2, 3, 3]  # once for each alpha
    strong, weak, mixed, unknown = outcomes(CLAIMS, made.cells(), tmp_path)
    assert strong.differences == (3.0, 4.0, 5.0) and weak.differences == pytest.approx((1.0, -1.0, 0.3))
    # t = 4·√3 with 2 degrees of freedom: p = 1 - t / √(t² + 2) = 0.0202, doubled for two primary contrasts.
    t = 4 * math.sqrt(3)
    assert strong.p == pytest.approx(2 * (1 - t / math.sqrt(t * t + 2)))
    assert (strong.verdict, weak.verdict) == ("holds", "unresolved")
    (alone,) = outcomes(Claims("Claims", ARMS, CONTRASTS[:1]), made.cells(), tmp_path)
    assert alone.p == strong.p  # one that is left out later still counts
    assert mixed.found is not None and mixed.p == mixed.found.p  # secondary: not adjusted
    assert mixed.differences == pytest.approx((2.0, 1.5, 2.65))
    assert (mixed.verdict, unknown.verdict, unknown.worlds) == ("reversed", "unfinished", ())
    # Both arms gain equally on both prompts, so that only worlds differ: (3, 4, 5) with replacement.
    assert strong.bootstrap is not None and strong.bootstrap == pytest.approx((3.0, 5.0), abs=0.35)


def test_the_report_has_the_table_the_contrasts_and_a_figure(tmp_path, runs):
    made = sweep(tmp_path, claims=CLAIMS)
    made.run()
    text = made.report()
    assert "over 3 worlds" in text and "| student before | 12.0 ± 1.0 |" in text
    assert "| easy | **55.0 ± 2.0** |" in text
    assert "| strong | 3 | +4.00 | +1.52 to +6.48 |" in text and "| +1.00 | – | holds |" in text
    assert "| unknown | 0 of 3 | – | – | – | – | – | – | – | unfinished |" in text
    written = json.loads((tmp_path / "contrasts.json").read_text())
    assert [o["verdict"] for o in written] == ["holds", "unresolved", "reversed", "unfinished"]
    assert written[1]["contrast"]["paper"] is None and written[0]["differences"] == [3.0, 4.0, 5.0]
    assert (tmp_path / "contrasts.png").read_bytes().startswith(b"\x89PNG")


def test_an_unfinished_world_leaves_verdicts_open_and_the_sweep_resumes(tmp_path, runs):
    runs.broken = {"steep/world2"}
    made = sweep(tmp_path, claims=CLAIMS)
    assert list(made.run()) == ["steep/world2"]
    strong, weak, *_ = outcomes(CLAIMS, made.cells(), tmp_path)
    assert (strong.verdict, weak.verdict, weak.missing) == ("holds", "unfinished", 1)
    assert weak.worlds == ("world1", "world3")
    runs.broken, runs.ran = set(), []
    assert made.run() == {} and runs.ran == ["steep/world2"]


def test_contrasts_named_after_the_first_run_are_not_primary(tmp_path, runs):
    sweep(tmp_path, claims=Claims("Claims", ARMS, CONTRASTS[1:])).run()
    found = {o.contrast.id: o for o in outcomes(CLAIMS, world_grid(CONFIG, ARMS, 3), tmp_path)}
    assert not found["strong"].registered and not found["strong"].is_primary and found["weak"].is_primary
    assert (
        found["weak"].found is not None and found["weak"].p == found["weak"].found.p
    )  # the only primary one
    made = sweep(tmp_path, claims=CLAIMS)
    assert "## Named after the first run" in made.report()


def test_each_arm_chooses_from_one_grid_by_validation_in_world_0(tmp_path, runs):
    made = sweep(tmp_path, grid=RATES)
    assert [c.name for c in made.cells()][:4] == [
        "easy/tuning_learning_rate=0.001",
        "steep/tuning_learning_rate=0.001",
        "plain/tuning_learning_rate=0.001",
        "easy/tuning_learning_rate=0.003",
    ]
    with pytest.raises(InputError, match=r"9 are not: easy/tuning_learning_rate=0\.001"):
        made.run(task=9)
    assert made.run(task=3) == {} and runs.ran == ["easy/tuning_learning_rate=0.003"]
    assert not made.has_scores()
    assert made.run() == {} and len(runs.ran) == 9 + 9
    chosen = {c.name: c.config.training.learning_rate for c in made.cells()[9:]}
    assert chosen["easy/world1"] == chosen["steep/world3"] == 3e-3 and chosen["plain/world2"] == 1e-2
    record = json.loads((tmp_path / "tuning.json").read_text())
    assert record["easy"]["at_the_edge"] == [] and record["plain"]["at_the_edge"] == [
        "training.learning_rate"
    ]
    # Of the kept student: the best validation, not the last.
    assert record["plain"]["validation_rouge_l"]["learning_rate=0.01"] == 0.01


def test_an_arm_must_not_set_what_the_grid_chooses(tmp_path):
    arms = {"fast": Row("sft", {"training.learning_rate": 0.1})}
    with pytest.raises(InputError, match=r"fast: sets training\.learning_rate, which --grid chooses"):
        Sweep(CONFIG, arms, tmp_path, worlds=1, grid=RATES)
