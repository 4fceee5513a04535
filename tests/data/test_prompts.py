import json

import pytest

from l2m_jax.data.prompts import PROMPT_END, TEMPLATE_PHRASES, format_prompt


def test_without_input():
    assert format_prompt("Name a colour.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nName a colour.\n\n### Response:\n"
    )


def test_with_input():
    assert format_prompt("Sort.", "b a") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\nSort.\n\n### Input:\nb a\n\n### Response:\n"
    )


def test_phrases_are_all_that_the_templates_add():
    without, with_input, before_input, end = TEMPLATE_PHRASES
    assert end == PROMPT_END
    assert format_prompt("I") == without + "I" + end
    assert format_prompt("I", "J") == with_input + "I" + before_input + "J" + end


@pytest.mark.parametrize(
    "name", ["dolly/test", "self_inst/test", "vicuna/test", "s_ni/test", "un_ni/short_subset"]
)
def test_published_prompts_are_these(shared, name):
    lines = (shared / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    for row in map(json.loads, lines):
        assert format_prompt(row["instruction"], row.get("input", "")) == row["prompt"]
