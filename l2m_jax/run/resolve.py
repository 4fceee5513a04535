"""From a config to the artefacts of its run: the only place that sees all settings.

Each phase gets its inputs from here and nothing else from the config. All keys are known before the first phase
starts.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from l2m_jax import methods
from l2m_jax.config import Config, Student, Teacher
from l2m_jax.generation import SamplingRules
from l2m_jax.run import data, sources, tokenizers
from l2m_jax.run.artefacts import Artefact, Source
from l2m_jax.run.diagnostics import DiagnosticsInputs, diagnostics_artefact
from l2m_jax.run.distillation import (
    StudentInputs,
    relevant_curriculum,
    relevant_rollouts,
    validation_inputs,
)
from l2m_jax.run.evaluation import EvaluationInputs, set_inputs
from l2m_jax.run.models import ModelInputs, PretrainingInputs, continued, model_inputs
from l2m_jax.run.pretraining import pretraining_inputs
from l2m_jax.run.ranking import RankingInputs
from l2m_jax.run.responses import ResponsesInputs
from l2m_jax.run.store import StoreInputs
from l2m_jax.training.optimizer import FineTuning

_STUDENT_SETTINGS = {
    "method": "method and overrides",
    "max_length": "data.max_length",
    "max_prompt_length": "data.max_prompt_length",
    "validation": "evaluation",
    "validation.count": "evaluation.validations",
    "validation.every": "evaluation.validation_steps",
    "validation.rows": "evaluation.validation_rows",
    "validation.seed": "evaluation.seeds",
    "validation.sampling": "sampling",
    "validation.max_prompt_length": "data.max_prompt_length",
    "validation.keep_best": "evaluation.select",
    "lora": "student.lora",
    "teacher_weights": "teacher.weights",
    "store_tail": "teacher.store_tail",
}


@dataclass(frozen=True)
class Artefacts:
    """What a run makes, in this order.

    Attributes:
        corpora: by part.
        pretrained: what is pretrained on text, by role: "teacher", "student".
        diagnostics: the teacher's states on the rows of the diagnostics; None without them.
        generated: responses that are generated once, by the name of their model.
        students, evaluations: by name; a student is named after its method.
    """

    tokenizer: tokenizers.Tokenizer
    corpora: dict[data.Part, Artefact[data.CorpusInputs]]
    pretrained: dict[str, Artefact[PretrainingInputs]]
    teacher: Artefact[ModelInputs]
    initial_student: Artefact[ModelInputs]
    ranking: Artefact[RankingInputs] | None
    store: Artefact[StoreInputs] | None
    diagnostics: Artefact[DiagnosticsInputs] | None
    generated: dict[str, Artefact[ResponsesInputs]]
    students: dict[str, Artefact[StudentInputs]]
    evaluations: dict[str, Artefact[EvaluationInputs]]

    @property
    def all_corpora(self) -> list[Artefact[data.CorpusInputs]]:
        """The parts of the data, and the teacher's training rows if they are those of another world."""
        others = [rows for rows in (self.teacher.inputs.train,) if rows is not None]
        return list(dict.fromkeys([*self.corpora.values(), *others]))

    @property
    def common(self) -> list[Artefact]:
        """All but the students and their scores."""
        own = [*self.students.values(), *(self.evaluations[name] for name in self.students)]
        return [artefact for artefact in self if artefact not in own]

    def __iter__(self) -> Iterator[Artefact]:
        if isinstance(self.tokenizer, Artefact):
            yield self.tokenizer
        yield from (*self.all_corpora, *self.pretrained.values(), self.teacher, self.initial_student)
        if self.ranking is not None:
            yield from (self.ranking.inputs.answers, self.ranking)
        if self.store is not None:
            yield self.store
        if self.diagnostics is not None:
            yield self.diagnostics
        yield from (*self.generated.values(), *self.students.values(), *self.evaluations.values())


def resolve(config: Config, workdir: Path, shared: Path) -> Artefacts:
    """All artefacts of a run.

    Args:
        shared: the folder of tokenizer, data, teacher, initial student, ranking, store and generated responses; what
            belongs to another world than 0 is in `folder_of_world`.

    Raises:
        InputError: a file or model that cannot be read.
    """
    return _Resolver(config, workdir, shared).artefacts()


def folder_of_world(shared: Path, world: int) -> Path:
    """Where `shared` keeps what belongs to one world."""
    return shared / f"world{world}" if world else shared


