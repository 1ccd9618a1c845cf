"""The recording: what was called, and what every storage was filled with.

A tensor's value is a `Value`: an output of a call of torch, or what was read of a
storage into which several calls had written. Calls take the values that their arguments
had at the time, so that the graph has no memory of its own: an operation in place is a
call that takes the old value, and the storage notes what was written where.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from shardinit.frontends.torch.geometry import Geometry, covered

Line = tuple[str, int]


class Value(NamedTuple):
    """An array: an output of a node.

    Attributes:
      node: the call, or the reading of a storage.
      index: which of its outputs.
    """

    node: Call | Read
    index: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.node.outputs[self.index].shape

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""
        return self.node.outputs[self.index].dtype


class Like(NamedTuple):
    """An argument of which a call takes the shape and the dtype, and no value."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(eq=False, slots=True)
class Call:
    """A call of an operation.

    Attributes:
      name: the operation's, such as ``mul_``, without its overload.
      func: torch's own function, which takes the arguments.
      args, kwargs: with a `Value`, or a `Like`, for each tensor.
      outputs: shapes and dtypes of the results.
      line: file and line of the user's code.
      draws: whether it draws random numbers itself.
      random: whether its results depend on any.
      known: the results, where torch has computed them.
      inputs: the values among the arguments.
    """

    name: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Like, ...]
    line: Line
    draws: bool = False
    known: list[torch.Tensor] | None = None
    inputs: tuple[Value, ...] = field(init=False)
    random: bool = field(init=False)

    def __post_init__(self):
        found: list[Value] = []
        replaced((self.args, self.kwargs), found.append)
        self.inputs = tuple(found)
        self.random = self.draws or any(value.node.random for value in found)


@dataclass(eq=False, slots=True)
class Read:
    """What a view of a storage held after several writes.

    Attributes:
      pieces: what was written, and where, in order.
      geometry: the view.
      length: elements of the storage.
      outputs: shape and dtype of the view.
      line: where the storage was created.
      missing: whether some elements that the view holds were never written.
    """

    pieces: tuple[tuple[Geometry, Value], ...]
    geometry: Geometry
    length: int
    outputs: tuple[Like, ...]
    line: Line
    missing: bool
    known: list[torch.Tensor] | None = None
    random: bool = field(init=False)

    def __post_init__(self):
        self.random = any(value.node.random for _, value in self.pieces)

    @property
    def inputs(self) -> tuple[Value, ...]:
        """The values that were written."""
        return tuple(value for _, value in self.pieces)


@dataclass(eq=False, slots=True)
class Storage:
    """The memory of tensors, and what was written into it.

    Attributes:
      dtype: of its elements.
      length: their number.
      line: where it was created.
      held: torch's storage; as long as it lives, no other has its address.
      writes: where, and what, in order; one that covers all forgets those before it.
      copied: it stands for memory of another dtype, which writes would not reach.
    """

    dtype: torch.dtype
    length: int
    line: Line
    held: Any
    writes: list[tuple[Geometry, Value]] = field(default_factory=list)
    copied: bool = False
    reads: dict[Geometry, Value] = field(default_factory=dict)

    def write(self, where: Geometry, value: Value) -> None:
        """Notes that a view now holds ``value``, which has the view's shape."""
        if where.covers(self.length):
            self.writes.clear()
        if where.size:
            self.writes.append((where, value))
        self.reads.clear()

    def read(self, view: Geometry) -> Value:
        """The value that a view holds."""
        if view not in self.reads:
            self.reads[view] = self._read(view)
        return self.reads[view]

    def _read(self, view: Geometry) -> Value:
        pieces: list[tuple[Geometry, Value]] = []
        for where, value in reversed(self.writes):
            if where == view and not pieces:
                return value
            if not where.apart(view):
                pieces.append((where, value))
        pieces.reverse()
        missing = not covered(view, [where for where, _ in pieces], self.length)
        like = Like(view.shape, self.dtype)
        read = Read(tuple(pieces), view, self.length, (like,), self.line, missing)
        return Value(read, 0)


def replaced(tree: Any, change: Callable[[Value], Any]) -> Any:
    """Arguments in which every `Value` is what ``change`` makes of it."""
    if isinstance(tree, Value):
        return change(tree)
    if isinstance(tree, Like):
        return tree
    if isinstance(tree, list | tuple):
        return type(tree)([replaced(item, change) for item in tree])
    if isinstance(tree, dict):
        return {name: replaced(item, change) for name, item in tree.items()}
    return tree


def topological(
    values: Iterable[Value], known: Callable[[Value], bool] = lambda value: False
) -> Iterator[Call | Read]:
    """The nodes that values are made of, each after its inputs, none twice.

    Args:
      values: the results.
      known: values that need no node.
    """
    seen: set[int] = set()
    stack: list[tuple[Call | Read, bool]] = [
        (v.node, False) for v in reversed(list(values)) if not known(v)
    ]
    while stack:
        node, done = stack.pop()
        if done:
            yield node
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            stack.extend((v.node, False) for v in reversed(node.inputs) if not known(v))
