"""HLO: what a compiled program does, read from the text its compiler gives.

Four questions have their answers in that text. Does any device talk to another: the
collectives, wherever they stand. Does anything full-size exist: the values that are
*materialised*, that is, not those inside a fusion, which live in registers. What does
the result take: its layout, tiles and all, since a TPU rounds the last two axes up. And
how many bytes move, at least: each materialised value is written once and read by
those who use it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

COLLECTIVES = frozenset(
    """all-gather all-reduce all-to-all collective-broadcast collective-permute
    ragged-all-to-all recv reduce-scatter send""".split()
)
# Names for values that stand elsewhere, and what holds a body that is read by itself.
_NO_VALUE = frozenset(
    """after-all bitcast call conditional constant get-tuple-element opt-barrier
    parameter partition-id replica-id tuple while""".split()
)
_SHAPE = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,<= ]*)\](?:\{([^{}]*)\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}


@dataclass(frozen=True)
class Shape:
    """One array of the program.

    Attributes:
      dtype: as HLO writes it, such as ``"bf16"``.
      dims: its axes.
      layout: axes from minor to major, then tiles and memory space.
    """

    dtype: str
    dims: tuple[int, ...]
    layout: str = ""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bits(self) -> int:
        """Bits of one element."""
        digits = re.search(r"\d+", self.dtype)
        return _BITS.get(self.dtype, int(digits[0]) if digits else 0)

    @property
    def bytes(self) -> int:
        """Bytes of the elements alone."""
        return -(-self.size * self.bits // 8)

    @property
    def padded_bytes(self) -> int:
        """Bytes that the array takes in its layout: axes rounded up to whole tiles."""
        order, _, rest = self.layout.partition(":")
        minor_first = [int(n) for n in order.split(",") if n.strip()]
        dims = [self.dims[n] for n in reversed(minor_first)]
        tile = re.search(r"T\(([\d,]+)\)", rest)
        if tile and len(dims) == len(self.dims):
            sizes = [int(n) for n in tile[1].split(",")]
            dims = [1] * (len(sizes) - len(dims)) + dims
            for axis, size in enumerate(sizes, start=len(dims) - len(sizes)):
                dims[axis] = -(-dims[axis] // size) * size
            return -(-math.prod(dims) * self.bits // 8)
        return self.bytes

    @property
    def in_main_memory(self) -> bool:
        """Whether it lies in the device's main memory, not in one on the chip."""
        return not re.search(r"S\([1-9]\d*\)", self.layout)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: of its value.
      opcode: what it does.
      shapes: the arrays of its value; several for a tuple.
      operands: names of the values that it reads.
      text: all that follows the operands: attributes and called computations.
      root: whether it is its computation's result.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    text: str
    root: bool


@dataclass(frozen=True)
class Module:
    """A compiled program.

    Attributes:
      computations: instructions by name of their computation.
      entry: name of the one that runs first.
    """

    computations: dict[str, list[Instruction]]
    entry: str

    @property
    def results(self) -> tuple[Shape, ...]:
        """The arrays that the program returns, with their layouts."""
        return next(i.shapes for i in self.computations[self.entry] if i.root)

    def collectives(self) -> list[str]:
        """Each instruction with which devices talk to each other."""
        found = []
        for body in self.computations.values():
            for line in body:
                opcode = re.sub(r"-(start|done)$", "", line.opcode)
                if opcode in COLLECTIVES and not line.opcode.endswith("-done"):
                    shapes = ", ".join(map(str, line.shapes[:2]))
                    found.append(f"{opcode} of {shapes}")
        return found

    def loops(self) -> int:
        """How many loops there are."""
        return sum(i.opcode == "while" for b in self.computations.values() for i in b)

    def materialised(self) -> Iterator[tuple[Instruction, int, dict[str, Instruction]]]:
        """Values that take memory, how often each is made, and their neighbours."""
        for name, times in self._run_counts().items():
            body = self.computations[name]
            by_name = {line.name: line for line in body}
            for line in body:
                if line.opcode not in _NO_VALUE:
                    yield line, times, by_name

    def bytes_moved(self) -> int:
        """Bytes through main memory: values written, and read where they are used."""
        total = 0
        for line, times, by_name in self.materialised():
            read = [s for n in line.operands if n in by_name for s in by_name[n].shapes]
            moved = [s for s in (*line.shapes, *read) if s.in_main_memory]
            total += times * sum(s.padded_bytes for s in moved)
        return total

    def _run_counts(self) -> dict[str, int]:
        """Computations whose values are materialised, and how often each runs."""
        counts = {self.entry: 1}
        waiting = [self.entry]
        while waiting:
            name = waiting.pop()
            for line in self.computations[name]:
                if line.opcode not in ("while", "conditional", "call", "async-start"):
                    continue
                trips = re.search(r'known_trip_count":?\{"n":"(\d+)"', line.text)
                times = counts[name] * (int(trips[1]) if trips else 1)
                for called in _called(line):
                    if called in self.computations and called not in counts:
                        counts[called] = times
                        waiting.append(called)
        return counts


def _called(line: Instruction) -> list[str]:
    names = re.findall(
        r"(?:body|condition|to_apply|calls|true_computation|false_computation)="
        r"%?([\w.\-]+)",
        line.text,
    )
    for several in re.findall(r"branch_computations=\{([^}]*)\}", line.text):
        names += [name.strip().lstrip("%") for name in several.split(",")]
    return names


def parse(text: str) -> Module:
    """Reads the text of a compiled module.

    Raises:
      ValueError: it has no entry computation; the text has another form than known.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, body = "", None
    for line in text.splitlines():
        if line.startswith("}"):
            body = None
        elif not line.startswith((" ", "\t")):
            head = _HEAD.match(line)
            if head and not line.startswith("HloModule"):
                body = computations.setdefault(head[2], [])
                entry = head[2] if head[1] else entry
        elif body is not None and (found := _INSTRUCTION.match(line)):
            body.append(_instruction(found[2], found[3], bool(found[1])))
    if not any(line.root for line in computations.get(entry, ())):
        raise ValueError("no entry computation in the compiler's text")
    return Module(computations, entry)


def _instruction(name: str, rest: str, root: bool) -> Instruction:
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    shapes = _shapes(rest[:end])
    opcode = re.match(r"\s*([\w\-]+)", rest[end:])
    if opcode is None:
        raise ValueError(f"an instruction without an opcode: {rest[:80]}")
    begin = end + opcode.end()
    close = _closing(rest, begin)
    operands = re.findall(r"%([\w.\-]+)", rest[begin:close])
    return Instruction(name, opcode[1], shapes, tuple(operands), rest[close:], root)


def _closing(text: str, begin: int) -> int:
    """Where the parenthesis that opens at ``begin`` is closed, one past it."""
    depth = 0
    for place in range(begin, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place + 1
    raise ValueError(f"an open parenthesis: {text[:80]}")


def _shapes(text: str) -> tuple[Shape, ...]:
    found: Sequence[tuple[str, str, str]] = _SHAPE.findall(text)
    return tuple(
        Shape(dtype, tuple(int(n.strip(" <=")) for n in dims.split(",") if n), layout)
        for dtype, dims, layout in found
    )
