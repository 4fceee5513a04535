"""Writes golden/*.safetensors: what `transformers` on PyTorch computes for each config of golden/cases.json.

Run it where PyTorch is installed, after a change to cases.json: python tests/models/make_golden.py
The weights are random, and stored beside the results. When a file changes without a change to cases.json,
the reference itself has changed: find out why before committing it.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN

GOLDEN = Path(__file__).parent / "golden"
ACTIVATIONS = (
    "gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "mish", "quick_gelu", "relu", "relu2", "relu6", "sigmoid",
    "silu", "swish", "tanh",
)  # fmt: skip
B, L, PROMPT, NEW = 2, 10, 4, 20
# Ids 0 to 3 are special in OPT, whose padding token gets no gradient through the embedding.
FIRST_TOKEN = 4


def random_model(hf: dict, seed: int):
    settings = {key: value for key, value in hf.items() if key != "model_type"}
    config = AutoConfig.for_model(hf["model_type"], **settings, attn_implementation="eager")
    model = AutoModelForCausalLM.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name or ".ln_" in name
            one = 0 if hf["model_type"].startswith("gemma3") else 1
            parameter.copy_(one + 0.2 * noise if is_norm and name.endswith("weight") else 0.3 * noise)
    return model


def submodules(model, hf: dict) -> dict:
    """The first block's parts by our names, with which of hook's input and output to keep."""
    if hf["model_type"] == "gpt2":
        block = model.transformer.h[0]
        return {
            "attention_norm": block.ln_1, "attention": block.attn, "mlp_in": block.mlp, "mlp_out": block.mlp,
            "block": block, "output": model.transformer.ln_f,
        }  # fmt: skip
    if hf["model_type"] == "opt":
        block = model.model.decoder.layers[0]
        return {
            "attention_norm": block.self_attn_layer_norm, "attention": block.self_attn, "mlp_in": block.fc1,
            "mlp_out": block.fc2, "block": block, "output": model.model.decoder,
        }  # fmt: skip
    block = model.model.layers[0]
    return {
        "attention_norm": block.input_layernorm, "attention": block.self_attn, "mlp_in": block.mlp,
        "mlp_out": block.mlp, "block": block, "output": model.model.norm,
    }  # fmt: skip


def record_submodules(model, hf: dict, tokens) -> dict:
    """Inputs ("in/...") and outputs ("out/...") of the first block's parts, each [B, L, width]."""
    kept = {}

    def hook(name):
        def keep(module, args, kwargs, output):
            given = args[0] if args else kwargs.get("hidden_states", kwargs.get("input_ids"))
            produced = (
                output[0] if isinstance(output, (tuple, dict)) or hasattr(output, "to_tuple") else output
            )
            for side, value in (("in", given), ("out", produced)):
                if value.is_floating_point():
                    kept[f"{side}/{name}"] = value.detach().reshape(B, L, -1).clone()

        return keep

    handles = [m.register_forward_hook(hook(n), with_kwargs=True) for n, m in submodules(model, hf).items()]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return kept


def padded_logits(model, tokens, lengths, side: str):
    """Logits of rows padded with zeros on one side, with the positions that count from each first token."""
    padded, mask = torch.zeros_like(tokens), torch.zeros_like(tokens)
    for row, length in enumerate(lengths):
        where = slice(0, length) if side == "right" else slice(L - length, L)
        padded[row, where], mask[row, where] = tokens[row, :length], 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return padded, mask, model(padded, attention_mask=mask, position_ids=positions).logits


def golden(hf: dict, seed: int) -> dict[str, torch.Tensor]:
    model = random_model(hf, seed)
    tokens = torch.tensor(np.random.RandomState(seed).randint(FIRST_TOKEN, hf["vocab_size"], (B, L)))
    file = {"tokens": tokens} | record_submodules(model, hf, tokens)
    file |= {f"weight/{name}": p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        file["logits"] = model(tokens).logits
    for side in ("left", "right"):
        padded, mask, logits = padded_logits(model, tokens, (6, L), side)
        file |= {f"{side}/tokens": padded, f"{side}/mask": mask, f"{side}/logits": logits}
    file["greedy"] = model.generate(
        tokens[:, :PROMPT],
        do_sample=False,
        min_new_tokens=NEW,
        max_new_tokens=NEW,
        pad_token_id=0,
        eos_token_id=None,
    )

    # Adam's eps is large enough that rounding in a gradient which is zero by symmetry (key biases) does not show.
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-2, betas=(0.9, 0.999), eps=1e-4, weight_decay=0.01
    )
    logits = model(tokens[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    file["loss"] = loss.detach()
    file |= {f"gradient/{name}": p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    return file | {f"adamw/{name}": p.detach().clone() for name, p in model.named_parameters()}


def main() -> None:
    for seed, (name, hf) in enumerate(json.loads((GOLDEN / "cases.json").read_text()).items()):
        tensors = {key: value.contiguous() for key, value in golden(hf, seed).items()}
        save_file(tensors, GOLDEN / f"{name}.safetensors")
    x = torch.linspace(-8, 8, 161)
    save_file({"x": x} | {name: ACT2FN[name](x) for name in ACTIVATIONS}, GOLDEN / "activations.safetensors")


if __name__ == "__main__":
    main()
