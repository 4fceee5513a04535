"""A student with adapters and an int8 teacher, from the settings to the folder."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from l2m_jax.config import change, defaults, parse
from l2m_jax.errors import InputError
from l2m_jax.run import checks, data, disk, tokenizers
from l2m_jax.run.context import start
from l2m_jax.run.distillation import make_student, validation_inputs
from l2m_jax.run.models import make_model
from l2m_jax.run.resolve import resolve
from l2m_jax.run.store import make_store

LORA = {
    "student.lora.rank": 2,
    "student.lora.alpha": 6.0,
    "student.lora.targets": ("query", "up"),
    "student.warmup.epochs": 0,
    "teacher.finetune.epochs": 0,
    "teacher.weights": "int8",
    "method": "kld",
    "curriculum.epochs_per_stage": 1,
    "evaluation.validations": 1,
    "evaluation.validation_rows": 1,
    "devices.slots": 1,
}


def _config(tiny, **changes):
    values = tiny.copy_and_resolve_references()
    values.update_from_flattened_dict(LORA | changes)
    return parse(values)


def test_the_student_is_the_base_and_its_adapter(tiny, tmp_path):
    config = _config(tiny)
    artefacts = resolve(config, tmp_path, tmp_path)
    tokenizers.make_tokenizer(artefacts.tokenizer)
    checks.check_models(config, artefacts)
    data.make_corpora(artefacts.all_corpora)
    context = start(config, tmp_path)
    make_model(artefacts.teacher, "teacher", context.teacher, context)
    make_model(artefacts.initial_student, "initial student", context.student, context)
    make_store(artefacts.store, context)
    student, corpus = artefacts.students["kld"], artefacts.corpora["validation"]
    monitored = validation_inputs(config.evaluation, corpus, config.sampling, config.data.max_prompt_length)
    make_student(student, "student", monitored, "", context)

    assert student.is_finished
    base, merged = (load_file(of.path / "model.safetensors") for of in (artefacts.initial_student, student))
    adapter = load_file(student.path / "adapter" / "adapter_model.safetensors")
    described = json.loads((student.path / "adapter" / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(artefacts.initial_student.path)
    changed = {name for name in base if not np.array_equal(base[name], merged[name])}
    assert changed == {"transformer.h.0.attn.c_attn.weight", "transformer.h.0.mlp.c_fc.weight"}
    for name in changed:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (adapter[f"{module}.lora_{matrix}.weight"] for matrix in "AB")
        np.testing.assert_allclose(merged[name], base[name] + 3.0 * (b @ a).T, rtol=1e-5, atol=1e-7)


def test_checkpoints_hold_the_adapters_alone(tiny, tmp_path):
    whole, adapted = (_config(tiny, **{"student.lora.rank": rank}) for rank in (0, 2))
    found = {}
    for config in (whole, adapted):
        artefacts = resolve(config, tmp_path, tmp_path)
        tokenizers.make_tokenizer(artefacts.tokenizer)
        data.make_corpora([artefacts.corpora["train"]])
        found[config.student.lora.rank] = disk.bytes_needed(config, artefacts)
    name = f"kld{disk.CHECKPOINTS}"
    numbers = 2 * (16 + 16 + 16 + 64)  # rank · (inputs + outputs)
    assert found[2][name] == disk.CHECKPOINTS_AT_ONCE * (3 * 4 * numbers + 4)  # with Adam's moments and count
    assert found[0]["kld"] == found[2]["kld"] and found[0][name] > 10 * found[2][name]


def test_a_target_that_the_student_lacks_is_refused_before_the_first_phase(tiny, tmp_path):
    config = _config(tiny, **{"student.lora.targets": ("gate",)})
    artefacts = resolve(config, tmp_path, tmp_path)
    tokenizers.make_tokenizer(artefacts.tokenizer)
    says = r"config\.student\.lora\.targets: the model has no dense layer 'gate'; choose from query, key, value, out"
    with pytest.raises(InputError, match=says):
        checks.check_models(config, artefacts)


def test_adapters_and_trained_layers_contradict_each_other():
    both = {"student.lora.rank": 4, "training.trainable_layers": 2}
    with pytest.raises(InputError, match=r"student\.lora\.rank: 4 freezes all layers.*set one of them to 0"):
        change(parse(defaults()), both)


def test_a_float_teacher_and_no_adapters_leave_the_keys_as_they_were(tiny, tmp_path):
    def keys(**changes):
        artefacts = resolve(_config(tiny, **changes), tmp_path, tmp_path)
        return artefacts.store.key, artefacts.students["kld"].key

    off = {"student.lora.rank": 0, "teacher.weights": "float"}
    assert keys(**off) == keys(**off, **{"student.lora.alpha": 1.0, "student.lora.targets": ()})
    assert len({keys(**off), keys(), keys(**{"teacher.weights": "float"})}) == 3
