"""A completion: the run of what was settled for each leaf of a restored tree.

Missing leaves are made by a plan of their own; what is there is placed, cast, grown or
shrunk, or read by windows where it comes from other leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from shardinit.core.cut.cut import LeafCut
from shardinit.core.plan.fsdp import fsdp
from shardinit.core.plan.leaf_info import LeafInfo
from shardinit.core.plan.leaves import PlanLeaf
from shardinit.core.plan.plan import Plan
from shardinit.core.plan.sharding import resolve
from shardinit.core.prng.root_key import KeyLike, RootKey, as_key
from shardinit.core.run.account import Account
from shardinit.core.run.compile import compile_plan, on_devices
from shardinit.core.run.growing import dividing, resized
from shardinit.core.run.mapped import Mapped
from shardinit.core.run.noise import Noise, added, noises
from shardinit.core.run.settling import Allowed, Settled, settled
from shardinit.core.run.training_state import is_drawn
from shardinit.core.types import Leaf, Tree
from shardinit.errors import StructureMismatchError
from shardinit.progress import Report


@dataclass(frozen=True, eq=False)
class MissingPlan:
    """What a completion will do; call it with a key to do it.

    Attributes:
      plan: of the whole result.

    Example:
      >>> import jax, shardinit
      >>> init = lambda key: dict.fromkeys(("old", "new"), jax.random.normal(key, (8,)))
      >>> plan = shardinit.plan_missing({"old": jax.numpy.zeros((8,))}, init)
      >>> sorted(plan(0))
      ['new', 'old']
    """

    plan: Plan
    _settled: Settled = field(repr=False)

    @property
    def account(self) -> Account:
        """What is kept, mapped, filled, grown, shrunk, cast and unexpected."""
        return self._settled.account

    def __str__(self) -> str:
        return f"{self.plan.name}\n{self.account}"

    def __call__(self, key: KeyLike, progress: Report | None = None) -> Tree:
        """Completes the tree.

        Args:
          key: a key of the type that was planned for, or an int seed.
          progress: called with (leaves dispatched, leaves in all).

        Returns:
          What ``fn(key)`` returns; see ``init_missing``.
        """
        return self.run(as_key(key), progress)

    def run(self, key: RootKey, progress: Report | None = None) -> Tree:
        """``__call__`` for a key that ``as_key`` made."""
        present, copies = self._settled.present, self._settled.copies
        policies = self._settled.policies

        def makes(path: str) -> bool:
            there = path in present or path in copies
            return not there or policies.get(path) == "init"

        exe = compile_plan(self.plan.selected(makes))
        made, places = exe.run(key, progress), exe.shardings
        noise = noises(self._noises(places), key)
        out = {
            leaf.path: self._leaf(leaf, fresh, sharding, key, noise)
            for leaf, fresh, sharding in zip(
                self.plan.leaves, made, places, strict=True
            )
        }
        for leaf, sharding in zip(self.plan.leaves, places, strict=True):
            # By default JAX may hand out the same buffers again, and who trains donates
            # both: the second donation would be of buffers that are deleted.
            if leaf.path in copies:
                source = out[copies[leaf.path]]
                out[leaf.path] = jax.device_put(source, sharding, may_alias=False)
        return exe.rebuild([out[leaf.path] for leaf in self.plan.leaves])

    def _noises(self, places: Sequence[NamedSharding]) -> list[Noise]:
        found = []
        for leaf, place in zip(self.plan.leaves, places, strict=True):
            have = self._settled.present.get(leaf.path)
            if isinstance(have, Mapped) and have.tensor.noise:
                where = _before(place, have.shape)
                noise = have.tensor.noise
                found.append(Noise(leaf.path, have.shape, leaf.dtype, noise, where))
        return found

    def _leaf(
        self,
        leaf: PlanLeaf,
        fresh: Any,
        sharding: NamedSharding,
        key: RootKey,
        noise: dict[str, Leaf],
    ) -> Leaf:
        if leaf.path not in self._settled.present:
            return fresh
        array = self._settled.present[leaf.path]
        if isinstance(array, Mapped):
            array = array.placed(_before(sharding, array.shape))
        if array.dtype != leaf.dtype:
            array = array.astype(leaf.dtype)
        if leaf.path in noise:
            more = noise.pop(leaf.path)
            array = added(jax.device_put(array, more.sharding), more)
        if tuple(np.shape(array)) != leaf.shape:
            # zeros: of what only shrinks
            policy = self._settled.policies.get(leaf.path, "zeros")
            return resized(
                array,
                leaf.shape,
                sharding,
                policy,
                fresh=fresh if policy == "init" else None,
                key=key,
                path=leaf.path,
            )
        if isinstance(array, jax.Array):
            anywhere = leaf.sharding is None
            # Not ``==``, by which P("a") and P("a", None) differ though every shard
            # lies the same (0.10.2 and 0.12.0.1): arrays would be copied for nothing.
            if anywhere or array.sharding.is_equivalent_to(sharding, array.ndim):
                return array
        return jax.device_put(array, sharding)


def restore_into(
    plan: Plan,
    found: Mapping[str, Any],
    read: Callable[[dict[str, jax.ShapeDtypeStruct]], Mapping[str, Any]],
    key: KeyLike | None,
    allowed: Allowed,
) -> Tree:
    """What a plan gives, its leaves from a checkpoint as far as that has them.

    Args:
      plan: the plan.
      found: shapes and dtypes of what the checkpoint has, by path.
      read: reads arrays, given where each will lie.
      key: for leaves that the checkpoint lacks; None where none of them is drawn.
      allowed: what may be done.

    Raises:
      StructureMismatchError: something else would have to be done, or a leaf has to be
        drawn and there is no key.
    """
    made = settled(plan, found, allowed)
    for leaf in plan.cut.leaves:
        if key is None and (why := _draws(leaf, made)):
            raise StructureMismatchError(
                f"leaf {leaf.path!r}",
                why,
                "a key for what has to be drawn",
                "Pass key=, or restore into a plan without it",
            )
    wanted: dict[str, jax.ShapeDtypeStruct] = {}
    for leaf, place in zip(plan.leaves, on_devices(plan), strict=True):
        if leaf.path in made.present:
            wanted |= _wanted(leaf.path, made.present[leaf.path], place)
    arrays = read(wanted)
    filled = {
        path: have.of(arrays) if isinstance(have, Mapped) else arrays[path]
        for path, have in made.present.items()
    }
    root = _any_key(plan) if key is None else as_key(key)
    return MissingPlan(plan, replace(made, present=filled)).run(root)


def _wanted(
    path: str, have: Any, place: NamedSharding
) -> dict[str, jax.ShapeDtypeStruct]:
    """What is read in advance for a leaf, by path, and where each array will lie."""
    if not isinstance(have, Mapped):
        return {path: _abstract(have, _before(place, have.shape))}
    if have.same:
        items = have.arrays.items()
        return {path: _abstract(x, _before(place, x.shape)) for path, x in items}
    return {  # others are read by windows when the leaf is made
        path: _abstract(x, _spread(place, path, x))
        for path, x in have.arrays.items()
        if isinstance(x, jax.ShapeDtypeStruct)
    }


def _abstract(array: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def _draws(leaf: LeafCut, made: Settled) -> str:
    """Why numbers are drawn for a leaf; empty if none are."""
    path, drawn = leaf.path, is_drawn(leaf.source)
    if path not in made.present:
        return "the checkpoint lacks it" if drawn and path not in made.copies else ""
    policy, have = made.policies.get(path), made.present[path]
    if policy == "mean_cov" or (policy == "init" and drawn):
        return f"it grows by {policy}"
    return "it gets noise" if isinstance(have, Mapped) and have.tensor.noise else ""


def _any_key(plan: Plan) -> RootKey:
    """A key such as the plan was made for, where nothing is drawn of it."""
    one = jax.random.key(0, impl=plan.cut.impl)
    return dict.fromkeys(plan.cut.streams, one) or one


def _before(place: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """Where a leaf lies as long as it has another shape."""
    spec, kind = dividing(place, shape), place.memory_kind
    return NamedSharding(place.mesh, spec, memory_kind=kind)


def _spread(place: NamedSharding, path: str, array: Any) -> NamedSharding:
    """Where a leaf is read that others are made of: no device has all of it."""
    info = LeafInfo(path, array.shape, array.dtype)
    return resolve([info], place.mesh, fsdp(min_bytes=0))[0]
