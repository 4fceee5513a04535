"""Answers on disk, one JSON line each as they come, so that an interrupted run continues where it stopped."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

from l2m_jax.errors import InputError
from l2m_jax.progress import console


@dataclasses.dataclass(frozen=True)
class Answer:
    """One generated answer.

    Attributes:
        prompt: index of its prompt.
        seed: the seed that it was sampled with.
        tokens: without the end of sequence.
        text: the same as text, without special tokens; empty where no tokenizer was given.
    """

    prompt: int
    seed: int
    tokens: tuple[int, ...]
    text: str


def read(path: Path) -> tuple[str, list[Answer]]:
    """What the answers in `path` were made from, and the answers, in the order in which they came.

    A last line without its end was cut off by the end of the run that wrote it, and does not count.

    Raises:
        InputError: the file is no such file.
    """
    lines = path.read_bytes().split(b"\n")[:-1]  # bytes: the cut may go through a character
    try:
        made_from = json.loads(lines[0])["made_from"] if lines else ""
        rows = [json.loads(line) for line in lines[1:]]
        return made_from, [Answer(r["prompt"], r["seed"], tuple(r["tokens"]), r["text"]) for r in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} holds something else than responses of this program ({error}); move it away or name another file"
        ) from error


class ResponseFile:
    """A response file to be completed.

    Attributes:
        answers: those that are already in it. Answers made from something else do not count and are replaced.
    """

    def __init__(self, path: Path, made_from: str):
        self._path, self._made_from = path, made_from
        self.answers: list[Answer] = []
        if path.exists():
            found, answers = read(path)
            if found == made_from:
                self.answers = answers
            else:
                console.print(f"  {path} was made from other inputs: starting again")

    def __enter__(self) -> "ResponseFile":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if not self.answers:
            self._path.write_text(json.dumps({"made_from": self._made_from}) + "\n", encoding="utf-8")
        else:
            _drop_unfinished_line(self._path)
        self._file = self._path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def add(self, answers: Iterable[Answer]) -> None:
        for answer in answers:
            self._file.write(json.dumps(dataclasses.asdict(answer), ensure_ascii=False) + "\n")
        self._file.flush()


def _drop_unfinished_line(path: Path) -> None:
    with path.open("rb+") as file:
        file.truncate(file.read().rfind(b"\n") + 1)
