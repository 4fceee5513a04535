"""The Alpaca templates that every example is put into."""

_WITHOUT_INPUT = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
_INSTRUCTION = "\n\n### Instruction:\n"
_INPUT = "\n\n### Input:\n"
PROMPT_END = "\n\n### Response:\n"

# What each prompt repeats: a tokenizer trained for a task can hold every one of them as a single token.
TEMPLATE_PHRASES = (_WITHOUT_INPUT + _INSTRUCTION, _WITH_INPUT + _INSTRUCTION, _INPUT, PROMPT_END)


def format_prompt(instruction: str, input: str = "") -> str:
    """The prompt of an example; the response follows directly after it.

    Args:
        instruction: what to do.
        input: what to do it with (Dolly's `context`); an empty one selects the template without input.
    """
    if input:
        return _WITH_INPUT + _INSTRUCTION + instruction + _INPUT + input + PROMPT_END
    return _WITHOUT_INPUT + _INSTRUCTION + instruction + PROMPT_END
