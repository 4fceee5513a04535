"""A small GPT-2 distilled on synthetic tasks, from nothing, on two CPU cores.

    uv run train.py --config configs/quickstart.py --workdir runs/quickstart
    uv run train.py --config configs/quickstart.py:compare --workdir runs/compare

`:compare` also trains SFT and KLD students on the same budget.
"""

from l2m_jax.config import defaults


def get_config(variant: str = ""):
    config = defaults()
    config.data.source = "synthetic"
    config.data.max_length = 128

    config.teacher.model.architecture = dict(
        family="gpt2",
        num_layers=4,
        num_heads=4,
        num_kv_heads=0,
        hidden_size=192,
        intermediate_size=0,
        max_positions=128,
    )
    config.teacher.model.dropout = 0.0
    config.teacher.finetune.epochs = 12
    config.teacher.finetune.learning_rate = 2e-3

    config.student.model.architecture = dict(
        family="gpt2",
        num_layers=2,
        num_heads=4,
        num_kv_heads=0,
        hidden_size=96,
        intermediate_size=0,
        max_positions=128,
    )
    config.student.model.dropout = 0.0
    config.student.warmup.epochs = 2  # so that its answers say something about difficulty
    config.student.warmup.learning_rate = 2e-3

    config.curriculum.epochs_per_stage = 4
    config.training.learning_rate = 2e-3
    config.sampling.max_new_tokens = 32
    config.evaluation.seeds = (10, 20, 30)
    config.evaluation.validation_every = 4
    config.max_shapes = 1
    if variant == "compare":
        config.baselines = ("sft", "kld")
    elif variant:
        raise ValueError(f"no variant {variant!r} of configs/quickstart.py; known: compare")
    return config
