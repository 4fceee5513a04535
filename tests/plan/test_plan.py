"""Plans of very small models on CPU devices."""

import dataclasses
import importlib.util
import json
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from l2m_jax import models
from l2m_jax.cli import config_file
from l2m_jax.config import change, defaults, parse
from l2m_jax.data.batches import ListedExamples, forward_batches, forward_shapes, micro_batches
from l2m_jax.errors import InputError
from l2m_jax.generation import programs as generation
from l2m_jax.parallel import Placement
from l2m_jax.plan import plan, targets
from l2m_jax.plan.programs import device_bytes, frozen, micro_batch, parameters, share_bytes
from l2m_jax.training.store_format import HiddenStates

SETTINGS = {
    "teacher.model.architecture.hidden_size": 32,
    "teacher.model.architecture.num_layers": 2,
    "student.model.architecture.num_layers": 2,
    "student.warmup.epochs": 0,
    "devices.slots": 4,
    "chunk_size": 32,
    "evaluation.diagnostic_rows": 4,
    "curriculum.rerank": True,
}


@pytest.fixture(scope="module")
def config(tiny):
    values = tiny.copy_and_resolve_references()
    values.update_from_flattened_dict(SETTINGS)
    return parse(values)


@pytest.fixture(scope="module")
def on_cpu(config):
    return plan.make(config, "cpu", 4)


@pytest.fixture(scope="module")
def sharded(config):
    return plan.make(change(config, {"devices.mapping": "fsdp"}), "cpu", 4)


def _count(config):
    return sum(leaf.size for leaf in jax.tree.leaves(parameters(config)))


def test_phases_are_those_of_the_run(on_cpu):
    names = [phase.name for phase in on_cpu.phases]
    before = ["teacher", "initial student", "difficulty", "teacher store", "diagnostics"]
    assert names == [*before, "student", "evaluation"]
    moments = [moment.name for moment in on_cpu.phase("student").moments]
    beside = ["validation", "diagnostics", "re-ranking"]
    assert moments == ["start", "training", "checkpoint", "resume", "best", *beside, "saving"]
    # Not fine-tuned: it is loaded and saved.
    assert [moment.name for moment in on_cpu.phase("initial student").moments] == ["saving"]


def test_a_state_in_training_is_16_bytes_a_parameter(on_cpu):
    student, teacher = _count(on_cpu.workload.student), _count(on_cpu.workload.teacher)
    weights = on_cpu.phase("student").moment("training").weights
    assert weights.parameters == 4 * student
    assert weights.optimizer == 2 * 4 * student + 4  # Adam's count
    assert weights.gradients == 4 * student + 4 * 4  # and four loss sums
    assert weights.teacher == 4 * on_cpu.workload.teacher.vocab_size * 32  # its head alone
    assert weights.copies == 0
    assert on_cpu.phase("teacher").moment("training").weights.parameters == 4 * teacher


def test_validation_frees_the_sums_and_adds_copies_and_caches(on_cpu):
    validation = on_cpu.phase("student").moment("validation")
    blocks = sum(x.size for x in jax.tree.leaves(parameters(on_cpu.workload.student)["blocks"]))
    assert validation.weights.gradients == 0
    assert validation.weights.copies == 4 * blocks  # float32 computed in float32: the layers taken apart
    assert validation.activations.cache > 0


def test_passes_beside_the_state_have_no_sums_and_fit_where_a_micro_batch_does(config, on_cpu):
    student = on_cpu.phase("student")
    training = student.moment("training").weights
    smallest = min(shape.slots for shape in student.training.batches.shapes)
    programs = {program.name: program for program in student.programs}
    for moment, program in (("diagnostics", "agreement"), ("re-ranking", "re-ranking")):
        assert student.moment(moment).weights == dataclasses.replace(training, gradients=0.0)
        assert student.moment(moment).activations.working >= programs[program].temporaries > 0
        rows, length = map(int, programs[program].size.removesuffix(" tokens").split(" × "))
        assert rows * length <= max(smallest, length)
    # A student without a teacher's signal gets its head for the diagnostics.
    without = plan.make(change(config, {"method": "sft"}), "cpu", 4, dry=True, only=("student",)).phases[0]
    assert without.moment("training").weights.teacher == 0
    assert without.moment("diagnostics").weights.teacher == training.teacher
    assert "re-ranking" not in [moment.name for moment in without.moments]


