"""Scores a model folder: `python eval.py --model runs/quickstart/student --sets test=FILE --output runs/scores`.

Sets are names (self_inst, vicuna, s_ni, un_ni), JSON-lines files, or name=file. The same command again goes on
where the first one stopped. With a judge, the win rate against a baseline's answers stands beside the scores; its key
comes from OPENAI_API_KEY:

    python eval.py ... --judge_model NAME --judge_url http://localhost:8000/v1 --baseline runs/teacher_scores
"""

import dataclasses
import hashlib
import sys
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from l2m_jax.cli.common import refuse, whole_numbers
from l2m_jax.errors import InputError

_MODEL = flags.DEFINE_string("model", None, "Hugging Face folder, GGUF file or hub name", required=True)
_SETS = flags.DEFINE_list("sets", ["dolly"], "Names, files, or name=file")
_OUTPUT = flags.DEFINE_string("output", None, "Where scores, answers and report are kept", required=True)
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "Folder or hub name; by default the model's own")
_SEEDS = flags.DEFINE_list("seeds", ["10", "20", "30", "40", "50"], "One answer to each prompt a seed")
_ROWS = flags.DEFINE_integer("rows", 0, "The most rows of each set; 0 takes all")
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "0 is greedy")
_TOP_K = flags.DEFINE_integer("top_k", 50, "0 is the whole vocabulary")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "1 switches it off")
_NGRAM = flags.DEFINE_integer("no_repeat_ngram", 0, "0 allows repetition")
_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 512, "The most tokens of an answer")
_PROMPT = flags.DEFINE_integer(
    "max_prompt_length", 0, "Rows with longer prompts are dropped; 0: what the model has room for"
)
_TRUNCATE = flags.DEFINE_bool("truncate", False, "Truncate long prompts instead of dropping their rows")
_BOS = flags.DEFINE_bool("bos", False, "Begin prompts with the token that begins a sequence")
_JUDGE_MODEL = flags.DEFINE_string("judge_model", None, "The judge of the win rate")
_JUDGE_URL = flags.DEFINE_string(
    "judge_url", None, "Its endpoint; by default $OPENAI_BASE_URL, or OpenAI's own"
)
_BASELINE = flags.DEFINE_string("baseline", None, "Whose answers to beat: responses.jsonl, or its folder")
_DTYPE = flags.DEFINE_enum("dtype", "auto", ["auto", "float32", "bfloat16"], "Of the computation")


def _checksum(params: Any) -> str:
    """Of the weights themselves: a folder can be written over."""
    import jax
    import numpy as np

    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def _evaluate() -> None:
    from l2m_jax import models, multihost
    from l2m_jax.config import Devices, Model
    from l2m_jax.evaluation import protocol
    from l2m_jax.evaluation.sets import read_set
    from l2m_jax.generation import SamplingRules
    from l2m_jax.progress import console
    from l2m_jax.reporting.report import write_report
    from l2m_jax.run import build

    multihost.start(Devices())
    output, name = Path(_OUTPUT.value), Path(_MODEL.value).name
    if (_JUDGE_MODEL.value is None) != (_BASELINE.value is None):
        raise InputError("--judge_model and --baseline: a win rate needs both")
    tokenizer = build.read_tokenizer(_TOKENIZER.value or _MODEL.value)
    config, params = models.load(_MODEL.value, dtype=build.compute_dtype(Model(dtype=_DTYPE.value)))
    config = dataclasses.replace(config, valid_vocab_size=min(config.valid_vocab_size, len(tokenizer)))
    rules = SamplingRules(
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        no_repeat_ngram=_NGRAM.value,
        max_new_tokens=_NEW_TOKENS.value,
    )
    room = config.max_positions - rules.max_new_tokens
    if room < 1:
        raise InputError(
            f"--max_new_tokens {rules.max_new_tokens}: the model's {config.max_positions} positions leave no room for a "
            "prompt; lower it"
        )
    sets = [
        read_set(
            source,
            tokenizer,
            output / "sets",
            max_prompt_length=min(room, _PROMPT.value or room),
            long_prompt="truncate" if _TRUNCATE.value else "drop",
            bos=_BOS.value,
            rows=_ROWS.value,
        )
        for source in _SETS.value
    ]
    results = protocol.evaluate(
        config,
        params,
        tokenizer,
        sets,
        rules,
        whole_numbers("seeds", _SEEDS.value),
        folder=output,
        made_from=_checksum(params),
        title=name,
    )
    title = f"Evaluation of {name}"
    multihost.first(lambda: write_report(output, title=title, results={name: results}))
    console.print(protocol.table({name: results}).markdown())
    if (judge := _JUDGE_MODEL.value) and (baseline := _BASELINE.value):
        facts = multihost.first(lambda: _win_rates(output, judge, Path(baseline)))
        multihost.first(lambda: write_report(output, title=title, results={name: results}, facts=facts))
        console.print("".join(f"{what}: {rate}\n" for what, rate in facts.items()))
    console.print(f"report: {output / 'report.md'}")


def _win_rates(output: Path, model: str, baseline: Path) -> dict[str, str]:
    from l2m_jax import files
    from l2m_jax.evaluation.judge import Judge, read_comparisons, win_rates
    from l2m_jax.evaluation.protocol import RESPONSES

    comparisons = read_comparisons(
        output / RESPONSES, baseline / RESPONSES if baseline.is_dir() else baseline
    )
    rates = win_rates(comparisons, Judge(model, _JUDGE_URL.value), output / "verdicts.jsonl")
    files.write_json(output / "win_rates.json", rates)
    return {f"win rate on {name} against {baseline}, by {model}": str(r) for name, r in rates.items()}


def _main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected argument {arguments[1]!r}")
    logging.set_verbosity(logging.WARNING)
    try:
        _evaluate()
    except InputError as error:
        refuse(str(error))
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on from the answers that are there")


def main() -> None:
    app.run(_main)


if __name__ == "__main__":
    main()
