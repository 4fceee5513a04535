"""Hugging Face `generate` on PyTorch, as a program of its own: python peer_generate.py request.json

Padded batches of prompts, seed after seed, each batch until its longest answer has ended. Reads what to do from
the request and prints one JSON line. It imports nothing of this package: PyTorch lives in another environment.
"""

import json
import sys
import time
from pathlib import Path

import torch  # pyright: ignore[reportMissingImports]
from transformers import AutoModelForCausalLM


def batches(prompts: list[list[int]], size: int, by_length: bool) -> list[list[list[int]]]:
    ordered = sorted(prompts, key=len) if by_length else prompts
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def pad(prompts: list[list[int]], eos: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded tokens and their attention mask, as decoder-only models need them."""
    longest = max(map(len, prompts))
    tokens = torch.full((len(prompts), longest), eos)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return tokens, mask


def count_tokens(new_BxL: torch.Tensor, eos: int) -> list[int]:
    """Tokens of each answer before its end of sequence."""
    ended = (new_BxL == eos).long()
    lengths = ended.argmax(dim=1)
    return torch.where(ended.any(dim=1), lengths, new_BxL.shape[1]).tolist()


@torch.inference_mode()
def generate(model, request: dict, by_length: bool) -> tuple[list[int], float]:
    """(tokens of each answer, seconds)."""
    eos, lengths = request["eos"], []
    start = time.perf_counter()
    for seed in request["seeds"]:
        torch.manual_seed(seed)
        for batch in batches(request["prompts"], request["batch_size"], by_length):
            tokens, mask = pad(batch, eos)
            out = model.generate(
                tokens,
                attention_mask=mask,
                do_sample=True,
                temperature=request["temperature"],
                top_k=request["top_k"],
                max_new_tokens=request["max_new_tokens"],
                eos_token_id=eos,
                pad_token_id=eos,
            )
            lengths += count_tokens(out[:, tokens.shape[1] :], eos)
    return lengths, time.perf_counter() - start


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    if request["threads"]:
        torch.set_num_threads(request["threads"])
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32).eval()
    warm_up = {"prompts": request["prompts"][:2], "seeds": [0], "max_new_tokens": 4}
    generate(model, request | warm_up, False)
    results = {}
    for name, by_length in (("transformers", False), ("transformers_sorted", True)):
        lengths, seconds = generate(model, request, by_length)
        results[name] = {"tokens": sum(lengths), "answers": len(lengths), "seconds": seconds}
    print(json.dumps({"results": results, "threads": torch.get_num_threads(), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