def test_the_host_holds_a_state_while_it_is_saved_or_restored(on_cpu, sharded):
    student = on_cpu.phase("student")
    state = 3 * 4 * _count(on_cpu.workload.student) + 4
    assert student.moment("checkpoint").host == {"state": state, "Orbax's copy": state}
    assert student.moment("resume").host == {"restored state": state}
    assert student.moment("saving").host["parameters"] == 4 * _count(on_cpu.workload.student)
    assert sharded.phase("student").moment("resume").host_bytes == 0  # straight to the devices


def test_a_store_needs_a_teacher_on_each_host(config):
    """Sharded over the devices of one process, where training shards it over all."""
    settings = {"devices.mapping": "fsdp", "devices.num_processes": 1}
    one, two = (
        plan.make(
            change(config, settings | {"devices.num_processes": n}),
            "cpu",
            4,
            dry=True,
            only=("teacher store",),
        )
        for n in (1, 2)
    )
    weights = [found.phase("teacher store").fullest.weights.parameters for found in (one, two)]
    assert 1.9 < weights[1] / weights[0] <= 2


def test_a_live_teacher_is_counted_whole(config):
    live = plan.make(change(config, {"teacher.signal": "live"}), "cpu", 4, dry=True)
    teacher = live.workload.teacher
    head = 4 * teacher.vocab_size * 32
    assert live.phase("student").moment("training").weights.teacher == 4 * _count(teacher) + head
    assert "teacher store" not in [phase.name for phase in live.phases]


def _of_student(config):
    return plan.make(config, "cpu", 4, dry=True, only=("student",))


def test_adapters_are_trained_beside_a_frozen_student(config):
    found = _of_student(change(config, {"student.lora.rank": 2}))
    student, model = found.phase("student"), parameters(found.workload.student)
    numbers = 2 * 2 * (4 * (16 + 16) + 2 * (16 + 64))  # layers · rank · (inputs + outputs)
    scales = 4 * 2 * 6  # of six kernels in two layers
    weights = student.moment("training").weights
    assert weights.frozen == share_bytes(model) + scales
    assert (weights.parameters, weights.optimizer) == (4 * numbers, 8 * numbers + 4)
    assert weights.gradients == 4 * numbers + 4 * 4
    copies = student.moment("validation").weights.copies
    assert copies == share_bytes(model["blocks"]) + scales + 4 * numbers
    assert student.training.written.bytes == 12 * numbers + 4


def test_the_whole_of_a_partly_trained_student_is_joined_to_validate(config):
    found = _of_student(change(config, {"training.trainable_layers": 1}))
    student, model = found.phase("student"), parameters(found.workload.student)
    weights = student.moment("training").weights
    assert weights.frozen + weights.parameters == share_bytes(model)
    copies = student.moment("validation").weights.copies
    assert copies == share_bytes(model) + share_bytes(model["blocks"])
    assert student.moment("diagnostics").weights.copies == share_bytes(model)


def test_an_int8_teacher_is_a_quarter_of_its_float32_kernels(config):
    live = change(config, {"teacher.signal": "live"})
    whole, small = (_of_student(change(live, {"teacher.weights": w})) for w in ("float", "int8"))
    blocks = parameters(whole.workload.teacher)["blocks"]
    groups = [*blocks["attention"].values(), *blocks["mlp"].values()]
    saved = sum(3 * group["kernel"].size - 4 * group["bias"].size for group in groups)
    held = [found.phase("student").moment("training").weights.teacher for found in (whole, small)]
    assert held[0] - held[1] == saved


def test_a_3b_student_with_adapters_beside_an_int8_7b_teacher():
    file = Path(__file__).resolve().parents[2] / "configs" / "lora_qwen.yaml"
    bfloat16 = {f"{who}.compute.dtype": "bfloat16" for who in ("teacher", "student")}
    config = change(config_file.read(str(file)), bfloat16 | {"teacher.signal": "live"})
    found = plan.make(config, "cpu", 1, dry=True, only=("student",))
    weights = found.phase("student").moment("training").weights
    assert weights.frozen == pytest.approx(2 * 3085.9e6, rel=1e-3)
    matrix = 152064 * 3584  # embeddings and head stay in two bytes, and the head counts once more
    assert weights.teacher == pytest.approx(7615.6e6 + 2 * matrix + 2 * matrix, rel=2e-3)
    assert weights.parameters + weights.optimizer + weights.gradients < 0.5e9


