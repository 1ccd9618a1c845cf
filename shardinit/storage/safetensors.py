"""safetensors: written by windows, so that a model larger than memory can be written.

Where every tensor lies is known beforehand (``layout``), so a checkpoint is filled
window by window: each is computed or copied, checksummed, written to its place and
forgotten. Windows are whole rows of a leaf, equal in shape as far as they can be, since
windows of one shape share one executable.

The folder has its name when it is complete and not before, and a writer that was killed
is taken over by the next (``unfinished``).
"""

from __future__ import annotations

import builtins
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from shardinit.core.ir.jaxpr import is_key, key_impl
from shardinit.core.paths import keys_of, nested
from shardinit.core.plan import sharding as sh
from shardinit.core.plan.leaf_info import LeafInfo
from shardinit.core.plan.mesh import one_device
from shardinit.core.plan.plan import Plan
from shardinit.core.plan.rules import Rules
from shardinit.core.prng.root_key import KeyLike
from shardinit.core.run.completion import Allowed, restore_into
from shardinit.core.run.lazy import LazyTree
from shardinit.errors import CheckpointError
from shardinit.storage.filling import WORKERS, OnWindow, Writer, compare
from shardinit.storage.layout import (
    INDEX,
    SINGLE,
    File,
    index_json,
    parse_size,
    plan_files,
    read_files,
    tensor_name,
)
from shardinit.storage.sources import Leaf as Leaf
from shardinit.storage.sources import leaves_of, nbytes_of
from shardinit.storage.unfinished import check_free, unfinished
from shardinit.storage.windows import windows

# Windows in memory at a time: computed or waiting to be seen, and their temporaries.
_HELD = 4 * WORKERS
_LARGEST_WINDOW = 64 << 20


def write(
    folder: str | os.PathLike[str],
    source: Any,
    *,
    max_shard_size: int | str = "5GB",
    max_memory: int | str = "1GiB",
    name: Callable[[str], str] = tensor_name,
    on_window: OnWindow | None = None,
    before_publish: Callable[[], None] | None = None,
    anew: bool = False,
) -> None:
    """Writes a checkpoint; takes over where an earlier call was killed.

    Args:
      folder: the checkpoint's folder. Where the same checkpoint is there already, it is
        compared, window by window, and nothing is written.
      source: a ``LazyTree`` from ``shardinit.open``, which may be larger than memory;
        or a pytree of jax or numpy arrays. Typed keys are kept as their key data.
      max_shard_size: bytes of tensors in a file.
      max_memory: bytes that the windows in memory may take, beyond what the process
        and ``source`` hold already.
      name: from a leaf's path to the tensor's name; default: dots between the keys.
      on_window: called in this thread with path, start and elements of every window,
        those of an earlier call too, such as ``Digester.add``.
      before_publish: called when all is written, before the folder gets its name.
      anew: what an earlier call left of something else is removed, not refused.

    Raises:
      CheckpointError: something else is there, or it is being written by another
        process or was begun with something else (unless ``anew``); a leaf whose dtype
        the format lacks, that is not there in full in this process, or needs more
        memory; the disk is full.

    Example:
      >>> import jax, shardinit, tempfile
      >>> from shardinit.storage import safetensors
      >>> init = lambda key: {"w": jax.random.normal(key, (64, 32))}
      >>> weights = shardinit.open(init, 0)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     safetensors.write(f"{folder}/ckpt", weights)  # window by window
    """
    target = Path(os.path.abspath(folder))
    window_bytes = min(parse_size(max_memory, "max_memory") // _HELD, _LARGEST_WINDOW)
    shard = parse_size(max_shard_size, "max_shard_size")
    leaves = leaves_of(source)
    for leaf in leaves:
        if leaf.whole and nbytes_of(leaf) > parse_size(max_memory, "max_memory"):
            raise CheckpointError(
                f"leaf {leaf.path!r}",
                f"any window of it needs the whole leaf ({leaf.whole}), "
                f"{nbytes_of(leaf):,} bytes",
                f"at most max_memory={max_memory}",
            )
    files = plan_files([(x.path, x.shape, x.dtype) for x in leaves], shard, name)
    by_path = {leaf.path: leaf for leaf in leaves}
    if os.path.exists(target / SINGLE) or os.path.exists(target / INDEX):
        compare(target, files, by_path, window_bytes, on_window)
        if before_publish is not None:
            before_publish()
        return
    check_free(target)
    lazy = isinstance(source, LazyTree)
    what = _identity(files, source.identity if lazy else "arrays")
    try:
        with unfinished(target, what, anew=anew) as begun:
            _check_room(begun.folder, files)
            writer = Writer(begun, by_path, window_bytes, trusted=lazy)
            for file in files:
                writer.write(file, on_window)
            if len(files) > 1:
                _write_index(begun.folder, files)
            if before_publish is not None:
                before_publish()
            begun.publish()
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {str(target)!r}",
            f"it cannot be written ({error.strerror or error})",
            remedy="What is written so far is kept; the next call goes on",
        ) from error


