"""Changes: what a diff found, as text, as a table and as data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

from shardinit.core.plan import text_table as table
from shardinit.core.plan.folded import folded, template
from shardinit.short import plural, short_repr

KINDS: Final = (
    "removed",
    "added",
    "renamed",
    "shape",
    "dtype",
    "sharding",
    "distribution",
    "keys",
    "bits",
    "values",
    "seed",
    "note",
)


@dataclass(frozen=True)
class Change:
    """One thing that is otherwise.

    Attributes:
      kind: one of ``KINDS``; a ``note`` changes no value.
      leaves: paths that it is about, those of the second side where it has them.
      before: as it was; after: as it is.

    Example:
      >>> str(Change("dtype", ("w",), "float32", "bfloat16"))
      'dtype: w: float32 -> bfloat16'
    """

    __repr__ = short_repr

    kind: str
    leaves: tuple[str, ...]
    before: str
    after: str

    def __str__(self) -> str:
        where = f" {_folded(self.leaves)}:" if self.leaves else ""
        arrow = " -> " if self.before and self.after else ""
        return f"{self.kind}:{where} {self.before}{arrow}{self.after}"


@dataclass(frozen=True)
class Changes:
    """All that is otherwise between two initialisations.

    Attributes:
      before: name of the first; after: of the second.
      changes: in the order of ``KINDS``.
      leaves: how many leaves both have; other_values: paths of those among them whose
        values are others, or that are new.

    Example:
      >>> import jax, shardinit
      >>> one = lambda key: {"w": jax.random.normal(key, (8, 32))}
      >>> two = lambda key: {"w": 0.02 * jax.random.normal(key, (8, 32))}
      >>> print(shardinit.diff(one, two).changes[0])
      distribution: w: normal 1 -> normal 0.02
      >>> shardinit.diff(one, one).same
      True
    """

    before: str
    after: str
    changes: tuple[Change, ...]
    leaves: int
    other_values: tuple[str, ...]

    # Without an annotation, with which a dataclass takes it for a field.
    HEADER = ("changed", "leaves", "path", "before", "after")

    @property
    def same(self) -> bool:
        """Whether nothing differs; notes do not count."""
        return all(change.kind == "note" for change in self.changes)

    def rows(self) -> list[tuple[str, ...]]:
        """A row for each change."""
        return [
            (x.kind, str(len(x.leaves) or ""), _folded(x.leaves), x.before, x.after)
            for x in self.changes
        ]

    def table(self) -> str:
        """The changes as text, a row for each."""
        return table.as_text(self.HEADER, self.rows())

    def summary(self) -> str:
        """One line: whether it is the same, and how many leaves have other values."""
        if self.same:
            return f"the same: {plural(self.leaves, 'leaf')} of {self.after}"
        return (
            f"differs: {plural(len(self.other_values), 'leaf')} of {self.after} with "
            f"other values, of {self.leaves:,} in both"
        )

    def to_data(self) -> dict[str, Any]:
        """The changes as plain data."""
        return {
            "same": self.same,
            "before": self.before,
            "after": self.after,
            "leaves": self.leaves,
            "other_values": list(self.other_values),
            "changes": [
                {
                    "kind": x.kind,
                    "leaves": list(x.leaves),
                    "before": x.before,
                    "after": x.after,
                }
                for x in self.changes
            ],
        }

    def to_json(self) -> str:
        """The changes as JSON."""
        return json.dumps(self.to_data(), indent=1)

    def __repr__(self) -> str:
        return f"<Changes: {self.summary()}>"

    def __str__(self) -> str:
        return "\n".join([*map(str, self.changes), self.summary()])


def _folded(paths: tuple[str, ...]) -> str:
    """Paths as text, layers folded; three templates at most."""
    groups: dict[str, list[str]] = {}
    for path in paths:
        groups.setdefault(template(path), []).append(path)
    said = [folded(group) for group in list(groups.values())[:3]]
    more = len(groups) - len(said)
    return ", ".join(said) + (f" and {more:,} more" if more > 0 else "")