def test_on_policy_methods_generate_beside_the_state_without_its_sums(config):
    found = plan.make(change(config, {"method": "skl_on_policy"}), "cpu", 4, dry=True).phase("student")
    rollouts, training = found.moment("rollouts").weights, found.moment("training").weights
    assert rollouts == dataclasses.replace(training, gradients=0.0, copies=rollouts.copies)
    assert rollouts.copies > 0


def test_baselines_are_phases_of_their_own(config):
    found = plan.make(change(config, {"baselines": ("seqkd",)}), "cpu", 4, dry=True)
    names = [phase.name for phase in found.phases]
    assert names[-4:] == ["generated responses", "student", "student:seqkd", "evaluation"]
    assert found.phase("student:seqkd").moment("training").weights.teacher == 0


def test_replicated_gradients_are_summed_once_a_step(on_cpu):
    training = on_cpu.phase("student").training
    assert training.accumulate.module.collectives == []
    collectives = training.update.module.collectives
    gradients = on_cpu.phase("student").moment("training").weights.gradients
    assert sum(c.bytes * c.count for c in collectives) == gradients
    assert {c.kind for c in collectives} == {"all-reduce"}


def test_operations_of_a_step_follow_from_the_sizes(on_cpu):
    """6 a parameter of a matrix and token, and the vocabulary's products for whole chunks."""
    w, training = on_cpu.workload, on_cpu.phase("student").training
    ((shape, count),) = training.batches.micro_batches.items()
    params = parameters(w.student)["blocks"]
    kernels = sum(x.size for p, x in jax.tree.leaves_with_path(params) if p[-1].key == "kernel")
    attention = 2 * 2 * shape.length * 16 * w.student.num_layers
    body = 3 * shape.slots * (2 * kernels + attention)
    # Three products of the student's head, one of the teacher's.
    vocabulary = 2 * w.student.vocab_size * (3 * 16 + 32)
    per_micro_batch = training.flops_per_step / 4 / count
    chunks = (per_micro_batch - body) / vocabulary / 32
    assert chunks == pytest.approx(round(chunks)) and 1 <= chunks <= shape.slots / 32


def test_checkpoints_end_stages_follow_validations_and_the_clock(config, on_cpu):
    # After each step here, because checkpoint_minutes is 0.
    assert on_cpu.phase("student").training.written.count == on_cpu.phase("student").training.updates
    rare = plan.make(change(config, {"checkpoint_minutes": 60.0}), "cpu", 4, dry=True)
    assert rare.phase("student").training.written.count == 4 + 4  # stages, validations
    last = change(config, {"checkpoint_minutes": 60.0, "evaluation.select": "last"})
    assert plan.make(last, "cpu", 4, dry=True).phase("student").training.written.count == 4


def test_the_document_is_json_with_the_promised_keys(on_cpu):
    document = json.loads(json.dumps(plan.document(on_cpu)))
    assert document["fits"] is True and document["verdict"] == "fits"
    parts = dict(document["bytes_per_device"])
    assert parts.pop("total") == sum(parts.values())
    totals = [m["bytes_per_device"]["total"] for phase in document["phases"] for m in phase["moments"]]
    assert document["bytes_per_device"]["total"] == max(totals)
    hosts = [m["host"]["total"] for phase in document["phases"] for m in phase["moments"]]
    assert document["host"]["bytes"]["total"] == max(hosts)
    checkpoints = document["checkpoints"]
    assert checkpoints["bytes_written"] == sum(p["bytes_written"] for p in checkpoints["phases"].values())
    assert checkpoints["seconds"] == pytest.approx(checkpoints["bytes_written"] / 1e9)
    assert checkpoints["peak_bytes_on_disk"] > checkpoints["disk"]["teacher store"] > 0
    assert document["flops_per_step"] > 0
    assert document["estimate"]["hours"] > 0
    assert "roofline" in document["estimate"]["basis"]
    assert document["compilations"]["total"] > 0
    assert document["attention"]["student"]["why_not"] == "there is no cuDNN on cpu"
    assert 0 < document["largest_logits"]["tokens"] <= 64 < document["largest_logits"]["of"]


