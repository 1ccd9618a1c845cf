"""A checkpoint read by windows: mapped, as sharded arrays, or into a plan's leaves."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from shardinit.core.ir.jaxpr import is_key, key_impl
from shardinit.core.paths import glob, keys_of, nested
from shardinit.core.plan import sharding as sh
from shardinit.core.plan.leaf_info import LeafInfo
from shardinit.core.plan.mesh import one_device
from shardinit.core.plan.plan import Plan
from shardinit.core.plan.rules import Rules
from shardinit.core.prng.root_key import KeyLike
from shardinit.core.run.completion import restore_into
from shardinit.core.run.settling import Allowed
from shardinit.errors import CheckpointError
from shardinit.storage import hf
from shardinit.storage.layout import File, read_files
from shardinit.storage.naming import Names, restored
from shardinit.storage.windows import LARGEST, windows


def open(folder: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint by path, mapped into memory: nothing is read yet.

    Raises:
      CheckpointError: the folder has no whole checkpoint.

    Example:
      >>> import tempfile
      >>> from shardinit.storage import safetensors
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     safetensors.write(f"{folder}/ckpt", {"w": np.ones((8, 32), np.float32)})
      ...     safetensors.open(f"{folder}/ckpt")["w"].sum()
      np.float32(256.0)
    """
    found: dict[str, np.ndarray] = {}
    for file in read_files(folder):
        found |= _mapped(folder, file)
    return found


def _mapped(folder: str | os.PathLike[str], file: File) -> dict[str, np.ndarray]:
    """The tensors of one file by path, mapped into memory."""
    mapped = np.memmap(os.path.join(os.fspath(folder), file.name), np.uint8, "r")
    found = {}
    for tensor in file.tensors:
        data = mapped[tensor.offset : tensor.offset + tensor.nbytes]
        if tensor.offset % tensor.dtype.itemsize:
            data = np.array(data)  # of another writer, who did not align
        found[tensor.path] = data.view(tensor.dtype).reshape(tensor.shape)
    return found


def read_windows(
    folder: str | os.PathLike[str], max_bytes: int = LARGEST
) -> Iterator[tuple[str, tuple[int, ...], np.ndarray]]:
    """The tensors of a checkpoint as windows: path, start and elements.

    Raises:
      CheckpointError: the folder has no whole checkpoint.

    Example:
      >>> import tempfile
      >>> from shardinit.storage import safetensors
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     safetensors.write(f"{folder}/ckpt", {"w": np.ones((8, 32), np.float32)})
      ...     [start for _, start, _ in safetensors.read_windows(f"{folder}/ckpt", 512)]
      [(0, 0), (4, 0)]
    """
    arrays = open(folder)
    for file in read_files(folder):
        for window in windows(file, max_bytes):
            part = arrays[window.tensor.path][window.region.slices]
            yield window.tensor.path, window.region.start, part


def load(
    folder: str | os.PathLike[str],
    *,
    mesh: Any = None,
    rules: Rules | None = None,
) -> dict[str, Any]:
    """A checkpoint as sharded arrays; each device reads its own shard from the files.

    Args:
      folder: of any checkpoint in this format.
      mesh: the devices; default the first one.
      rules: ``PathRules`` or ``fsdp(...)``; default ``fsdp()`` over all axes.

    Returns:
      Nested dicts of jax arrays, a level for each key of the paths.

    Raises:
      CheckpointError: the folder has no whole checkpoint, or paths that are no tree.
      ShardingError: rules that do not fit.

    Example:
      >>> import tempfile
      >>> from shardinit.storage import safetensors
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     safetensors.write(f"{folder}/ckpt", {"w": np.ones((8, 32), np.float32)})
      ...     safetensors.load(f"{folder}/ckpt")["w"].shape
      (8, 32)
    """
    arrays = open(folder)
    if mesh is None:
        mesh = one_device()
    infos = [LeafInfo(path, array.shape, array.dtype) for path, array in arrays.items()]
    shardings = sh.resolve(infos, mesh, rules)
    for path in arrays:
        ends = (at for at, letter in enumerate(path) if letter == "/")
        if any(path[:end] in arrays for end in ends):
            raise CheckpointError(f"tensor {path!r}", "it lies inside another tensor")
    made = [
        jax.make_array_from_callback(
            # A copy: JAX on CPU takes over numpy's memory where it can
            # (https://github.com/jax-ml/jax/issues/37830), and this is the file's.
            array.shape,
            sharding,
            lambda index, array=array: np.array(array[index]),
        )
        for array, sharding in zip(arrays.values(), shardings, strict=True)
    ]
    return nested(map(keys_of, arrays), made)


