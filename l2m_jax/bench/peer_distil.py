"""Distillation with PyTorch, as a program of its own: python peer_distil.py request.json WAY STEPS

WAY is "padded_512" (the published way: rows padded to 512, live teacher, logits at every position), "padded_longest"
(rows padded to the longest of the batch), or "trl" (TRL's GKDTrainer, off-policy). All minimise KL(teacher‖student)
over response tokens with AdamW. Prints one JSON line. It imports nothing of this package: PyTorch lives in another
environment.
"""

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
from transformers import AutoModelForCausalLM, AutoTokenizer

IGNORED = -100
WEIGHT_DECAY = 0.01
CLIP_NORM = 1.0


def collate(examples: list[dict], eos: int, length: int | None) -> dict[str, torch.Tensor]:
    length = length or max(len(e["tokens"]) for e in examples)
    input_ids = torch.full((len(examples), length), eos)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for row, example in enumerate(examples):
        tokens, prompt = torch.tensor(example["tokens"]), example["prompt_length"]
        input_ids[row, : len(tokens)] = tokens
        attention_mask[row, : len(tokens)] = 1
        labels[row, prompt : len(tokens)] = tokens[prompt:]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def load(folder: str):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def distil(request: dict, batches: list[list[dict]], length: int | None) -> tuple[list[float], list[float]]:
    """(losses, seconds of each step)."""
    student, teacher = load(request["student"]).train(), load(request["teacher"]).eval()
    decayed = [p for p in student.parameters() if p.ndim > 1]
    other = [p for p in student.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": other, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=request["learning_rate"], betas=(0.9, 0.999))
    losses, times = [], []
    for examples in batches:
        start = time.perf_counter()
        batch = collate(examples, request["eos"], length)
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        with torch.no_grad():
            teacher_logits = teacher(**inputs, use_cache=False).logits[:, :-1]
        student_logits = student(**inputs, use_cache=False).logits[:, :-1]
        mask = batch["labels"][:, 1:] != IGNORED
        p = F.softmax(teacher_logits, dim=-1, dtype=torch.float32)
        log_p = F.log_softmax(teacher_logits, dim=-1, dtype=torch.float32)
        log_q = F.log_softmax(student_logits, dim=-1, dtype=torch.float32)
        divergence = (p * (log_p - log_q)).sum(-1)
        loss = (divergence * mask).sum() / mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        times.append(time.perf_counter() - start)
    return losses, times


def distil_with_trl(request: dict, batches: list[list[dict]]) -> tuple[list[float], list[float]]:
    from datasets import Dataset
    from torch.utils.data import SequentialSampler  # pyright: ignore[reportMissingImports]
    from transformers import TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer  # pyright: ignore[reportMissingImports]

    losses, times = [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            times.append(time.perf_counter() - self.start)

    class InOrder(GKDTrainer):
        def _get_train_sampler(self, train_dataset=None):
            return SequentialSampler(train_dataset or self.train_dataset)

        def compute_loss(self, *arguments, **keywords):
            loss = super().compute_loss(*arguments, **keywords)
            losses.append((loss[0] if isinstance(loss, tuple) else loss).item())
            return loss

    with tempfile.TemporaryDirectory() as folder:
        arguments = GKDConfig(
            output_dir=folder,
            lmbda=0.0,  # off-policy
            beta=0.0,  # KL(teacher‖student)
            per_device_train_batch_size=len(batches[0]),
            max_steps=len(batches),
            learning_rate=request["learning_rate"],
            lr_scheduler_type="constant",
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=CLIP_NORM,
            adam_beta1=0.9,
            adam_beta2=0.999,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = InOrder(
            model=load(request["student"]),
            teacher_model=load(request["teacher"]),
            args=arguments,
            data_collator=lambda examples: collate(examples, request["eos"], None),
            train_dataset=Dataset.from_list([example for batch in batches for example in batch]),
            processing_class=AutoTokenizer.from_pretrained(request["student"]),
            callbacks=[Clock()],
        )
        trainer.train()
    return losses, times


def matmul_gflops() -> float:
    """The rate of a large float32 matrix product, as `bench.common.matmul_rate` measures ours."""
    size, took = 1024, 0.0
    while took < 0.05 and size < 16384:
        size *= 2
        a = torch.full((size, size), 1 / size)
        torch.mm(a, a)
        times = []
        for _ in range(9):
            start = time.perf_counter()
            torch.mm(a, a)
            times.append(time.perf_counter() - start)
        took = sorted(times)[4]
    return 2 * size**3 / took / 1e9


def main() -> None:
    request, way, steps = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2], int(sys.argv[3])
    batches = [
        [{"tokens": request["tokens"][i], "prompt_length": request["prompt_lengths"][i]} for i in indices]
        for indices in request["batches"][:steps]
    ]
    rates = [matmul_gflops()]
    if way == "trl":
        losses, times = distil_with_trl(request, batches)
    else:
        losses, times = distil(request, batches, 512 if way == "padded_512" else None)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rates.append(matmul_gflops())
    print(
        json.dumps(
            {
                "losses": losses,
                "step_seconds": times,
                "peak_rss_mb": peak * (1 if sys.platform == "darwin" else 1024) / 1e6,
                "matmul_gflops": sum(rates) / 2,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
