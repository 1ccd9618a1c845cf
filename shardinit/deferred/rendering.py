"""Representations of structs: as text, and for treescope.

The text form looks like a call of the constructor, with arrays as dtype and shape and
long values over several lines. In a notebook, treescope asks an object for its
representation and gets it from here. This module imports treescope only then.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

_WIDTH = 80


def in_treescope(node: Any, path: str | None, subtree_renderer: Any) -> Any:
    """Renders a struct for treescope: foldable, with its own colour."""
    from treescope import repr_lib

    return repr_lib.render_object_constructor(
        object_type=type(node),
        attributes=node.attributes_dict(),
        path=path,
        subtree_renderer=subtree_renderer,
        roundtrippable=False,
        color=node.treescope_color(),
    )


def as_text(node: Any) -> str:
    """Renders a struct as a call of its constructor, arrays as dtype and shape."""
    return _text(node, "")


def _text(value: Any, indent: str) -> str:
    if hasattr(value, "attributes_dict"):
        name = type(value).__name__
        items = [f"{k}=" for k in value.attributes_dict()]
        return _call(f"{name}(", items, value.attributes_dict().values(), ")", indent)
    if type(value) is list:
        return _call("[", [""] * len(value), value, "]", indent)
    if type(value) is tuple:
        end = ",)" if len(value) == 1 else ")"
        return _call("(", [""] * len(value), value, end, indent)
    if isinstance(value, Mapping) and type(value) is dict:
        items = [f"{k!r}: " for k in value]
        return _call("{", items, value.values(), "}", indent)
    return _leaf(value)


def _call(start: str, labels: Any, values: Any, end: str, indent: str) -> str:
    inner = indent + "  "
    parts = [f"{k}{_text(v, inner)}" for k, v in zip(labels, values, strict=True)]
    line = start + ", ".join(parts) + end
    if "\n" not in line and len(indent) + len(line) <= _WIDTH:
        return line
    body = "".join(f"\n{inner}{part}," for part in parts)
    return f"{start}{body}\n{indent}{end.removeprefix(',')}"


def _leaf(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        shown = f"{value.dtype}[{','.join(map(str, value.shape))}]"
        axes = getattr(value, "axes", None)
        return shown if axes is None else f"{shown}{list(axes)}"
    if isinstance(value, functools.partial):
        return f"partial({_leaf(value.func)}, …)"
    if callable(value) and hasattr(value, "__qualname__"):
        return f"<{value.__qualname__}>"
    return repr(value)
