"""The weights that the plan counts at each moment, against those of a whole run on 4 devices."""

import json

import pytest

from l2m_jax.config import parse
from l2m_jax.plan import plan

MEASURED = {  # phase and moment of the plan, by the sampler's name for them
    "teacher: training": ("teacher", "training"),
    "teacher: checkpoint": ("teacher", "checkpoint"),
    "initial student: training": ("initial student", "training"),
    "student: start": ("student", "start"),
    "student: training": ("student", "training"),
    "student: checkpoint": ("student", "checkpoint"),
    "student: validation": ("student", "validation"),
    "student: resume": ("student", "resume"),
    "student: best": ("student", "best"),
    "store": ("teacher store", "hidden states"),
    "diagnostics": ("diagnostics", "hidden states"),
    "ranking": ("difficulty", "answers"),
    "evaluation": ("evaluation", "teacher"),
}


@pytest.fixture(scope="module")
def planned(sampled):
    mapping, folder, most = sampled
    config = parse(json.loads((folder / mapping / "config.json").read_text()))
    return plan.make(config, "cpu", 4, dry=True), most


@pytest.mark.parametrize("measured", MEASURED)
def test_weights_on_a_device_are_those_of_a_run(planned, measured):
    found, most = planned
    phase, moment = MEASURED[measured]
    expected = found.phase(phase).moment(moment).weight_bytes
    assert max(most[measured]) == pytest.approx(expected, rel=0.1)
