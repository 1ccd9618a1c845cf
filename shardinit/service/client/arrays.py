"""Arrays: sharded JAX arrays out of windows that a service sends.

For jobs that want bytes rather than programs: nothing is compiled in the job, at the
price of the weights crossing the network. Each process asks for the shards of its own
devices and for no others, each distinct shard once however many devices hold it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import compress
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shardinit.core.paths import chosen
from shardinit.core.plan import sharding as sh
from shardinit.core.plan.entries import as_entry
from shardinit.core.plan.leaf_info import LeafInfo
from shardinit.core.plan.mesh import one_device
from shardinit.core.plan.options import Select
from shardinit.core.program.treedef import read_tree
from shardinit.core.region import Region
from shardinit.core.run.processes import assert_same
from shardinit.progress import Report
from shardinit.service.client.transfer import Piece, whole
from shardinit.service.wire.description import Description, LeafDescription
from shardinit.service.wire.limits import KEY_TYPES

Receive = Callable[[Sequence[Piece]], Iterator[np.ndarray]]


def from_windows(
    described: Description,
    receive: Receive,
    *,
    mesh: Mesh | None,
    out_shardings: Any,
    select: Select | None,
    progress: Report,
) -> Any:
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
        infos = [LeafInfo(x.path, x.shape, 1, None) for x in leaves]
        shardings = sh.from_tree(out_shardings, infos, structure, mesh)
    else:
        devices = mesh or one_device()
        specs = [PartitionSpec(*(as_entry(e) for e in x.spec or ())) for x in leaves]
        shardings = [NamedSharding(devices, spec) for spec in specs]
    picked = chosen(select, [leaf.path for leaf in leaves])
    taken = list(compress(shardings, picked))
    assert_same({"fingerprint": described.fingerprint}, taken)
    pieces = [
        _pieces(leaf, sharding) if taken else {}
        for leaf, sharding, taken in zip(leaves, shardings, picked, strict=True)
    ]
    blocks = receive([piece for found in pieces for piece in found])
    result: list[Any] = []
    done, total = 0, sum(picked)
    for leaf, sharding, taken, found in zip(
        leaves, shardings, picked, pieces, strict=True
    ):
        if not taken:
            kept = jax.ShapeDtypeStruct(leaf.shape, _dtype(leaf), sharding=sharding)
            result.append(kept)
            continue
        result.append(_assemble(leaf, sharding, blocks, found.values()))
        done += 1
        progress(done, total)
    for _ in blocks:  # lets the last stream come to its end
        raise AssertionError("more windows than pieces")
    return jax.tree.unflatten(structure, result)


def _words(leaf: LeafDescription, sharding: NamedSharding) -> NamedSharding:
    """The sharding of a leaf's bytes: the words of keys are not cut."""
    if leaf.dtype not in KEY_TYPES:
        return sharding
    missing = len(leaf.shape) - len(sharding.spec)
    spec = PartitionSpec(*sharding.spec, *[None] * missing, None)
    return NamedSharding(sharding.mesh, spec)


def _pieces(leaf: LeafDescription, sharding: NamedSharding) -> dict[Piece, list[Any]]:
    """The distinct windows of this process's devices, and the devices of each."""
    full = whole(leaf)
    shape = full.region.shape
    where = _words(leaf, sharding).addressable_devices_indices_map(shape)
    found: dict[Piece, list[Any]] = {}
    for device, index in where.items():
        piece = replace(full, region=Region.of_slices(index or (), shape))
        found.setdefault(piece, []).append(device)
    return found


def _assemble(
    leaf: LeafDescription,
    sharding: NamedSharding,
    blocks: Iterator[np.ndarray],
    places: Iterable[Sequence[Any]],
) -> jax.Array:
    shards = []
    for devices in places:
        block = next(blocks)
        for device in devices:
            # A copy for each device: its new owner may donate it.
            shards.append(jax.device_put(block.copy(), device))
    array = jax.make_array_from_single_device_arrays(
        whole(leaf).region.shape, _words(leaf, sharding), shards
    )
    if leaf.dtype not in KEY_TYPES:
        return array
    return jax.random.wrap_key_data(array, impl=KEY_TYPES[leaf.dtype][0])


def _dtype(leaf: LeafDescription) -> Any:
    """What JAX calls the leaf's elements."""
    if leaf.dtype not in KEY_TYPES:
        return whole(leaf).dtype
    impl, _ = KEY_TYPES[leaf.dtype]
    return jax.eval_shape(lambda: jax.random.key(0, impl=impl)).dtype
