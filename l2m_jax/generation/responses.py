"""Answers on disk, one JSON line each, written as they are made so that an interrupted run can resume."""

import contextlib
import dataclasses
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from l2m_jax.errors import InputError
from l2m_jax.files import parse_json


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
        key: says whose answers they are: it changes with the model's weights and the tokenizer.
    """

    path: Path
    key: str

    def read(self) -> list[Answer]:
        """The answers in the file, in the order they were written; none if there is no file.

        A last line without its line end was cut off when the run that wrote it ended, and is ignored.

        Raises:
            InputError: the file holds answers with another key, or something else.
        """
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().split(b"\n")[:-1]  # bytes: the cut may be inside a character
        if not lines:
            return []
        try:
            key = parse_json(lines[0])["key"]
            answers = [_checked(parse_json(line)) for line in lines[1:]]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.path}: not a file of generated answers ({error!r}); choose another folder, or "
                f"delete {self.path} to make them again"
            ) from error
        if key != self.key:
            raise InputError(
                f"{self.path}: holds answers of another model, or to other prompts, or with other sampling rules; "
                "choose another folder, or delete the file"
            )
        return answers

    @contextlib.contextmanager
    def appending(self) -> Iterator[Callable[[Iterable[Answer]], None]]:
        """Opens the file, which `read` has accepted; gives a function that appends answers to it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            file.seek(0)
            complete = file.read().rfind(b"\n") + 1
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


def _line(answer: Answer) -> dict:
    """The answer with a checksum of its own: a file that still grows has none."""
    line = dataclasses.asdict(answer)
    return line | {"crc32": zlib.crc32(json.dumps(line).encode())}


def _checked(line: dict) -> Answer:
    answer = Answer(line["prompt"], line["seed"], tuple(line["tokens"]), line["text"])
    if line != json.loads(json.dumps(_line(answer))):
        raise ValueError("an answer differs from what was written")
    return answer
