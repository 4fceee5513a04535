"""The Alpaca prompt templates, used for every example."""

_WITHOUT_INPUT = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
_INSTRUCTION = "\n\n### Instruction:\n"
_INPUT = "\n\n### Input:\n"
PROMPT_END = "\n\n### Response:\n"

# The fixed parts of the prompts. A tokenizer trained on the data can make each of them a single token.
TEMPLATE_PHRASES = (_WITHOUT_INPUT + _INSTRUCTION, _WITH_INPUT + _INSTRUCTION, _INPUT, PROMPT_END)


def format_prompt(instruction: str, input: str = "") -> str:
    """The prompt of an example; the response follows it directly.

    Args:
        instruction: the task.
        input: further context (Dolly's `context`); if empty, the template without input is used.
    """
    if input:
        return _WITH_INPUT + _INSTRUCTION + instruction + _INPUT + input + PROMPT_END
    return _WITHOUT_INPUT + _INSTRUCTION + instruction + PROMPT_END
