"""The smallest run with all phases, for tests. The variant "no_dropout" has no dropout, so that other devices change nothing."""

from ml_collections import ConfigDict

from l2m_jax.config import defaults


def get_config(variant: str = "") -> ConfigDict:
    config = defaults()
    config.data.source = "synthetic"
    config.data.synthetic.update(train=48, validation=4, test=4, tokenizer_size=400)
    config.data.max_length = 160
    for model, width in ((config.teacher.model, 24), (config.student.model, 16)):
        model.architecture.update(num_layers=1, num_heads=2, hidden_size=width, max_positions=192)
    if variant == "no_dropout":
        for training in (config.teacher.finetune, config.student.warmup, config.training):
            training.dropout = 0.0
    config.teacher.finetune.update(epochs=1)
    config.student.warmup.update(epochs=1)
    config.curriculum.epochs_per_stage = 2
    config.sampling.max_new_tokens = 4
    config.evaluation.seeds = (10, 20)
    config.max_shapes = 1
    config.checkpoint_minutes = 0.0
    config.evaluation.validations = 4
    config.evaluation.diagnostic_rows = 0  # they compile programs of their own
    config.devices.count = 1
    return config
