"""Whether weights are those of a plan at a key, before a receipt says so.

A receipt of the wrong weights is worse than none. Computing all of them again would
cost what the initialisation cost; two small windows of each leaf find another seed,
another function and leaves that were swapped.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from shardinit.core.paths import named_leaves
from shardinit.core.plan.mesh import alone_on, one_device
from shardinit.core.plan.plan import Plan
from shardinit.core.region import Region
from shardinit.core.run.lazy import LazyArray
from shardinit.core.run.lazy import open as open_lazily
from shardinit.errors import ReceiptMismatchError
from shardinit.verify.digest.devices import Digester, as_array
from shardinit.verify.digest.host import Digest

WINDOW = 8  # elements along each of the last two axes of a window
RECOMPUTED_BYTES = 1 << 20  # of a leaf that is known by its digest
FULL_BYTES = 1 << 26  # of a leaf of which any window costs all of it


def hold_against(
    plan: Plan,
    key: Any,
    params: Any,
    found: Digest,
    kept: Collection[str],
    device: Any,
) -> None:
    """Holds weights against what a plan makes.

    Args:
      plan: what is said to have made them.
      key: the key, or the int seed, that it was run with.
      params: the weights, or their digest.
      found: their digest.
      kept: paths of leaves that something else made.
      device: where windows are computed: one that holds the weights.

    Raises:
      ReceiptMismatchError: leaves are missing or extra, or have another shape, dtype
        or value. Its ``differences`` name each of them.
    """
    names = dict(zip(plan.paths_of(found.kinds), found.kinds, strict=True))
    made_by = open_lazily(plan, key, device=device)
    lazy = {names.get(path, path): leaf for path, leaf in made_by.items()}
    differences = list(_kinds(lazy, found, kept))
    if not differences:
        made = {path: lazy[path] for path in found.leaves if path not in kept}
        held = {p: leaf for p, leaf in made.items() if _can_be_held(plan, leaf)}
        differing = _differing(held, params, found)
        differences = [f"{path!r} has other values" for path in differing]
    if differences:
        some = "; ".join(differences[:5])
        if len(differences) > 5:
            some += f"; and {len(differences) - 5} more"
        raise ReceiptMismatchError(
            f"receipt of {plan.name!r}",
            f"the weights are not those of this plan at this key: {some}",
            "what the plan makes of the key",
            "Pass the plan and the key that made them; leaves from elsewhere: kept=",
            differences=differences,
        )


def _kinds(
    lazy: Mapping[str, LazyArray], found: Digest, kept: Collection[str]
) -> Iterator[str]:
    """What differs in names, shapes and dtypes."""
    for path, leaf in lazy.items():
        if path not in found.kinds:
            if path not in kept:
                yield f"{path!r} is missing"
            continue
        shape, dtype = found.kinds[path]
        if shape != leaf.shape:
            yield f"{path!r} has shape {shape}, not {leaf.shape}"
        elif dtype != leaf.dtype.name:
            yield f"{path!r} has dtype {dtype}, not {leaf.dtype.name}"
    for path in found.kinds:
        if path not in lazy:
            yield f"{path!r} is extra"


def _differing(held: Mapping[str, LazyArray], params: Any, found: Digest) -> list[str]:
    """Paths of leaves of other values; of a digest alone, of small leaves only."""
    if params is found:
        return [p for p, leaf in held.items() if _digest_differs(p, leaf, found)]
    arrays = dict(named_leaves(params))
    return [p for p, leaf in held.items() if _windows_differ(leaf, arrays[p])]


def _can_be_held(plan: Plan, leaf: LazyArray) -> bool:
    if leaf.whole and plan.whole_mode == "gspmd":
        return False  # its bits are the compiler's
    return not leaf.whole or leaf.nbytes <= FULL_BYTES


def _digest_differs(path: str, leaf: LazyArray, found: Digest) -> bool:
    if leaf.nbytes > RECOMPUTED_BYTES:
        return False
    digester = Digester({path: (leaf.shape, leaf.dtype)})
    digester.add(path, (0,) * leaf.ndim, np.asarray(leaf))
    return digester.digest().leaves[path] != found.leaves[path]


def _windows_differ(leaf: LazyArray, value: Any) -> bool:
    return any(
        _bytes(window) != _bytes(leaf.read(region.start, region.shape))
        for region, window in _windows(as_array(leaf.path, value))
    )


def _bytes(array: np.ndarray) -> bytes:
    # Bytes, not ``==``: by that NaN differs from itself, and -0.0 equals 0.0.
    return np.ascontiguousarray(array).tobytes()


def _windows(array: Any) -> Iterator[tuple[Region, np.ndarray]]:
    """The first and the last corner of what this process holds of an array."""
    if not array.size:
        return
    if isinstance(array, np.ndarray):
        shards = [(Region.full(array.shape), array)]
    else:
        shards = [
            (Region.of_slices(shard.index, array.shape), shard.data)
            for shard in array.addressable_shards
        ]
    sides = _sides(shards[0][1].shape)
    yield _window(*shards[0], Region((0,) * array.ndim, sides))
    shard, data = shards[-1]
    last = tuple(n - side for n, side in zip(data.shape, sides, strict=True))
    yield _window(shard, data, Region(last, sides))


def _sides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """One element along all axes but the last two."""
    rank = len(shape)
    return tuple(min(n, WINDOW if rank - i <= 2 else 1) for i, n in enumerate(shape))


def _window(shard: Region, data: Any, part: Region) -> tuple[Region, np.ndarray]:
    """Where a part of a shard lies in the whole array, and its elements."""
    place = part.within(shard)
    if isinstance(data, np.ndarray):
        return place, data[part.slices]
    with alone_on(one_device(next(iter(data.devices())))):
        return place, np.asarray(data[part.slices])
