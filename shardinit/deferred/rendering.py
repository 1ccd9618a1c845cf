"""How structs are shown: as text by themselves, in colour where treescope is there.

A model is read more often than it is built. The text form is the constructor's, with
arrays as dtype and shape and long things over several lines; it needs nothing. In a
notebook, treescope asks each object for its own rendering and finds it here; treescope
is imported by whoever asks, never by this library.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

_WIDTH = 80


def in_treescope(node: Any, path: str | None, subtree_renderer: Any) -> Any:
    """A struct for treescope: foldable, with its own colour."""
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
    """A struct as the call that would make it, arrays as dtype and shape."""
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