def restore(
    folder: str | os.PathLike[str],
    plan: Plan,
    *,
    key: KeyLike | None = None,
    names: Names | None = None,
    config: Any = None,
    **allowed: Any,
) -> Any:
    """A checkpoint in the leaves of a plan; each device reads its own shard.

    Args:
      folder: of any checkpoint in this format.
      plan: where each leaf will lie, and what the checkpoint may lack: that is
        initialised, such as the optimizer of parameters that were written alone.
      key: for leaves that the checkpoint lacks; needed if one is drawn.
      names: how the checkpoint names and shapes its tensors, as ``write`` takes it;
        each device reads the windows of them that make its shard.
      config: for ``names="hf"``; default the folder's ``config.json``.
      **allowed: ``missing=``, ``unexpected=``, ``grow=``, ``shrink=``, ``cast=`` and
        ``paths=`` as for ``shardinit.plan_missing``.

    Returns:
      What ``init`` would return, in the user's own classes.

    Raises:
      CheckpointError: the folder has no whole checkpoint.
      StructureMismatchError: the checkpoint does not fit the plan.

    Example:
      >>> import jax, shardinit, tempfile
      >>> from shardinit.storage import safetensors
      >>> plan = shardinit.plan(lambda key: {"w": jax.random.normal(key, (8, 32))})
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     safetensors.write(f"{folder}/ckpt", {"w": np.ones((8, 32), np.float32)})
      ...     safetensors.restore(f"{folder}/ckpt", plan)["w"].shape
      (8, 32)
    """
    opened: Mapping[str, Any] = open(folder)
    if names is not None:
        of = {leaf.path: tuple(leaf.shape) for leaf in plan.leaves}
        shapes = {path: of[own] for path, own in plan.unboxed.items()}
        opened = open_leaves(folder, shapes, names=names, config=config)
    arrays = dict(zip(plan.paths_of(opened), opened.values(), strict=True))
    impls = {x.path: key_impl(x.dtype) for x in plan.leaves if is_key(x.dtype)}
    found: dict[str, Any] = dict(arrays)
    for leaf in plan.leaves:
        words = found.get(leaf.path)
        if leaf.path in impls and words is not None and words.dtype == np.uint32:
            found[leaf.path] = jax.ShapeDtypeStruct(words.shape[:-1], leaf.dtype)

    def read(wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        return {
            path: _sharded(arrays[path], leaf.sharding, impls.get(path))
            for path, leaf in wanted.items()
        }

    return restore_into(plan, found, read, key, Allowed(**allowed))


def _sharded(array: Any, sharding: NamedSharding, impl: str | None) -> jax.Array:
    """A leaf from what is mapped; of a typed key, whose words are the last axis."""
    spec = sharding.spec
    if impl is not None:
        spec = PartitionSpec(*spec, *[None] * (array.ndim - len(spec)))
    made = jax.make_array_from_callback(
        array.shape,
        NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind),
        # a copy of what is mapped: JAX would take the file's own memory
        lambda index: np.require(array[index], None, ["O"]),
    )
    return made if impl is None else jax.random.wrap_key_data(made, impl=impl)


def open_leaves(
    folder: str | os.PathLike[str],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    names: Names,
    config: Any = None,
) -> dict[str, Any]:
    """The leaves of a model as a folder of another naming has them.

    Args:
      folder: of any checkpoint in this format.
      shapes: of the model's leaves, by path.
      names: how the checkpoint names and shapes its tensors, as ``write`` takes it.
      config: for ``names="hf"``; default the folder's ``config.json``.

    Returns:
      What has a shape, a dtype and, by slices, windows that are read when they are
      asked for: by path, and by name for tensors that make no leaf.

    Raises:
      CheckpointError: the folder has no whole checkpoint, or a leaf in part.
      SelectError: names that do not fit the leaves.

    Example:
      >>> import tempfile
      >>> from shardinit.storage import safetensors
      >>> weights = {"w": np.ones((8, 32), np.float32)}
      >>> names, shapes = {"w": "linear.weight : transpose"}, {"w": (8, 32)}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     safetensors.write(f"{folder}/a", weights, names=names)
      ...     found = safetensors.open_leaves(f"{folder}/a", shapes, names=names)
      ...     found["w"][0:2, 0:3].shape
      (2, 3)
    """
    tensors = {}
    for file in read_files(folder):
        mapped = _mapped(folder, file)
        tensors |= {tensor.name: mapped[tensor.path] for tensor in file.tensors}
    described = folder if config is None and names == "hf" else config
    idle: Sequence[str] = ()
    if any("/" in path for path in shapes) and described is not None:
        described = hf.read_config(described)
        idle = hf.idle(described)
    found, left = restored(shapes, tensors, names, described)
    return {**found, **{name: tensors[name] for name in _without(left, idle)}}


def _without(names: Iterable[str], globs: Sequence[str]) -> list[str]:
    """The names that no glob matches."""
    passed = [glob(pattern) for pattern in globs]
    return [name for name in names if not any(matches(name) for matches in passed)]