def _write_index(folder: Path, files: Sequence[File]) -> None:
    with builtins.open(folder / INDEX, "w", encoding="utf-8") as index:
        index.write(index_json(files))
        index.flush()
        os.fsync(index.fileno())


def _check_room(folder: Path, files: Sequence[File]) -> None:
    held = sum(x.stat().st_blocks * 512 for x in folder.iterdir())
    needed = sum(file.size for file in files) - held
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"checkpoint {str(folder)!r}",
            f"{needed:,} bytes are still to be written",
            f"no more than the {free:,} that are free",
        )


def _identity(files: Sequence[File], source: str) -> str:
    """What is being written: the layout and, where it is known, the values."""
    hashed = hashlib.sha256(source.encode())
    for file in files:
        hashed.update(json.dumps(file.name).encode() + file.header)
    return hashed.hexdigest()


# ---- reading -------------------------------------------------------------------------


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
        path = os.path.join(os.fspath(folder), file.name)
        mapped = np.memmap(path, np.uint8, "r")
        for tensor in file.tensors:
            data = mapped[tensor.offset : tensor.offset + tensor.nbytes]
            if tensor.offset % tensor.dtype.itemsize:
                data = np.array(data)  # of another writer, who did not align
            found[tensor.path] = data.view(tensor.dtype).reshape(tensor.shape)
    return found


def read_windows(
    folder: str | os.PathLike[str], max_bytes: int = _LARGEST_WINDOW
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
    infos = [
        LeafInfo(path, array.shape, array.dtype.itemsize)
        for path, array in arrays.items()
    ]
    shardings = sh.resolve(infos, mesh, rules)
    for path in arrays:
        ends = (at for at, letter in enumerate(path) if letter == "/")
        if any(path[:end] in arrays for end in ends):
            raise CheckpointError(f"tensor {path!r}", "it lies inside another tensor")
    made = [
        jax.make_array_from_callback(
            array.shape, sharding, lambda index, array=array: np.array(array[index])
        )
        for array, sharding in zip(arrays.values(), shardings, strict=True)
    ]
    return nested(map(keys_of, arrays), made)


def restore(
    folder: str | os.PathLike[str],
    plan: Plan,
    *,
    key: KeyLike | None = None,
    **allowed: Any,
) -> Any:
    """A checkpoint in the leaves of a plan; each device reads its own shard.

    Args:
      folder: of any checkpoint in this format.
      plan: where each leaf will lie, and what the checkpoint may lack: that is
        initialised, such as the optimizer of parameters that were written alone.
      key: for leaves that the checkpoint lacks; needed if one is drawn.
      **allowed: ``missing=``, ``unexpected=``, ``grow=``, ``shrink=`` and ``cast=`` as
        for ``shardinit.plan_missing``.

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
    arrays = open(folder)
    impls = {x.path: key_impl(x.dtype) for x in plan.leaves if is_key(x.dtype)}
    found: dict[str, Any] = {
        path: jax.ShapeDtypeStruct(array.shape, array.dtype)
        for path, array in arrays.items()
    }
    for leaf in plan.leaves:
        words = found.get(leaf.path)
        if leaf.path in impls and words is not None and words.dtype == np.uint32:
            found[leaf.path] = jax.ShapeDtypeStruct(words.shape[:-1], leaf.dtype)

    def read(wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        made = {}
        for path, leaf in wanted.items():
            array, spec = arrays[path], leaf.sharding.spec
            if path in impls:  # the words of a key are a last axis
                spec = PartitionSpec(*spec, *[None] * (array.ndim - len(spec)))
            place = NamedSharding(
                leaf.sharding.mesh, spec, memory_kind=leaf.sharding.memory_kind
            )
            made[path] = jax.make_array_from_callback(
                array.shape, place, lambda index, array=array: np.array(array[index])
            )
            if path in impls:
                made[path] = jax.random.wrap_key_data(made[path], impl=impls[path])
        return made

    return restore_into(plan, found, read, key, Allowed(**allowed))
