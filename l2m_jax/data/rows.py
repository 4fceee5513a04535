"""Rows as text, from JSON objects of any of the known formats.

    instruction   instruction; input or context; output or response, a string or a list of equally correct strings
    messages      messages, a list of objects with role (system, user or assistant) and content
    prompt        prompt and completion: both strings, or both lists of messages

`category` or `topic` and `id` may stand beside each. Other columns are ignored.
"""

import json
from typing import Any, NamedTuple

from l2m_jax.errors import InputError

FORMATS = {
    "instruction": "instruction, input, output",
    "messages": "messages (each with role and content)",
    "prompt": "prompt, completion",
}
# All columns that a row is made of.
COLUMNS = (
    *("id", "category", "topic", "instruction", "input", "context", "output", "response"),
    *("messages", "prompt", "completion", "tools"),
)
_ROLES = ("system", "user", "assistant")
# Without these, the text would be another than the model was meant to learn.
_UNSUPPORTED = {
    "tool_calls": "tool calls",
    "tool_call_id": "tool calls",
    "function_call": "tool calls",
    "reasoning_content": "reasoning beside the content",
    "thinking": "reasoning beside the content",
    "weight": "weights of messages",
}


class Message(NamedTuple):
    role: str
    content: str


class Row(NamedTuple):
    """One example as text.

    Attributes:
        references: the correct answers; training uses the first. Of a conversation, its last turn.
        messages: the conversation, which ends with the assistant's turn; empty for a row of the format instruction.
        last_turn_only: whether the assistant's earlier turns carry no loss.
    """

    id: str
    instruction: str
    input: str
    references: tuple[str, ...]
    category: str = ""
    messages: tuple[Message, ...] = ()
    last_turn_only: bool = False

    @property
    def conversation(self) -> tuple[Message, ...]:
        """The messages; of a row without them, instruction and input as the user's turn, and the first reference."""
        if self.messages:
            return self.messages
        asked = f"{self.instruction}\n\n{self.input}" if self.input else self.instruction
        return Message("user", asked), Message("assistant", self.references[0])


def row_format(value: Any, place: str) -> str:
    """The format of a row, a name of `FORMATS`.

    Raises:
        InputError: not an object, or its columns are of no known format.
    """
    if not isinstance(value, dict):
        raise InputError(f"{place}: expected a JSON object, not {_shown(value)}")
    has = {name for name, column in value.items() if column is not None}
    # Published data sets have their rendered prompt or its id beside the instruction or the messages.
    if "instruction" in has:
        return "instruction"
    if "messages" in has:
        return "messages"
    if has >= {"prompt", "completion"}:
        return "prompt"
    if has & {"output", "response"}:
        return "instruction"
    raise InputError(
        f"{place}: columns {_listed(value)} are of no known format (known: {'; '.join(FORMATS.values())})"
    )


def parse_row(value: dict[str, Any], kind: str, default_id: str, place: str) -> Row:
    """The row of the format `kind`; without an `id` it is called `default_id`.

    Raises:
        InputError: a field is missing or of the wrong kind; begins with `place`.
    """
    row = {"instruction": _instruction_row, "messages": _messages_row, "prompt": _prompt_row}[kind](
        value, place
    )
    return row._replace(
        id=default_id if value.get("id") is None else str(value["id"]),
        category=_text(value, place, "category", "topic"),
    )


def refuse_mixture(value: dict[str, Any], found: str, before: str, place: str) -> None:
    """Raises InputError if a row's format `found` differs from that of the rows before it."""
    if found != before:
        raise InputError(
            f"{place}: columns {_listed(value)} are of the format {found!r}, but the rows before are of {before!r}; give "
            f"each format a file of its own (known: {'; '.join(FORMATS.values())})"
        )


def require_single_turn(row: Row) -> None:
    """Raises InputError for a conversation that is more than one user's and one assistant's turn."""
    if len(row.messages) > 2:
        roles = ", ".join(message.role for message in row.messages[:6])
        raise InputError(
            f"row '{row.id}': {len(row.messages)} messages ({roles}{', ...' * (len(row.messages) > 6)}), but the Alpaca prompt "
            "has room for one user's and one assistant's turn; set data.prompt to 'chat'"
        )


