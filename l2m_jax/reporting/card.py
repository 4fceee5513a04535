"""The model card of a distilled student: README.md with the hub's metadata header."""

import dataclasses
from collections.abc import Mapping

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """Facts about a student, for readers on the hub.

    Attributes:
        name: the model's name.
        student: what the student started from, a hub name or a description.
        teacher: a hub name or a description.
        method: such as "l2m" or "skl".
        alpha, beta: the value of each stage.
        data: the training data, hub names or descriptions.
        trained: the part of the student that was trained; empty: all of it.
        answers: how the answers were sampled whose Rouge-L is given.
        rouge_l: mean Rouge-L of each set, 0 to 100.
        license: in the hub's spelling.
        language: a two-letter code; None if unknown.
    """

    name: str
    student: str
    teacher: str
    method: str
    alpha: tuple[float, ...] = ()
    beta: tuple[float, ...] = ()
    data: tuple[str, ...] = ()
    rouge_l: Mapping[str, float] = dataclasses.field(default_factory=dict)
    license: str | None = None
    language: str | None = None
    answers: str = ""
    trained: str = ""

    def render(self) -> str:
        """The text of README.md."""
        metadata = ModelCardData(
            language=self.language,
            license=self.license,
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=["knowledge-distillation", "l2m_jax", self.method],
            base_model=[name for name in (self.student, self.teacher) if _is_hub_name(name)] or None,
            datasets=[name for name in self.data if _is_hub_name(name)] or None,
            metrics=["rouge"] if self.rouge_l else None,
            model_name=self.name,
            eval_results=[
                EvalResult(
                    task_type="text-generation",
                    dataset_type=dataset,
                    dataset_name=dataset,
                    metric_type="rouge",
                    metric_name="Rouge-L",
                    metric_value=round(score, 2),
                )
                for dataset, score in self.rouge_l.items()
            ]
            or None,
        )
        rows = [
            ("Student started from", self.student),
            ("Teacher", self.teacher),
            ("Method", self.method),
            ("Trained", self.trained),
            ("α of each stage", ", ".join(f"{value:g}" for value in self.alpha)),
            ("β of each stage", ", ".join(f"{value:g}" for value in self.beta)),
            ("Data", ", ".join(self.data)),
            ("Answers", self.answers),
        ]
        lines = ["---", metadata.to_yaml(), "---", "", f"# {self.name}", "", "| | |", "|---|---|"]
        lines += [f"| {title} | {value} |" for title, value in rows if value]
        if self.rouge_l:
            lines += ["", "| set | Rouge-L |", "|---|---|"]
            lines += [f"| {dataset} | {score:.2f} |" for dataset, score in self.rouge_l.items()]
        return "\n".join(lines) + "\n"


def _is_hub_name(text: str) -> bool:
    """Descriptions have a space. Old models of the hub, such as gpt2, have no owner."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True
