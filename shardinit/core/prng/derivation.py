"""The key prelude: how each leaf's keys derive from the root key.

Between the root key and the random bits of a leaf lie only key operations: fold in a
number, split, take one of the parts, and copies of those. Under ``jax.jit`` a
thousand of them take most of a minute to compile, on JAX 0.12.0.1 too
(https://github.com/jax-ml/jax/issues/1172 is the first report); here they are a small
graph of derivations, folded while the function is traced and evaluated on the host,
level by level, every level as one batch. The same graph is what a saved program
carries.

A derivation's value is a flat vector of 32-bit words: the key data of its keys in row-
major order (two words a key for threefry2x32, four for rbg). Shapes live with the
traced values; reshaping, slicing, stacking and wrapping of raw keys are all one
operation on words, *take*.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np

from shardinit.core.prng import threefry

THREEFRY = "threefry2x32"


# Compared by identity: the ``==`` that dataclasses write would compare ``data``, and
# the truth of an array of several elements is an error in numpy.
@dataclass(frozen=True, eq=False)
class Derivation:
    """One step from the root key towards the keys of a leaf.

    Attributes:
      op: ``"root"``, ``"words"`` (constants), ``"fold_in"``, ``"split"`` or ``"take"``.
      impl: name of the key implementation, such as ``"threefry2x32"``.
      words: length of the value in 32-bit words.
      parents: what this is derived from; one except for take, none for root and words.
      data: fold_in: the uint32 folded into each key; words: the constants; take: for
        each word of the result its place in the concatenated words of the parents.
      shape: split: the shape that each parent key is split into.
      level: the longest way from the root, in steps that run threefry.
    """

    op: str
    impl: str
    words: int
    parents: tuple[Derivation, ...] = ()
    data: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint32))
    shape: tuple[int, ...] = ()
    level: int = 0


def words_per_key(impl: str) -> int:
    """Number of 32-bit words in the data of one key of implementation ``impl``."""
    if impl == THREEFRY:
        return 2
    return int(np.prod(jax.random.key_data(jax.random.key(0, impl=impl)).shape))


def root(impl: str, streams: int = 1) -> Derivation:
    """The root key itself: a key, or those of all streams one after the other."""
    return Derivation("root", impl, streams * words_per_key(impl))


def streams_read(wanted: Sequence[Derivation]) -> set[int]:
    """The numbers of the streams whose words derivations read; 0 is a single key's."""
    nodes = topological(wanted)
    root = next((node for node in nodes if node.op == "root"), None)
    if root is None:
        return set()
    per_key = words_per_key(root.impl)
    if root.words == per_key:
        return {0}
    read = [np.arange(root.words)] if root in wanted else []
    for node in nodes:
        begin = 0
        for parent in node.parents:
            if parent.op == "root":
                places = node.data if node.op == "take" else np.arange(parent.words)
                inside = (begin <= places) & (places < begin + parent.words)
                read.append(places[inside] - begin)
            begin += parent.words
    return {int(place) // per_key for places in read for place in np.unique(places)}


def constant(words: np.ndarray, impl: str) -> Derivation:
    """Keys that do not depend on the root key, as their words."""
    words = np.ascontiguousarray(words, np.uint32).ravel()
    return Derivation("words", impl, words.size, data=words)


def fold_in(parent: Derivation, data: np.ndarray) -> Derivation:
    """``jax.random.fold_in`` of each key of ``parent`` with its number of ``data``."""
    data = np.ascontiguousarray(data).astype(np.uint32).ravel()
    return Derivation(
        "fold_in", parent.impl, parent.words, (parent,), data, level=parent.level + 1
    )


def split(parent: Derivation, shape: tuple[int, ...]) -> Derivation:
    """``jax.random.split`` of each key of ``parent`` into keys of ``shape``."""
    shape = tuple(int(n) for n in shape)
    words = parent.words * math.prod(shape)
    return Derivation(
        "split", parent.impl, words, (parent,), shape=shape, level=parent.level + 1
    )


def take(
    parents: Sequence[Derivation], places: np.ndarray, impl: str | None = None
) -> Derivation:
    """The words at ``places`` of the concatenated words of ``parents``.

    A take of a take becomes one take, so that long chains of slices stay flat.
    """
    places = np.ascontiguousarray(places, np.int64).ravel()
    impl = impl or parents[0].impl
    if len(parents) == 1:
        parent = parents[0]
        same = impl == parent.impl and places.size == parent.words
        if same and np.array_equal(places, np.arange(parent.words)):
            return parent
        if parent.op == "take":
            return take(parent.parents, parent.data[places], impl)
    level = max(p.level for p in parents)
    return Derivation("take", impl, places.size, tuple(parents), places, level=level)


def topological(wanted: Iterable[Derivation]) -> list[Derivation]:
    """All derivations that ``wanted`` need, each after its parents, without repeats."""
    order: list[Derivation] = []
    # With a stack of its own: a chain of keys is as long as the model is deep, and
    # Python ends a recursion at 1,000 frames.
    state: dict[int, bool] = {}
    stack = [(d, False) for d in reversed(list(wanted))]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif id(node) not in state:
            state[id(node)] = True
            stack.append((node, True))
            stack.extend((p, False) for p in reversed(node.parents))
    return order


def derive(wanted: Sequence[Derivation], key_words: np.ndarray) -> list[np.ndarray]:
    """Runs the derivations on the host.

    Args:
      wanted: the derivations whose words are needed.
      key_words: uint32 words of the root key.

    Returns:
      One uint32 vector for each of ``wanted``, equal to what ``jax.random`` gives.
    """
    values: dict[int, np.ndarray] = {}
    batches: dict[int, list[Derivation]] = {}
    order = topological(wanted)
    for node in order:
        batches.setdefault(node.level, []).append(node)
    for level in sorted(batches):
        nodes = batches[level]
        _hash_batch([n for n in nodes if n.op in ("fold_in", "split")], values)
        for node in nodes:  # takes of this level may read what was just hashed
            if node.op == "root":
                values[id(node)] = np.asarray(key_words, np.uint32).ravel()
            elif node.op == "words":
                values[id(node)] = node.data
            elif node.op == "take":
                parts = [values[id(p)] for p in node.parents]
                source = parts[0] if len(parts) == 1 else np.concatenate(parts)
                values[id(node)] = source[node.data]
    return [values[id(node)] for node in wanted]


def _hash_batch(nodes: list[Derivation], values: dict[int, np.ndarray]) -> None:
    """Evaluates fold_ins and splits whose parents are known: threefry as one batch."""
    hashed, others = [], []
    for node in nodes:
        (hashed if node.impl == THREEFRY else others).append(node)
    for node in others:
        values[id(node)] = _by_jax(node, values[id(node.parents[0])])
    if not hashed:
        return
    keys, highs, lows = [], [], []
    for node in hashed:
        parent = values[id(node.parents[0])].reshape(-1, 2)
        if node.op == "fold_in":
            keys.append(parent)
            highs.append(np.zeros(len(parent), np.uint32))
            lows.append(node.data)
        else:
            # Each part of a split is the key hashed with the part's 64-bit number.
            parts = np.arange(math.prod(node.shape), dtype=np.uint64)
            keys.append(np.repeat(parent, len(parts), axis=0))
            highs.append(
                np.tile((parts >> np.uint64(32)).astype(np.uint32), len(parent))
            )
            lows.append(np.tile(parts.astype(np.uint32), len(parent)))
    key = np.concatenate(keys)
    out = np.stack(
        threefry.hash_on_host(
            key[:, 0], key[:, 1], np.concatenate(highs), np.concatenate(lows)
        ),
        axis=1,
    ).ravel()
    start = 0
    for node in hashed:
        values[id(node)] = out[start : start + node.words]
        start += node.words


def _by_jax(node: Derivation, parent: np.ndarray) -> np.ndarray:
    """The other implementations keep their own rules: ask JAX, one key at a time."""
    # Not by vmap, which draws for a whole batch of rbg keys from the first of them
    # (https://github.com/jax-ml/jax/issues/19085).
    per_key = words_per_key(node.impl)
    out = []
    for number, words in enumerate(parent.reshape(-1, per_key)):
        key = jax.random.wrap_key_data(jax.numpy.asarray(words), impl=node.impl)
        if node.op == "fold_in":
            derived = jax.random.fold_in(key, node.data[number])
        else:
            derived = jax.random.split(key, node.shape)
        out.append(np.asarray(jax.random.key_data(derived)).ravel())
    return np.concatenate(out) if out else np.zeros(0, np.uint32)
