"""Growing: a restored array in another shape, by a policy for what is new.

What is there stays at the low end of every axis. What an axis gained is filled by the
policy, one axis after the other; what it lost is cut off. Arrays are moved and filled
where they will lie, by the compiler.
"""

from __future__ import annotations

import zlib
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shardinit.core.plan.entries import parts
from shardinit.core.prng.root_key import RootKey, keys_of
from shardinit.core.types import Array

POLICIES: Final = ("init", "mean", "mean_cov", "zeros", "copy")
_SPREAD = 1e-9  # of the old rows' covariance, as transformers resizes embeddings


def resized(
    old: Array,
    shape: tuple[int, ...],
    sharding: NamedSharding,
    policy: str,
    *,
    fresh: jax.Array | None,
    key: RootKey,
    path: str,
) -> jax.Array:
    """``old`` in another shape.

    Args:
      old: what is there, of as many axes.
      shape: what it shall have.
      sharding: where it will lie.
      policy: for what is new: ``"init"`` takes it from ``fresh``, ``"mean"`` is the
        mean of the old rows, ``"mean_cov"`` drawn about it with their covariance,
        ``"zeros"``, or ``"copy"``, the old rows over again.
      fresh: the initialised leaf, for ``"init"``.
      key: the root key, for ``"mean_cov"``; of several streams the last one's counts.
      path: of the leaf, which tells its numbers from those of others.
    """
    # The compiler places the copy. On Explicit axes, which jax.make_mesh gives by
    # default, JAX asks for the sharding of each result instead, as in
    # https://github.com/marin-community/marin/pull/2288
    mesh = sharding.mesh
    auto = Mesh(np.asarray(mesh.devices), mesh.axis_names)
    old = jax.device_put(old, NamedSharding(auto, dividing(sharding, np.shape(old))))
    placed = NamedSharding(auto, sharding.spec)
    low = tuple(slice(0, min(a, b)) for a, b in zip(np.shape(old), shape, strict=True))

    def put(fresh: Array, old: Array) -> Array:
        return lax.dynamic_update_slice(fresh, old[low], [0] * fresh.ndim)

    def fill(old: Array, seed: Array) -> Array:
        old = old[low]
        for axis, size in enumerate(shape):
            if size > old.shape[axis]:
                old = _longer(old, axis, size, policy, jax.random.fold_in(seed, axis))
        return old

    if fresh is not None:
        fresh = _moved(fresh, placed)
        made = jax.jit(put, out_shardings=placed, donate_argnums=0)(fresh, old)
    else:
        seed = jax.random.fold_in(seed_of(key), zlib.crc32(path.encode()))
        seed = jax.device_put(seed, NamedSharding(auto, PartitionSpec()))
        made = jax.jit(fill, out_shardings=placed)(old, seed)
    return _moved(made, sharding)


def _moved(array: jax.Array, sharding: NamedSharding) -> jax.Array:
    """An array that nobody else holds, elsewhere; JAX donates within one memory."""
    # "Donation across different memory kinds is not implemented", on 0.10.2 and
    # 0.12.0.1.
    same = array.sharding.memory_kind == sharding.memory_kind
    return jax.device_put(array, sharding, donate=same)


def seed_of(key: RootKey) -> jax.Array:
    """The key of what shardinit draws itself; of several streams the last one's."""
    last = keys_of(key)[-1]
    typed = jnp.issubdtype(last.dtype, jax.dtypes.prng_key)
    words = jax.random.key_data(last if typed else jax.random.wrap_key_data(last))
    return jax.random.key(int(words.ravel()[-1]))


def _longer(old: Array, axis: int, size: int, policy: str, key: Array) -> Array:
    """An array with one axis longer."""
    rows = jnp.moveaxis(old, axis, 0)
    added = size - rows.shape[0]
    if policy == "copy":
        new = jnp.take(rows, np.arange(rows.shape[0], size) % rows.shape[0], axis=0)
    elif policy == "zeros":
        new = jnp.zeros((added, *rows.shape[1:]), rows.dtype)
    else:
        wide = rows.astype(jnp.promote_types(rows.dtype, jnp.float32))
        mean = wide.mean(0)
        new = jnp.broadcast_to(mean, (added, *mean.shape))
        if policy == "mean_cov":
            # Weights of unit variance on the centred rows: their sum has the rows' own
            # covariance, without a matrix of it.
            weights = jax.random.normal(key, (added, rows.shape[0]), wide.dtype)
            scale = (_SPREAD / rows.shape[0]) ** 0.5
            new = new + scale * jnp.tensordot(weights, wide - mean, 1)
        new = new.astype(rows.dtype)
    return jnp.moveaxis(jnp.concatenate([rows, new]), 0, axis)


def dividing(sharding: NamedSharding, shape: tuple[int, ...]) -> PartitionSpec:
    """The entries of a spec that divide a smaller shape as well."""
    sizes = sharding.mesh.shape
    entries = []
    for size, entry in zip(shape, sharding.spec, strict=False):
        entries.append(entry if size % parts(entry, sizes) == 0 else None)
    return PartitionSpec(*entries)
