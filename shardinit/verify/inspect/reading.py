"""Leaves read at a key: the numbers of each, all of them or windows, and at what cost.

Leaves of one program are read together (``windows``). Leaves that are there on the host
are read as they are; one that has to be computed in full is, below a limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shardinit.core.cut.cut import LeafCut
from shardinit.core.cut.sources import Keys, Windowed
from shardinit.core.plan.mesh import as_device
from shardinit.core.plan.plan import Plan
from shardinit.core.prng.root_key import RootKey
from shardinit.core.run.arguments import key_words, operand_words
from shardinit.core.run.lazy import open as open_lazily
from shardinit.core.types import Device
from shardinit.errors import WholeLeafError
from shardinit.verify.inspect.windows import Layout, evaluate, layout


@dataclass(frozen=True, eq=False)
class Seen:
    """What was read of one leaf.

    Attributes:
      number: of the leaf in the plan.
      windows: (windows, elements of each), of the leaf's dtype; none where it was not
        read. Of a leaf that is one number throughout a single element.
      exact: whether they are all that there is to know.
      unread: why it was not read; empty if it was.
    """

    number: int
    windows: np.ndarray
    exact: bool
    unread: str = ""


class Reader:
    """Reads leaves of a plan at a key.

    Attributes:
      key: words of the root key, uint32.
      words: of each leaf's operands, by the leaf's number.
    """

    def __init__(
        self,
        plan: Plan,
        root: RootKey,
        numbers: Sequence[int],
        *,
        memory_limit: int,
        device: Device | str | None = None,
    ):
        self._cut, self._numbers = plan.cut, numbers
        self._device = as_device(device)
        self._lazy = open_lazily(
            plan, root, memory_limit=memory_limit, device=self._device
        )
        self.key = key_words(root, plan.cut)
        derived = [plan.cut.leaves[number].operands for number in numbers]
        found = operand_words(derived, self.key)
        self.words = dict(zip(numbers, found, strict=True))

    def read(
        self, depth: Callable[[LeafCut], int | None] | None = None
    ) -> Iterator[Seen]:
        """Every leaf once, those of one program one after the other.

        Args:
          depth: the axis along which a leaf stacks layers (``windows.layout``).
        """
        together: dict[Any, list[int]] = {}
        for number in self._numbers:
            leaf = self._cut.leaves[number]
            if isinstance(leaf.source, Windowed):
                axis = None if depth is None else depth(leaf)
                alike = (leaf.source.program, leaf.shape, axis)
                together.setdefault(alike, []).append(number)
            else:
                yield self._alone(leaf, number)
        for (program, shape, axis), numbers in together.items():
            yield from self._windowed(program, layout(shape, depth=axis), numbers)

    def _alone(self, leaf: LeafCut, number: int) -> Seen:
        """A leaf that is there in full, or that is computed in full."""
        nothing = np.zeros((0, 0))
        if isinstance(leaf.source, Keys):
            return Seen(number, nothing, False, "keys are no numbers")
        try:
            values = np.asarray(self._lazy[leaf.path])
        except WholeLeafError as error:
            return Seen(number, nothing, False, error.got)
        return Seen(number, values.reshape(1, -1), True)

    def _windowed(
        self, program: int, place: Layout, numbers: Sequence[int]
    ) -> Iterator[Seen]:
        if self._cut.is_uniform(self._cut.leaves[numbers[0]]):
            rank = len(place.shape)
            place = Layout((1,) * rank, np.zeros((1, rank), np.uint32), True)
        words = np.stack([self.words[number] for number in numbers])
        function = self._cut.programs[program]
        made = evaluate(function, place.shape, words, place.starts, self._device)
        for number, windows in zip(numbers, made, strict=True):
            yield Seen(number, windows, place.exact)
