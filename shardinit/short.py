"""Short forms for people: what an object is and not all that it has, and counts."""

from __future__ import annotations

import dataclasses
import reprlib
from typing import Any

_MOST = 500  # characters
_CUT = reprlib.Repr()
_CUT.maxtuple = _CUT.maxlist = _CUT.maxdict = 2
_CUT.maxstring = _CUT.maxother = 60


def short_repr(self: Any) -> str:
    """The ``repr`` of a dataclass; of a long one what is long in it is cut.

    Example:
      >>> @dataclasses.dataclass(repr=False)
      ... class Pair:
      ...     rules: tuple
      ...     __repr__ = short_repr
      >>> Pair((1, 2, 3))
      Pair(rules=(1, 2, 3))
      >>> Pair(tuple(range(1000)))
      Pair(rules=(0, 1, ...))
    """
    fields = [x.name for x in dataclasses.fields(self) if x.repr]
    for shown in (repr, _CUT.repr):
        said = ", ".join(f"{name}={shown(getattr(self, name))}" for name in fields)
        text = f"{type(self).__qualname__}({said})"
        if len(text) <= _MOST:
            return text
    return f"{text[: _MOST - 4]}...)"


def plural(count: int, noun: str) -> str:
    """A number of things: of one, or of several.

    Example:
      >>> plural(1, "leaf"), plural(20_000, "leaf"), plural(0, "program")
      ('1 leaf', '20,000 leaves', '0 programs')
    """
    if count == 1:
        return f"1 {noun}"
    return f"{count:,} {noun[:-1]}ves" if noun == "leaf" else f"{count:,} {noun}s"
