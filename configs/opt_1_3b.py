"""The paper's OPT experiment: 2.7B into 1.3B, on Dolly.

    uv run l2m train --config configs/opt_1_3b.py --workdir runs/opt_1_3b

Downloads facebook/opt-2.7b, facebook/opt-1.3b and Dolly from the hub. Without a network, give folders and files:

    --config.teacher.model.path=FOLDER --config.student.model.path=FOLDER --config.data.train=FILE

According to `l2m plan`, on 80 GB devices (hours are a roofline estimate):

    4 × A100, pmap   50 GiB on a device (teacher, training), about 1.6 h
    4 × A100, fsdp   22 GiB on a device (student, validation), about 1.5 h
    1 × H100         50 GiB on a device (teacher, training), about 3.1 h

`:minillm` and `:pocl` use the protocols of MiniLLM and POCL instead of the paper's.
"""

from l2m_jax.config import PRESETS, defaults


def get_config(variant: str = ""):
    if variant and variant not in PRESETS:
        raise ValueError(f"no variant {variant!r} of configs/opt_1_3b.py; known: {', '.join(PRESETS)}")
    config = defaults(variant or "paper")
    config.data.train_rows = 11_500
    config.teacher.model.path = "facebook/opt-2.7b"
    config.teacher.compute.remat = "block"
    config.teacher.finetune.update(epochs=10, learning_rate=5e-5)
    config.student.model.path = "facebook/opt-1.3b"
    config.curriculum.alpha = 0.15
    config.evaluation.sets = ("test", "self_inst", "vicuna", "s_ni", "un_ni")
    return config
