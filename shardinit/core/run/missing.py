"""Completion: initialise what a restored tree lacks, and nothing else.

A checkpoint that has no head yet, a layer that was added, a vocabulary that grew, the
optimizer that parameters have not met: what is there is kept, what is missing is
planned, compiled and run alone, at a cost in proportion to it. The values are those
that a full initialisation would have given, so that it does not matter in how many
steps a model came to be. ``plan_missing`` says what will become of each leaf before
anything runs; ``init_missing`` runs that plan.
"""

from __future__ import annotations

from typing import Any

import jax

from shardinit.core.paths import named_leaves
from shardinit.core.plan.mesh import AnyMesh
from shardinit.core.plan.options import PlanOptions, Select
from shardinit.core.plan.padding import Pad, padded
from shardinit.core.plan.placement import Placement
from shardinit.core.plan.plan import Plan
from shardinit.core.plan.planning import make_plan
from shardinit.core.plan.rules import Rules
from shardinit.core.prng.root_key import KeyLike, RootKey, as_key
from shardinit.core.run.completion import MissingPlan
from shardinit.core.run.renames import Lines
from shardinit.core.run.settling import Allowed, Grow, settled
from shardinit.core.types import Tree
from shardinit.progress import Report


def plan_missing(
    partial: Tree,
    fn: object,
    key: KeyLike | None = None,
    *,
    mesh: AnyMesh | None = None,
    rules: Rules | None = None,
    out_shardings: Tree = None,
    missing: Select | None = None,
    unexpected: Select = (),
    grow: Grow = (),
    shrink: Select = (),
    cast: Select = (),
    paths: Lines = (),
    pad: Pad | None = None,
    opt_rules: Rules | Placement | None = None,
    opt_state: Select | None = None,
) -> MissingPlan:
    """Plans what ``init_missing`` would do, with its account; runs nothing.

    Args:
      partial: a pytree with the keys of ``fn``'s result, or what ``init`` returns of
        it: the user's own object, or a part of its state. A leaf is missing where it
        is None, ``...``, a ``jax.ShapeDtypeStruct``, or not there at all, alone or with
        all that holds it.
      fn: ``key -> pytree of arrays``, an ``InitFn``, an ``InitProgram`` or a ``Plan``,
        which says itself where its leaves lie if nothing else does.
      key: a key whose type counts; default ``jax.random.key(0)``.
      mesh: as for ``shardinit.init``.
      rules: as for ``shardinit.init``.
      out_shardings: as for ``shardinit.init``.
      missing: globs or a predicate on the paths that may be missing; default all.
      unexpected: globs or a predicate on paths that may be there though ``fn`` does not
        have them; they are dropped and counted.
      grow: globs or a predicate on the paths of leaves that may have become larger, or
        a dict of globs to policies: what is there is kept at the low end of every axis,
        what is new is ``"init"`` (as initialised, the policy of globs alone), the
        ``"mean"`` of the old rows, ``"mean_cov"`` (drawn about it with their
        covariance, as ``transformers`` resizes embeddings), ``"zeros"``, or ``"copy"``
        (the old rows over again).
      shrink: globs or a predicate on the paths of leaves that may have become smaller:
        the low end of every axis is kept.
      cast: globs or a predicate on the paths of leaves that may get another dtype.
      paths: lines of ``path there -> path of the model``, with what changes on the way
        (``core.run.renames`` has the words): a text, a list, a file, or a mapping. Each
        device reads the windows that make its shard. A leaf that no line matches keeps
        its path.
      pad: globs to multiples as for ``shardinit.padded``: leaves that are rounded up
        though ``fn`` gives their true sizes. They may grow, by ``"zeros"`` where
        ``grow`` says nothing else.
      opt_rules: as for ``shardinit.plan``.
      opt_state: as for ``shardinit.plan``.

    Raises:
      SelectError: a line of ``paths`` that says nothing or fits no leaf, or a glob that
        matches none.
      StructureMismatchError: a leaf that ``fn`` does not have, that is missing, of
        another dtype or another shape, and that nothing allows; or state of an
        optimizer that is missing and depends on parameters that are there.

    Example:
      >>> import jax, shardinit
      >>> ones = jax.numpy.ones
      >>> init = lambda key: {"w": jax.random.normal(key, (8, 4)), "b": ones(4)}
      >>> restored = {"w": jax.numpy.zeros((6, 4))}
      >>> plan = shardinit.plan_missing(restored, init, grow={"w": "mean"})
      >>> print(plan.account)
      what    leaves  bytes  which
      grown   1       128    w (6, 4) -> (8, 4) by mean
      filled  1       16     b
    """
    options = PlanOptions(
        mesh=mesh,
        rules=rules,
        out_shardings=out_shardings,
        opt_rules=opt_rules,
        opt_state=opt_state,
    )
    allowed = Allowed(
        missing=missing,
        unexpected=unexpected,
        grow=grow,
        shrink=shrink,
        cast=cast,
        paths=paths,
        pad=pad or {},
    )
    root = as_key(0 if key is None else key)
    return _completion(partial, fn, root, options, allowed)


