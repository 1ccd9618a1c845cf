"""Renamed modules: which leaves of one tree are those of another under another name.

A rename changes one key of the paths of all leaves below it, puts a level in or takes
one out. Leaves of one shape and dtype that agree in all other keys are counted for each
such change, and the change that explains most is taken first.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from shardinit.verify.compare.snapshot import LeafSnapshot

Rename = tuple[str, str]


def renamed(
    gone: Mapping[str, LeafSnapshot], new: Mapping[str, LeafSnapshot]
) -> dict[Rename, list[tuple[str, str]]]:
    """Pairs of old and new paths, by what became of which key.

    Args:
      gone: leaves that only the first tree has, by path.
      new: leaves that only the second has.

    Returns:
      By (old key, new key), either empty for a level that came or went, the pairs of
      paths. Leaves that no rename explains are in none.

    Example:
      >>> leaf = LeafSnapshot("mlp/w", (8,), "float32")
      >>> renamed({"mlp/w": leaf}, {"ffn/w": LeafSnapshot("ffn/w", (8,), "float32")})
      {('mlp', 'ffn'): [('mlp/w', 'ffn/w')]}
    """
    candidates: dict[Rename, list[tuple[str, str]]] = defaultdict(list)
    places: dict[Any, list[tuple[str, str]]] = defaultdict(list)
    for path, leaf in new.items():
        for form, key in _forms(path):
            places[form, leaf.shape, leaf.dtype].append((key, path))
    for path, leaf in gone.items():
        for form, key in _forms(path):
            for other, there in places.get((form, leaf.shape, leaf.dtype), ()):
                if (key, path) != (other, there):
                    candidates[key, other].append((path, there))
    found: dict[Rename, list[tuple[str, str]]] = {}
    used: set[str] = set()
    taken: set[str] = set()
    counts = Counter({rename: len(pairs) for rename, pairs in candidates.items()})
    for rename, _ in counts.most_common():
        for old, there in candidates[rename]:
            if old not in used and there not in taken:
                used.add(old)
                taken.add(there)
                found.setdefault(rename, []).append((old, there))
    return found


def _forms(path: str) -> Iterator[tuple[Any, str]]:
    """The path with one key left open, and as it is with a level to come."""
    parts = path.split("/")
    for i, part in enumerate(parts):
        yield (i, *parts[:i], None, *parts[i + 1 :]), part
        # As a level less: met by the path that has it not, and the other way round.
        yield ("less", *parts[:i], *parts[i + 1 :]), part
    yield ("less", *parts), ""
