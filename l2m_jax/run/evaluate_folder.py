"""The evaluation of a model that no run of this package need have made."""

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path

from l2m_jax import files, models
from l2m_jax.config import Config, Devices, Model
from l2m_jax.data.tokenizer import tokenizer_fingerprint
from l2m_jax.errors import InputError
from l2m_jax.evaluation import protocol
from l2m_jax.evaluation.judge import Judge, WinRate, read_comparisons, win_rates
from l2m_jax.evaluation.protocol import Results
from l2m_jax.evaluation.sets import read_set
from l2m_jax.generation import SamplingRules
from l2m_jax.multihost import first
from l2m_jax.run import build
from l2m_jax.run.context import parallel_of


@dataclass(frozen=True)
class FolderEvaluation:
    """
    Attributes:
        model: a Hugging Face folder, a GGUF file or a hub name.
        output: takes results.json, responses.jsonl and the sets' tokens.
        sets: names of `EVALUATION_SETS`, JSON-lines files, or name=file.
        seeds: one response to each prompt for each seed.
        tokenizer: a folder or hub name; empty for the model's own.
        rows: the maximum number of rows of each set; 0 for all.
        max_prompt_length: tokens; 0 for what the model has room for.
        truncate: shorten longer prompts instead of leaving them out.
        bos: begin prompts with the beginning-of-sequence token.
        dtype: compute dtype; "auto" for bfloat16 on GPU and TPU, float32 on CPU.
    """

    model: str
    output: Path
    sets: tuple[str, ...]
    rules: SamplingRules
    seeds: tuple[int, ...]
    tokenizer: str = ""
    rows: int = 0
    max_prompt_length: int = 0
    truncate: bool = False
    bos: bool = False
    dtype: str = "auto"

    def __post_init__(self):
        for name in ("rows", "max_prompt_length"):
            if getattr(self, name) < 0:
                raise InputError(f"{name}: {getattr(self, name)} must be 0 or more")


def evaluate_folder(asked: FolderEvaluation, devices: Devices) -> Results:
    """Responses of a model to the prompts of all sets, and their scores. A second call resumes the first.

    Raises:
        InputError: a model, set or tokenizer that cannot be read, no room for prompts, or too many devices.
    """
    parallel = parallel_of(Config(devices=devices))
    tokenizer = build.read_tokenizer(asked.tokenizer or asked.model)
    sharding = parallel.parameter_sharding if parallel.mapping == "fsdp" else None
    room = models.read_config(asked.model).max_positions - asked.rules.max_new_tokens
    if room < 1:
        raise InputError(
            f"max_new_tokens: {asked.rules.max_new_tokens} leaves no room for a prompt within the model's "
            f"{room + asked.rules.max_new_tokens} positions; lower it"
        )
    sets = [
        read_set(
            source,
            tokenizer,
            asked.output / "sets",
            max_prompt_length=min(room, asked.max_prompt_length or room),
            long_prompt="truncate" if asked.truncate else "drop",
            bos=asked.bos,
            rows=asked.rows,
        )
        for source in asked.sets
    ]
    dtype = build.compute_dtype(Model(dtype=asked.dtype))
    config, params = models.load(asked.model, dtype=dtype, sharding=sharding)
    config = dataclasses.replace(config, valid_vocab_size=min(config.valid_vocab_size, len(tokenizer)))
    return protocol.evaluate(
        config,
        params,
        tokenizer,
        sets,
        asked.rules,
        asked.seeds,
        folder=asked.output,
        made_from=files.fingerprint(first(lambda: _content(asked.model)), tokenizer_fingerprint(tokenizer)),
        title=Path(asked.model).name,
        **({"mesh": parallel.mesh} if sharding else {"devices": parallel.devices}),
    )


def _content(model: str) -> str:
    """A hash of the weights, since a folder can be overwritten; a hub name stands for itself."""
    path = Path(model)
    found = sorted((*path.glob("config.json"), *path.glob("*.safetensors"))) if path.is_dir() else [path]
    if not found[0].is_file():
        return model
    digest = hashlib.sha256()
    for file in found:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def responses_file(baseline: Path) -> Path:
    """The responses of an evaluation, given the file or its folder.

    Raises:
        InputError: there is no such file.
    """
    file = baseline / protocol.RESPONSES if baseline.is_dir() else baseline
    if not file.is_file():
        raise InputError(f"{file}: no such file; give responses.jsonl of an evaluation, or its folder")
    return file


def compare(output: Path, baseline: Path, judge: Judge) -> dict[str, WinRate]:
    """Win rates of the responses in `output` against those of the file `baseline`, kept in win_rates.json.

    Raises:
        InputError: responses to other prompts, or a judge that does not answer.
    """
    rates = win_rates(
        read_comparisons(output / protocol.RESPONSES, baseline), judge, output / "verdicts.jsonl"
    )
    files.write_json(output / "win_rates.json", rates)
    return rates
