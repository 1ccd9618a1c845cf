"""Where a leaf comes from: one of five sources, each of which knows how to make it.

A leaf that a program computes is run on the devices. The others are there on the host
before anything runs, and each device gets its part of them.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import jax
import numpy as np

from shardinit.core.cut.leaf_program import Program
from shardinit.core.ir.jaxpr import no_mesh
from shardinit.core.prng.derivation import Derivation
from shardinit.core.types import Device, Values


@dataclass(frozen=True, eq=False)
class Windowed:
    """A program computes any window of the leaf alone.

    Attributes:
      program: number of the program.
      operands: the derivations of the program's operands.
    """

    program: int
    operands: tuple[Derivation, ...]
    result: ClassVar[int] = 0

    def program_of(self, programs: Sequence[Program]) -> Program:
        """The program that makes it, out of those of its function."""
        return programs[self.program]

    @property
    def computation(self) -> Hashable:
        """Equal for leaves that are computed alike, of whatever keys."""
        return self.program, self.result


@dataclass(frozen=True, eq=False)
class Replicated:
    """A program computes all of the leaf on every device, maybe beside others.

    Attributes:
      program: number of the program.
      operands: the derivations of the program's operands; one tuple for all leaves of
        one run.
      result: which result of the program the leaf is.
    """

    program: int
    operands: tuple[Derivation, ...]
    result: int

    def program_of(self, programs: Sequence[Program]) -> Program:
        """The program that makes it, out of those of its function."""
        return programs[self.program]

    @property
    def computation(self) -> Hashable:
        """Equal for leaves that are computed alike, of whatever keys."""
        return self.program, self.result


@dataclass(frozen=True, eq=False)
class Table:
    """A table of constants, made once as plain JAX makes it on one device.

    Attributes:
      program: it makes the table and takes no operands.
    """

    program: Program
    operands: ClassVar[tuple[Derivation, ...]] = ()
    result: ClassVar[int] = 0

    def program_of(self, programs: Sequence[Program]) -> Program:
        """Its own program, which is none of its function's."""
        return self.program

    def on_host(
        self, shape: Sequence[int], words: np.ndarray, device: Device
    ) -> Values:
        """The leaf as numpy; computed on ``device``."""
        return _table_on(device, self.program)


@dataclass(frozen=True, eq=False)
class Constant:
    """An array that was captured, or folded while tracing.

    Attributes:
      array: its contents.
    """

    array: np.ndarray
    operands: ClassVar[tuple[Derivation, ...]] = ()
    result: ClassVar[int] = 0

    def program_of(self, programs: Sequence[Program]) -> None:
        """No program makes it."""

    def on_host(
        self, shape: Sequence[int], words: np.ndarray, device: Device
    ) -> Values:
        """The leaf as numpy."""
        return self.array


@dataclass(frozen=True, eq=False)
class Keys:
    """Keys, typed or raw, and nothing is computed from them.

    Attributes:
      derivation: how they come from the root key.
    """

    derivation: Derivation
    result: ClassVar[int] = 0

    def program_of(self, programs: Sequence[Program]) -> None:
        """No program makes them."""

    @property
    def operands(self) -> tuple[Derivation, ...]:
        """The derivation."""
        return (self.derivation,)

    def on_host(
        self, shape: Sequence[int], words: np.ndarray, device: Device
    ) -> Values:
        """The leaf as numpy: its key data, words of typed keys as a last axis.

        Args:
          shape: of the leaf.
          words: of the derivation.
          device: unused; nothing is computed.
        """
        width = words.size // max(math.prod(shape), 1)
        typed = words.size != math.prod(shape)
        return words.reshape((*shape, width) if typed else tuple(shape))


@lru_cache(maxsize=256)
def _table_on(device: Device, program: Program) -> np.ndarray:
    """What a program of a table makes, on one device; not to be written to."""
    ((shape, _),) = program.outs
    words, start = np.zeros(0, np.uint32), [np.uint32(0)] * len(shape)

    def make() -> Values:
        return program.window(words, [start], [shape], lanes=False)[0]

    place = jax.sharding.SingleDeviceSharding(device)
    with no_mesh():
        made = np.asarray(jax.jit(make, out_shardings=place).lower().compile()())
    made.setflags(write=False)
    return made


Run = Windowed | Replicated
Hosted = Table | Constant | Keys
Source = Run | Hosted
