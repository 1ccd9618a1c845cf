"""Diff: what changed between two initialisations, and how.

Leaves are held against each other by path, those of renamed modules by both of theirs.
Of each pair all is compared that both sides know: shape, dtype, sharding, the
distribution, how its keys are derived, its random bits, its values. Values are compared
only where one platform made both: elsewhere a last place may differ with nothing wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from shardinit.core.paths import named_leaves
from shardinit.core.plan.folded import template
from shardinit.core.prng.root_key import KeyLike
from shardinit.errors import ArgumentError
from shardinit.verify.compare.changes import KINDS, Change, Changes
from shardinit.verify.compare.renames import renamed
from shardinit.verify.compare.snapshot import LeafSnapshot, Snapshot
from shardinit.verify.compare.taking import of_arrays, of_digest, of_receipt, snapshot
from shardinit.verify.digest.host import Digest
from shardinit.verify.receipt_record import Receipt

_MACHINE = ("platform", "device", "processor", "flags", "jax")


def diff(a: object, b: object, *, key: KeyLike = 0, values: bool = False) -> Changes:
    """What changed from one initialisation to another.

    Args:
      a: before. A function, an ``InitFn``, a ``Plan``, an ``InitProgram``, a
        ``Receipt``, a ``Digest``, a ``Snapshot`` (as ``shardinit pin`` writes them), or
        a tree of arrays, such as a restored checkpoint.
      b: after; of any of these, and of another than ``a`` if you like.
      key: the key at which functions are compared.
      values: compute windows of functions and compare them as well. Functions that are
        equal, at equal keys, have equal values without a look.

    Raises:
      InitFnError: a function that cannot be cut.

    Example:
      >>> import jax, shardinit
      >>> old = lambda key: {"mlp": {"w": jax.random.normal(key, (8, 32))}}
      >>> new = lambda key: {"ffn": {"w": jax.random.normal(key, (8, 32))}}
      >>> print(shardinit.diff(old, new).changes[0])
      renamed: ffn/w: mlp -> ffn; keys and values are as before
    """
    arrays = any(not _is_function(x) and not isinstance(x, Snapshot) for x in (a, b))
    one, two = (as_snapshot(x, key, values=values or arrays) for x in (a, b))
    return compare(one, two)


def _is_function(x: object) -> bool:
    return callable(x) or hasattr(x, "as_cut") or hasattr(x, "rebuild")


def as_snapshot(x: Any, key: KeyLike = 0, *, values: bool = False) -> Snapshot:
    """A snapshot of whatever ``diff`` takes."""
    if isinstance(x, Snapshot):
        return x
    if isinstance(x, Digest):
        return of_digest(x)
    if isinstance(x, Receipt):
        return of_receipt(x)
    if _is_function(x):
        return snapshot(x, key, values=values)
    arrays = dict(named_leaves(x))
    if x is None or not all(hasattr(array, "dtype") for array in arrays.values()):
        raise ArgumentError(
            "diff",
            f"got {type(x).__name__}",
            "init functions, plans, programs, receipts, digests or trees of arrays",
            "A file is read by shardinit.load_program or Receipt.load first; shardinit "
            "diff A B at a shell takes files of all kinds",
        )
    return of_arrays(arrays, "arrays")


def compare(a: Snapshot, b: Snapshot) -> Changes:
    """What changed from one snapshot to another (see ``diff``)."""
    gone = {leaf.path: leaf for leaf in a.leaves}
    new = {leaf.path: leaf for leaf in b.leaves}
    pairs = [(gone.pop(x.path), new.pop(x.path)) for x in b.leaves if x.path in gone]
    moves = renamed(gone, new)
    found = _Found(a, b)
    for leaf, other in pairs:
        found.pair(leaf, other)
    for (old, there), moved in moves.items():
        both = [(gone.pop(p), new.pop(q)) for p, q in moved]
        found.rename(old, there, both)
        pairs += both
    found.only_one_has(gone, new)
    found.of_all()
    order = [leaf.path for leaf in b.leaves if leaf.path in found.others]
    return Changes(a.name, b.name, found.changes(), len(pairs), tuple(order))


class _Found:
    """Changes as they are found, leaves that changed alike together."""

    def __init__(self, a: Snapshot, b: Snapshot):
        self._a, self._b = a, b
        self._leaves: dict[tuple[str, str, str], list[str]] = {}
        self.others: set[str] = set()
        self._one_jax = a.made_by.get("jax") == b.made_by.get("jax")
        known = bool(a.made_by) and bool(b.made_by)
        self._one_machine = not known or all(
            a.made_by.get(name) == b.made_by.get(name) for name in _MACHINE
        )
        self._one_key = None in (a.key, b.key) or (a.key, a.impl) == (b.key, b.impl)

    def add(self, kind: str, path: str | None, before: str, after: str) -> None:
        """Notes a change of a leaf, or of all."""
        paths = self._leaves.setdefault((kind, before, after), [])
        if path is not None:
            paths.append(path)

    def pair(self, a: LeafSnapshot, b: LeafSnapshot) -> None:
        """All that is otherwise about one leaf, its path aside."""
        kinds = dict(self._differences(a, b))
        for kind, sides in kinds.items():
            self.add(kind, b.path, *sides)
        if set(kinds) - {"sharding", "note"}:
            self.others.add(b.path)

    def rename(
        self, old: str, new: str, moved: list[tuple[LeafSnapshot, LeafSnapshot]]
    ) -> None:
        """Leaves of a module of another name: their keys may come from its name."""
        for a, b in moved:
            kinds = dict(self._differences(a, b))
            drawn = {k: v for k, v in kinds.items() if k not in ("keys", "bits")}
            rekeyed = set(kinds) & {"keys", "bits", "values"}
            said = "keys and values are as before"
            if rekeyed:
                said = "with the name their keys, so every value is another"
                drawn.pop("values", None)
            elif a.keys is None or b.keys is None:
                said = "no keys are known"
            sides = old or "(no level)", f"{new or '(no level)'}; {said}"
            self.add("renamed", b.path, *sides)
            for kind, each in drawn.items():
                self.add(kind, b.path, *each)
            if rekeyed or set(drawn) - {"sharding", "note"}:
                self.others.add(b.path)

    def _differences(
        self, a: LeafSnapshot, b: LeafSnapshot
    ) -> Iterator[tuple[str, tuple[str, str]]]:
        if a.shape != b.shape:
            yield "shape", (_shape(a), _shape(b))
        if a.dtype != b.dtype:
            yield "dtype", (a.dtype, b.dtype)
        if _known(a.sharding, b.sharding) and a.sharding != b.sharding:
            yield "sharding", (str(a.sharding), str(b.sharding))
        same_kind = (a.shape, a.dtype) == (b.shape, b.dtype)
        values = self._values(a, b)
        yield from self._drawn(a, b, same_kind, values)
        if self._one_key:
            yield from self._randomness(a, b, same_kind, values)

    def _randomness(
        self, a: LeafSnapshot, b: LeafSnapshot, same_kind: bool, values: bool | None
    ) -> Iterator[tuple[str, tuple[str, str]]]:
        """What one root key gives two leaves: other keys, bits of them, or values."""
        if _known(a.keys, b.keys) and a.keys != b.keys:
            yield "keys", (a.derived or "", b.derived or "")
        elif _known(a.bits, b.bits) and a.bits != b.bits:
            yield "bits", ("random bits", "other random bits of the same keys")
        elif values is False and same_kind:
            yield "values", ("values", "other values")

    def _drawn(
        self, a: LeafSnapshot, b: LeafSnapshot, same_kind: bool, values: bool | None
    ) -> Iterator[tuple[str, tuple[str, str]]]:
        if _known(a.law, b.law) and a.law != b.law:
            yield "distribution", (str(a.law), str(b.law))
        elif same_kind and self._one_jax and _known(a.function, b.function):
            if a.function == b.function:
                return
            if values:
                yield "note", ("another function", "its values are the same")
            else:
                law = f"{b.law or 'unknown law'}, function "
                yield (
                    "distribution",
                    (law + str(a.function)[:8], law + str(b.function)[:8]),
                )

    def _values(self, a: LeafSnapshot, b: LeafSnapshot) -> bool | None:
        """Whether the values are the same; None where that cannot be said."""
        both = set(a.values) & set(b.values)
        if not both or not (self._one_machine and self._one_key):
            return None
        return all(a.values[kind] == b.values[kind] for kind in both)

    def only_one_has(
        self, gone: Mapping[str, LeafSnapshot], new: Mapping[str, LeafSnapshot]
    ) -> None:
        """Leaves that were removed, and those that were added."""
        for path, leaf in gone.items():
            self.add("removed", path, _described(leaf), "")
        for path, leaf in new.items():
            self.add("added", path, "", _described(leaf))
        self.others.update(new)

    def of_all(self) -> None:
        """What is otherwise about all leaves."""
        a, b = self._a, self._b
        if not self._one_key:
            self.add("seed", None, f"{a.impl} {a.key}", f"{b.impl} {b.key}")
            self.others.update(leaf.path for leaf in b.leaves)
        if a.mesh and b.mesh and a.mesh != b.mesh:
            self.add("note", None, f"mesh {a.mesh}", f"mesh {b.mesh}")
        if not any(leaf.function for leaf in (*a.leaves, *b.leaves)):
            self._note_fingerprints()
        if not self._one_machine:
            self._note_machines()

    def _note_fingerprints(self) -> None:
        prints = (self._a.fingerprint, self._b.fingerprint)
        if _known(*prints) and prints[0] != prints[1]:
            before, after = (f"fingerprint {text}"[:20] for text in prints)
            self.add("note", None, before, after)

    def _note_machines(self) -> None:
        """Says what the two were made by, and what of them is not compared for it."""
        before, after = self._a.made_by, self._b.made_by
        names = [name for name in _MACHINE if before.get(name) != after.get(name)]
        sides = [
            "; ".join(made_by.get(name, "?")[:40] for name in names)
            for made_by in (before, after)
        ]
        said = f"{sides[1]}: values are not compared"
        if not self._one_jax:
            said += ", functions by their distribution only"
        self.add("note", None, sides[0], said)

    def changes(self) -> tuple[Change, ...]:
        """All changes, leaves of one template together, in the order of ``KINDS``."""
        found = [
            Change(kind, tuple(paths), before, after)
            for (kind, before, after), paths in self._merged().items()
        ]
        return tuple(sorted(found, key=lambda change: KINDS.index(change.kind)))

    def _merged(self) -> Mapping[tuple[str, str, str], list[str]]:
        """Keys differ leaf by leaf: those of sisters are one change."""
        merged: dict[tuple[str, str, str], list[str]] = {}
        for (kind, before, after), paths in self._leaves.items():
            if kind != "keys":
                merged[kind, before, after] = paths
                continue
            old, new = template(before), template(after)
            if old == new and before != after:
                new += ", by other numbers"
            merged.setdefault((kind, old, new), []).extend(paths)
        return merged


def _described(leaf: LeafSnapshot) -> str:
    law = f", {leaf.law}" if leaf.law else ""
    return f"{_shape(leaf)} {leaf.dtype}{law}"


def _known(a: object, b: object) -> bool:
    return a is not None and b is not None


def _shape(leaf: LeafSnapshot) -> str:
    return "x".join(map(str, leaf.shape)) or "scalar"
