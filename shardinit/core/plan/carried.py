"""Carried: axis names and optimizer state that a result itself declares.

A front end knows its framework's trees. A function of the user's own returns whatever
it likes: boxes around arrays, a training state in a dataclass, a tuple of both. Boxes
are known by their protocol (Flax's ``unbox`` and ``replace_boxed``, the metadata of NNX
Variables, named arrays), state of an optimizer by the classes that optax gives it, or
by the paths that the caller names. No framework is imported for it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from shardinit.core.cut.cut import Cut
from shardinit.core.init_fn import AxisNames, AxisRule, Mirror, axis_names
from shardinit.core.paths import chosen, path_str
from shardinit.core.plan.leaves import Names, names_of
from shardinit.core.plan.mirrors import mirrors
from shardinit.core.plan.options import Select
from shardinit.core.types import Tree

# Flax NNX called the same metadata by these names, newest first (``out_sharding`` from
# 0.12.4 on): https://github.com/google/flax/issues/5248
_SHARDING_METADATA = ("out_sharding", "sharding_names", "sharding")


def carried_axes(cut: Cut, axes: Tree, opt_state: Select | None) -> Tree:
    """The axis names of all leaves, with what the result itself carries.

    Args:
      cut: the function.
      axes: the names that a front end gave, None for none.
      opt_state: globs or a predicate on the paths of optimizer state, beside what the
        classes say.

    Returns:
      A tree of `AxisNames` or None shaped like the result, or ``axes`` where there is
      nothing to add.
    """
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in cut.leaves]
    tree = jax.tree.unflatten(cut.tree, shapes)
    given = names_of(cut, axes)
    names = [b if a is None else a for a, b in zip(given, _boxed(tree), strict=True)]
    state = _in_state(cut, tree, names, opt_state)
    if any(state):
        names = _mirrored(tree, names, state)
    elif all(a is b for a, b in zip(names, given, strict=True)):
        return axes
    return jax.tree.unflatten(cut.tree, names)


def _in_state(
    cut: Cut, tree: Tree, names: Sequence[object], opt_state: Select | None
) -> list[bool]:
    """For each leaf whether it is an optimizer's: by class, front end or globs."""
    said = [isinstance(name, AxisNames) and name.optimizer for name in names]
    globs = [False] * len(said)
    if opt_state is not None:
        globs = chosen(opt_state, [leaf.path for leaf in cut.leaves], "opt_state")
    return list(map(any, zip(_optimizers(tree), said, globs, strict=True)))


def rules_of_context(axes: Tree) -> Sequence[AxisRule]:
    """The logical rules of Flax's own context, where a box gave names to a leaf.

    Args:
      axes: from ``carried_axes``.
    """
    # Whoever has set rules there has imported it; others need not wait for Flax.
    flax = sys.modules.get("flax.core.spmd")
    names = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, AxisNames))
    boxed = any(isinstance(x, AxisNames) and x.named for x in names)
    return flax.get_logical_axis_rules() if flax is not None and boxed else ()


def box_axes(box: Any, rank: int) -> AxisNames | None:
    """What a box says of the array in it.

    The names of a logical box (one that has rules) have a meaning by rules alone; those
    of other boxes may be mesh axes. A name that is a sharding stands for its spec.

    Args:
      box: one of Flax's boxes, an NNX Variable, or a box of either's protocol.
      rank: of the array.
    """
    read = getattr(box, "get_metadata", None)
    metadata: Any = read() if callable(read) else getattr(box, "metadata", None) or {}
    names = _names_in_box(box, metadata)
    # a NamedSharding wraps a PartitionSpec, and names a mesh
    own_mesh = getattr(box, "mesh", None) or metadata.get("mesh")
    mesh = getattr(names, "mesh", None) or own_mesh
    names = getattr(names, "spec", names)
    if not names or len(names) > rank:  # around another array than it was made for
        return None
    logical = hasattr(box, "rules")
    rules = (box.rules if logical else metadata.get("sharding_rules")) or ()
    return AxisNames(names, rank, passes=not logical, rules=rules, mesh=mesh)


def _names_in_box(box: Any, metadata: Mapping[str, Any]) -> Any:
    """The names that a box gives, or the sharding, or the spec; or nothing."""
    given = (metadata[k] for k in _SHARDING_METADATA if metadata.get(k))
    names: Any = getattr(box, "names", None) or next(given, None)
    if not names and hasattr(box, "get_partition_spec"):  # a box of somebody else's
        names = box.get_partition_spec()
    while hasattr(names, "sharding"):  # a jax Format wraps a sharding
        names = names.sharding
    return names


def _is_box(node: object) -> bool:
    kind = type(node)
    return (
        (hasattr(kind, "unbox") and hasattr(kind, "replace_boxed"))
        or (hasattr(kind, "get_metadata") and hasattr(kind, "get_raw_value"))
        or axis_names(node) is not None
    )


def _boxed(tree: Tree) -> list[AxisNames | None]:
    """For each leaf the names from its box, if it has one."""
    names: list[AxisNames | None] = []
    for node in jax.tree.leaves(tree, is_leaf=_is_box):
        inside = jax.tree.leaves(node)
        # Names are for the axes of one array, and an NNX Variable may hold a tree of
        # them.
        if not _is_box(node) or len(inside) != 1:
            names += [None] * len(inside)
            continue
        rank = len(inside[0].shape)
        plain = axis_names(node)
        found = box_axes(node, rank)
        if found is None and plain is not None and len(plain) == rank:
            found = AxisNames(plain, rank)
        names.append(found)
    return names


def _is_state(node: object) -> bool:
    return type(node).__module__.partition(".")[0] == "optax"


def _optimizers(tree: Tree) -> list[bool]:
    """For each leaf whether it lies in a state of optax's."""
    found: list[bool] = []
    for node in jax.tree.leaves(tree, is_leaf=_is_state):
        found += [_is_state(node)] * len(jax.tree.leaves(node))
    return found


def _mirrored(tree: Tree, names: Sequence[Names], state: Sequence[bool]) -> list[Names]:
    """The names, with a `Mirror` in state of an optimizer that has a parameter."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    shapes = [(path, leaf.shape) for path, leaf in flat]
    pairs = list(zip(shapes, state, strict=True))
    belongs = mirrors(
        {path: shape for (path, shape), is_state in pairs if is_state},
        {path: shape for (path, shape), is_state in pairs if not is_state},
    )
    out: list[Names] = []
    for (path, shape), name, is_state in zip(shapes, names, state, strict=True):
        mirror = getattr(name, "mirrors", None)
        if is_state and mirror is None and path in belongs:
            param, dims = belongs[path]
            mirror = Mirror(path_str(param), dims)
        if mirror is not None:
            name = AxisNames((), len(shape), mirrors=mirror, optimizer=True)
        out.append(_as_state(name, len(shape)) if is_state else name)
    return out


def _as_state(name: Names, rank: int) -> AxisNames:
    """The names of a leaf as those of optimizer state."""
    if isinstance(name, AxisNames):
        return name.of_optimizer()
    return AxisNames(name or (), rank, optimizer=True)