@pytest.mark.parametrize(
    ("part", "verdict"),
    [
        (0.74, "fits"),
        (0.76, "fits with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95"),
        (0.94, "fits with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95"),
        (0.96, "does not fit"),
    ],
)
def test_the_verdict_knows_what_jax_preallocates(on_cpu, part, verdict):
    total = on_cpu.largest.fullest.device_bytes
    card = dataclasses.replace(on_cpu.target, platform="cuda", memory=total / part)
    found = dataclasses.replace(on_cpu, target=card)
    assert found.verdict == verdict
    assert plan.document(found)["needs_larger_memory_fraction"] == (0.75 < part < 0.95)
    # No fraction is preallocated elsewhere.
    tpu = dataclasses.replace(found, target=dataclasses.replace(card, platform="tpu"))
    assert tpu.verdict == ("fits" if part < 0.95 else "does not fit")


def test_sharding_spreads_the_state_over_the_devices(sharded, on_cpu):
    ours, replicated = (p.phase("student").moment("training").weights for p in (sharded, on_cpu))
    assert replicated.optimizer / 4 <= ours.optimizer < replicated.optimizer / 3
    collectives = sharded.phase("student").training.accumulate.module.collectives
    assert any(c.kind == "all-gather" for c in collectives)


@pytest.mark.parametrize("mapping", ["pmap", "fsdp"])
def test_planned_arrays_lie_as_placed_ones(on_cpu, mapping):
    placement = Placement(mapping, tuple(jax.devices()[:4]))
    student = on_cpu.workload.student
    placed = placement.place(models.init(student, jax.random.key(0)))
    planned = placement.abstract(parameters(student))
    prepared = generation.prepare_on_devices(student, placed, placement)
    prepare = partial(generation.prepare, student, generation.is_transposed(placement))
    layers = placement.abstract(jax.eval_shape(prepare, parameters(student)))
    for real_tree, shapes in ((placed, planned), (prepared, layers)):
        for real, shape in zip(jax.tree.leaves(real_tree), jax.tree.leaves(shapes), strict=True):
            assert real.shape == shape.shape and real.dtype == shape.dtype
            assert real.sharding.is_equivalent_to(shape.sharding, real.ndim)
    on_first = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(placed))
    assert device_bytes(planned) == on_first


def test_planned_batches_and_frozen_models_are_shaped_as_real_ones(on_cpu, tmp_path):
    examples = ListedExamples([np.arange(9, dtype=np.int32)] * 3, np.array([4, 4, 4]))
    shape = on_cpu.phase("student").training.batches.shapes[0]
    rows = np.zeros((5, 32), np.float32)
    (real,) = micro_batches(examples, [0, 1, 2], [shape], 1, lambda _: {"teacher_hidden_TxE": rows})
    planned = micro_batch(shape, HiddenStates(32, "float32"))
    for array, expected in zip(jax.tree.leaves(real), jax.tree.leaves(planned), strict=True):
        assert array.shape[1:] == expected.shape and array.dtype == expected.dtype
    fed = {batch.micro_batch.tokens_RxL.shape[1:] for batch in forward_batches(examples, [0, 1, 2], 1)}
    assert fed <= set(forward_shapes(examples.lengths, 1))

    student = dataclasses.replace(on_cpu.workload.student, dtype="bfloat16")
    models.save(tmp_path, student, models.init(student, jax.random.key(0)))
    _, loaded = models.load(tmp_path, dtype="bfloat16", frozen=True)
    assert share_bytes(frozen(student)) == sum(leaf.nbytes for leaf in jax.tree.leaves(loaded))


def _with_memory(monkeypatch, memory):
    real = targets.get
    monkeypatch.setattr(targets, "get", lambda name: dataclasses.replace(real(name), memory=memory))


