"""The programs of the paper's pairs, at their real sizes, before a compiler optimises them."""

import re
from pathlib import Path

import jax
import pytest

from l2m_jax.cli import config_file
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
