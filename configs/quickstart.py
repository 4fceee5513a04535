"""A small GPT-2, from random weights, distilled on synthetic tasks on two CPU cores.

    uv run l2m train --config configs/quickstart.py --workdir runs/quickstart
    uv run l2m train --config configs/quickstart.py:compare --workdir runs/compare

`:compare` also trains SFT and KL baselines on the same budget.
"""

from l2m_jax.config import defaults


def get_config(variant: str = ""):
    config = defaults()
    config.data.source = "synthetic"
    config.data.synthetic.train = 4000
    config.data.max_length = 40
    config.max_shapes = 1

    config.teacher.model.architecture.update(num_layers=3, num_heads=4, hidden_size=128, max_positions=64)
    config.teacher.finetune.update(epochs=12, batch_size=64, learning_rate=3e-3, dropout=0.0)

    config.student.model.architecture.update(num_layers=2, num_heads=4, hidden_size=64, max_positions=64)
    # Some training before the ranking: the answers of an untrained student say nothing about difficulty.
    config.student.warmup.update(epochs=3, batch_size=64, learning_rate=3e-3, dropout=0.0)

    config.curriculum.epochs_per_stage = 4
    config.training.update(batch_size=64, learning_rate=3e-3, dropout=0.0)
    config.sampling.max_new_tokens = 24
    config.evaluation.seeds = (10, 20, 30)
    config.evaluation.validations = 10
    if variant == "compare":
        config.baselines = ("sft", "kld")
    elif variant:
        raise ValueError(f"no variant {variant!r} of configs/quickstart.py; known: compare")
    return config