def _instruction_row(value: dict[str, Any], place: str) -> Row:
    answer = next((value[name] for name in ("output", "response") if value.get(name) is not None), None)
    if answer is None:
        raise InputError(f"{place}: no field 'output' (or 'response'; fields: {_listed(value)})")
    references = [answer] if isinstance(answer, str) else answer
    if not isinstance(references, list) or not all(isinstance(reference, str) for reference in references):
        raise InputError(f"{place}: 'output' must be a string or a list of strings, not {_shown(answer)}")
    return Row(
        id="",
        instruction=_text(value, place, "instruction", needed=True),
        input=_text(value, place, "input", "context"),
        references=tuple(reference for reference in references if reference.strip()),
    )


def _messages_row(value: dict[str, Any], place: str) -> Row:
    if value.get("tools"):
        raise InputError(f"{place}: 'tools' is given, and tool calls are not supported; leave such rows out")
    return _conversation(_messages(value["messages"], place, "messages"), place)


def _prompt_row(value: dict[str, Any], place: str) -> Row:
    prompt, completion = value["prompt"], value["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            return Row("", prompt, "", ())
        return _conversation([Message("user", prompt), Message("assistant", completion)], place)
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise InputError(
            f"{place}: 'prompt' and 'completion' must be two strings or two lists of messages, not {_shown(prompt)} and "
            f"{_shown(completion)}"
        )
    if value.get("tools"):
        raise InputError(f"{place}: 'tools' is given, and tool calls are not supported; leave such rows out")
    before, answer = _messages(prompt, place, "prompt"), _messages(completion, place, "completion")
    if [message.role for message in answer] != ["assistant"]:
        raise InputError(
            f"{place}: 'completion' must be one message of the assistant; give several turns as 'messages'"
        )
    return _conversation([*before, *answer], place)._replace(last_turn_only=True)


def _messages(values: Any, place: str, name: str) -> list[Message]:
    if not isinstance(values, list) or not values:
        raise InputError(f"{place}: '{name}' must be a list of messages, not {_shown(values)}")
    found = []
    for number, value in enumerate(values, start=1):
        where = f"{place}, {name} {number}"
        if not isinstance(value, dict):
            raise InputError(f"{where}: expected an object with role and content, not {_shown(value)}")
        for key, what in _UNSUPPORTED.items():
            if value.get(key) not in (None, [], {}, ""):
                raise InputError(
                    f"{where}: '{key}' is given, and {what} are not supported; leave such rows out"
                )
        role, content = value.get("role"), value.get("content")
        if role == "tool":
            raise InputError(f"{where}: role 'tool', and tool calls are not supported; leave such rows out")
        if role not in _ROLES:
            raise InputError(f"{where}: role {_shown(role)} is not one of {', '.join(_ROLES)}")
        if not isinstance(content, str):
            raise InputError(
                f"{where}: 'content' must be a string, not {_shown(content)}; only text is supported"
            )
        if role == "system" and number > 1:
            again = any(message.role == "system" for message in found)
            raise InputError(
                f"{where}: {'a second system message' if again else 'a system message'} after the first message; a "
                "conversation may begin with one system message"
            )
        if role == "assistant" and not content.strip():
            raise InputError(f"{where}: the assistant's content is empty; fill it or leave the row out")
        found.append(Message(role, content))
    return found


def _conversation(messages: list[Message], place: str) -> Row:
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise InputError(
            f"{place}: no turn of the assistant, so there is nothing to learn; leave the row out"
        )
    if roles[-1] != "assistant":
        raise InputError(
            f"{place}: the last message is the {roles[-1]}'s; remove what follows the assistant's last turn"
        )
    if "user" not in roles[: roles.index("assistant")]:
        raise InputError(f"{place}: no turn of the user before the assistant's first; leave the row out")
    asked = next(message.content for message in reversed(messages) if message.role == "user")
    return Row("", asked, "", (messages[-1].content,), messages=tuple(messages))


def _text(value: dict[str, Any], place: str, *names: str, needed: bool = False) -> str:
    found = next((value[name] for name in names if value.get(name) is not None), None)
    if found is None and needed:
        raise InputError(f"{place}: no field '{names[0]}' (fields: {_listed(value)})")
    if found is not None and not isinstance(found, str):
        raise InputError(f"{place}: '{names[0]}' must be a string, not {_shown(found)}")
    return found or ""


def _listed(value: dict[str, Any]) -> str:
    return ", ".join(value) or "none"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else text[:37] + "..."
