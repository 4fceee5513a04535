"""The last phase: the answers of all models, scored."""

import json
from collections.abc import Iterator
from pathlib import Path

from l2m_jax import files
from l2m_jax.evaluation.protocol import Results, evaluate
from l2m_jax.evaluation.sets import PromptSet, from_corpus, read_set
from l2m_jax.models import DecoderConfig
from l2m_jax.multihost import is_first
from l2m_jax.run.build import begins_with_bos
from l2m_jax.run.context import FinishedModel, Run


def _sets(run: Run, config: DecoderConfig) -> list[PromptSet]:
    e, data = run.config.evaluation, run.config.data
    found = []
    for source in e.sets:
        if source == "test":
            found.append(
                from_corpus("test", run.splits.test, rows=e.rows, longest_prompt=run.longest_prompt(config))
            )
        else:
            found.append(
                read_set(
                    source,
                    run.tokenizer,
                    run.workdir / "data" / "sets",
                    max_prompt_length=run.longest_prompt(config),
                    long_prompt="truncate" if data.truncate else "drop",
                    bos=begins_with_bos(data, "evaluation"),
                    rows=e.rows,
                )
            )
    return found


def evaluated_models(
    run: Run, teacher: FinishedModel, initial: FinishedModel, students: dict[str, FinishedModel]
) -> dict[str, Results]:
    evaluated = {"teacher": teacher, "student before": initial, **students}
    sets = _sets(run, initial.config)
    folders = {
        name: (run.workdir if name in students else run.shared) / "evaluation" / name.replace(" ", "_")
        for name in evaluated
    }
    results = {}
    for name, model in evaluated.items():
        results[name] = evaluate(
            model.config,
            model.params,
            run.tokenizer,
            sets,
            run.rules,
            run.config.evaluation.seeds,
            folder=folders[name],
            made_from=model.fingerprint,
            title=name,
            **run.placement,
        )
    if is_first():
        summary = run.workdir / "evaluation"
        files.write_json(summary / "results.json", results)
        files.write_text(summary / "responses.jsonl", "".join(_responses(folders)))
    return results


def _responses(folders: dict[str, Path]) -> Iterator[str]:
    """The answers of all models, each line with its model."""
    for name, folder in folders.items():
        with (folder / "responses.jsonl").open(encoding="utf-8") as lines:
            for line in lines:
                yield json.dumps({"model": name, **json.loads(line)}, ensure_ascii=False) + "\n"
