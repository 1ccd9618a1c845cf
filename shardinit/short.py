"""What a prompt shows of an object: what it is, and not all that it has."""

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
