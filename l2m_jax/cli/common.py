"""What all commands share: their parser, their exit statuses, and the kinds of values that flags take."""

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from l2m_jax import files, preemption
from l2m_jax.errors import InputError, shown

_OVERRIDE = "--config."
_LONGEST_MESSAGE = 2000
# Errors of a path that cannot be used as it was given.
_WRONG_PATH = (
    errno.EACCES,
    errno.EEXIST,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
)


def refuse(message: str) -> NoReturn:
    """Prints one sentence and exits with status 2, which tells supervisors that a retry would not help."""
    print(f"error: {_one_line(message)}", file=sys.stderr)
    sys.exit(2)


def _one_line(message: str) -> str:
    """A message may quote line ends, control characters, or a whole file."""
    text = " ".join(message.splitlines())
    if len(text) > _LONGEST_MESSAGE:
        text = f"{text[: _LONGEST_MESSAGE // 2]} ... {text[-_LONGEST_MESSAGE // 2 :]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class Parser(argparse.ArgumentParser):
    """Flags with dashes or underscores in their names, and no abbreviations.

    `parse_args` also collects overrides such as `--config.training.learning_rate=5e-5`, anywhere among the flags, into
    `overrides`: pairs of a setting's name and its value as text.
    """

    def __init__(self, command: str, description: str | None):
        super().__init__(
            prog=f"l2m {command}".rstrip(),
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def parse_args(self, args: Sequence[str] | None = None, namespace=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        given = sys.argv[1:] if args is None else args
        for argument in given:
            if not argument.isascii() and argument != argument.encode(errors="ignore").decode():
                self.error(f"{argument}: not UTF-8; rename the file")
        try:
            flags, overrides = _split(given)
        except InputError as error:
            refuse(str(error))
        options = super().parse_args(flags, namespace)
        if overrides and not hasattr(options, "config"):
            self.error(f"{_OVERRIDE}{overrides[0][0]}: this command has no --config")
        options.overrides = overrides
        return options

    def error(self, message: str) -> NoReturn:
        refuse(f"{message} (see {self.prog} --help)")


def _split(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """The flags, with dashes in their names, and the overrides."""
    flags, overrides = [], []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        if argument.startswith(_OVERRIDE):
            if not equals:
                if not rest or rest[0].startswith("--"):
                    raise InputError(f"{name}: has no value; give one, as in {name}=VALUE")
                value = rest.pop(0)
            overrides.append((name.removeprefix(_OVERRIDE), value))
        else:
            flags.append(name.replace("_", "-") + equals + value if name.startswith("--") else argument)
    return flags, overrides


def add_config(parser: Parser, *, required: bool = True) -> None:
    """The flag `--config`, and the settings that may follow it."""
    parser.add_argument(
        "--config",
        required=required,
        metavar="FILE[:VARIANT]",
        help="a Python file such as configs/quickstart.py:compare, or a YAML file; change any of its settings with "
        "--config.NAME=VALUE, as in --config.training.learning_rate=5e-5",
    )


def use_huge_pages() -> None:
    """Starts this process again with an allocator that asks Linux for huge pages: glibc reads that only at the start.

    On a CPU, each step takes new memory for its arrays. In pages of 4 kB, mapping it takes a tenth of the step. A value of
    the user's for the variable takes precedence.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def run(
    parser: Parser, command: Callable[[argparse.Namespace], None], arguments: Sequence[str] | None
) -> None:
    """Parses `arguments` (by default the process's) and runs the command.

    Exits with status 2 after an error that the user can correct, a full disk among them; with 75 after SIGTERM or
    SIGINT, which tells supervisors to run the command again.
    """
    if arguments is None:
        use_huge_pages()
    # Transformers would begin each run with the advice to install PyTorch.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        with preemption.handled():
            command(parser.parse_args(arguments))
    except InputError as error:
        refuse(str(error))
    except Exception as error:
        place = getattr(error, "filename", None)
        if files.disk_is_full(error):
            refuse(
                f"{f'{place}: ' if place else ''}the disk or the quota is full; make room and run the same command "
                "again"
            )
        if not isinstance(error, OSError) or error.errno not in _WRONG_PATH or not place:
            raise
        refuse(f"{place}: {error.strerror}; check this path and its permissions")
    except preemption.Preempted:
        print("ended by a signal: run the same command again to resume", file=sys.stderr)
        preemption.end_others()
        sys.exit(preemption.EXIT_STATUS)
    except KeyboardInterrupt:
        print("interrupted: run the same command again to resume", file=sys.stderr)
        sys.exit(130)


def output_file(text: str) -> Path:
    """A flag's value: a file to write, which may be there already."""
    path = Path(text)
    _require_folder(path.parent, text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"'{text}' is a folder; name a file")
    return path


def output_folder(text: str) -> Path:
    """A flag's value: a folder to write into, which may be there already."""
    path = Path(text)
    _require_folder(path, text)
    return path


def _require_folder(path: Path, text: str) -> None:
    """Of a folder that does not exist yet, the nearest existing parent counts."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"'{text}': '{there}' is a file, not a folder; choose another place")
    if not os.access(there, os.W_OK):
        raise argparse.ArgumentTypeError(f"'{text}': '{there}' is not writable; choose another place")


def comma_separated(text: str) -> list[str]:
    """A flag's value such as `sft,l2m`."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise argparse.ArgumentTypeError(f"expected one or more, separated by commas, got {text!r}")
    return parts


def whole_numbers(text: str) -> list[int]:
    """A flag's value such as `0,1,2`."""
    try:
        return [int(part) for part in comma_separated(text)]
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"expected whole numbers such as 0,1,2, got {shown(text)}") from None
