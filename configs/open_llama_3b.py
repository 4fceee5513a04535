"""The paper's OpenLLaMA experiment: 7B into 3B, on Dolly.

    uv run l2m train --config configs/open_llama_3b.py --workdir runs/open_llama_3b

Downloads openlm-research/open_llama_7b_v2, openlm-research/open_llama_3b_v2 and Dolly from the hub. Without a network,
give folders and files:

    --config.teacher.model.path=FOLDER --config.student.model.path=FOLDER --config.data.train=FILE

According to `l2m plan`, on 80 GB devices (hours are a roofline estimate):

    4 × A100, pmap   does not fit: 126 GiB on a device (teacher, training)
    4 × A100, fsdp   32 GiB on a device (teacher, training), about 4.3 h
    1 × H100         does not fit: 126 GiB on a device (teacher, training)

`:minillm` and `:pocl` use the protocols of MiniLLM and POCL instead of the paper's.
"""

from l2m_jax.config import PRESETS, defaults


def get_config(variant: str = ""):
    if variant and variant not in PRESETS:
        raise ValueError(f"no variant {variant!r} of configs/open_llama_3b.py; known: {', '.join(PRESETS)}")
    config = defaults(variant or "paper")
    config.data.train_rows = 11_500
    config.teacher.model.path = "openlm-research/open_llama_7b_v2"
    config.teacher.compute.remat = "block"
    config.teacher.finetune.update(epochs=10, learning_rate=5e-5)
    config.student.model.path = "openlm-research/open_llama_3b_v2"
    config.student.compute.remat = "block"
    config.devices.mapping = "fsdp"  # fine-tuning the teacher needs more than one device's memory
    config.curriculum.alpha = 0.15
    config.evaluation.sets = ("test", "self_inst", "vicuna", "s_ni", "un_ni")
    return config
