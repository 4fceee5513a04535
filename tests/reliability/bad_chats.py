"""Wrong conversations, formats and chat templates: a part of the table in `bad_inputs`, in the same form."""

from typing import Any

from bad_inputs import ROWS, World, case, json_lines

TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<|endoftext|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
USER = {"role": "user", "content": "Name a fruit."}
ANSWER = {"role": "assistant", "content": "an apple"}
CHATS = [{"messages": [{"role": "user", "content": f"Name fruit {i}."}, ANSWER]} for i in range(12)]


def chat(world: World, rows: list[Any], *flags: str, template: str | None = TEMPLATE) -> list[str]:
    folder = world.own / "chat"
    folder.mkdir()
    for file in (world.good / "model").glob("tokenizer*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    given = ["--config.data.prompt=chat", f"--config.data.tokenizer={folder}", *flags]
    return world.train_on(world.file("rows.jsonl", json_lines(rows)), *given)


def turns(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


SECOND_ROW = {
    "unknown role": (turns({**USER, "role": "human"}, ANSWER), "messages 1: role .human. is not one of system, user"),
    "role is a list": (turns({**USER, "role": ["user"]}, ANSWER), "messages 1: role .*user.* is not one of"),
    "no role": (turns({"content": "x"}, ANSWER), "messages 1: role null is not one of system, user, assistant"),
    "two system messages": (
        turns({"role": "system", "content": "a"}, {"role": "system", "content": "b"}, USER, ANSWER),
        "messages 2: a second system message after the first message; a conversation may begin with one",
    ),
    "system message later": (
        turns(USER, {"role": "system", "content": "b"}, ANSWER), "messages 2: a system message after the first",
    ),
    "empty assistant": (turns(USER, {**ANSWER, "content": " \n"}), "messages 2: the assistant's content is empty"),
    "no assistant": (turns(USER), "no turn of the assistant, so there is nothing to learn; leave the row out"),
    "user last": (turns(USER, ANSWER, USER), "the last message is the user's; remove what follows"),
    "no user": (turns({"role": "system", "content": "a"}, ANSWER), "no turn of the user before the assistant's first"),
    "content is a list": (
        turns({**USER, "content": [{"type": "image"}]}, ANSWER), "messages 1: 'content' must be a string, not .*only text",
    ),
    "content is null": (turns(USER, {**ANSWER, "content": None}), "messages 2: 'content' must be a string, not null"),
    "tool calls": (
        turns(USER, {**ANSWER, "tool_calls": [{"id": 1}]}), "messages 2: 'tool_calls' is given, and tool calls are not supp",
    ),
    "a tool's turn": (turns(USER, {"role": "tool", "content": "5"}, ANSWER), "messages 2: role 'tool'.*not supported"),
    "tools": ({**turns(USER, ANSWER), "tools": [{"name": "f"}]}, "'tools' is given, and tool calls are not supported"),
    "reasoning": (turns(USER, {**ANSWER, "reasoning_content": "hm"}), "messages 2: .*reasoning beside the content"),
    "weights": (turns(USER, {**ANSWER, "weight": 1}), "messages 2: 'weight' is given, and weights of messages are"),
    "no messages": ({"messages": []}, r"'messages' must be a list of messages, not \[\]"),
    "messages of text": (turns("hello"), 'messages 1: expected an object with role and content, not "hello"'),
    "a mixture": (ROWS[0], "columns instruction, .* are of the format 'instruction', but the rows before .* 'messages'.*own"),
    "unknown columns": ({"conversations": [], "x": 1}, r"columns conversations, x are of no known format \(known: instruc"),
}  # fmt: skip
for _name, (_row, _says) in SECOND_ROW.items():
    case(
        f"chat: {_name}",
        lambda w, row=_row: chat(w, [CHATS[0], row, *CHATS[1:]]),
        rf"config.data.*rows\.jsonl, line 2(: |, ){_says}",
    )

COMPLETIONS = {
    "text and messages": (
        {"prompt": "a", "completion": [ANSWER]}, "'prompt' and 'completion' must be two strings or two lists",
    ),
    "two turns": ({"prompt": [USER], "completion": [ANSWER, USER, ANSWER]}, "must be one message of the assistant"),
    "no completion": ({"prompt": "a", "x": 1}, "columns prompt, x are of no known format .*prompt, completion"),
}  # fmt: skip
for _name, (_row, _says) in COMPLETIONS.items():
    case(
        f"completion: {_name}",
        lambda w, row=_row: chat(w, [row]),
        rf"config.data.train: .*, line 1: .*{_says}",
    )

case(
    "chat: several turns with the Alpaca prompt",
    lambda w: w.train_on(
        w.file("rows.jsonl", json_lines([{**turns(USER, ANSWER, USER, ANSWER), "id": "x"}]))
    ),
    "config.data.train: row 'x': 4 messages .user, assistant.*set data.prompt to 'chat'",
)
TEMPLATES = {
    "none": (None, "config.data.tokenizer: the tokenizer has no chat template; give one whose folder"),
    "broken": ("{% for", "config.data.tokenizer: .*the chat template refuses it"),
    "no end": (TEMPLATE.replace("<|endoftext|>", "</turn>"), "no special token, so that generation could not tell"),
    "the day": (TEMPLATE + "{{ strftime_now('%d') }}", "writes the day's date.*give a chat_template.jinja with a fixed"),
    "earlier turns rewritten": (
        TEMPLATE.replace("m.content", "(m.content if loop.last or m.role == 'user' else 'cut')"),
        "row 'rows/1', message 2: the chat template writes this turn otherwise.*'cut.*instead of 'an app.*prompt .all",
    ),
    "another generation prompt": (TEMPLATE.replace("<assistant>", "<model>"), "begins the assistant's turn otherwise"),
    "an error": (TEMPLATE + "{{ raise_exception('no') if messages | length > 2 }}", "row 'rows/1': .* refuses it .no."),
}  # fmt: skip
for _name, (_template, _says) in TEMPLATES.items():
    case(
        f"template: {_name}",
        lambda w, template=_template: chat(w, [turns(USER, ANSWER, USER, ANSWER), *CHATS], template=template),
        _says,
    )
case(
    "chat: cut turns",
    lambda w: chat(w, CHATS, "--config.data.truncate=true"),
    "config.data.truncate: true with prompt 'chat' would cut turns in two; set it to false",
)
case(
    "chat: beginning of sequence",
    lambda w: chat(w, CHATS, "--config.data.bos=both"),
    "config.data.bos: 'both' with prompt 'chat'.*set it to 'none'",
)
case(
    "chat: no tokenizer",
    lambda w: w.train("--config.data.prompt=chat"),
    "config.data.prompt: 'chat', but the tokenizer trained on synthetic tasks has no chat template; set",
)
case(
    "eval: chat without a template",
    lambda w: w.eval("--prompt=chat"),
    "--model: the tokenizer has no chat template",
)
case(
    "eval: chat, truncated", lambda w: w.eval("--prompt=chat", "--truncate"), "--truncate: would cut a chat's"
)
case("eval: chat with a beginning of sequence", lambda w: w.eval("--prompt=chat", "--bos"), "--bos: the chat")
case("data: how many", lambda w: ["data", "--config=x", "--show=-1"], "--show: invalid number of rows value")

for _name, _rows in {
    "messages": CHATS,
    "instruction rows": ROWS,
    "completions": [{"prompt": f"Name fruit {i}.", "completion": "an apple"} for i in range(12)],
    "lists of messages": [
        {"prompt": [{**USER, "content": f"Name fruit {i}."}], "completion": [ANSWER]} for i in range(12)
    ],
}.items():
    case(f"chat: {_name}", lambda w, rows=_rows: chat(w, rows), "Name fruit 0", tolerated=True)
case(
    "rows: one user's and one assistant's turn",
    lambda w: w.train_on(w.file("rows.jsonl", json_lines(CHATS))),
    "Name fruit 11",
    tolerated=True,
)
