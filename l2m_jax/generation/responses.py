"""Answers on disk, one JSON line each, written as they are made so that an interrupted run can resume."""

import contextlib
import dataclasses
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from l2m_jax.errors import InputError
from l2m_jax.files import parse_json

_BLOCK = 1 << 16


@dataclasses.dataclass(frozen=True)
class Answer:
    """One generated answer.

    Attributes:
        prompt: index of its prompt.
        seed: the seed it was sampled with.
        tokens: without the end of sequence.
        text: the decoded tokens, without special tokens; empty where no tokenizer was given.
    """

    prompt: int
    seed: int
    tokens: tuple[int, ...]
    text: str


@dataclasses.dataclass(frozen=True)
class ResponseFile:
    """A JSON lines file for answers.

    Attributes:
        path: of the file, which may hold some of the answers already.
        key: says whose answers they are: it changes with the model's weights and the tokenizer. None reads those of
            any.
    """

    path: Path
    key: str | None

    def read(self) -> list[Answer]:
        """The answers in the file, in the order they were written (see `lines`)."""
        return [answer for _, answer in self.lines()]

    def lines(self) -> Iterator[tuple[int, Answer]]:
        """The answers in the file, in the order they were written, each with the place of its line for `answer_at`.

        One line is held at a time. Without a file there are none. A last line without its line end was cut off when
        the run that wrote it ended, and is ignored.

        Raises:
            InputError: the file holds answers with another key, or something else.
        """
        if not self.path.exists():
            return
        with self.path.open("rb") as file:  # bytes: the cut may be inside a character
            header = file.readline()
            if not header.endswith(b"\n"):
                return
            with self._explained():
                key = parse_json(header)["key"]
            if self.key not in (None, key):
                raise InputError(
                    f"{self.path}: holds answers of another model, or to other prompts, or with other sampling rules; "
                    f"choose another folder, or delete {self.path} to make them again"
                )
            place = len(header)
            while (line := file.readline()).endswith(b"\n"):
                with self._explained():
                    answer = _checked(parse_json(line))
                yield place, answer
                place += len(line)

    def answer_at(self, place: int) -> Answer:
        """The answer whose line begins at `place`, a number of bytes.

        Raises:
            InputError: what is there is no answer.
        """
        with self._explained(), self.path.open("rb") as file:
            file.seek(place)
            return _checked(parse_json(file.readline()))

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.path}: not a file of generated answers ({error!r}); choose another folder, or "
                f"delete {self.path} to make them again"
            ) from error

    @contextlib.contextmanager
    def appending(self) -> Iterator[Callable[[Iterable[Answer]], None]]:
        """Opens the file, which `read` has accepted; gives a function that appends answers to it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            complete = _end_of_last_line(file)
            file.truncate(complete)

            def write(line: dict) -> None:
                file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")

            def append(answers: Iterable[Answer]) -> None:
                for answer in answers:
                    write(_line(answer))
                file.flush()

            if not complete:
                write({"key": self.key})
            yield append
            os.fsync(file.fileno())


def _end_of_last_line(file: BinaryIO) -> int:
    """The number of bytes up to the last line end. Reads backwards from the end of the file."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - _BLOCK)
        file.seek(start)
        if (found := file.read(end - start).rfind(b"\n")) >= 0:
            return start + found + 1
        end = start
    return 0


def _line(answer: Answer) -> dict:
    """The answer with a checksum of its own: a file that still grows has none."""
    line = vars(answer) | {"tokens": list(answer.tokens)}
    return line | {"crc32": zlib.crc32(json.dumps(line).encode())}


def _checked(line: dict) -> Answer:
    answer = Answer(line["prompt"], line["seed"], tuple(line["tokens"]), line["text"])
    if line != _line(answer):
        raise ValueError("an answer differs from what was written")
    return answer
