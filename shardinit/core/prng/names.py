"""Names instead of order: a leaf's key from the root key and the leaf's own name.

A key that is split along the way depends on everything drawn before it: one layer more,
and all the later ones start from other weights. A key that folds in a hash of the name
depends on the name alone, so that layers may be added, removed and reordered and
nobody else notices. What it asks in return is that names differ, and that their hashes
do; both are checked here, before anything runs.

The derivations are plain ``jax.random.fold_in`` by constants and fold into the key
prelude like any other. The narrow one, 32 bits of SHA-1, is that of Penzai, whose
models keep their values. Among 10,000 names one pair in a hundred models has the same
32 bits; the wide one folds in 128 bits of SHA-256 of a tagged message.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.typing import ArrayLike

from shardinit.core.init_fn import InitFn
from shardinit.core.paths import path_str
from shardinit.core.types import Tree
from shardinit.errors import DuplicateNamesError, NameClashError, ShardinitError


def _fold_all(key: jax.Array, *words: ArrayLike) -> jax.Array:
    for word in words:
        key = jax.random.fold_in(key, word)
    return key


# inlined: the same few equations in a trace, without the checks of their arguments
_fold_in = jax.jit(_fold_all, inline=True)

S = TypeVar("S")  # what stands for a value not yet drawn

_WIDE_TAG = b"shardinit wide name\x00"


def words_of(name: str, *, wide: bool = False) -> tuple[int, ...]:
    """The 32-bit words that stand for a name, one of them or, if ``wide``, four."""
    if wide:
        digest = hashlib.sha256(_WIDE_TAG + name.encode()).digest()[:16]
    else:
        digest = hashlib.sha1(name.encode()).digest()[:4]
    return tuple(np.frombuffer(digest, ">u4").tolist())


def key_for_name(key: jax.Array, name: str, *, wide: bool = False) -> jax.Array:
    """The key of the leaf called ``name``: its words folded into ``key``, in order."""
    words = map(np.uint32, words_of(name, wide=wide))
    with jax.transfer_guard("allow"):  # of these words, which no user sees
        return _fold_in(key, *words)


def check_unique(names: Sequence[str], paths: Callable[[], Sequence[str]]) -> None:
    """Refuses names that are used more than once.

    Args:
      names: of all parameters of a model.
      paths: their paths in the model, made only for the error.

    Raises:
      DuplicateNamesError: with every repeated name, and where it stands.
    """
    counts = Counter(names)
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        at = [p for p, name in zip(paths(), names, strict=True) if counts[name] > 1]
        raise DuplicateNamesError(repeated, at)


def check_distinct(
    names: Sequence[str], paths: Callable[[], Sequence[str]], *, wide: bool = False
) -> None:
    """Refuses two names from which the same key would be derived.

    Args:
      names: of the parameters to be drawn, all different.
      paths: their paths in the model, made only for the error.
      wide: whether keys derive from 128 bits of a name or from 32.

    Raises:
      NameClashError: with both names and paths.
    """
    seen: dict[tuple[int, ...], int] = {}
    for number, name in enumerate(names):
        other = seen.setdefault(words_of(name, wide=wide), number)
        if names[other] != name:
            at = paths()
            raise NameClashError(
                f"parameters {names[other]!r} at {at[other]!r} and {name!r} at "
                f"{at[number]!r}",
                f"{'128' if wide else '32'} bits of the hashes of their names are "
                f"equal, so both would be drawn from one key",
                "names that give different keys",
                "Rename one of them, or pass wide_names=True, which changes the "
                "values of all parameters",
            )


def paths_of(tree: Tree, is_slot: Callable[[object], bool]) -> list[str]:
    """The paths of all leaves of ``tree``, a slot counting as one leaf."""
    pairs = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_slot)
    return [path_str(path) for path, node in pairs if is_slot(node)]


def fill_slots(
    tree: Tree,
    *,
    is_slot: Callable[[object], bool],
    name_of: Callable[[S], str],
    fill: Callable[[S, jax.Array], Tree],
    axes_of: Callable[[S], Tree] | None = None,
    wide_names: bool = False,
    name: str = "init",
) -> InitFn:
    """An init function of a model in which slots stand for values not yet drawn.

    The function makes the slots' values and nothing else, at their own paths in the
    model; ``rebuild`` puts them between everything that the model holds already, which
    no trace ever sees. Where ``select`` left a slot's values out, the slot stays.

    Args:
      tree: the model; slots may be anywhere in it, or be all of it.
      is_slot: tells a slot from any other node.
      name_of: the name of a slot.
      fill: from a slot and its key to the subtree that takes its place.
      axes_of: from a slot to a tree like that subtree, for each leaf a tuple of axis
        names, or None where none are known.
      wide_names: fold 128 bits of a name into the key instead of 32.
      name: of the model, for tables and errors.

    Raises:
      NameClashError: two slots would be drawn from one key.
    """
    slots = _Slots(tree, is_slot)
    names = [name_of(slot) for slot in slots.slots]
    check_distinct(names, slots.paths, wide=wide_names)

    def fn(key: jax.Array) -> Tree:
        made = []
        for number, slot in enumerate(slots.slots):
            own_key = key_for_name(key, names[number], wide=wide_names)
            try:
                made.append(fill(slot, own_key))
            except ShardinitError as error:
                if path := slots.paths()[number]:
                    error.relocate(f"{path}: {error.where}")
                raise
        return slots.alone(made)

    axes = None
    if axes_of is not None:
        known = [axes_of(slot) for slot in slots.slots]
        axes = slots.alone(known) if jax.tree.leaves(known) else None
    return InitFn(
        fn, axes=axes, rebuild=slots.rebuild, state_of=slots.state_of, name=name
    )


class _Slots:
    """Where the slots of a model are, and what else it holds.

    Args:
      model: a tree; slots may be anywhere in it, or be all of it.
      is_slot: tells a slot from any other node.
    """

    def __init__(self, model: Tree, is_slot: Callable[[object], bool]):
        self._model, self._is_slot = model, is_slot
        self._nodes, self._structure = jax.tree.flatten(model, is_leaf=is_slot)
        self._places = [i for i, node in enumerate(self._nodes) if is_slot(node)]
        self.slots = [self._nodes[i] for i in self._places]

    def paths(self) -> list[str]:
        """The path of each slot."""
        return paths_of(self._model, self._is_slot)

    def alone(self, parts: Sequence[Tree]) -> Tree:
        """The model with these in the slots' places, and None for all that it holds."""
        return self._filled(parts, [None] * len(self._nodes))

    def rebuild(self, made: Tree) -> Tree:
        """The model with what ``alone`` gave; slots stay whose values are shapes."""
        parts = self._parts(made)
        waiting = [_has_shapes(part) for part in parts]
        if not all(waiting):  # else all of it is abstract: the shapes were asked for
            triples = zip(parts, self.slots, waiting, strict=True)
            parts = [slot if waits else part for part, slot, waits in triples]
        return self._filled(parts, self._nodes)

    def state_of(self, model: Tree) -> Tree:
        """What ``alone`` gives, of a model that was rebuilt; None for slots in it."""
        parts = self._parts(model)
        return self.alone([None if self._is_slot(part) else part for part in parts])

    def _parts(self, tree: Tree) -> list[Tree]:
        parts = self._structure.flatten_up_to(tree)
        return [parts[i] for i in self._places]

    def _filled(self, parts: Sequence[Tree], rest: Sequence[Tree]) -> Tree:
        nodes = list(rest)
        for place, part in zip(self._places, parts, strict=True):
            nodes[place] = part
        return self._structure.unflatten(nodes)


def _has_shapes(part: Tree) -> bool:
    return any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(part))
