"""Naming: a checkpoint's tensors as another tool calls and shapes them.

``names`` says how the leaves of a model make the tensors of a file: ``"hf"`` for what
``transformers`` reads, or lines of ``leaf -> tensor`` (``core.run.renames``). Tensors
are computed of windows of leaves, and leaves of windows of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from shardinit.core.region import Region
from shardinit.core.run.parts import Part, Tensor, by_leaf, read_leaf
from shardinit.core.run.renames import Lines, Rename, renames_of
from shardinit.core.run.tensors import tensors
from shardinit.errors import CheckpointError
from shardinit.storage import hf
from shardinit.storage.sources import Leaf

Names = Lines
"""``"hf"``, lines of pairs, a file of them, or a mapping of leaves to tensors."""

_PARAMS = "params/"  # what the paths of parameters beside optimizer state begin with


class Renamed:
    """A tensor that is computed of windows of leaves: what a writer takes for a leaf.

    Attributes:
      name: of the tensor.
      path: the name with ``/`` between its keys.
      whole: why a window of it costs a leaf in full; empty if none does.
      shape, dtype: of the tensor.
    """

    def __init__(self, tensor: Tensor, leaves: Mapping[str, Leaf]):
        mine = [leaves[path] for path in dict.fromkeys(p.path for p in tensor.parts)]
        dtypes = {leaf.dtype for leaf in mine}
        if len(dtypes) > 1:
            raise CheckpointError(
                f"tensor {tensor.name!r}",
                f"its leaves are of {sorted(map(str, dtypes))}",
                "one dtype",
            )
        self.name = tensor.name
        self.path = tensor.name.replace(".", "/")
        self.whole = next((leaf.whole for leaf in mine if leaf.whole), "")
        self.shape = tensor.shape
        self.dtype = mine[0].dtype
        self._tensor, self._leaves = tensor, leaves

    def read(self, start: Sequence[int], shape: Sequence[int]) -> np.ndarray:
        """The window of ``shape`` that begins at ``start``."""
        return self._tensor.read(
            start, shape, self.dtype, lambda path, a, n: self._leaves[path].read(a, n)
        )


def renamed(leaves: Sequence[Leaf], names: Names, config: Any) -> list[Renamed]:
    """Leaves as the tensors that they make.

    Raises:
      CheckpointError: leaves of two dtypes in one tensor.
      SelectError: lines that are none, or do not fit the leaves.
    """
    by_path = {leaf.path: leaf for leaf in leaves}
    shapes = {leaf.path: leaf.shape for leaf in leaves}
    made = named(shapes, names, config, every=True)
    # In the order of layers, however they are laid out: the files are the same.
    order = sorted(made, key=lambda name: [_order(key) for key in name.split(".")])
    return [Renamed(made[name], by_path) for name in order]


def _order(key: str) -> tuple[bool, int, str]:
    """Numbers by their value, before other keys."""
    return not key.isdecimal(), int(key) if key.isdecimal() else 0, key


def named(
    shapes: Mapping[str, tuple[int, ...]], names: Names, config: Any, *, every: bool
) -> dict[str, Tensor]:
    """The tensors that leaves make, by name.

    Args:
      shapes: of the leaves, by path.
      names: ``"hf"`` or lines.
      config: what describes the model, for ``"hf"``.
      every: whether a leaf that has no name is refused.
    """
    if names != "hf":
        return tensors(_lines(names), shapes, every_leaf=every)
    if not any("/" in path for path in shapes):  # the names of a torch module
        return {path: Tensor.alone(path, shape, path) for path, shape in shapes.items()}
    if config is None:
        raise CheckpointError(
            'names="hf"', "got no config", "config=, such as a model's config.json"
        )
    bare = {x.removeprefix(_PARAMS): x for x in shapes}
    inner = {short: shapes[path] for short, path in bare.items()}
    lines = hf.lines_for(hf.read_config(config), inner)
    made = tensors(lines, inner, every_leaf=every, every_line=False)
    return {name: _back(tensor, bare) for name, tensor in made.items()}


def _back(tensor: Tensor, paths: Mapping[str, str]) -> Tensor:
    parts = tuple(replace(part, path=paths[part.path]) for part in tensor.parts)
    return replace(tensor, parts=parts)


def _lines(names: Names) -> tuple[Rename, ...]:
    """A user's own lines; a file holds the leaves' own numbers and no others."""
    lines = renames_of(names, "names")
    for line in lines:
        if line.noise:
            raise line.fault("noise", "numbers of the leaf alone")
    return lines


# ---- the way back --------------------------------------------------------------------


@dataclass(frozen=True)
class Restored:
    """A leaf whose windows are read from the tensors that it is of.

    Attributes:
      shape, dtype: what the file has of it.
      read: the window of a start and a shape.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Sequence[int], Sequence[int]], np.ndarray]

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        region = Region.of_slices(index, self.shape)
        return self.read(region.start, region.shape)


