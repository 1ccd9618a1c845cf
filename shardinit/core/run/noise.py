"""Noise: what is added to leaves that would else be copies of each other.

The numbers come of the root key and the leaf's path, by a plan of their own, so that
they are the same on every mesh.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from shardinit.core.leaf_spec import LeafSpec
from shardinit.core.plan.options import PlanOptions
from shardinit.core.plan.planning import make_plan
from shardinit.core.prng.root_key import RootKey
from shardinit.core.run.compile import compile_plan
from shardinit.core.run.growing import seed_of
from shardinit.core.types import Leaf


@dataclass(frozen=True)
class Noise(LeafSpec):
    """Normal numbers for one leaf, whose path tells them from those of others.

    Attributes:
      scale: their standard deviation.
      sharding: where they will lie.
    """

    scale: float
    sharding: NamedSharding

    def draw(self, key: jax.Array) -> jax.Array:
        """The numbers, drawn in float32 at least, of a key that all leaves share."""
        # Not ``hash``, which Python salts anew in every process: those of a job would
        # draw different noise.
        own = jax.random.fold_in(key, zlib.crc32(self.path.encode()))
        wide = jnp.promote_types(self.dtype, jnp.float32)
        return (self.scale * jax.random.normal(own, self.shape, wide)).astype(
            self.dtype
        )


def noises(asked: Sequence[Noise], key: RootKey) -> dict[str, Leaf]:
    """Draws noise for leaves, by path; each device its own shard of it."""
    if not asked:
        return {}
    root = seed_of(key)
    places = [one.sharding for one in asked]
    options = PlanOptions(out_shardings=places)
    plan = make_plan(lambda key: [x.draw(key) for x in asked], root, options)
    made = compile_plan(plan).run(root)
    return {one.path: array for one, array in zip(asked, made, strict=True)}


@jax.jit
def added(array: jax.Array, noise: jax.Array) -> jax.Array:
    """Their sum, where both lie."""
    return array + noise
