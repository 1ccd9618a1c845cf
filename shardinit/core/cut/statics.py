"""Arrays that a result holds beside its leaves, in its structure.

A class may keep a field out of its leaves (``static`` in Equinox and in
``jax.tree_util.register_dataclass``). What is in it belongs to the structure, which JAX
compares and hashes: an array there makes either fail, and one that was computed inside
the function is a tracer, which means nothing when the trace has ended.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np

from shardinit.core.ir.jaxpr import is_tracer
from shardinit.core.paths import path_str
from shardinit.core.types import Array, Tree, TreeDef
from shardinit.errors import InitFnError


def static_arrays(tree: Tree) -> Iterator[tuple[str, Array]]:
    """The path and the value of each array in the structure of a pytree."""
    stack: list[tuple[jax.tree_util.KeyPath, Tree]] = [((), tree)]
    while stack:
        path, node = stack.pop()
        below = jax.tree_util.tree_leaves_with_path(
            node, is_leaf=lambda x, node=node: x is not node
        )
        inner = [(path + step, child) for step, child in below if step]
        stack.extend(inner)
        leaves = {id(x) for x in jax.tree.leaves(node)}
        children = {id(child) for _, child in inner}
        for name, value in getattr(node, "__dict__", {}).items():
            if id(value) in children:
                continue
            for held in jax.tree.leaves(value):
                if isinstance(held, jax.Array | np.ndarray) and id(held) not in leaves:
                    yield path_str((*path, jax.tree_util.GetAttrKey(name))), held


def _static(structure: TreeDef) -> Iterator[object]:
    """All that the classes of a pytree structure keep in it."""
    stack = [structure]
    while stack:
        node = stack.pop()
        stack.extend(node.children())
        kind, held = node.node_data() or (None, None)
        if kind not in (None, dict, list, tuple):
            yield from jax.tree.leaves(held)


def refuse_static_tracers(tree: Tree, structure: TreeDef) -> None:
    """Refuses a result with an array in a static field that the trace computed.

    Args:
      tree: the result, its leaves of any kind.
      structure: its pytree structure.

    Raises:
      InitFnError: with the field.
    """
    if not any(map(is_tracer, _static(structure))):
        return
    for path, value in static_arrays(tree):
        if is_tracer(value):
            raise InitFnError(
                f"static field {path!r}",
                "the init function computes the array that is in it",
                "an array that stays when the function has been traced",
                "Make it with numpy, or inside jax.ensure_compile_time_eval(), or let "
                "the field be no static one",
            )
