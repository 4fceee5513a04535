import dataclasses

import yaml

from l2m_jax.config import Student
from l2m_jax.models.freezing import TopLayers
from l2m_jax.models.lora import Lora
from l2m_jax.models.settings import Model
from l2m_jax.reporting.card import ModelCard
from l2m_jax.run.summary import start_of, trained_part

CARD = ModelCard(
    name="gpt2-small-l2m",
    student="openai-community/gpt2",
    teacher="openai-community/gpt2-xl, fine-tuned",
    method="l2m",
    alpha=(0.0, 0.05, 0.1, 0.15),
    beta=(0.7, 0.8, 0.9, 1.0),
    data=("databricks/databricks-dolly-15k", "own rows"),
    answers="temperature 1, top-k 50",
    rouge_l={"dolly": 25.217, "vicuna": 17.0},
    license="cc-by-sa-3.0",
)


def test_the_header_is_what_the_hub_reads():
    _, header, _ = CARD.render().split("---\n", 2)
    metadata = yaml.safe_load(header)
    assert metadata["base_model"] == ["openai-community/gpt2"], "a description is no hub name"
    assert metadata["datasets"] == ["databricks/databricks-dolly-15k"]
    assert metadata["license"] == "cc-by-sa-3.0"
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "text-generation"
    results = metadata["model-index"][0]["results"]
    assert [(r["dataset"]["name"], r["metrics"][0]["value"]) for r in results] == [
        ("dolly", 25.22),
        ("vicuna", 17.0),
    ]


def test_the_text_names_teacher_method_schedules_data_and_scores():
    text = CARD.render().split("---\n", 2)[2]
    for part in (
        "gpt2-xl, fine-tuned",
        "l2m",
        "0, 0.05, 0.1, 0.15",
        "0.7, 0.8, 0.9, 1",
        "own rows",
        "25.22",
        "top-k 50",
    ):
        assert part in text


def test_the_text_says_what_was_trained():
    lora = trained_part(Lora(rank=8, alpha=16, targets=("query", "value")))
    assert lora == "LoRA adapters of rank 8 and alpha 16 beside query, value"
    assert f"| Trained | {lora} |" in dataclasses.replace(CARD, trained=lora).render()
    assert trained_part(Lora(rank=4)) == "LoRA adapters of rank 4 and alpha 16 beside all dense layers"
    assert trained_part(TopLayers(10)) == "the top 10 layers"
    assert trained_part(None) == "" and "Trained" not in CARD.render()


def test_a_card_without_scores_has_no_empty_tables():
    text = ModelCard(name="x", student="./local", teacher="a teacher", method="sft").render()
    assert "model-index" not in text and "Rouge-L" not in text and "α" not in text
    assert "base_model" not in text


def test_the_card_says_what_a_student_started_from_and_no_path_of_this_machine(tmp_path):
    (tmp_path / "weights.gguf").write_text("")
    for model, said in (
        (Model(init="teacher_layers", layers=(0, 2)), "layers 0, 2 of the teacher"),
        (Model(), "random weights"),
        (Model(path="gpt2", init="random"), "random weights"),
        (Model(path="gpt2"), "gpt2"),
        (Model(path=str(tmp_path / "weights.gguf")), "weights.gguf (a local file)"),
    ):
        assert start_of(Student(model=model)) == said
