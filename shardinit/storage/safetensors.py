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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
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
from shardinit.core.run.lazy import LazyTree
from shardinit.core.run.settling import Allowed
from shardinit.errors import CheckpointError
from shardinit.storage import hf
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
from shardinit.storage.naming import Names, Renamed, renamed, restored
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
    names: Names | None = None,
    config: Any = None,
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
      names: ``"hf"`` for the names and shapes that ``transformers`` reads: of the
        decoders of the registry, or of a flat dict with a torch module's names. Or
        lines of ``leaf -> tensor : transpose …`` (``core.run.renames``), a file of
        such, or a mapping. Windows then have the tensors' paths.
      config: what describes the model: a dict as ``config.json`` has it, a
        ``ModelSpec``, or a file; is written beside the tensors for ``names="hf"``.
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
    beside = {}
    if names is not None:
        if config is not None and names == "hf":
            given = hf.read_config(config)
            beside[hf.CONFIG] = hf.config_json(given, [leaf.dtype for leaf in leaves])
        leaves = renamed(_persistent(leaves, source, names), names, config)
        by_path = {leaf.path: leaf for leaf in leaves}
        files = _plan_renamed(leaves, shard)
    else:
        files = plan_files([(x.path, x.shape, x.dtype) for x in leaves], shard, name)
        by_path = {leaf.path: leaf for leaf in leaves}
    if os.path.exists(target / SINGLE) or os.path.exists(target / INDEX):
        _compare_beside(target, beside)
        compare(target, files, by_path, window_bytes, on_window)
        if before_publish is not None:
            before_publish()
        return
    check_free(target)
    lazy = isinstance(source, LazyTree)
    what = _identity(files, source.identity if lazy else "arrays", beside)
    try:
        with unfinished(target, what, anew=anew) as begun:
            _check_room(begun.folder, files)
            writer = Writer(begun, by_path, window_bytes, trusted=lazy)
            for file in files:
                writer.write(file, on_window)
            if len(files) > 1:
                beside[INDEX] = index_json(files)
            for title, text in beside.items():
                _write_text(begun.folder / title, text)
            if before_publish is not None:
                before_publish()
            begun.publish()
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {str(target)!r}",
            f"it cannot be written ({error.strerror or error})",
            remedy="What is written so far is kept; the next call goes on",
        ) from error


def _persistent(leaves: list[Leaf], source: Any, names: Names) -> list[Leaf]:
    """Without the buffers that a torch module keeps out of its ``state_dict``."""
    init_fn = getattr(source, "init_fn", None)
    kept = getattr(init_fn, "persistent", None) if names == "hf" else None
    return leaves if kept is None else [leaf for leaf in leaves if leaf.path in kept]


def _plan_renamed(leaves: Sequence[Renamed], shard: int) -> list[File]:
    """Files of tensors with the names that they have, which say their paths."""
    titles = {leaf.path: leaf.name for leaf in leaves}
    specs = [(leaf.path, leaf.shape, leaf.dtype) for leaf in leaves]
    return plan_files(specs, shard, titles.__getitem__)


def _write_text(path: Path, text: str) -> None:
    with builtins.open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _compare_beside(target: Path, beside: Mapping[str, str]) -> None:
    """Holds the small files of a checkpoint against what would be written."""
    for title, text in beside.items():
        path = target / title
        if not path.is_file() or path.read_text("utf-8") != text:
            raise CheckpointError.taken("checkpoint", target, f"another {title}")


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


def _identity(files: Sequence[File], source: str, beside: Mapping[str, str]) -> str:
    """What is being written: the layout and, where it is known, the values."""
    hashed = hashlib.sha256(source.encode())
    for text in beside.values():
        hashed.update(text.encode())
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
        made = {}
        for path, leaf in wanted.items():
            array, spec = arrays[path], leaf.sharding.spec
            if path in impls:  # the words of a key are a last axis
                spec = PartitionSpec(*spec, *[None] * (array.ndim - len(spec)))
            place = NamedSharding(
                leaf.sharding.mesh, spec, memory_kind=leaf.sharding.memory_kind
            )
            made[path] = jax.make_array_from_callback(
                array.shape,
                place,
                # a copy of what is mapped: JAX would take the file's own memory
                lambda index, array=array: np.require(array[index], None, ["O"]),
            )
            if path in impls:
                made[path] = jax.random.wrap_key_data(made[path], impl=impls[path])
        return made

    return restore_into(plan, found, read, key, Allowed(**allowed))


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
    if any("/" in path for path in shapes) and described is not None:
        described = hf.read_config(described)
        passed = [glob(pattern) for pattern in hf.idle(described)]
    else:
        passed = []
    found, left = restored(shapes, tensors, names, described)
    more = {name for name in left if not any(matches(name) for matches in passed)}
    return {**found, **{name: tensors[name] for name in more}}
