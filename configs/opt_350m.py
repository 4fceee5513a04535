"""The paper's OPT experiment: 2.7B into 350M, on Dolly.

    uv run l2m train --config configs/opt_350m.py --workdir runs/opt_350m

Downloads facebook/opt-2.7b, facebook/opt-350m and Dolly from the hub. Without a network, give folders and files:

    --config.teacher.model.path=FOLDER --config.student.model.path=FOLDER --config.data.train=FILE

According to `l2m plan`, on 80 GB devices (hours are a roofline estimate):

    4 × A100, pmap   50 GiB on a device (teacher, training), about 0.9 h
    4 × A100, fsdp   20 GiB on a device (evaluation, teacher), about 0.8 h
    1 × H100         50 GiB on a device (teacher, training), about 1.7 h

`:minillm` and `:pocl` use the protocols of MiniLLM and POCL instead of the paper's.
"""

from l2m_jax.config import PRESETS, defaults


def get_config(variant: str = ""):
    if variant and variant not in PRESETS:
        raise ValueError(f"no variant {variant!r} of configs/opt_350m.py; known: {', '.join(PRESETS)}")
    config = defaults(variant or "paper")
    config.data.train_rows = 11_500
    config.teacher.model.path = "facebook/opt-2.7b"
    config.teacher.compute.remat = "block"
    config.teacher.finetune.update(epochs=10, learning_rate=5e-5)
    config.student.model.path = "facebook/opt-350m"
    config.curriculum.alpha = 0.15
    config.evaluation.sets = ("test", "self_inst", "vicuna", "s_ni", "un_ni")
    return config
