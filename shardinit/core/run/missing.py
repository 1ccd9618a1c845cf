"""Completion: initialise what a restored tree lacks, and nothing else.

A checkpoint that has no head yet, a layer that was added, a vocabulary that grew: what
is there is kept as it is, what is missing is planned, compiled and run alone, at a
cost in proportion to it. The values are those that a full initialisation would have
given, so that it does not matter in how many steps a model came to be.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shardinit.core.paths import chosen, path_str
from shardinit.core.plan.entries import parts
from shardinit.core.plan.leaves import PlanLeaf
from shardinit.core.plan.mesh import AnyMesh
from shardinit.core.plan.options import PlanOptions, Select
from shardinit.core.plan.placement import Placement
from shardinit.core.plan.plan import Plan, make_plan
from shardinit.core.plan.rules import Rules
from shardinit.core.prng.root_key import KeyLike, as_key
from shardinit.core.run.compile import Progress, compile_plan
from shardinit.core.types import Leaf, Tree, Values
from shardinit.errors import StructureMismatchError


def init_missing(
    partial: Tree,
    fn: object,
    key: KeyLike,
    *,
    mesh: AnyMesh | None = None,
    rules: Rules | None = None,
    out_shardings: Tree = None,
    grow: Select = (),
    opt_rules: Rules | Placement | None = None,
    opt_state: Select | None = None,
    progress: Progress | None = None,
) -> Tree:
    """Fills what ``partial`` lacks of what ``fn(key)`` would give.

    Args:
      partial: a pytree with the keys of ``fn``'s result, or what ``init`` returns of
        it: the user's own object, or a part of its state. A leaf is missing where it
        is None, a ``jax.ShapeDtypeStruct``, or not there at all, alone or with all
        that holds it.
      fn: ``key -> pytree of arrays``, an ``InitFn`` or an ``InitProgram``.
      key: a key or an int seed.
      mesh: as for ``shardinit.init``.
      rules: as for ``shardinit.init``.
      out_shardings: as for ``shardinit.init``.
      grow: globs or a predicate on the paths of leaves that may have become larger:
        what is there is kept at the low end of every axis, the rest is initialised.
      opt_rules: as for ``shardinit.plan``.
      opt_state: as for ``shardinit.plan``.
      progress: called with (leaves dispatched, leaves in all).

    Returns:
      What ``fn(key)`` returns. Arrays of ``partial`` are in it as they are, the same
      objects; numpy arrays are placed on their shardings.

    Raises:
      StructureMismatchError: a leaf that ``fn`` does not have, another dtype, or
        another shape that ``grow`` does not allow.

    Example:
      >>> import jax, shardinit
      >>> init = lambda key: dict.fromkeys(("old", "new"), jax.random.normal(key, (8,)))
      >>> restored = {"old": jax.numpy.zeros((8,))}
      >>> whole = shardinit.init_missing(restored, init, 0)
      >>> sorted(whole), whole["old"] is restored["old"]
      (['new', 'old'], True)
    """
    root = as_key(key)
    options = PlanOptions(
        mesh=mesh,
        rules=rules,
        out_shardings=out_shardings,
        opt_rules=opt_rules,
        opt_state=opt_state,
    )
    whole = make_plan(fn, root, options)
    whole.warn()
    present = _present(partial, whole)
    paths = [leaf.path for leaf in whole.leaves]
    may_grow = chosen(grow or (lambda path: False), paths, "grow")
    kept: dict[str, Values] = {}
    grown: dict[str, Values] = {}
    for leaf, allowed in zip(whole.leaves, may_grow, strict=True):
        if leaf.path in present:
            array = present[leaf.path]
            larger = _check(leaf, array, allowed)
            (grown if larger else kept)[leaf.path] = array
    lacking = replace(options, select=lambda path: path not in kept)
    exe = compile_plan(make_plan(whole, root, lacking))
    made = exe.run(root, progress)
    out = []
    for leaf, fresh, sharding in zip(whole.leaves, made, exe.shardings, strict=True):
        if leaf.path in kept:
            array = kept[leaf.path]
            out.append(
                array
                if isinstance(array, jax.Array)
                else jax.device_put(array, sharding)
            )
        elif leaf.path in grown:
            out.append(_grow(fresh, grown[leaf.path], sharding))
        else:
            out.append(fresh)
    return exe.rebuild(out)


def _present(partial: Tree, whole: Plan) -> dict[str, Values]:
    """The arrays of a partial tree by path."""

    def absent(x: object) -> bool:
        return x is None or isinstance(x, jax.ShapeDtypeStruct)

    state = whole.init_fn.state_of(partial)
    flat, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=absent)
    there = {path_str(path): x for path, x in flat if not absent(x)}
    known = {leaf.path for leaf in whole.leaves}
    extra = [path for path in there if path not in known]
    if extra:
        raise StructureMismatchError(
            f"leaf {extra[0]!r}",
            f"it is not among the {len(known):,} leaves of the init function"
            + (f", nor are {len(extra) - 1:,} others" if len(extra) > 1 else ""),
            "a path such as " + ", ".join(map(repr, sorted(known)[:3])),
            "Remove it, or give the tree the keys that the function gives it",
        )
    return there


def _check(leaf: PlanLeaf, array: Values, may_grow: bool) -> bool:
    """Whether the leaf has grown since; refuses what does not fit."""
    if not hasattr(array, "dtype"):
        raise StructureMismatchError(
            f"leaf {leaf.path!r}",
            f"got {type(array).__name__}",
            f"an array of dtype {leaf.dtype}, or None where it is missing",
        )
    shape, dtype = tuple(np.shape(array)), array.dtype
    if dtype != leaf.dtype:
        raise StructureMismatchError(
            f"leaf {leaf.path!r}",
            f"it has dtype {dtype}",
            f"{leaf.dtype}: values are never cast",
            "Cast it, or initialise with its dtype",
        )
    if shape == leaf.shape:
        return False
    fits = len(shape) == len(leaf.shape) and all(
        have <= want for have, want in zip(shape, leaf.shape, strict=True)
    )
    if not (may_grow and fits):
        raise StructureMismatchError(
            f"leaf {leaf.path!r}",
            f"it has shape {shape}",
            f"{leaf.shape}",
            f"Pass grow={leaf.path!r} to keep its values and initialise the rest"
            if fits
            else "A leaf can grow; it cannot shrink or change its number of axes",
        )
    return True


def _grow(fresh: Leaf, old: Values, sharding: NamedSharding) -> jax.Array:
    """The fresh leaf with the old one in its low corner, in the fresh one's memory."""
    # The compiler places the copy; explicit axes would have to be told how.
    mesh = sharding.mesh
    auto = Mesh(np.asarray(mesh.devices), mesh.axis_names)
    old = jax.device_put(old, NamedSharding(auto, _dividing(sharding, np.shape(old))))
    fresh = jax.device_put(fresh, NamedSharding(auto, sharding.spec), donate=True)

    def put(fresh: jax.Array, old: Values) -> jax.Array:
        return lax.dynamic_update_slice(fresh, old, [0] * fresh.ndim)

    placed = NamedSharding(auto, sharding.spec)
    grown = jax.jit(put, out_shardings=placed, donate_argnums=0)(fresh, old)
    return jax.device_put(grown, sharding, donate=True)


def _dividing(sharding: NamedSharding, shape: tuple[int, ...]) -> PartitionSpec:
    """The entries of a spec that divide a smaller shape as well."""
    sizes = sharding.mesh.shape
    entries = []
    for size, entry in zip(shape, sharding.spec, strict=False):
        entries.append(entry if size % parts(entry, sizes) == 0 else None)
    return PartitionSpec(*entries)
