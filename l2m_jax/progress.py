"""Progress on screen: a bar with rates and time left in a terminal, a line now and then in a log file."""

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(highlight=False, soft_wrap=True)

_SECONDS_BETWEEN_LINES = 20.0


class Bar:
    """Counts up to `total`, if it is known; `fields` such as loss="1.234" are shown beside it."""

    def __init__(self, title: str, total: int | None, bar: Progress | None):
        self._title, self._total, self._bar = title, total, bar
        self._task = bar.add_task(title, total=total, fields="") if bar else None
        self._done = self._start_done = 0
        self._start = self._last_line = time.monotonic()

    def resume_at(self, done: int) -> None:
        """Steps already finished in an earlier run: they count as done, but not towards the time left."""
        self._done = self._start_done = done
        if self._bar is not None and self._task is not None:
            self._bar.reset(self._task, total=self._total, completed=done)

    def advance(self, steps: int = 1, **fields: str) -> None:
        self._done += steps
        text = "  ".join(f"{name} {value}" for name, value in fields.items())
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=steps, fields=text)
            return
        now = time.monotonic()
        is_last = self._total is not None and self._done >= self._total
        if now - self._last_line < _SECONDS_BETWEEN_LINES and not is_last:
            return
        self._last_line = now
        if self._total is None:
            console.print(f"  {self._title}  {self._done}  {text}".rstrip())
            return
        rate = (self._done - self._start_done) / max(now - self._start, 1e-9)
        left = (self._total - self._done) / max(rate, 1e-9)
        console.print(f"  {self._title}  {self._done}/{self._total}  {text}  {left:.0f} s left")


@contextlib.contextmanager
def bar(title: str, total: int | None) -> Iterator[Bar]:
    """`with bar("stage 1", steps) as b: b.advance(loss="1.23")`."""
    if not console.is_terminal:
        yield Bar(title, total, None)
        return
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[fields]}"),
    )
    with Progress(*columns, console=console) as shown:
        yield Bar(title, total, shown)
