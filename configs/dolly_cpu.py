"""Real Dolly rows and the GPT-2 tokenizer, with models small enough for two CPU cores.

    uv run l2m train --config configs/dolly_cpu.py --workdir runs/dolly \
        --config.data.train=dolly/train.jsonl --config.data.validation=dolly/dev.jsonl \
        --config.data.test=dolly/test.jsonl --config.data.tokenizer=tokenizers/gpt2

A step takes a second or more, mostly in the heads with 50,257 entries: expect an hour or two. `:smoke` uses a few
hundred rows and ends within five minutes. The models start from random weights, so they learn the form of the answers
and some words, but not to answer: this checks the pipeline on real text.
"""

from l2m_jax.config import defaults


def get_config(variant: str = ""):
    config = defaults("minillm")
    config.data.validation_rows = 100
    config.data.test_rows = 100
    config.teacher.model.architecture.update(num_layers=4, num_heads=4, hidden_size=128, max_positions=512)
    config.teacher.finetune.update(epochs=1, learning_rate=1e-3)
    config.student.model.architecture.update(num_layers=2, num_heads=2, hidden_size=64, max_positions=512)
    config.student.warmup.update(epochs=1, learning_rate=1e-3)
    config.curriculum.update(alpha=0.15, epochs_per_stage=1)
    config.training.learning_rate = 1e-3
    config.sampling.max_new_tokens = 128
    config.evaluation.seeds = (10, 20)
    if variant == "smoke":
        config.data.update(
            train_rows=256, validation_rows=16, test_rows=24, max_length=256, max_prompt_length=128
        )
        config.teacher.finetune.epochs = 2
        config.sampling.max_new_tokens = 32
        config.evaluation.validation_rows = 16
    elif variant:
        raise ValueError(f"no variant {variant!r} of configs/dolly_cpu.py; known: smoke")
    return config
