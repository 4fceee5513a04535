"""What a compiled program does, read from its optimised HLO text: collectives, memory traffic, buffers, kernels.

An instruction in the body of a loop counts as often as the loop runs.
"""

import collections
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16}
_ARRAY = re.compile(r"\b(pred|token|opaque|bf16|[a-z]\d+[a-z0-9]*)\[([\d,]*)\]")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONTRACTED = re.compile(r'"?lhs_contracting_dim(?:ension)?s"?[:=](?:\[([^\]]*)\]|\{([^}]*)\})')
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# These move no memory of their own: they rename, or what they call is counted instead.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call",
    "after-all", "partition-id", "replica-id", "opt-barrier", "async-start", "async-done", "async-update",
    "iota", "copy-done",
}  # fmt: skip

# These write into their first operand, in place: which operand is written.
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}


class Array(NamedTuple):
    dtype: str
    dims: tuple[int, ...]

    @property
    def bytes(self) -> float:
        digits = re.search(r"\d+", self.dtype)
        bits = _BITS.get(self.dtype, int(digits.group()) if digits else 0)
        return self.size * bits / 8

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class Instruction:
    """
    Attributes:
        result: the arrays of its result, those of a tuple one after another.
        operands: names of other instructions of the same computation.
        attributes: everything behind the operands.
    """

    name: str
    opcode: str
    result: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str

    @property
    def bytes(self) -> float:
        return sum(array.bytes for array in self.result)

    def called(self, attribute: str) -> list[str]:
        found = re.search(rf"\b{attribute}=(?:%?([\w.\-]+)|\{{([^}}]*)\}})", self.attributes)
        if not found:
            return []
        return re.findall(r"[\w.\-]+", found.group(1) or found.group(2))


class Collective(NamedTuple):
    """
    Attributes:
        bytes: one device's share of the data as the operation sees it: what an all-reduce reduces, what an
            all-gather ends up with, what a reduce-scatter starts from.
        count: how often a run of the program does it.
        overlaps: whether other work stands between its start and its end.
    """

    kind: str
    bytes: float
    count: float
    overlaps: bool


class Product(NamedTuple):
    """A matrix product.

    Attributes:
        dtype: of its operands, the wider one.
        flops: of one.
        count: how often a run of the program computes it.
    """

    dtype: str
    flops: float
    count: float


class Scatter(NamedTuple):
    """
    Attributes:
        unique: whether the compiler knows that no index occurs twice. If not, a GPU adds atomically.
        operation: the name of the operation that it comes from.
    """

    array: Array
    unique: bool
    operation: str


