"""The programs of the paper's pairs, at their real sizes, before a compiler optimises them."""

import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from l2m_jax import models
from l2m_jax.cli import config_file
from l2m_jax.generation import programs as generation
from l2m_jax.parallel import Placement
from l2m_jax.plan import targets
from l2m_jax.plan.phases import Planner
from l2m_jax.plan.programs import Compiler
from l2m_jax.plan.workload import workload
from l2m_jax.training import step

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
_PRODUCT = re.compile(r"stablehlo.dot_general .* : \(tensor<[\dx]*(\w+)>, tensor<[\dx]*(\w+)>\)")
_SCATTER = re.compile(r'"stablehlo.scatter"(.*?)\}\) : \(tensor<([^>]+)>', re.DOTALL)


@pytest.mark.parametrize(
    "name", ["gpt2_small", "gpt2_medium", "gpt2_large", "opt_125m", "opt_350m", "opt_1_3b", "open_llama_3b"]
)
def test_an_update_on_a_gpu_multiplies_in_bfloat16_and_sums_in_float32(name):
    config = config_file.read(str(CONFIGS / f"{name}.py"), [])
    work = workload(config, "cuda", 1)
    # Attention as without cuDNN, which only a GPU's compiler knows.
    compiler = Compiler(Placement("pmap", tuple(jax.devices()[:1])), dry=True)
    shapes, (objective,), batches, _ = Planner(work, targets.get("cpu"), compiler).distillation(config.method)
    arguments = shapes.accumulate_arguments(objective, batches.largest)
    text = compiler.lower(step.accumulate, arguments).as_text()
    products = _PRODUCT.findall(text)
    assert len(products) > 20 and set(products) == {("bf16", "bf16")}
    # Rows that may repeat are summed in float32.
    repeated = [shape for marks, shape in _SCATTER.findall(text) if "unique_indices = true" not in marks]
    assert repeated and all(shape.endswith("f32") for shape in repeated)


def test_a_decoding_step_writes_to_no_row_twice():
    config = config_file.read(str(CONFIGS / "gpt2_small.py"), [])
    model = workload(config, "cuda", 1).student
    compiler = Compiler(Placement("pmap", tuple(jax.devices()[:1])), dry=True)
    params = jax.eval_shape(lambda: models.init(model, jax.random.key(0)))
    layers = jax.eval_shape(partial(generation.prepare, model, False), params)
    slots = jax.eval_shape(partial(generation.empty_slots, model, 4, 64))
    arguments = (model, config.sampling, (0,), layers, slots, jax.ShapeDtypeStruct((), jnp.int32))
    found = _SCATTER.findall(compiler.lower(generation.decode, arguments).as_text())
    assert len(found) == 2 * model.num_layers + 1  # keys, values and the token
    assert all("unique_indices = true" in marks for marks, _ in found)
