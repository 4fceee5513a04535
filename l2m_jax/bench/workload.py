"""The distillation work that is put through ours and the peers' ways: the same rows, weights, order and optimiser."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from l2m_jax import models
from l2m_jax.data.batches import Examples
from l2m_jax.data.order import order_of_examples
from l2m_jax.data.prompts import format_prompt
from l2m_jax.data.sources import read_file
from l2m_jax.data.tokenizer import load_tokenizer
from l2m_jax.errors import InputError
from l2m_jax.models import DecoderConfig
from l2m_jax.models.hf import gpt2

# No side drops anything, so that losses can be compared.
_NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
TEACHER = gpt2.read_config({"n_layer": 12, "n_embd": 768, "n_head": 12, **_NO_DROPOUT})
STUDENT = gpt2.read_config({"n_layer": 4, "n_embd": 256, "n_head": 4, **_NO_DROPOUT})
ROW_LENGTH = 512  # what the published code pads every row to
PASSES = 20  # over the training set in a whole run


@dataclass(frozen=True)
class Request:
    """
    Attributes:
        student, teacher: Hugging Face folders.
        tokens: prompt and response of each example, `prompt_lengths` of them the prompt's.
        batches: the examples of each batch, in order.
        eos: also what rows are padded with.
        dtype: of our products; sums and weights are float32.
    """

    student: str
    teacher: str
    tokens: list[list[int]]
    prompt_lengths: list[int]
    batches: list[list[int]]
    learning_rate: float
    eos: int
    dtype: str = "float32"

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, file: Path) -> "Request":
        return cls(**json.loads(file.read_text()))


def make_request(
    folder: Path,
    data: Path,
    tokenizer_folder: Path,
    *,
    batches: int,
    batch_size: int,
    student: DecoderConfig = STUDENT,
    teacher: DecoderConfig = TEACHER,
    learning_rate: float = 5e-4,
) -> Request:
    """Random weights, saved into `folder`, and the first `batches` of an epoch over rows of at most `ROW_LENGTH` tokens.

    The teacher's head is scaled up, so that its distributions are peaked as a trained model's.

    Raises:
        InputError: `data` holds too few rows.
    """
    tokenizer = load_tokenizer(tokenizer_folder)
    eos: Any = tokenizer.eos_token_id
    tokens, prompt_lengths = [], []
    for row in read_file(data):
        prompt = format_prompt(row.instruction, row.input)
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        whole = tokenizer.encode(prompt + row.references[0], add_special_tokens=False)
        if len(whole) < ROW_LENGTH and len(whole) > len(ids):
            tokens.append([*whole, eos])
            prompt_lengths.append(len(ids))
    wanted = batches * batch_size
    if len(tokens) < wanted:
        raise InputError(
            f"--data {data}: {len(tokens)} rows of at most {ROW_LENGTH} tokens, {wanted} are needed"
        )
    order = order_of_examples(0, 1, 0, np.arange(len(tokens)))[:wanted]
    for name, config, seed in (("student", student, 0), ("teacher", teacher, 1)):
        params = models.init(config, jax.random.key(seed))
        if name == "teacher":
            norm = params["output"]["norm"]
            norm["scale"] = 3 * norm["scale"]
        models.save(folder / name, config, params, tokenizer=tokenizer)
    return Request(
        str(folder / "student"),
        str(folder / "teacher"),
        [tokens[i] for i in order],
        [prompt_lengths[i] for i in order],
        np.arange(wanted).reshape(batches, batch_size).tolist(),
        learning_rate,
        eos,
    )


def step_flops(
    student: DecoderConfig,
    teacher: DecoderConfig,
    examples: Examples,
    batches: Sequence[Sequence[int] | np.ndarray],
) -> dict[str, float]:
    """Flops a batch of the matrix products that the real tokens need; padding and attention scores do not count.

    Returns:
        `student_body`, `student_head` (forward and backward), `teacher_body`, `teacher_head` (forward); heads over
        targets.
    """
    chosen = np.concatenate(batches)
    tokens = float(examples.lengths[chosen].sum()) / len(batches)
    targets = tokens - float(examples.prompt_lengths[chosen].sum()) / len(batches)
    return {
        "student_body": 6 * tokens * _body(student),
        "teacher_body": 2 * tokens * _body(teacher),
        "student_head": 6 * targets * student.vocab_size * student.embed_size,
        "teacher_head": 2 * targets * teacher.vocab_size * teacher.embed_size,
    }


def padded_flops(
    student: DecoderConfig,
    teacher: DecoderConfig,
    lengths: np.ndarray,
    batches: np.ndarray,
    padded_to: int = 0,
) -> float:
    """Flops a batch of the matrix products of a step that pads rows and runs both models, with heads, on all positions.

    Args:
        lengths: tokens of each example, [n].
        batches: the examples of each batch, [batches, batch_size].
        padded_to: the length of a padded row; 0: the longest of its batch.
    """
    longest = np.full(len(batches), padded_to) if padded_to else lengths[batches].max(axis=1)
    tokens = float(longest.mean()) * batches.shape[1]
    return sum(
        passes * 2 * tokens * (_body(config) + config.vocab_size * config.embed_size)
        for passes, config in ((3, student), (1, teacher))
    )


def _body(config: DecoderConfig) -> int:
    """Parameters of the blocks' matrices."""
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    mlp = 3 if config.gated_mlp else 2
    return config.num_layers * config.hidden_size * (heads * config.head_dim + mlp * config.intermediate_size)