def _completion(
    partial: Tree, fn: object, key: RootKey, options: PlanOptions, allowed: Allowed
) -> MissingPlan:
    """``plan_missing`` for options that are two objects."""
    fn = padded(fn, allowed.pad) if allowed.pad else fn
    if isinstance(fn, Plan) and options == PlanOptions():
        plan = fn
    else:
        plan = make_plan(fn, key, options)
    return MissingPlan(plan, settled(plan, present_in(partial, plan), allowed))


def init_missing(
    partial: Tree,
    fn: object,
    key: KeyLike,
    *,
    mesh: AnyMesh | None = None,
    rules: Rules | None = None,
    out_shardings: Tree = None,
    missing: Select | None = None,
    unexpected: Select = (),
    grow: Grow = (),
    shrink: Select = (),
    cast: Select = (),
    paths: Lines = (),
    pad: Pad | None = None,
    opt_rules: Rules | Placement | None = None,
    opt_state: Select | None = None,
    progress: Report | None = None,
) -> Tree:
    """Fills what ``partial`` lacks of what ``fn(key)`` would give.

    ``plan_missing`` and its call in one; see there for the arguments and the errors.

    Args:
      partial: as for ``plan_missing``.
      fn: as for ``plan_missing``.
      key: a key or an int seed.
      mesh: as for ``shardinit.init``.
      rules: as for ``shardinit.init``.
      out_shardings: as for ``shardinit.init``.
      missing: as for ``plan_missing``.
      unexpected: as for ``plan_missing``.
      grow: as for ``plan_missing``.
      shrink: as for ``plan_missing``.
      cast: as for ``plan_missing``.
      paths: as for ``plan_missing``.
      pad: as for ``plan_missing``.
      opt_rules: as for ``shardinit.plan``.
      opt_state: as for ``shardinit.plan``.
      progress: called with (leaves dispatched, leaves in all).

    Returns:
      What ``fn(key)`` returns. Arrays of ``partial`` that lie as planned are in it as
      they are, the same objects; others are placed on their shardings. Missing state of
      an optimizer that repeats parameters (a slow copy of them) repeats those that are
      there.

    Example:
      >>> import jax, shardinit
      >>> init = lambda key: dict.fromkeys(("old", "new"), jax.random.normal(key, (8,)))
      >>> restored = {"old": jax.numpy.zeros((8,))}
      >>> whole = shardinit.init_missing(restored, init, 0)
      >>> sorted(whole), whole["old"] is restored["old"]
      (['new', 'old'], True)
    """
    options = PlanOptions(
        mesh=mesh,
        rules=rules,
        out_shardings=out_shardings,
        opt_rules=opt_rules,
        opt_state=opt_state,
    )
    allowed = Allowed(
        missing=missing,
        unexpected=unexpected,
        grow=grow,
        shrink=shrink,
        cast=cast,
        paths=paths,
        pad=pad or {},
    )
    root = as_key(key)
    made = _completion(partial, fn, root, options, allowed)
    made.plan.warn()
    return made.run(root, progress)


def present_in(partial: Tree, plan: Plan) -> dict[str, Any]:
    """The arrays of a partial tree by path."""

    def absent(x: object) -> bool:
        return x is None or x is ... or isinstance(x, jax.ShapeDtypeStruct)

    state = plan.init_fn.state_of(partial)
    found = {path: x for path, x in named_leaves(state, absent) if not absent(x)}
    return dict(zip(plan.paths_of(found), found.values(), strict=True))
