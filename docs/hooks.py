"""Fills pages of the site in when it is built: `{{ fields: FILE CLASS }}` becomes the listing of a settings dataclass."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Of a field's default, what only the code needs: groups have settings of their own, and metadata are about keys.
_DEFAULTS = (
    (re.compile(r" = field\(default_factory=\w+\)"), ""),
    (re.compile(r"field\(default_factory=lambda: (\w+\(.*?\))\)"), r"\1"),
    (re.compile(r"field\(default=(.*?), metadata=\{.*?\}\)"), r"\1"),
)
_MARK = re.compile(r"^\{\{ fields: (\S+) (\w+) \}\}$", re.MULTILINE)


def fields(file: str, name: str) -> str:
    """The fields of a dataclass as they stand in its file, with their comments, but without docstring and methods."""
    text = (ROOT / file).read_text(encoding="utf-8")
    [found] = [n for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name == name]
    fields = [node for node in found.body if isinstance(node, ast.AnnAssign)]
    lines = text.splitlines()
    first, last = fields[0].lineno - 1, fields[-1].end_lineno
    while lines[first - 1].strip().startswith("#"):  # a comment above the first field belongs to it
        first -= 1
    listing = "\n".join(line[4:] for line in lines[first:last])
    for pattern, default in _DEFAULTS:
        listing = pattern.sub(default, listing)
    return f"```python\n{listing}\n```"


def on_page_markdown(markdown: str, **_) -> str:
    return _MARK.sub(lambda mark: fields(mark[1], mark[2]), markdown)
