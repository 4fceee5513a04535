"""Evaluation of a model folder, whether or not this package made it."""

from dataclasses import dataclass
from pathlib import Path

from l2m_jax import files, models
from l2m_jax.errors import InputError, require_at_least
from l2m_jax.evaluation import protocol
from l2m_jax.evaluation.judge import Judge, WinRate, check_baseline, read_comparisons, win_rates
from l2m_jax.evaluation.protocol import Results
from l2m_jax.evaluation.settings import Evaluation
from l2m_jax.generation import SamplingRules
from l2m_jax.models import Compute
from l2m_jax.multihost import Devices
from l2m_jax.run import sources, tokenizers
from l2m_jax.run.artefacts import Artefact, refuse_changed
from l2m_jax.run.context import placement_of
from l2m_jax.run.evaluation import EvaluationInputs, make_evaluation, set_inputs

_VERDICTS = "verdicts.jsonl"


@dataclass(frozen=True)
class FolderEvaluation:
    """
    Attributes:
        model: a Hugging Face folder, a GGUF file or a hub name.
        evaluation: its sets, seeds and rows.
        tokenizer: a folder or hub name; empty for the model's own.
        max_prompt_length: tokens; 0 for what the model has room for.
        truncate: shorten longer prompts instead of leaving them out.
        bos: begin prompts with the beginning-of-sequence token.
        prompt: "alpaca", or "chat" for the tokenizer's chat template.
        dtype: compute dtype; "auto" for bfloat16 on GPU and TPU, float32 on CPU.
    """

    model: str
    evaluation: Evaluation
    sampling: SamplingRules
    tokenizer: str = ""
    max_prompt_length: int = 0
    truncate: bool = False
    bos: bool = False
    prompt: str = "alpaca"
    dtype: str = "auto"

    def __post_init__(self):
        require_at_least(self, 0, "max_prompt_length")
        if self.prompt == "chat" and self.bos:
            raise InputError("bos: the chat template writes the beginning of sequence itself; leave it out")
        if self.prompt == "chat" and self.truncate:
            raise InputError("truncate: would cut a chat's turns in two; leave it out")


def evaluate_folder(asked: FolderEvaluation, devices: Devices, output: Path) -> Results:
    """Responses of a model to the prompts of all sets, and their scores, in `output`. A second call resumes the first.

    Raises:
        InputError: a model, set or tokenizer that cannot be read, no room for prompts, too many devices, or another
            evaluation in `output`.
    """
    placement, e = placement_of(devices), asked.evaluation
    if Path(asked.model).is_dir():  # its config is read before its tokenizer, whose reader says less
        models.read_config(asked.model)
    inputs = EvaluationInputs(
        model=sources.given_model(asked.model),
        sets=tuple(map(set_inputs, e.sets)),
        tokenizer=tokenizers.tokenizer_source(
            asked.tokenizer or asked.model, "--tokenizer" if asked.tokenizer else "--model", asked.prompt
        ),
        sampling=asked.sampling,
        seeds=e.seeds,
        rows=e.rows,
        max_prompt_length=asked.max_prompt_length,
        truncate=asked.truncate,
        bos=asked.bos,
    )
    # The template of a chat is part of the tokenizer.
    artefact = Artefact(inputs, output, settings={"tokenizer": "--tokenizer or --prompt"})
    refuse_changed([artefact])
    return make_evaluation(artefact, Path(asked.model).name, Compute(asked.dtype), placement, devices.slots)


def responses_file(baseline: Path) -> Path:
    """The responses of an evaluation, given the file or its folder.

    Raises:
        InputError: there is no such file.
    """
    file = baseline / protocol.RESPONSES if baseline.is_dir() else baseline
    if not file.is_file():
        raise InputError(f"{file}: no such file; give responses.jsonl of an evaluation, or its folder")
    return file


def checked_judge(model: str, url: str | None, baseline: Path, output: Path) -> Judge:
    """A judge to compare with the responses in `baseline`, checked before a model answers anything.

    Raises:
        InputError: a wrong name, URL, key or baseline. Once there are verdicts in `output`, the key may be missing.
    """
    judge = Judge(model, url)
    check_baseline(baseline)
    if not (output / _VERDICTS).is_file():
        judge.check()
    return judge


def compare(output: Path, baseline: Path, judge: Judge) -> dict[str, WinRate]:
    """Win rates of the responses in `output` against those of the file `baseline`, kept in win_rates.json.

    Raises:
        InputError: responses to other prompts, or a judge that does not answer.
    """
    rates = win_rates(read_comparisons(output / protocol.RESPONSES, baseline), judge, output / _VERDICTS)
    files.write_json(output / "win_rates.json", rates)
    return rates
