"""How keys derive from the root key, as nodes of a message, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from shardinit.core.cut.cut import Cut
from shardinit.core.prng import derivation as keys
from shardinit.v1 import program_pb2 as pb

MAX_ELEMENTS = 1 << 62
MAX_KEY_WORDS = 1 << 26  # of one node: 32 million stacked keys


def write_keys(cut: Cut, content: pb.InitProgramContent) -> dict[int, int]:
    """Writes the derivations of all keys; returns their numbers by identity."""
    numbers: dict[int, int] = {}
    for node in keys.topological(d for leaf in cut.leaves for d in leaf.operands):
        parents = [numbers[id(p)] for p in node.parents]
        numbers[id(node)] = len(numbers)
        foreign = node.impl if node.impl != cut.impl else ""
        _write_key(node, parents, foreign, content.key_nodes.add())
    return numbers


def _write_key(
    node: keys.Derivation, parents: Sequence[int], foreign: str, out: pb.KeyNode
) -> None:
    """Writes one step.

    Args:
      node: the step.
      parents: the numbers of what it is derived from.
      foreign: the implementation of its keys, where it is not that of the root.
      out: its message.
    """
    if node.op == "root":
        out.root.SetInParent()
    elif node.op == "fold_in":
        out.fold_in.parent = parents[0]
        out.fold_in.data.extend(node.data.tolist())
        if len(node.data) != 1:
            out.fold_in.shape.append(len(node.data))
    elif node.op == "split":
        out.split.parent = parents[0]
        out.split.shape.extend(node.shape)
    elif node.op == "words":
        out.words.data = node.data.astype("<u4").tobytes()
        out.words.key_impl = foreign
    else:
        _write_take(node.data, out.take)
        out.take.parents.extend(parents)
        out.take.key_impl = foreign


def _write_take(places: np.ndarray, out: pb.KeyNode.Take) -> None:
    """Writes which words are taken: as a range, which is short, if they are one."""
    start = int(places[0]) if places.size else 0
    if np.array_equal(places, np.arange(start, start + places.size)):
        out.range.start, out.range.count = start, places.size
    else:
        out.list.words.extend(places.tolist())


def read_keys(content: pb.InitProgramContent) -> list[keys.Derivation]:
    """The derivations of a message, by number.

    Raises:
      ValueError: one contradicts itself, or names a node that is not before it.
    """
    made: list[keys.Derivation] = []

    def parent(number: int) -> keys.Derivation:
        if number >= len(made):
            raise ValueError(f"key node {len(made)} names node {number}, not before it")
        return made[number]

    for node in content.key_nodes:
        kind = node.WhichOneof("derivation")
        if kind == "root":
            made.append(keys.root(content.key_impl, max(len(content.key_streams), 1)))
        elif kind == "fold_in":
            source = parent(node.fold_in.parent)
            data = np.asarray(node.fold_in.data, np.uint32)
            if data.size * keys.words_per_key(source.impl) != source.words:
                raise ValueError("fold_in of another number of keys")
            made.append(keys.fold_in(source, data))
        elif kind == "split":
            made.append(
                keys.split(parent(node.split.parent), read_shape(node.split.shape))
            )
        elif kind == "words":
            words = np.frombuffer(node.words.data, "<u4")
            made.append(keys.constant(words, node.words.key_impl or content.key_impl))
        elif kind == "take":
            made.append(_read_take(node.take, parent, content.key_impl))
        else:
            raise ValueError(f"key node {len(made)} says nothing")
        if made[-1].words > MAX_KEY_WORDS:
            raise ValueError(f"key node {len(made) - 1} of {made[-1].words:,} words")
    return made


def _read_take(
    take: pb.KeyNode.Take, parent: Callable[[int], keys.Derivation], impl: str
) -> keys.Derivation:
    parents = [parent(number) for number in take.parents]
    there = sum(p.words for p in parents)
    if take.WhichOneof("indices") == "range":
        begin, count = take.range.start, take.range.count
        if begin + count > there:
            raise ValueError("take beyond the words of its parents")
        places = np.arange(begin, begin + count)
    else:
        places = np.asarray(take.list.words, np.int64)
        if places.size and places.max() >= there:
            raise ValueError("take beyond the words of its parents")
    return keys.take(parents, places, take.key_impl or impl)


def read_shape(dims: Sequence[int]) -> tuple[int, ...]:
    """A shape that a message gives.

    Raises:
      ValueError: an array can have no such shape.
    """
    shape = tuple(int(n) for n in dims)
    size = 1
    for n in shape:
        size *= max(n, 1)
        if n < 0 or size > MAX_ELEMENTS:
            raise ValueError(f"the shape {shape}")
    return shape
