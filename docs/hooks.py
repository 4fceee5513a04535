"""Fills pages of the site in when it is built: `{{ fields: FILE CLASS }}` becomes the listing of a settings dataclass."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_MARK = re.compile(r"^\{\{ fields: (\S+) (\w+) \}\}$", re.MULTILINE)


def fields(file: str, name: str) -> str:
    """The fields of a dataclass as they stand in its file, with their comments, but without docstring and methods."""
    text = (ROOT / file).read_text(encoding="utf-8")
    [found] = [n for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name == name]
    fields = [node for node in found.body if isinstance(node, ast.AnnAssign)]
    after = next(
        (
            min(node.lineno, *(d.lineno for d in node.decorator_list), node.lineno)
            for node in found.body
            if isinstance(node, ast.FunctionDef)
        ),
        (found.end_lineno or 0) + 1,
    )
    lines = text.splitlines()
    first = fields[0].lineno - 1
    while lines[first - 1].strip().startswith("#"):  # a comment above the first field belongs to it
        first -= 1
    listing = "\n".join(line[4:] for line in lines[first : after - 1]).strip()
    return f"```python\n{listing}\n```"


def on_page_markdown(markdown: str, **_) -> str:
    return _MARK.sub(lambda mark: fields(mark[1], mark[2]), markdown)
