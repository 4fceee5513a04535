"""Pieces of Markdown: tables, and text that fits into their cells."""

import html
from collections.abc import Iterable, Sequence
from typing import Any


def short(text: str, longest: int = 160) -> str:
    """`text` on one line, shortened to `longest` characters and escaped for Markdown."""
    text = " ".join(text.split())
    text = text if len(text) <= longest else text[: longest - 1] + "…"
    text = html.escape(text, quote=False)
    return "".join("\\" + c if c in "\\|*_`[]~$" else c for c in text)


def table(
    heading: Sequence[str], rows: Iterable[Sequence[Any]], *, left: int = 1, right: int | None = None
) -> str:
    """A Markdown table. The first `left` columns are left-aligned, or all but the first `right` ones."""
    count = len(heading)
    aligned = ["---"] * left + ["---:"] * (count - left)
    if right is not None:
        aligned = ["---:"] * right + ["---"] * (count - right)
    lines = [heading, aligned, *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)
