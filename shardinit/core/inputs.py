"""Which leaves of an init function depend on the values of example inputs.

Lazily initialised modules are shown an input, of which an initialiser sees the shape
and hardly ever the values. Whether they matter is not guessed: the function is traced
with its inputs as arguments, and a leaf depends on them if the walk back from it meets
one. Where none does, the inputs need not exist.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from shardinit.core import jaxpr as jx
from shardinit.core import keys
from shardinit.core.builder import Builder
from shardinit.core.graph import Value, leaves
from shardinit.core.paths import path_str


def dependent_leaves(
    fn: Callable[[Any], Any], key: Any, inputs: Sequence[Any]
) -> list[str]:
    """Paths of the leaves that depend on the value of an input.

    Args:
      fn: from a pair of a key and a list of arrays to a pytree of arrays.
      key: an abstract typed key.
      inputs: abstract arrays.
    """
    with jx.collector_paused(), jx.no_mesh():
        closed, shapes = jx.trace(fn, (key, list(inputs)))
        root = Value(key.shape, key.dtype, key=keys.root(jx.key_impl(key.dtype)))
        values = [Value(x.shape, x.dtype) for x in inputs]
        given = [root, *values]
        outs = Builder(fold=True, opaque=False).read(*jx.opened(closed), given)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
    wanted = set(values)
    return [
        path_str(path)
        for path, out in zip(paths, outs, strict=True)
        if not wanted.isdisjoint(leaves([out], ()))
    ]
