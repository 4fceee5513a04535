"""Score a model folder.

    l2m eval --model runs/quickstart/student --sets mine=FILE --max-new-tokens 24 --output runs/scores

Sets are names (dolly, self_inst, vicuna, s_ni, un_ni), JSON-lines files, or name=file. Run the same command again to resume.
With a judge, the report also has the win rate against the responses of a baseline; OPENAI_API_KEY holds the judge's
key:

    l2m eval ... --judge-model NAME --judge-url http://localhost:8000/v1 --baseline runs/teacher_scores
"""

import argparse
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from l2m_jax.cli.common import Parser, comma_separated, output_folder, run, whole_numbers
from l2m_jax.errors import InputError


def _parser() -> Parser:
    parser = Parser("eval", __doc__)
    parser.add_argument("--model", required=True, help="a Hugging Face folder, a GGUF file or a hub name")
    parser.add_argument(
        "--output", type=output_folder, required=True, help="where scores, responses and the report are kept"
    )
    parser.add_argument(
        "--sets",
        "--set",
        type=comma_separated,
        action="extend",
        help="names, files or name=file (default: dolly)",
    )
    parser.add_argument("--tokenizer", default="", help="a folder or hub name (default: the model's own)")
    parser.add_argument(
        "--seeds",
        type=whole_numbers,
        default=[10, 20, 30, 40, 50],
        help="one response to each prompt for each seed (default: 10,20,30,40,50)",
    )
    parser.add_argument(
        "--rows", type=int, default=0, help="the maximum number of rows of each set; 0 for all"
    )
    parser.add_argument(
        "--max-prompt-length",
        type=int,
        default=0,
        help="tokens; longer prompts are left out and counted. 0 for what the model has room for",
    )
    parser.add_argument(
        "--truncate", action="store_true", help="shorten long prompts instead of leaving them out"
    )
    parser.add_argument(
        "--bos", action="store_true", help="begin prompts with the beginning-of-sequence token"
    )
    parser.add_argument(
        "--prompt",
        choices=("alpaca", "chat"),
        default="alpaca",
        help="how prompts are written; 'chat' is the tokenizer's own chat template (default: alpaca)",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="compute dtype (default: auto)",
    )
    parser.add_argument("--devices", type=int, default=0, help="the number of devices (default: all)")
    parser.add_argument(
        "--mapping",
        choices=("pmap", "fsdp"),
        default="pmap",
        help="one copy of the model on each device, or one model sharded over them (default: pmap)",
    )
    _add_sampling_flags(parser)
    judge = parser.add_argument_group("win rate")
    judge.add_argument("--judge-model", help="the judge's name at its endpoint")
    judge.add_argument("--judge-url", help="its endpoint (default: $OPENAI_BASE_URL, or OpenAI's)")
    judge.add_argument(
        "--baseline", type=Path, help="the responses to compare with: responses.jsonl, or its folder"
    )
    return parser


def _add_sampling_flags(parser: Parser) -> None:
    from l2m_jax.generation.sampling import SamplingRules

    group = parser.add_argument_group("sampling")
    described = dict(re.findall(r"^ +(\w+): (.+)$", SamplingRules.__doc__ or "", re.MULTILINE))
    for field in dataclasses.fields(SamplingRules):
        group.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(field.default),
            default=field.default,
            help=f"{described.get(field.name, '').rstrip('.').replace('%', '%%')} (default: %(default)s)",
        )


def _evaluate(options: argparse.Namespace) -> None:
    if (options.judge_model is None) != (options.baseline is None):
        raise InputError("--judge-model and --baseline: a win rate needs both")

    from l2m_jax import multihost, preemption
    from l2m_jax.evaluation.settings import Evaluation
    from l2m_jax.generation.sampling import SamplingRules
    from l2m_jax.multihost import Devices
    from l2m_jax.progress import console
    from l2m_jax.reporting.report import write_report
    from l2m_jax.reporting.tables import results_table
    from l2m_jax.run import folder_evaluation as folder

    baseline = None if options.baseline is None else folder.responses_file(options.baseline)
    judge = (
        None
        if baseline is None
        else folder.checked_judge(options.judge_model, options.judge_url, baseline, options.output)
    )
    try:
        asked = folder.FolderEvaluation(
            model=options.model,
            evaluation=Evaluation(
                sets=tuple(options.sets or ["dolly"]), seeds=tuple(options.seeds), rows=options.rows
            ),
            sampling=SamplingRules(
                **{f.name: getattr(options, f.name) for f in dataclasses.fields(SamplingRules)}
            ),
            tokenizer=options.tokenizer,
            max_prompt_length=options.max_prompt_length,
            truncate=options.truncate,
            bos=options.bos,
            prompt=options.prompt,
            dtype=options.dtype,
        )
    except InputError as error:
        raise InputError(f"--{error}") from error
    try:
        devices = Devices(mapping=options.mapping, count=options.devices)
    except InputError as error:
        raise InputError(f"--devices{str(error).removeprefix('count')}") from error
    multihost.start(devices)
    preemption.follow()
    results = {Path(options.model).name: folder.evaluate_folder(asked, devices, options.output)}
    title = f"Evaluation of {Path(options.model).name}"
    multihost.first(lambda: write_report(options.output, title=title, results=results))
    console.print(results_table(results).markdown())
    if baseline is not None and judge is not None:
        rates = multihost.first(
            lambda: {s: str(rate) for s, rate in folder.compare(options.output, baseline, judge).items()}
        )
        facts = {
            f"win rate on {name} against {options.baseline}, by {options.judge_model}": rate
            for name, rate in rates.items()
        }
        multihost.first(lambda: write_report(options.output, title=title, results=results, facts=facts))
        console.print("".join(f"{what}: {rate}\n" for what, rate in facts.items()))
    console.print(f"report: {options.output / 'report.md'}")


def main(arguments: Sequence[str] | None = None) -> None:
    run(_parser(), _evaluate, arguments)


if __name__ == "__main__":
    main()
