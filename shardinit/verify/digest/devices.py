"""Digests of sharded arrays, computed on the devices where the shards lie.

What is hashed, and why no mesh can change it, stands in ``host``. Here every
device adds up its own shard and hands over sixteen bytes; nothing is gathered. Shards
that are copies count once: of each process those that it can address and whose
replica number is 0. The processes of a job then add their sums, so that each of them
gets the same digest.

A shard is read once. XLA for CPU does not fuse elementwise work into a reduction and
would keep four words for each element; so there a loop takes blocks that stay in the
cache and adds them, elementwise, to sums as large as a block. Accelerators fuse, and
get the reduction as it is written down. (Compiled for TPU v5p, not run: temporaries
under 0.3 MB for matrices of 2 to 260 MB. One long vector is laid out anew by the
compiler and takes 16 times its size.)

A leaf costs one dispatch. For leaves of some tens of thousands of elements that is
what a digest takes, and as much or more than making them took.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shardinit.core.ir.jaxpr import is_key
from shardinit.core.paths import named_leaves
from shardinit.core.plan.mesh import alone_on
from shardinit.core.region import Region
from shardinit.errors import DigestError
from shardinit.verify.digest import host
from shardinit.verify.digest.host import (
    BLOCK,
    LANES,
    Digest,
    axis_keys,
    bits_of,
    finish,
    mix,
    place_hash,
    split_axes,
    window_sums,
)

# Smaller windows are not worth a call to the device.
_SMALL = 1 << 14
_SPEC = PartitionSpec("window")
_NOTHING = np.zeros((0, LANES), np.uint32)


def digest(tree: Any) -> Digest:
    """The digest of a pytree of arrays, the same on every mesh.

    Args:
      tree: jax arrays with any sharding, typed keys (which count as their key data),
        numpy arrays, numbers. In a job of several processes all of them must call
        this, with the same global arrays; other leaves are taken from process 0.

    Returns:
      The digest; the same in every process.

    Raises:
      DigestError: a leaf that has a shape and no values (``jax.ShapeDtypeStruct``), or
        is no array.

    Example:
      >>> import jax, shardinit
      >>> params = shardinit.init(lambda key: {"w": jax.random.normal(key, (8, 32))}, 0)
      >>> shardinit.digest(params).leaves.keys()  # 128 bits of each leaf, on any mesh
      dict_keys(['w'])
    """
    named = named_leaves(tree)
    with jax.transfer_guard("allow"):  # of words, which no user sees
        return _digest(named)


def _digest(named: Sequence[tuple[str, Any]]) -> Digest:
    arrays = {path: as_array(path, leaf) for path, leaf in named}
    if len(arrays) != len(named):
        twice = next(p for i, (p, _) in enumerate(named) if p in dict(named[:i]))
        raise DigestError(f"leaf {twice!r}", "two leaves have this path", "one each")
    pending = [_sums(array) for array in arrays.values()]
    sums = [np.asarray(s).sum(axis=0, dtype=np.uint32) for s in jax.device_get(pending)]
    totals = np.array(sums, np.uint32).reshape(-1, LANES)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        # Gathered as uint32 and added here: sums modulo 2**32 are then those of one
        # process.
        everyone = np.asarray(multihost_utils.process_allgather(totals))
        totals = everyone.sum(axis=0, dtype=np.uint32)
    return finish(
        (path, array.shape, array.dtype, total)
        for (path, array), total in zip(arrays.items(), totals, strict=True)
    )


def _sums(array: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """What this process counts of an array: of one that all have in full, the first."""
    here = jax.process_index() == 0
    if isinstance(array, jax.Array):
        counted = here or not array.is_fully_addressable
        return _device_sums(array) if counted else _NOTHING
    return window_sums(array, (0,) * array.ndim)[None] if here else _NOTHING


def as_array(path: str, leaf: Any) -> jax.Array | np.ndarray:
    """A leaf as a jax or numpy array of elements that have bits; keys as their words.

    Example:
      >>> as_array("rng", jax.random.key(7))
      Array([0, 7], dtype=uint32)

    Raises:
      DigestError: a leaf that has a shape and no values, or is no array.
    """
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise DigestError(
            f"leaf {path!r}",
            f"it has a shape, {leaf.shape}, and no values",
            "an array",
            "Initialise it, or leave it out of the tree",
        )
    if isinstance(leaf, jax.Array):
        return jax.random.key_data(leaf) if is_key(leaf.dtype) else leaf
    if not isinstance(leaf, np.ndarray | np.generic | bool | int | float | complex):
        raise DigestError(
            f"leaf {path!r}",
            f"a {type(leaf).__name__}",
            "an array",
            "A checkpoint's are read by shardinit.storage.orbax.restore(folder), or "
            "safetensors.open(folder)",
        )
    return np.asarray(leaf)


# ---- sums on devices -----------------------------------------------------------------


def _device_sums(array: jax.Array) -> jax.Array | np.ndarray:
    """Sums of the shards that this process counts: uint32 ``(shards, LANES)``."""
    # Number 0 of each shard is in one process only, so that over all of them a copy
    # counts once.
    shards = [s for s in array.addressable_shards if s.replica_id == 0]
    if not shards or not array.size:
        return _NOTHING
    if not array.ndim:
        return window_sums(np.asarray(shards[0].data), ())[None]
    starts = [Region.of_slices(s.index, array.shape).start for s in shards]
    return _run([shard.data for shard in shards], starts)


def _run(windows: Sequence[jax.Array], starts: Sequence[Sequence[int]]) -> jax.Array:
    """Sums of equally shaped windows, each on its device: ``(windows, LANES)``."""
    devices: tuple[Any, ...] = tuple(window.device for window in windows)
    if devices[0].platform == "cpu":
        # The bits through numpy, which shares the memory both ways: XLA for CPU would
        # copy the window to look at it as integers.
        views = [bits_of(np.asarray(window)) for window in windows]
        windows = jax.device_put(views, list(devices))
    wide = np.array(starts, np.uint64)
    halves = np.stack([wide, wide >> np.uint64(32)], axis=-1).astype(np.uint32)
    run, mesh = _runner(devices)
    sharding = NamedSharding(mesh, _SPEC)
    length, *rest = windows[0].shape
    # The windows side by side as one array of a mesh that is one long axis: no copy,
    # and nothing that depends on how they lay on the mesh they came from.
    flat = jax.make_array_from_single_device_arrays(
        (length * len(devices), *rest), sharding, list(windows)
    )
    with alone_on(mesh):
        return run(flat, jax.device_put(halves, sharding))


@functools.lru_cache(maxsize=64)
def _runner(
    devices: tuple[Any, ...],
) -> tuple[Callable[..., jax.Array], Mesh]:
    """The jitted sums of windows on these devices, and the mesh of those."""
    mesh = Mesh(np.array(devices), ("window",))
    sums = loop_sums if devices[0].platform == "cpu" else fused_sums
    run = jax.shard_map(
        lambda window, start: sums(window, start[0])[None],
        mesh=mesh,
        in_specs=_SPEC,
        out_specs=_SPEC,
        # The loop's sums begin as zeros made inside, which the check takes for values
        # that are the same on all devices: "scan body function carry input and carry
        # output must have equal types" (0.10.2 and 0.12.0.1).
        check_vma=False,
    )
    return jax.jit(run), mesh


def _places(
    flat: jax.Array, shape: Sequence[int], start: jax.Array, axes: Sequence[int]
) -> jax.Array:
    """Hashes of row-major places in a box of neighbouring axes: ``(LANES, n)``.

    Args:
      flat: uint32 ``(n,)``.
      shape: of the window.
      start: uint32 ``(rank, 2)``, low and high words of where the window begins; an
        axis beyond, the words of an element, begins at 0.
      axes: the neighbouring axes.
    """
    places = jnp.zeros((LANES, 1), np.uint32)
    for axis in reversed(axes):
        size = np.uint32(shape[axis])
        inner, flat = (flat, flat) if axis == axes[0] else (flat % size, flat // size)
        low, high = inner, jnp.zeros_like(inner)
        if axis < start.shape[0]:
            low = inner + start[axis, 0]
            high = start[axis, 1] + (low < inner).astype(np.uint32)
        keys = axis_keys(axis + 1)[:, None]
        places = places + place_hash(low[None], high[None], keys)
    return places


def loop_sums(bits: jax.Array, start: jax.Array) -> jax.Array:
    """Sums of a window, block by block.

    Args:
      bits: unsigned integers, as ``host.bits_of`` gives them.
      start: uint32 ``(rank, 2)``, low and high words of where the window begins.

    Returns:
      uint32 ``(LANES,)``.

    Example:
      >>> window = np.arange(6, dtype=np.uint32).reshape(2, 3)
      >>> start = jnp.zeros((2, 2), np.uint32)
      >>> sums = loop_sums(jnp.asarray(window), start)
      >>> bool((sums == window_sums(window, (0, 0))).all())
      True
    """
    shape = bits.shape
    first = split_axes(shape)
    rows, columns = math.prod(shape[:first]), math.prod(shape[first:])
    flat = bits.reshape(rows, columns)
    wide = min(columns, BLOCK)
    high = min(rows, max(1, BLOCK // wide))
    ragged = rows % high or columns % wide

    def line(
        number: jax.Array, count: int, size: int
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """A block along one side: its begin, its places, and which of them are new.

        The last block is moved back to end with the array.
        """
        nominal = number * count
        begin = jnp.minimum(nominal, size - count)
        places = lax.iota(np.uint32, count) + begin.astype(np.uint32)
        return begin, places, places >= nominal.astype(np.uint32)

    def column_block(number: jax.Array, total: jax.Array) -> jax.Array:
        left, at, fresh_columns = line(number, wide, columns)
        column = _places(at, shape, start, range(first, len(shape)))
        column = lax.optimization_barrier(column)[:, None, :]

        def row_block(number: jax.Array, total: jax.Array) -> jax.Array:
            top, at, fresh_rows = line(number, high, rows)
            row = _places(at, shape, start, range(first)) + axis_keys(0)[:, None]
            row = lax.optimization_barrier(row)[:, :, None]
            block = lax.dynamic_slice(flat, (top, left), (high, wide))
            # Else XLA widens the whole window once, before the loop.
            words = lax.optimization_barrier(block).astype(np.uint32)
            hashed = mix(words[None] ^ (row + column))
            if ragged:
                fresh = fresh_rows[:, None] & fresh_columns[None]
                hashed = jnp.where(fresh[None], hashed, np.uint32(0))
            return total + hashed

        return lax.fori_loop(0, -(-rows // high), row_block, total)

    total = jnp.zeros((LANES, high, wide), np.uint32)
    total = lax.fori_loop(0, -(-columns // wide), column_block, total)
    return jnp.sum(total, axis=(1, 2), dtype=np.uint32)


def fused_sums(window: jax.Array, start: jax.Array) -> jax.Array:
    """Sums of a window as plain reductions, for compilers that fuse into them.

    One a lane: XLA for TPU would keep the words of a reduction over lanes.

    Args:
      window: the elements.
      start: as for ``loop_sums``.

    Returns:
      uint32 ``(LANES,)``.

    Example:
      >>> window = np.arange(6, dtype=np.uint32).reshape(2, 3)
      >>> start = jnp.zeros((2, 2), np.uint32)
      >>> sums = fused_sums(jnp.asarray(window), start)
      >>> bool((sums == window_sums(window, (0, 0))).all())
      True
    """
    bits = _bits(window)
    lines = []
    for axis, size in enumerate(bits.shape):
        line = _places(lax.iota(np.uint32, size), bits.shape, start, [axis])
        dims = [size if a == axis else 1 for a in range(bits.ndim)]
        lines.append(line.reshape(LANES, *dims))
    sums = []
    for lane in range(LANES):
        place: Any = axis_keys(0)[lane]
        for line in lines:
            place = place + line[lane]
        hashed = mix(bits.astype(np.uint32) ^ place)
        sums.append(jnp.sum(hashed, dtype=np.uint32))
    return jnp.stack(sums)


def _bits(array: jax.Array) -> jax.Array:
    """What ``host.bits_of`` gives, of a traced array."""
    dtype = array.dtype
    if dtype == np.bool_:
        return array.astype(np.uint8)
    if jnp.issubdtype(dtype, np.complexfloating):
        parts = [_bits(lax.real(array)), _bits(lax.imag(array))]
        if dtype == np.complex64:
            return jnp.stack(parts, axis=-1)
        return jnp.concatenate(parts, axis=-1)
    floating = jnp.issubdtype(dtype, np.floating)
    width = (jnp.finfo if floating else jnp.iinfo)(dtype).bits
    if width == 64:
        return lax.bitcast_convert_type(array, np.uint32)
    bits = lax.bitcast_convert_type(array, f"uint{width}")
    return bits if width >= 8 else bits.astype(np.uint8)


class Digester(host.Digester):
    """``host.Digester``, with large windows added up by JAX on the CPU.

    Windows of one shape share one executable.

    Example:
      >>> digester = Digester({"w": ((8, 32), "float32")})
      >>> digester.add("w", (0, 0), np.ones((8, 32), np.float32))
      >>> digester.digest().root == digest({"w": jnp.ones((8, 32))}).root
      True
    """

    def _window_sums(self, window: np.ndarray, start: Sequence[int]) -> np.ndarray:
        if window.size < _SMALL:
            return window_sums(window, start)
        cpu = jax.local_devices(backend="cpu")[0]
        return np.asarray(_run([jax.device_put(bits_of(window), cpu)], [start]))[0]
