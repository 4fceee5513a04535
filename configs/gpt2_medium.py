"""The paper's GPT-2 experiment: 1.5B into 340M, on Dolly.

    uv run l2m train --config configs/gpt2_medium.py --workdir runs/gpt2_medium

Downloads gpt2-xl, gpt2-medium and Dolly from the hub. Without a network, give folders and files:

    --config.teacher.model.path=FOLDER --config.student.model.path=FOLDER --config.data.train=FILE

According to `l2m plan`, on 80 GB devices (hours are a roofline estimate):

    4 × A100, pmap   29 GiB on a device (teacher, training), about 0.8 h
    4 × A100, fsdp   19 GiB on a device (evaluation, teacher), about 0.7 h
    1 × H100         30 GiB on a device (teacher, training), about 1.8 h

`:minillm` and `:pocl` use the protocols of MiniLLM and POCL instead of the paper's.
"""

from l2m_jax.config import PRESETS, defaults


def get_config(variant: str = ""):
    if variant and variant not in PRESETS:
        raise ValueError(f"no variant {variant!r} of configs/gpt2_medium.py; known: {', '.join(PRESETS)}")
    config = defaults(variant or "paper")
    config.data.train_rows = 11_500
    config.teacher.model.path = "gpt2-xl"
    config.teacher.compute.remat = "block"
    config.teacher.finetune.update(epochs=10, learning_rate=5e-5)
    config.student.model.path = "gpt2-medium"
    config.curriculum.alpha = 0.15
    config.evaluation.sets = ("test", "self_inst", "vicuna", "s_ni", "un_ni")
    return config
