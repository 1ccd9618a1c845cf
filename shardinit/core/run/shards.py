"""Shards of what is there in full: each device gets its part.

A constant, a table and keys are on the host; and a leaf that needs all of itself is
computed once where devices share their processor, not by each of them: that would be
the same work as often as there are devices, and a QR of stacked matrices would never
end. LAPACK's
kernels hand the matrices of a batch to the threads on which the devices wait for them
(jaxlib 0.10.2: ``lapack_sgeqrf_ffi`` in a ``BlockingCounter``), as in
https://github.com/PyAutoLabs/PyAutoFit/issues/1530.
"""

from __future__ import annotations

import jax
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from shardinit.core.cut.cut import LeafCut
from shardinit.core.ir.jaxpr import is_key, key_impl
from shardinit.core.plan.mesh import one_computes
from shardinit.core.run.lower import anywhere
from shardinit.core.types import Device


def one_for_all(sharding: NamedSharding) -> Device | None:
    """The device that computes a leaf in full for this process; None: each does."""
    here = sharding.addressable_devices if one_computes(sharding.mesh) else ()
    return min(here, key=lambda device: device.id, default=None)


def handed_out(array: jax.Array, leaf: LeafCut, sharding: NamedSharding) -> jax.Array:
    """A leaf that one CPU device has in full, each device its part."""
    # numpy has no keys: "JAX array with PRNGKey dtype cannot be converted to a NumPy
    # array" (0.10.2 and 0.12.0.1).
    words = jax.random.key_data(array) if is_key(leaf.dtype) else array
    return sharded(np.asarray(words), leaf, sharding)


def sharded(array: np.ndarray, leaf: LeafCut, sharding: NamedSharding) -> jax.Array:
    """A leaf from its elements, or from the words of its keys as a last axis."""
    # A copy for each device: what is handed out may be donated by its new owner.
    made = jax.make_array_from_callback(
        array.shape, of_words(sharding, leaf), lambda index: np.array(array[index])
    )
    return as_keys(made, leaf)


def as_keys(array: jax.Array, leaf: LeafCut | jax.ShapeDtypeStruct) -> jax.Array:
    """Typed keys from their words, where the leaf is of keys."""
    if not is_key(leaf.dtype):
        return array
    return jax.random.wrap_key_data(array, impl=key_impl(leaf.dtype))


def of_words(
    sharding: NamedSharding, leaf: LeafCut | jax.ShapeDtypeStruct
) -> NamedSharding:
    """The sharding of what a leaf is made of: the words of a key are a last axis."""
    if not is_key(leaf.dtype):
        return sharding
    # A spec may be shorter than the rank, so the last axis has to be counted to.
    entries = (*sharding.spec, *[None] * (len(leaf.shape) - len(sharding.spec)), None)
    kind = sharding.memory_kind
    return NamedSharding(sharding.mesh, PartitionSpec(*entries), memory_kind=kind)


def typed(leaf: LeafCut, array: jax.Array) -> jax.Array:
    """The leaf, weakly typed where the function returned it so.

    A scalar of 0.07 that came back strong would widen a bfloat16 network it scales.
    """
    if not leaf.weak_type:
        return array
    where = array.sharding if array.committed else None
    # JAX gives a set, which has no order: the same device in every run.
    here = min(array.sharding.addressable_devices, key=lambda device: device.id)
    with anywhere(here):
        return jax.jit(_weakened, out_shardings=where, donate_argnums=0)(array)


def _weakened(array: jax.Array) -> jax.Array:
    # No function of JAX's makes a weak array of a strong one; this primitive does.
    return lax.convert_element_type_p.bind(
        array, new_dtype=array.dtype, weak_type=True, sharding=None
    )
