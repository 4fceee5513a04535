import math
from pathlib import Path

import pytest

from l2m_jax.cli import claims_file, config_file
from l2m_jax.errors import InputError
from l2m_jax.sweep.cells import world_grid
from l2m_jax.sweep.presets import Row

ROOT = Path(__file__).resolve().parents[2]
TEXT = """
title: A title
arms:
  l2m: {method: l2m}
  mixed: {method: kld, overrides.beta: 0.9, curriculum.subsets: [1, 2]}
contrasts:
  - {id: one, statement: A statement., left: l2m, right: mixed, paper: 0.4, sets: [test]}
  - {id: two, statement: Another., left: mixed, right: l2m}
"""


def read(tmp_path, text: str = TEXT):
    file = tmp_path / "claims.yaml"
    file.write_text(text)
    return claims_file.read(file)


def test_arms_and_contrasts_have_the_types_that_they_need(tmp_path):
    claims = read(tmp_path)
    assert claims.title == "A title"
    assert claims.arms["mixed"] == Row("kld", {"overrides.beta": 0.9, "curriculum.subsets": (1, 2)})
    one, two = claims.contrasts
    assert (one.paper, one.sets, one.role, one.sign) == (0.4, ("test",), "primary", "positive")
    assert math.isnan(two.paper) and two.effect is None


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("title: A title", "", "expected title, arms and contrasts"),
        ("{method: l2m}", "{}", "arms.l2m: expected a method"),
        ("overrides.beta: 0.9", "overrides.bet: 0.9", "arms.mixed: no such setting 'overrides.bet'; did you mean"),
        ("overrides.beta: 0.9", "overrides.beta: much", "arms.mixed: expected a number, got 'much'"),
        ("overrides.beta: 0.9", "overrides: 0.9", "arms.mixed: 'overrides' is a group of settings"),
        ("right: mixed", "right: other", "contrasts.one: no arm 'other' (known: l2m, mixed)"),
        ("paper: 0.4", "papers: 0.4", "contrasts.one.papers: no such field"),
        ("paper: 0.4", "metric: bleu", "contrasts.one.metric: 'bleu' is not one of"),
        ("paper: 0.4", "paper: -0.4", "contrasts.one.paper: -0.4 does not have the sign"),
        ("statement: A statement., ", "", "contrasts.one.statement: missing"),
        ("id: two, ", "", "contrasts[1]: expected an id"),
        ("arms:", "arms: [", "not valid YAML"),
    ],
)  # fmt: skip
def test_mistakes_are_named(tmp_path, old, new, said):
    assert old in TEXT
    with pytest.raises(InputError) as error:
        read(tmp_path, TEXT.replace(old, new, 1))
    assert said in str(error.value) and str(error.value).startswith("--claims ")
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        claims_file.read(tmp_path / "none.yaml")


def test_a_grid_has_typed_values():
    given = ["training.learning_rate=1e-3, 3e-3", "training.batch_size=8"]
    assert claims_file.grid(given) == {
        "training.learning_rate": [1e-3, 3e-3],
        "training.batch_size": [8],
    }
    with pytest.raises(InputError, match=r"--grid training\.rate: no such setting"):
        claims_file.grid(["training.rate=1"])
    with pytest.raises(InputError, match="expected a setting and its values"):
        claims_file.grid(["training.learning_rate"])


@pytest.mark.parametrize(
    "file", sorted((ROOT / "configs" / "claims").glob("*.yaml")), ids=lambda file: file.stem
)
def test_the_projects_claims_can_be_run(file):
    claims = claims_file.read(file)
    cells = world_grid(config_file.read(str(ROOT / "configs" / "quickstart.py")), claims.arms, 1)
    assert len({cell.config for cell in cells}) == len(claims.arms)  # no two arms are the same
    used = {arm for contrast in claims.contrasts for arm in contrast.weights}
    assert used == set(claims.arms)


def test_claims_need_worlds(tmp_path, refused):
    said = refused("sweep", "--config=x.py", f"--claims={tmp_path}", f"--workdir={tmp_path}")
    assert said.startswith("--claims: needs --worlds")
