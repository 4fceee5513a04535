import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2m_jax import models
from l2m_jax.errors import InputError
from l2m_jax.models.hf import folder

CASES = json.loads((Path(__file__).parent / "golden" / "cases.json").read_text())


@pytest.mark.parametrize("name", ["gpt2", "opt_350m", "llama"])
def test_a_student_of_the_teachers_layers(name):
    config = folder._FAMILIES[CASES[name]["model_type"]].read_config(CASES[name])
    params = models.init(config, jax.random.key(0))
    student_config, student = models.student_from_teacher(config, params, (1,))
    assert student_config.num_layers == 1
    reference = jax.eval_shape(lambda key: models.init(student_config, key), jax.random.key(0))
    assert jax.tree.map(jnp.shape, student) == jax.tree.map(lambda leaf: leaf.shape, reference)
    jax.tree.map(lambda s, t: np.testing.assert_array_equal(s[0], t[1]), student["blocks"], params["blocks"])
    for group in params.keys() - {"blocks"}:
        jax.tree.map(np.testing.assert_array_equal, student[group], params[group])


def test_all_layers_make_the_teacher_with_buffers_of_its_own():
    config = folder._FAMILIES["gpt2"].read_config(CASES["gpt2"])
    params = models.init(config, jax.random.key(0))
    _, student = models.student_from_teacher(config, params, (0, 1))
    tokens = jnp.array([[1, 2, 3]])
    expected = models.logits(config, params, tokens)
    np.testing.assert_array_equal(models.logits(config, student, tokens), expected)
    # A training step donates the student's buffers; the teacher must not lose its own.
    jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)(student)
    np.testing.assert_array_equal(models.logits(config, params, tokens), expected)


@pytest.mark.parametrize("layers", [(), (0, 2), (-1,)])
def test_layers_that_the_teacher_lacks(layers):
    config = folder._FAMILIES["gpt2"].read_config(CASES["gpt2"])
    with pytest.raises(InputError, match="each between 0 and 1"):
        models.student_from_teacher(config, {}, layers)