@dataclass(frozen=True)
class Module:
    """A parsed program. `unknown_trips`: how often a loop runs whose count is not in the text."""

    computations: dict[str, dict[str, Instruction]]
    entry: str
    unknown_trips: float = 1.0

    @staticmethod
    def parse(text: str, unknown_trips: float = 1.0) -> "Module":
        computations: dict[str, dict[str, Instruction]] = {}
        entry, current = "", None
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = computations.setdefault(header.group(2), {})
                entry = header.group(2) if header.group(1) else entry
            elif current is not None and (found := _LINE.match(line)):
                name, shape, opcode, rest = found.groups()
                inside, attributes = _split(rest)
                operands = tuple(re.findall(r"%([\w.\-]+)", inside))
                current[name] = Instruction(name, opcode, _arrays(shape), operands, attributes)
        return Module(computations, entry, unknown_trips)

    def run(self) -> Iterator[tuple[dict[str, Instruction], Instruction, float]]:
        """(computation, instruction, how often) of all that runs as a step of its own: not what lies in a fusion."""
        yield from self._run(self.entry, 1.0)

    def _run(self, name: str, times: float) -> Iterator[tuple[dict[str, Instruction], Instruction, float]]:
        computation = self.computations[name]
        for instruction in computation.values():
            yield computation, instruction, times
            match instruction.opcode:
                case "while":
                    known = _TRIPS.search(instruction.attributes)
                    trips = float(known.group(1)) if known else self.unknown_trips
                    for body in instruction.called("body"):
                        yield from self._run(body, times * trips)
                case "call":
                    for called in instruction.called("to_apply"):
                        yield from self._run(called, times)
                case "async-start":
                    for called in instruction.called("calls"):
                        yield from self._run(called, times)
                case "conditional":  # one of its branches: the one that does most stands for it
                    branches = instruction.called("branch_computations")
                    branches += instruction.called("true_computation")
                    branches += instruction.called("false_computation")
                    if branches:
                        yield from self._run(max(branches, key=lambda b: len(self.computations[b])), times)

    @cached_property
    def collectives(self) -> list[Collective]:
        found = []
        for computation, instruction, times in self.run():
            kind = instruction.opcode.removesuffix("-start")
            if kind not in _COLLECTIVES:
                continue
            operands = sum(computation[o].bytes for o in instruction.operands if o in computation)
            size = operands if kind == "reduce-scatter" else instruction.bytes
            if kind != "all-reduce" and instruction.opcode.endswith("-start"):
                size = instruction.bytes - operands  # the result holds the operands too
            found.append(Collective(kind, size, times, _overlaps(computation, instruction)))
        return found

    @cached_property
    def products(self) -> list[Product]:
        """Matrix products, also those within fusions. Fused attention kernels are `custom_calls`."""
        found = []
        for computation, instruction, times in self._with_fused():
            contracted = _CONTRACTED.search(instruction.attributes)
            if contracted is None or instruction.opcode not in ("dot", "custom-call"):
                continue
            left, right = (computation[name].result[0] for name in instruction.operands[:2])
            dims = re.findall(r"\d+", contracted.group(1) or contracted.group(2) or "")
            depth = math.prod(left.dims[int(d)] for d in dims)
            dtype = max(left, right, key=lambda array: array.bytes / max(array.size, 1)).dtype
            found.append(Product(dtype, 2.0 * instruction.result[0].size * depth, times))
        return found

    @cached_property
    def scatters(self) -> list[Scatter]:
        """Additions to, or writes into, rows of an array by their index; also those within fusions."""
        return [
            Scatter(i.result[0], "unique_indices=true" in i.attributes, _operation(i))
            for _, i, _ in self._with_fused()
            if i.opcode == "scatter"
        ]

    def _with_fused(self) -> Iterator[tuple[dict[str, Instruction], Instruction, float]]:
        for computation, instruction, times in self.run():
            yield computation, instruction, times
            if instruction.opcode == "fusion":
                (called,) = instruction.called("calls")
                for inner in self.computations[called].values():
                    yield self.computations[called], inner, times

    @cached_property
    def custom_calls(self) -> dict[str, float]:
        """How often each custom call runs: the kernels of cuBLAS, cuDNN and the like."""
        calls: collections.Counter[str] = collections.Counter()
        for _, instruction, times in self.run():
            if target := re.search(r'custom_call_target="([^"]+)"', instruction.attributes):
                calls[target.group(1)] += times  # pyright: ignore[reportArgumentType]
        return dict(calls)

    @cached_property
    def traffic(self) -> float:
        """Bytes that kernels read from and write to memory: what a slice of a larger array takes, not the array."""
        return sum(times * self._moved(c, i) for c, i, times in self.run() if i.opcode not in _FREE)

    @cached_property
    def kernels(self) -> float:
        """How many kernels start."""
        return sum(
            times for _, i, times in self.run() if i.opcode not in _FREE and not i.opcode.endswith("-done")
        )

    def buffers(self) -> list[tuple[Array, str]]:
        """Arrays that the program makes, largest first, each with the name of the operation that made it."""
        found: dict[Array, str] = {}
        for _, instruction, _ in self.run():
            if instruction.opcode in _FREE:
                continue
            for array in instruction.result:
                found.setdefault(array, _operation(instruction))
        return sorted(found.items(), key=lambda item: -item[0].bytes)

    def _moved(self, computation: dict[str, Instruction], instruction: Instruction) -> float:
        operands = [computation[o] for o in instruction.operands if o in computation]
        match instruction.opcode:
            case "fusion":
                return self._moved_by_fusion(instruction)
            case "dynamic-slice" | "gather":
                return 2 * instruction.bytes
            case "dynamic-update-slice" | "scatter":
                return 2 * operands[_UPDATES[instruction.opcode]].bytes
        if instruction.opcode.endswith("-done"):
            return 0.0
        return instruction.bytes + sum(operand.bytes for operand in operands)

    def _moved_by_fusion(self, fusion: Instruction) -> float:
        (called,) = fusion.called("calls")
        inside = self.computations[called]
        read = sum(_read(inside, i) for i in inside.values() if i.opcode == "parameter")
        updates = [inside[i.operands[_UPDATES[i.opcode]]] for i in inside.values() if i.opcode in _UPDATES]
        return read + (sum(update.bytes for update in updates) if updates else fusion.bytes)


def _operation(instruction: Instruction) -> str:
    name = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return name.group(1) if name else instruction.opcode


def _split(text: str) -> tuple[str, str]:
    """What stands before the parenthesis that closes the operands, and what stands behind it."""
    depth = 1
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[:i], text[i + 1 :]
    return text, ""


def _arrays(text: str) -> tuple[Array, ...]:
    return tuple(
        Array(dtype, tuple(int(d) for d in dims.split(",") if d)) for dtype, dims in _ARRAY.findall(text)
    )


def _read(inside: dict[str, Instruction], value: Instruction) -> float:
    """Bytes of a fusion's operand that it reads: all of them, or as much as it slices out."""
    total = 0.0
    for user in inside.values():
        if value.name not in user.operands:
            continue
        if user.opcode in ("dynamic-slice", "gather"):
            total += user.bytes
        elif user.opcode == "bitcast":
            total += _read(inside, user)
        elif user.opcode not in _UPDATES or user.operands[0] != value.name:
            total += value.bytes
    return min(total, value.bytes)


def _overlaps(computation: dict[str, Instruction], start: Instruction) -> bool:
    """The text is in the order in which the program runs, so what stands between start and end runs beside it."""
    if not start.opcode.endswith("-start"):
        return False
    between = iter(computation.values())
    for instruction in between:
        if instruction is start:
            break
    for instruction in between:
        if start.name in instruction.operands:
            return False
        if instruction.opcode not in _FREE:
            return True
    return False
