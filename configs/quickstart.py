"""A small GPT-2, pretrained on plain text, distilled on synthetic tasks on two CPU cores.

    uv run l2m train --config configs/quickstart.py --workdir runs/quickstart
    uv run l2m train --config configs/quickstart.py:compare --workdir runs/quickstart

`:compare` also trains the curriculum's control (the same stages, filled at random) and SFT and KL baselines on the same
budget. In the same folder it uses all that the first command made. `:random` has no pretraining: random weights, and
three passes over the tasks. `:lab` and `:lab_random` are the starts of the experiments: longer pretraining, more test
prompts.
"""

from l2m_jax.config import defaults

VARIANTS = ("compare", "random", "lab", "lab_random")


def get_config(variant: str = ""):
    if variant and variant not in VARIANTS:
        raise ValueError(f"no variant {variant!r} of configs/quickstart.py; known: {', '.join(VARIANTS)}")
    config = defaults()
    config.data.source = "synthetic"
    config.data.synthetic.train = 4000
    config.data.max_length = 40
    config.max_shapes = 1

    config.teacher.model.architecture.update(num_layers=3, num_heads=4, hidden_size=128, max_positions=64)
    config.teacher.finetune.update(epochs=12, batch_size=64, learning_rate=3e-3, dropout=0.0)
    config.student.model.architecture.update(num_layers=2, num_heads=4, hidden_size=64, max_positions=64)
    config.student.warmup.update(epochs=0, batch_size=64, learning_rate=3e-3, dropout=0.0)

    config.curriculum.epochs_per_stage = 4
    config.training.update(batch_size=64, learning_rate=3e-3, dropout=0.0)
    config.sampling.max_new_tokens = 24
    config.evaluation.seeds = (10, 20, 30)
    config.evaluation.validations = 10

    if variant in ("random", "lab_random"):
        # Some training before the ranking: the answers of an untrained student say nothing about difficulty.
        config.student.warmup.epochs = 3
    else:
        for who in (config.teacher, config.student):
            who.pretrain.update(
                text="synthetic", sequence_length=64, batch_size=32, learning_rate=3e-3, dropout=0.0
            )
        config.teacher.pretrain.tokens = 200_000
        config.student.pretrain.tokens = 300_000
        config.student.warmup.epochs = 1
        if variant != "lab":
            # Pretrained, two layers score about as high as three (single runs), in two thirds of the time.
            config.teacher.model.architecture.num_layers = 2
    if variant == "lab":
        for who in (config.teacher, config.student):
            who.pretrain.update(tokens=1_000_000, epochs=5, seed=0)  # the same in all worlds
    if variant.startswith("lab"):
        config.data.synthetic.test = 600
    if variant == "compare":
        config.baselines = ("random_order", "sft", "kld")
    return config
