"""The account of a completion: what of a restored tree is kept, and what is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from shardinit.core.plan import text_table
from shardinit.short import short_repr

KINDS: Final = ("kept", "mapped", "cast", "grown", "shrunk", "filled", "unexpected")
_SHOWN = 3


@dataclass(frozen=True)
class Entry:
    """One leaf of an account.

    Attributes:
      path: its key path.
      nbytes: bytes of the whole leaf, as it will be; of what is there, if unexpected.
      change: what becomes of it, for people; empty for a leaf that is kept or filled.
    """

    path: str
    nbytes: int
    change: str = ""

    def __str__(self) -> str:
        return f"{self.path} {self.change}".strip()


@dataclass(frozen=True)
class Account:
    """What a completion keeps, fills and changes; ``print`` shows it as a table.

    A leaf that is mapped, cast and grown stands in all three.

    Attributes:
      kept: leaves that are there and stay as they are.
      mapped: leaves that are there under other paths, or in other shapes.
      filled: leaves that are missing and will be initialised.
      grown: leaves that become larger.
      shrunk: leaves of which a part is dropped.
      cast: leaves that get another dtype.
      unexpected: leaves that are there and that the model does not have; dropped.

    Example:
      >>> import jax, shardinit
      >>> init = lambda key: dict.fromkeys(("old", "new"), jax.random.normal(key, (8,)))
      >>> plan = shardinit.plan_missing({"old": jax.numpy.zeros((8,))}, init)
      >>> [entry.path for entry in plan.account.filled]
      ['new']
    """

    __repr__ = short_repr

    kept: tuple[Entry, ...] = ()
    mapped: tuple[Entry, ...] = ()
    filled: tuple[Entry, ...] = ()
    grown: tuple[Entry, ...] = ()
    shrunk: tuple[Entry, ...] = ()
    cast: tuple[Entry, ...] = ()
    unexpected: tuple[Entry, ...] = ()

    def __str__(self) -> str:
        rows = []
        for kind in KINDS:
            entries: Sequence[Entry] = getattr(self, kind)
            if not entries:
                continue
            shown = ", ".join(map(str, entries[:_SHOWN]))
            more = len(entries) - _SHOWN
            shown += f" and {more:,} more" if more > 0 else ""
            nbytes = sum(entry.nbytes for entry in entries)
            rows.append((kind, f"{len(entries):,}", f"{nbytes:,}", shown))
        return text_table.as_text(("what", "leaves", "bytes", "which"), rows)

    def as_data(self) -> dict[str, dict[str, int | list[str]]]:
        """The account as plain data, for JSON."""
        return {
            kind: {
                "leaves": len(getattr(self, kind)),
                "bytes": sum(entry.nbytes for entry in getattr(self, kind)),
                "paths": [entry.path for entry in getattr(self, kind)],
            }
            for kind in KINDS
        }
