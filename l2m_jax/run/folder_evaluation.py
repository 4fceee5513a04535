"""Evaluation of a model folder, whether or not this package made it."""

from dataclasses import dataclass
from pathlib import Path

from l2m_jax import files
from l2m_jax.errors import InputError
from l2m_jax.evaluation import protocol
from l2m_jax.evaluation.judge import Judge, WinRate, read_comparisons, win_rates
from l2m_jax.evaluation.protocol import Results
from l2m_jax.evaluation.sets import read_set
from l2m_jax.generation import Generator, SamplingRules
from l2m_jax.models import Compute
from l2m_jax.multihost import Devices
from l2m_jax.run import data
from l2m_jax.run.context import placement_of
from l2m_jax.run.models import load_frozen, read_config
from l2m_jax.run.responses import longest_prompt


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
    placement = placement_of(devices)
    given = data.tokenizer_source(
        asked.tokenizer or asked.model, "--tokenizer" if asked.tokenizer else "--model"
    )
    tokenizer = data.load(given)
    model, compute = data.given_model(asked.model), Compute(dtype=asked.dtype)
    config = read_config(model, compute, given)
    room = longest_prompt(config, asked.rules, asked.max_prompt_length)
    if room < 1:
        raise InputError(
            f"max_new_tokens: {asked.rules.max_new_tokens} leaves no room for a prompt within the model's "
            f"{config.max_positions} positions; lower it"
        )
    sets = [
        read_set(
            source,
            tokenizer,
            asked.output / "sets",
            max_prompt_length=room,
            long_prompt="truncate" if asked.truncate else "drop",
            bos=asked.bos,
            rows=asked.rows,
        )
        for source in asked.sets
    ]
    config, params = load_frozen(model, compute, given, placement)
    return protocol.evaluate(
        Generator(config, params, placement, tokenizer),
        sets,
        asked.rules,
        asked.seeds,
        folder=asked.output,
        key=files.fingerprint(model, given),
        title=Path(asked.model).name,
    )


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
