"""Writes golden/greedy.json: greedy answers of `transformers`' generate on PyTorch, one prompt at a time.

Run it where PyTorch is installed: python tests/generation/make_golden.py
Weights and configs are those of tests/models/golden; make these first. When the file changes without a change
here or there, the reference itself has changed: find out why before committing it.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

HERE = Path(__file__).parent
MODELS = HERE.parent / "models" / "golden"
CASES = ("gpt2", "opt", "opt_350m", "llama_gqa_tied", "mistral_window", "gemma3")
RULES = {
    "plain": {"max_new_tokens": 12},
    "no repeated 2-gram, no early end": {
        "max_new_tokens": 14,
        "no_repeat_ngram_size": 2,
        "min_new_tokens": 6,
    },
}
LENGTHS = (1, 2, 3, 5, 8, 10)


def load(hf: dict, weights: dict):
    settings = {key: value for key, value in hf.items() if key != "model_type"}
    config = AutoConfig.for_model(hf["model_type"], **settings, attn_implementation="eager")
    model = AutoModelForCausalLM.from_config(config).float().eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    model.tie_weights()
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    return model


def answer(model, prompt: list[int], eos: int | None, rules: dict) -> list[int]:
    tokens = torch.tensor([prompt])
    out = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=0,
        **rules,
    )
    return out[0, len(prompt) :].tolist()


def golden(name: str, seed: int) -> dict:
    hf = json.loads((MODELS / "cases.json").read_text())[name]
    tensors = load_file(MODELS / f"{name}.safetensors")
    prefix = "weight/"
    model = load(hf, {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    rng = np.random.RandomState(seed)
    prompts = [rng.randint(4, hf["vocab_size"], length).tolist() for length in LENGTHS]
    # The end of sequence is what the model says third to the first prompt, so that it comes up in time.
    eos = answer(model, prompts[0], None, RULES["plain"])[2]
    answers = {rules: [answer(model, p, eos, given) for p in prompts] for rules, given in RULES.items()}
    return {"prompts": prompts, "eos": eos, "answers": answers}


def main() -> None:
    file = {"rules": RULES, "cases": {name: golden(name, seed) for seed, name in enumerate(CASES)}}
    (HERE / "golden").mkdir(exist_ok=True)
    (HERE / "golden" / "greedy.json").write_text(json.dumps(file, indent=1) + "\n")


if __name__ == "__main__":
    main()