def test_what_does_not_fit_says_what_would(config, on_cpu, sharded, monkeypatch):
    needed = [
        max(found.needed(moment) for moment in found.phase("teacher").moments) for found in (sharded, on_cpu)
    ]
    room = sum(needed) / 2
    _with_memory(monkeypatch, room / plan.LARGEST_FRACTION)
    small = dataclasses.replace(on_cpu, target=targets.get("cpu"), phases=(on_cpu.phase("teacher"),))
    assert not small.fits
    tried = plan.what_would_fit(config, small)
    assert tried[0].settings == {"data.max_length": 80, "chunk_size": 32}
    assert "teacher.compute.remat" in tried[1].settings
    assert [change.fits for change in tried] == [False] * (len(tried) - 1) + [True]
    assert tried[-1].compiled and 4 * tried[-1].total <= room


def test_nothing_is_compiled_where_the_weights_alone_are_too_large(config, on_cpu, monkeypatch):
    _with_memory(monkeypatch, 1.0)
    tried = plan.what_would_fit(config, dataclasses.replace(on_cpu, target=targets.get("cpu")))
    assert tried and not any(change.fits or change.compiled for change in tried)
    assert tried[-1].settings["devices.mapping"] == "fsdp"  # more CPU devices share one memory


def test_a_length_that_leaves_no_room_for_the_prompt_is_not_proposed(on_cpu, config, monkeypatch):
    _with_memory(monkeypatch, 1.0)
    short = change(config, {"data.max_prompt_length": 100, "data.truncate": True})
    tried = plan.what_would_fit(short, dataclasses.replace(on_cpu, target=targets.get("cpu")))
    assert all("data.max_length" not in change.settings for change in tried)


def test_the_papers_models_are_known_without_files():
    values = defaults()
    values.teacher.model.path = "gpt2-xl"
    values.student.model.path = "gpt2"
    found = plan.make(parse(values), "cpu", 2, dry=True)
    assert found.workload.teacher.num_layers == 48
    assert "Dolly" in found.workload.assumptions[0]
    optimizer = found.phase("teacher").moment("training").weights.optimizer
    assert optimizer == pytest.approx(2 * 4 * 1557.6e6, rel=1e-4)


def test_a_model_that_nobody_knows(config):
    values = defaults()
    values.teacher.model.path = "/no/such/model"
    with pytest.raises(InputError, match=r"config\.teacher\.model\.path: .*the plan knows gpt2, gpt2-medium"):
        plan.make(parse(values), "cpu", 1)


@pytest.mark.parametrize("name", ["a100", "h100_80g", "v5e8", "a100_80gb:2"])
def test_unknown_targets_list_the_known_ones(config, name):
    with pytest.raises(
        InputError, match=rf"--target: no target '{name}' \(.*known: a100_80gb, h100_80gb, v4"
    ):
        plan.make(config, name, 1)


def test_more_cpu_devices_than_there_are(config):
    with pytest.raises(InputError, match="--devices: 64 CPU devices asked for"):
        plan.make(config, "cpu", 64)
    with pytest.raises(InputError, match="--devices 0: must be 1 or more"):
        plan.make(config, "cpu", 0)


@pytest.mark.parametrize(("target", "extra"), [("a100_80gb", "cuda12"), ("v5e", "tpu")])
def test_a_compiler_that_is_not_installed_is_named(config, monkeypatch, target, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=f"--target: compiling for .* needs .*uv sync --extra {extra}"):
        plan.make(config, target, 1)


def test_pretraining_has_phases_of_its_own(config):
    text = {"text": "synthetic", "tokens": 1000, "epochs": 2, "sequence_length": 51, "batch_size": 4}
    settings = {
        f"{who}.pretrain.{name}": value for who in ("teacher", "student") for name, value in text.items()
    }
    only = ("pretrained teacher", "pretrained student")
    changed = change(config, settings | {"student.pretrain.from_teacher": True})
    teacher, student = plan.make(changed, "cpu", 1, dry=True, only=only).phases
    assert (teacher.name, student.name) == only
    # 20 sequences of 50 targets, twice.
    assert teacher.training.updates == student.training.updates == 10
    held = [phase.moment("training").weights.teacher for phase in (teacher, student)]
    assert held[0] == 0 and held[1] > 0  # the teacher runs live
