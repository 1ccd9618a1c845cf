"""Mapped leaves: what a restored tree has under other paths, in other shapes.

Lines of ``restored -> model`` (`renames`) say which leaves of a restored tree make
which leaves of a model. A leaf that only changes its path stays the array that it is.
Any other is read where it will lie: a device's shard, from windows of what is there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import NamedSharding

from shardinit.core.ir.jaxpr import is_key
from shardinit.core.region import Region
from shardinit.core.run.parts import Tensor
from shardinit.core.run.renames import Lines, Rename, renames_of
from shardinit.core.run.tensors import tensors
from shardinit.core.types import DType
from shardinit.errors import SelectError, StructureMismatchError


@dataclass(frozen=True, eq=False)
class Mapped:
    """A leaf of a model, of leaves that a restored tree has under other paths.

    Attributes:
      tensor: which parts of which leaves it is.
      arrays: those leaves by path; shapes and dtypes alone do for a plan.
      same: it is one of them as it is, and no other leaf is of that one.
    """

    tensor: Tensor
    arrays: Mapping[str, Any]
    same: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the leaf, as the restored tree has it."""
        return self.tensor.shape

    @property
    def dtype(self) -> DType:
        """Of the leaf, as the restored tree has it."""
        return next(iter(self.arrays.values())).dtype

    @property
    def change(self) -> str:
        """What becomes of it, for people."""
        first, *others = self.arrays
        text = f"from {first}" + (f" and {len(others):,} more" if others else "")
        noise = self.tensor.noise
        return text + (f" with noise {noise:g}" if noise else "")

    def of(self, arrays: Mapping[str, Any]) -> Mapped:
        """The same leaf, of arrays that have been read by now."""
        return replace(
            self, arrays={x: arrays.get(x, y) for x, y in self.arrays.items()}
        )

    def placed(self, sharding: NamedSharding) -> Any:
        """The leaf; where it has to be made, each device reads its own shard."""
        if self.same:
            return next(iter(self.arrays.values()))

        def shard(index: Any) -> np.ndarray:
            region = Region.of_slices(index, self.shape)
            made = self.tensor.read(region.start, region.shape, self.dtype, self._read)
            return np.ascontiguousarray(made)

        # Not ``device_put`` of the leaf: that would need all of it on the host at once.
        made = jax.make_array_from_callback(self.shape, sharding, shard)
        # The host's windows go with the transfer: those of one leaf at a time.
        return jax.block_until_ready(made)

    def _read(
        self, path: str, start: tuple[int, ...], shape: tuple[int, ...]
    ) -> np.ndarray:
        array, region = self.arrays[path], Region(start, shape)
        if isinstance(array, jax.Array):
            return _of_shards(path, array, region)
        return np.asarray(array[region.slices])


def _of_shards(path: str, array: jax.Array, region: Region) -> np.ndarray:
    """A window of an array, of the shards of it that this process holds."""
    out, seen, there = np.empty(region.shape, array.dtype), set(), 0
    for shard in array.addressable_shards:
        place = Region.of_slices(shard.index, array.shape)
        both = place.overlap(region)
        if place in seen or not both.size:
            continue
        seen.add(place)
        there += both.size
        # Sliced where it lies: of a whole shard JAX would keep the copy on the host.
        host = shard.device.platform == "cpu"
        part, into = both.seen_from(place), both.seen_from(region).slices
        if host:
            out[into] = np.asarray(shard.data)[part.slices]
        else:
            out[into] = lax.dynamic_slice(shard.data, part.start, part.shape)
    if there != region.size:
        raise StructureMismatchError(
            f"leaf {path!r}",
            "another process holds a part of it that this one's shards are made of",
            "an array whose shards are all in this process, or numpy",
            "Restore it from its folder: storage.safetensors.restore(..., paths=...)",
        )
    return out


def mapped(
    present: Mapping[str, Any], paths: Lines, model: Collection[str]
) -> dict[str, Any]:
    """What is there, by the paths of the model as far as lines give them.

    Args:
      present: what has shape and dtype, by path of the restored tree.
      paths: lines of ``restored -> model``.
      model: the model's paths.

    Raises:
      SelectError: lines that are none, do not fit, or make what is there already.
      StructureMismatchError: leaves of several dtypes make one, or keys do.
    """
    lines = renames_of(paths, "paths")
    if not lines:
        return dict(present)
    shapes = {path: tuple(np.shape(x)) for path, x in present.items()}
    made = tensors(lines, shapes, every_leaf=False)
    users = _users(made.values())
    stays = {x for x in users if x in model and x not in made and _copied(x, lines)}
    out = {path: x for path, x in present.items() if path not in users or path in stays}
    for name, tensor in made.items():
        if name in out:
            raise SelectError(
                f"paths={_line(tensor, lines)!r}",
                f"it makes {name!r}, which is there itself",
                "paths that the restored tree does not have",
                "Take that leaf out of the tree, or give it a line of its own",
            )
        out[name] = _leaf(name, tensor, present, users, stays)
    return out


def _users(made: Iterable[Tensor]) -> dict[str, set[str]]:
    """For each leaf that is there the names of what is made of it."""
    users: dict[str, set[str]] = {}
    for tensor in made:
        for part in tensor.parts:
            users.setdefault(part.path, set()).add(tensor.name)
    return users


def _leaf(
    name: str,
    tensor: Tensor,
    present: Mapping[str, Any],
    users: Mapping[str, set[str]],
    stays: Collection[str],
) -> Mapped:
    arrays = {part.path: present[part.path] for part in tensor.parts}
    path = tensor.parts[0].path
    alone = len(users[path]) == 1 and path not in stays
    same = tensor.parts == Tensor.alone(path, tensor.shape, name).parts
    for source, array in arrays.items():
        if not hasattr(array, "dtype"):
            got = f"got {type(array).__name__}"
            raise StructureMismatchError(f"leaf {source!r}", got, "an array")
    dtypes = {array.dtype for array in arrays.values()}
    keys = any(map(is_key, dtypes))
    if len(dtypes) > 1 or (keys and not (same and alone)):
        raise StructureMismatchError(
            f"leaf {name!r}",
            f"it is made of {path!r} and others, of {sorted(map(str, dtypes))}",
            "keys that only change their path" if keys else "leaves of one dtype",
        )
    return Mapped(tensor, arrays, same and alone)


def _copied(path: str, lines: tuple[Rename, ...]) -> bool:
    """Whether a leaf only has lines that leave it where it is as well."""
    own = (line for line in lines if line.matched(path) is not None)
    return all("copy" in line.words for line in own)


def _line(tensor: Tensor, lines: tuple[Rename, ...]) -> str:
    path = tensor.parts[0].path
    return next(line.line for line in lines if line.matched(path) is not None)
