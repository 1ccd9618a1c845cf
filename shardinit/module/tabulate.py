"""Tables of modules: shapes, sizes and kinds of their leaves.

No array is allocated. With inputs, the module is traced as by ``init``, so that the
table of an uninitialised model shows the values that ``init`` would make.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import chain
from typing import Any, TypeAlias

import jax

from shardinit.core.paths import path_str
from shardinit.extras import needs
from shardinit.module import context, walk
from shardinit.module.fields import MISSING, Initializer, is_array
from shardinit.module.initialise import Initialisation

_Leaf: TypeAlias = tuple[str, type | None, Any]
"""A leaf of a module: its path below the module, its kind and what it is."""


def record(
    scope: context.Scope, module: Any, args: Any, kwargs: Any, outputs: Any
) -> None:
    """Records the shapes of the first call of a module in ``scope.calls``."""
    assert scope.calls is not None
    assert scope.tree is not None
    given = (args[0] if len(args) == 1 else args) if not kwargs else (args, kwargs)
    path = path_str(scope.tree.path(module) or ())
    scope.calls.setdefault(path, (_shapes(given), _shapes(outputs)))


def _shapes(tree: Any) -> str:
    if is_array(tree):
        return _shape(tree)
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{k}: {_shapes(v)}" for k, v in tree.items()) + "}"
    if isinstance(tree, (list, tuple)):
        return "(" + ", ".join(map(_shapes, tree)) + ")"
    return type(tree).__name__ if not isinstance(tree, (int, float)) else repr(tree)


def _shape(x: Any) -> str:
    return f"{x.dtype}[{','.join(map(str, x.shape))}]"


def human(size: int) -> str:
    """Formats a number of bytes with a unit: ``"1.5 MB"``."""
    value, unit = float(size), "B"
    for larger in ("KB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"


def tabulate(module: Any, inputs: Any = MISSING, depth: int = -1) -> str:
    """Implements ``Module.tabulate``."""
    calls: dict[str, tuple[Any, Any]] = {}
    shown = module
    if inputs is not MISSING:
        with context.entered(context.Scope(calls=calls)):
            made = Initialisation(module, inputs)
        key = jax.eval_shape(jax.random.key, 0)
        shown = made.rebuild(jax.eval_shape(made.fn, key))
    leaves: dict[int, list[_Leaf]] = {}

    def collect(path: Any, owner: Any, name: str, leaf: Any) -> Any:
        below = path_str(path[len(paths[id(owner)]) :])
        kind = walk.kind_of(owner, name)
        leaves.setdefault(id(owner), []).append((below, kind, leaf))
        return leaf

    found = walk.modules(shown)
    paths = {id(item): path for path, item in found}
    walk.map_leaves(shown, collect)
    kinds = _kinds(leaves)
    return _render(found, leaves, kinds, calls, inputs is not MISSING, depth)


def _kinds(leaves: dict[int, list[_Leaf]]) -> list[Any]:
    kinds = {kind for own in leaves.values() for _, kind, leaf in own if is_array(leaf)}
    return sorted(kinds, key=lambda kind: "~" if kind is None else kind.__name__)


def _order(item: tuple[walk.Path, Any]) -> list[tuple[bool, Any]]:
    """Sort key: parents before children, names alphabetical, indices by number."""
    parts = [getattr(entry, "idx", None) for entry in item[0]]
    return [
        (idx is None, path_str([entry]) if idx is None else idx)
        for idx, entry in zip(parts, item[0], strict=True)
    ]


def _render(
    found: list[tuple[walk.Path, Any]],
    leaves: dict[int, list[_Leaf]],
    kinds: list[Any],
    calls: dict[str, tuple[Any, Any]],
    called: bool,
    depth: int,
) -> str:
    with needs("rich", "shardinit[cli]"):
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    table = Table(show_footer=True, title=type(found[-1][1]).__name__)
    titles = ["path", "module", "fields", *(["inputs", "outputs"] if called else [])]
    for title in titles[:-1]:
        table.add_column(title)
    table.add_column(titles[-1], footer="total", footer_style="bold")
    everything = list(chain.from_iterable(leaves.values()))
    for kind in kinds:
        title = "other" if kind is None else kind.__name__
        table.add_column(title, footer=_sizes(everything, kind), justify="right")
    for path, module in sorted(found, key=_order):
        if 0 <= depth < len(path):
            continue
        name, own = path_str(path), leaves.get(id(module), [])
        fields = "\n".join(_field(*leaf) for leaf in own if _is_shown(leaf[2]))
        shapes = calls.get(name, ("", "")) if called else ()
        cells = [_sizes(own, kind) for kind in kinds]
        row = [name, type(module).__name__, fields, *shapes, *cells]
        # As `Text`: in a str rich reads square brackets as markup.
        table.add_row(*map(Text, row))
    out = io.StringIO()
    Console(file=out, width=200, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _sizes(leaves: Sequence[_Leaf], kind: type | None) -> str:
    """Elements and bytes of the arrays of one kind; empty where there are none."""
    arrays = [x for _, its, x in leaves if its is kind and is_array(x)]
    size = sum(x.size * x.dtype.itemsize for x in arrays)
    return f"{sum(x.size for x in arrays):,}  {human(size)}" if arrays else ""


def _is_shown(leaf: Any) -> bool:
    return is_array(leaf) or isinstance(leaf, Initializer)


def _field(name: str, kind: type | None, leaf: Any) -> str:
    what = _shape(leaf) if is_array(leaf) else "Initializer"
    return f"{name}: {what}"
