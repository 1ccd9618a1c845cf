"""Arrays: sharded JAX arrays out of windows that a service sends.

For jobs that want bytes rather than programs: nothing is compiled in the job, at the
price of the weights crossing the network. Each process asks for the shards of its own
devices and for no others, each distinct shard once however many devices hold it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import compress
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from shardinit.core.paths import chosen
from shardinit.core.plan import sharding as sh
from shardinit.core.plan.entries import as_entry
from shardinit.core.plan.leaf_info import LeafInfo
from shardinit.core.plan.mesh import one_device
from shardinit.core.plan.options import Select
from shardinit.core.program.treedef import read_tree
from shardinit.core.region import Region
from shardinit.core.run.processes import assert_same
from shardinit.core.run.shards import as_keys, of_words
from shardinit.core.types import Device, DType, Tree
from shardinit.progress import Report
from shardinit.service.client.transfer import Piece, full_piece
from shardinit.service.wire.description import Description, LeafDescription
from shardinit.service.wire.fields import KEY_TYPES

Receive = Callable[[Sequence[Piece]], Iterator[np.ndarray]]


def from_windows(
    described: Description,
    receive: Receive,
    *,
    mesh: Mesh | None,
    out_shardings: Tree,
    select: Select | None,
    progress: Report,
) -> Tree:
    """The pytree of a described model, its leaves sharded.

    Args:
      described: the model, on the mesh if there is one.
      receive: from pieces to their windows, in order.
      mesh: the devices; None for the first one.
      out_shardings: a pytree of shardings instead of where the service placed leaves.
      select: globs over leaf paths.
      progress: called with (leaves complete, leaves in all).

    Returns:
      dicts, lists and tuples of arrays; leaves that ``select`` left out are
      ``jax.ShapeDtypeStruct``.

    Raises:
      ShardingError: ``out_shardings`` does not fit.
      FingerprintMismatchError: another process of the job asked for something else.
    """
    structure, order = read_tree(described.nodes, len(described.leaves))
    leaves = [described.leaves[number] for number in order]
    if out_shardings is not None:
        infos = [LeafInfo(x.path, x.shape, _dtype(x)) for x in leaves]
        shardings = sh.from_tree(out_shardings, infos, structure, mesh)
    else:
        shardings = _as_described(leaves, mesh or one_device())
    picked = chosen(select, [leaf.path for leaf in leaves])
    assert_same(
        {"fingerprint": described.fingerprint}, list(compress(shardings, picked))
    )
    result: list[Any] = [
        jax.ShapeDtypeStruct(leaf.shape, _dtype(leaf), sharding=sharding)
        for leaf, sharding in zip(leaves, shardings, strict=True)
    ]
    numbers = list(compress(range(len(leaves)), picked))
    pieces = [_pieces(leaves[i], shardings[i], result[i]) for i in numbers]
    blocks = receive([piece for found in pieces for piece in found])
    for done, (i, found) in enumerate(zip(numbers, pieces, strict=True), 1):
        shape = full_piece(leaves[i]).region.shape
        result[i] = _assemble(result[i], shardings[i], shape, blocks, found.values())
        progress(done, len(numbers))
    return jax.tree.unflatten(structure, result)


def _as_described(leaves: Sequence[LeafDescription], mesh: Mesh) -> list[NamedSharding]:
    """Where the service placed the leaves."""

    def place(leaf: LeafDescription) -> NamedSharding:
        spec = PartitionSpec(*map(as_entry, leaf.spec or ()))
        return NamedSharding(mesh, spec, memory_kind=leaf.memory_kind or None)

    return list(map(place, leaves))


def _pieces(
    leaf: LeafDescription, sharding: NamedSharding, abstract: jax.ShapeDtypeStruct
) -> dict[Piece, list[Device]]:
    """The distinct windows of this process's devices, and the devices of each."""
    full = full_piece(leaf)
    shape = full.region.shape
    where = of_words(sharding, abstract).addressable_devices_indices_map(shape)
    found: dict[Piece, list[Device]] = {}
    for device, index in where.items():
        piece = replace(full, region=Region.of_slices(index or (), shape))
        found.setdefault(piece, []).append(device)
    return found


def _assemble(
    abstract: jax.ShapeDtypeStruct,
    sharding: NamedSharding,
    shape: tuple[int, ...],
    blocks: Iterator[np.ndarray],
    places: Iterable[Sequence[Device]],
) -> jax.Array:
    """A leaf of its shards; ``shape`` is that of what was sent, the words of keys."""
    shards = []
    for devices in places:
        block = next(blocks)
        for device in devices:
            place = SingleDeviceSharding(device, memory_kind=sharding.memory_kind)
            # A copy for each device: its new owner may donate it.
            shards.append(jax.device_put(block.copy(), place))
    # From what is here: ``device_put`` of a whole leaf would want all of it in each
    # process.
    array = jax.make_array_from_single_device_arrays(
        shape, of_words(sharding, abstract), shards
    )
    return as_keys(array, abstract)


def _dtype(leaf: LeafDescription) -> DType:
    """What JAX calls the leaf's elements."""
    if leaf.dtype not in KEY_TYPES:
        return full_piece(leaf).dtype
    return _key_dtype(KEY_TYPES[leaf.dtype][0])


@lru_cache
def _key_dtype(impl: str) -> DType:
    return jax.eval_shape(lambda: jax.random.key(0, impl=impl)).dtype