def restored(
    shapes: Mapping[str, tuple[int, ...]],
    arrays: Mapping[str, np.ndarray],
    names: Names,
    config: Any,
) -> tuple[dict[str, Restored], list[str]]:
    """Leaves as they can be read from a file of another naming.

    Args:
      shapes: of the leaves that are wanted, by path.
      arrays: the file's tensors, by name; nothing is read but windows.
      names: as ``renamed`` takes them.
      config: what describes the model, for ``"hf"``.

    Returns:
      The leaves that are there, by path, and the names of tensors that make none.

    Raises:
      CheckpointError: a leaf that is there in part, or of another shape.
    """
    made = named(shapes, names, config, every=False)
    there, left = _in_file(made, arrays)

    def read(name: str, start: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
        return arrays[there[name]][Region(start, shape).slices]

    found = {}
    for path, parts in by_leaf(made.values()).items():
        mine = dict.fromkeys(part.tensor for part in parts)
        lacking = [name for name in mine if name not in there]
        if len(lacking) == len(mine):
            continue
        if lacking:
            raise CheckpointError(
                f"leaf {path!r}",
                f"{len(lacking)} of its {len(mine)} tensors are not there",
                f"all, {lacking[0]!r} among them",
            )
        shape = shapes[path]
        for name in mine:
            got = arrays[there[name]].shape
            if got != made[name].shape:
                shape = _other_shape(parts, got, made[name])
        if shape != shapes[path]:
            parts = [replace(part, shape=shape) for part in parts]
        dtype = arrays[there[parts[0].tensor]].dtype
        found[path] = Restored(
            shape,
            dtype,
            lambda start, shape, parts=parts, dtype=dtype: read_leaf(
                parts, start, shape, dtype, read
            ),
        )
    return found, left


def _in_file(
    made: Mapping[str, Tensor], there: Iterable[str]
) -> tuple[dict[str, str], list[str]]:
    """Names in the file by those of the tensors, and names that no leaf makes.

    A checkpoint of a model without its head has names without their first key.
    """
    left = dict.fromkeys(there)
    found = {name: name for name in made if name in left}
    if not found:
        short = {name: name.partition(".")[2] for name in made}
        found = {name: inner for name, inner in short.items() if inner in left}
    used = set(found.values())
    return found, [name for name in left if name not in used]


def _other_shape(
    parts: Sequence[Part], got: tuple[int, ...], tensor: Tensor
) -> tuple[int, ...]:
    """The shape of a leaf whose tensor has another: a vocabulary that grew."""
    (part, *others) = parts
    plain = not part.lead and set(part.lens) <= {1} and len(tensor.parts) == 1
    if others or not plain or len(got) != len(part.shape):
        raise CheckpointError(
            f"tensor {tensor.name!r}", f"it has shape {got}", f"{tensor.shape}"
        )
    return got[::-1] if part.swap else got