def tokenizer_of(config: Config, folder: Path) -> tokenizers.Tokenizer:
    """The given tokenizer, or one that `folder` has once it is trained or trimmed."""
    given = tokenizers.given_tokenizer(config.data, config.teacher.model.path)
    if given is None:
        trained = tokenizers.TokenizerInputs(tokenizers.relevant_synthetic(config.data))
        return Artefact(trained, folder / "tokenizer", settings={"synthetic": "data.synthetic"})
    if not config.data.trim_vocabulary:
        return given
    pretrained = (config.teacher.pretrain, config.student.pretrain)
    texts = [(p.text, p.tokens) for p in pretrained if p.text]
    inputs = tokenizers.trimmed_inputs(config.data, given, config.evaluation.sets, texts)
    settings = {
        "whole": "data.tokenizer",
        "least": "data.trim_vocabulary",
        "train": "data.train",
        "held_out": "data.validation or data.test",
        "data": "data",
        "sets": "evaluation.sets",
        "texts": "the texts to pretrain on",
    }
    return Artefact(inputs, folder / "tokenizer", settings=settings)


class _Resolver:
    def __init__(self, config: Config, workdir: Path, shared: Path):
        self.config, self.workdir, self.shared = config, workdir, shared
        self.own = folder_of_world(shared, config.world)
        self.chosen = {
            name: methods.get(name, config.overrides, config.rollouts, config.curriculum)
            for name in config.method_names
        }
        self.tokenizer = tokenizer_of(config, shared / "data")
        self.corpora: dict[data.Part, Artefact[data.CorpusInputs]] = {
            part: self._corpus(part, config.world) for part in data.PARTS
        }
        self.pretrained: dict[str, Artefact[PretrainingInputs]] = {}
        self.teacher = self._teacher()
        self.initial = self._initial_student()

    def artefacts(self) -> Artefacts:
        config = self.config
        ranked = any(methods.needs_ranking(method, config.curriculum) for method in self.chosen.values())
        ranking = self._ranking() if ranked else None
        store = self._store() if any(self.config.reads_store(m) for m in self.chosen.values()) else None
        names = dict.fromkeys(
            name for method in self.chosen.values() for name in methods.generated_by(method)
        )
        generated = {name: self._responses(name) for name in names}
        students = {
            name: self._student(name, method, ranking, store, generated)
            for name, method in self.chosen.items()
        }
        evaluations = {
            "teacher": self._evaluation(self.teacher, self.teacher.path.parent, "teacher"),
            "student before": self._evaluation(self.initial, self.initial.path.parent, "student_before"),
        }
        for name, student in students.items():
            evaluations[name] = self._evaluation(student, self.workdir, name)
        return Artefacts(
            self.tokenizer,
            self.corpora,
            self.pretrained,
            self.teacher,
            self.initial,
            ranking,
            store,
            self._diagnostics(),
            generated,
            students,
            evaluations,
        )

    def _corpus(self, part: data.Part, world: int) -> Artefact[data.CorpusInputs]:
        inputs = data.corpus_inputs(self.config.data, part, self.tokenizer, world)
        source = "data.train" if inputs.split else f"data.{part}"
        settings = {"data": "data", "source": source, "tokenizer": "data.tokenizer", "world": "world"}
        return Artefact(inputs, folder_of_world(self.shared, inputs.world) / "data" / part, settings=settings)

    def _teachers_rows(self, world: int) -> Artefact[data.CorpusInputs]:
        """The training rows of a teacher that has another number of them."""
        rows = dataclasses.replace(self.config.data, train_rows=self.config.teacher.train_rows)
        inputs = data.corpus_inputs(rows, "train", self.tokenizer, world, self.config.data.train_rows)
        settings = {
            "data": "data",
            "data.train_rows": "teacher.train_rows",
            "source": "data.train",
            "tokenizer": "data.tokenizer",
            "world": "world",
            "world_rows": "data.train_rows",
        }
        folder = folder_of_world(self.shared, world)
        return Artefact(inputs, folder / "data" / "teacher_train", settings=settings)

    def _teacher(self) -> Artefact[ModelInputs]:
        teacher, world = self.config.teacher, self.config.teacher_world
        inputs = self._model("teacher", teacher, teacher.finetune, world, None)
        folder = folder_of_world(self.shared, 0 if self._alike(teacher, inputs) else world)
        return Artefact(
            inputs,
            folder / "teacher",
            folder / "checkpoints" / "teacher",
            {"model": "teacher.model", "weights": "teacher.model.path", "finetune": "teacher.finetune"},
        )

    def _initial_student(self) -> Artefact[ModelInputs]:
        student = self.config.student
        inputs = self._model("student", student, student.warmup, self.config.world, self.teacher)
        alike = self._alike(student, inputs) and self.teacher.path.parent == self.shared
        folder = self.shared if alike else self.own
        return Artefact(
            inputs,
            folder / "initial_student",
            folder / "checkpoints" / "initial_student",
            {"model": "student.model", "weights": "student.model.path", "finetune": "student.warmup"},
        )

    def _alike(self, who: Teacher | Student, inputs: ModelInputs) -> bool:
        """Whether the model, but for its teacher, is the same in every world, and is kept once."""
        return inputs.train is None and inputs.seed is None and not self._redrawn(who)

    def _model(
        self,
        role: str,
        who: Teacher | Student,
        finetune: FineTuning,
        world: int,
        teacher: Artefact[ModelInputs] | None,
    ) -> ModelInputs:
        """The inputs of teacher or initial student, which may continue a pretrained model."""
        train, seed = self._corpus("train", world), self.config.seed_of(world)
        if role == "teacher" and self.config.teacher.train_rows not in (0, self.config.data.train_rows):
            train = self._teachers_rows(world)
        if not who.pretrain.text:
            return model_inputs(role, who.model, finetune, train, self.tokenizer, seed, teacher)
        self.pretrained[role] = self._pretrained(role, who, world)
        return continued(self.pretrained[role], finetune, train, seed)

    @staticmethod
    def _redrawn(who: Teacher | Student) -> bool:
        """Whether the model is pretrained again in each world."""
        return bool(who.pretrain.text) and who.pretrain.seed < 0

    def _pretrained(self, role: str, who: Teacher | Student, world: int) -> Artefact[PretrainingInputs]:
        pretrain, untuned = who.pretrain, self._untuned_teacher() if role == "student" else None
        seed = self.config.seed_of(world) if self._redrawn(who) else pretrain.seed
        untrained, train = FineTuning(epochs=0), self._corpus("train", world)
        start = model_inputs(role, who.model, untrained, train, self.tokenizer, seed, untuned)
        inputs = pretraining_inputs(pretrain, start, untuned, seed)
        # A teacher of this world makes the student one of this world, too.
        of_world = isinstance(untuned, Artefact) and untuned.path.parent != self.shared
        folder = folder_of_world(self.shared, world if self._redrawn(who) or of_world else 0)
        name = f"pretrained_{role}"
        settings = {
            "start.model": f"{role}.model",
            "start.weights": f"{role}.model.path",
            "start.seed": "seed",
            "pretrain": f"{role}.pretrain",
            "text": f"{role}.pretrain.text",
            "seed": "seed" if pretrain.seed < 0 else f"{role}.pretrain.seed",
        }
        return Artefact(inputs, folder / name, folder / "checkpoints" / name, settings)

    def _untuned_teacher(self) -> Artefact | Source | None:
        """The teacher before its fine-tuning; None if it has random weights then."""
        teacher = self.config.teacher
        if not teacher.has_weights:
            return None
        return self.pretrained.get("teacher") or sources.given_model(teacher.model.path)

    def _ranking(self) -> Artefact[RankingInputs]:
        c = self.config.curriculum
        rules = self.config.sampling
        if c.ranking_temperature >= 0:
            rules = dataclasses.replace(rules, temperature=c.ranking_temperature)
        model = sources.given_model(c.ranking_model) if c.ranking_model else self.initial
        if rules == self.config.sampling and not c.ranking_rows:
            # The same answers may also be training data.
            name = "ranking_model" if c.ranking_model else "initial_student"
        else:
            name = "ranking"
        answers = self._responses_of(model, name, rules, c.ranking_rows)
        inputs = RankingInputs(
            model=model,
            answers=answers,
            train=self.corpora["train"],
            tokenizer=self.tokenizer,
            ranking=c.ranking,
            stages=c.stages,
            seed=self.config.seed_of(self.config.world) if c.ranking == "random" else None,
        )
        settings = {"ranking": "curriculum.ranking", "stages": "curriculum.stages"}
        return Artefact(inputs, self.own / "difficulty.parquet", settings=settings)

    def _responses(self, name: str) -> Artefact[ResponsesInputs]:
        model = {"teacher": self.teacher, "initial_student": self.initial}[name]
        return self._responses_of(model, name, self.config.sampling)

    def _responses_of(
        self, model, name: str, rules: SamplingRules, rows: int = 0
    ) -> Artefact[ResponsesInputs]:
        config = self.config
        inputs = ResponsesInputs(
            model=model,
            train=self.corpora["train"],
            tokenizer=self.tokenizer,
            sampling=rules,
            seed=config.evaluation.seeds[0],
            max_prompt_length=config.data.max_prompt_length,
            rows=rows,
        )
        settings = {
            "sampling": "sampling",
            "seed": "evaluation.seeds",
            "max_prompt_length": "data.max_prompt_length",
            "rows": "curriculum.ranking_rows",
        }
        return Artefact(inputs, self.own / f"{name}_responses.jsonl", settings=settings)

    def _store(self) -> Artefact[StoreInputs]:
        teacher = self.config.teacher
        inputs = StoreInputs(
            self.teacher,
            self.corpora["train"],
            self.tokenizer,
            teacher.store_dtype,
            teacher.weights,
            teacher.store_top_k,
        )
        settings = {
            "dtype": "teacher.store_dtype",
            "weights": "teacher.weights",
            "top_k": "teacher.store_top_k",
        }
        return Artefact(inputs, self.own / "teacher_store", settings=settings)

    def _diagnostics(self) -> Artefact[DiagnosticsInputs] | None:
        rows = self.config.evaluation.diagnostic_rows
        if not rows:
            return None
        corpora = self.corpora
        inputs = DiagnosticsInputs(
            self.teacher, corpora["validation"], corpora["train"], self.tokenizer, rows
        )
        return diagnostics_artefact(inputs, self.own)

    def _student(
        self,
        name: str,
        method: methods.Method,
        ranking: Artefact[RankingInputs] | None,
        store: Artefact[StoreInputs] | None,
        generated: dict[str, Artefact[ResponsesInputs]],
    ) -> Artefact[StudentInputs]:
        config = self.config
        validation = validation_inputs(
            config.evaluation, self.corpora["validation"], config.sampling, config.data.max_prompt_length
        )
        curriculum = relevant_curriculum(method, config.curriculum)
        live = methods.needs_teacher(method, config.curriculum) and not config.reads_store(method)
        inputs = StudentInputs(
            method=method,
            curriculum=curriculum,
            training=config.training.relevant,
            seed=config.student_seed,
            initial=self.initial,
            train=self.corpora["train"],
            tokenizer=self.tokenizer,
            ranking=ranking if methods.needs_ranking(method, config.curriculum) else None,
            teacher=self.teacher if methods.needs_teacher(method, config.curriculum) else None,
            store=store if config.reads_store(method) else None,
            generated=tuple((of, generated[of]) for of in methods.generated_by(method)),
            rollouts=relevant_rollouts(method, config.rollouts),
            sampling=config.sampling if method.on_policy else None,
            max_length=None if method.on_references_alone else config.data.max_length,
            max_prompt_length=config.data.max_prompt_length if method.on_policy else None,
            validation=validation if validation.keep_best or curriculum.patience else None,
            lora=config.student.lora if config.student.lora.rank else None,
            teacher_weights=config.teacher.weights if live else "float",
            store_tail=config.teacher.store_tail
            or not (config.reads_store(method) and config.teacher.store_top_k),
        )
        main = name == config.method
        settings = _STUDENT_SETTINGS | {"seed": "seed" if config.student.seed < 0 else "student.seed"}
        return Artefact(
            inputs,
            self.workdir / "student" if main else self.workdir / "baselines" / name,
            self.workdir / "checkpoints" / ("student" if main else f"student_{name}"),
            settings,
        )

    def _evaluation(self, model: Artefact, folder: Path, name: str) -> Artefact[EvaluationInputs]:
        config, e = self.config, self.config.evaluation
        inputs = EvaluationInputs(
            model=model,
            sets=tuple(set_inputs(source, self.corpora["test"]) for source in e.sets),
            tokenizer=self.tokenizer,
            sampling=config.sampling,
            seeds=e.seeds,
            rows=e.rows,
            max_prompt_length=config.data.max_prompt_length,
            truncate=config.data.truncate,
            bos=config.data.bos in ("evaluation", "both"),
        )
        settings = {name: f"evaluation.{name}" for name in ("sets", "seeds", "rows")}
        settings |= {name: f"data.{name}" for name in ("tokenizer", "max_prompt_length", "truncate", "bos")}
        return Artefact(inputs, folder / "evaluation" / name, settings=settings)
