"""A checkpoint written by windows, so that a model larger than memory can be written.

Where every tensor lies is known beforehand (``layout``), so a checkpoint is filled
window by window: each is computed or copied, checksummed, written to its place and
forgotten. Windows are whole rows of a leaf, equal in shape as far as they can be, since
windows of one shape share one executable.

The folder has its name when it is complete and not before, and a writer that was killed
is taken over by the next (``unfinished``).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shardinit.core.run.lazy import LazyTree
from shardinit.errors import CheckpointError
from shardinit.files import write_file
from shardinit.storage import hf
from shardinit.storage.filling import WORKERS, OnWindow, Writer, compare
from shardinit.storage.layout import (
    INDEX,
    SINGLE,
    File,
    index_json,
    parse_size,
    plan_files,
    tensor_name,
)
from shardinit.storage.naming import Names, renamed
from shardinit.storage.sources import Leaf, leaves_of, nbytes_of
from shardinit.storage.unfinished import check_free, unfinished
from shardinit.storage.windows import LARGEST

# Windows in memory at a time: computed or waiting to be seen, and their temporaries.
_HELD = 4 * WORKERS


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
    publish = before_publish or (lambda: None)
    window_bytes = min(parse_size(max_memory, "max_memory") // _HELD, LARGEST)
    shard = parse_size(max_shard_size, "max_shard_size")
    leaves = leaves_of(source)
    _check_windows(leaves, max_memory)
    beside = _config_beside(leaves, names, config)
    if names is not None:
        leaves = renamed(_persistent(leaves, source, names), names, config)
        name = {leaf.path: leaf.name for leaf in leaves}.__getitem__
    files = plan_files([(x.path, x.shape, x.dtype) for x in leaves], shard, name)
    by_path = {leaf.path: leaf for leaf in leaves}
    if any((target / name).exists() for name in (SINGLE, INDEX)):
        _compare_beside(target, beside)
        compare(target, files, by_path, window_bytes, on_window)
        publish()
        return
    check_free(target)
    lazy = isinstance(source, LazyTree)
    what = _identity(files, source.identity if lazy else "arrays", beside)
    try:
        with unfinished(target, what, anew=anew) as begun:
            _check_room(begun.folder, files)
            writer = Writer(begun, by_path, window_bytes, trusted=lazy)
            _fill(begun.folder, writer, files, beside, on_window)
            publish()
            begun.publish()
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {str(target)!r}",
            f"it cannot be written ({error.strerror or error})",
            remedy="What is written so far is kept; the next call goes on",
        ) from error


def _config_beside(
    leaves: Sequence[Leaf], names: Names | None, config: Any
) -> dict[str, str]:
    """The ``config.json`` that ``transformers`` reads beside the tensors."""
    if names != "hf" or config is None:
        return {}
    given = hf.read_config(config)
    return {hf.CONFIG: hf.config_json(given, [leaf.dtype for leaf in leaves])}


def _persistent(leaves: list[Leaf], source: Any, names: Names) -> list[Leaf]:
    """Without the buffers that a torch module keeps out of its ``state_dict``."""
    init_fn = getattr(source, "init_fn", None)
    kept = getattr(init_fn, "persistent", None) if names == "hf" else None
    return leaves if kept is None else [leaf for leaf in leaves if leaf.path in kept]


def _check_windows(leaves: Sequence[Leaf], max_memory: int | str) -> None:
    """Refuses leaves of which any window takes more memory than there may be."""
    for leaf in leaves:
        if leaf.whole and nbytes_of(leaf) > parse_size(max_memory, "max_memory"):
            raise CheckpointError(
                f"leaf {leaf.path!r}",
                f"any window of it needs the whole leaf ({leaf.whole}), "
                f"{nbytes_of(leaf):,} bytes",
                f"at most max_memory={max_memory}",
            )


def _fill(
    folder: Path,
    writer: Writer,
    files: Sequence[File],
    beside: Mapping[str, str],
    on_window: OnWindow | None,
) -> None:
    """Writes the files of tensors, then the small ones beside them."""
    for file in files:
        writer.write(file, on_window)
    index = {INDEX: index_json(files)} if len(files) > 1 else {}
    for title, text in {**beside, **index}.items():
        write_file(folder / title, text.encode())


def _compare_beside(target: Path, beside: Mapping[str, str]) -> None:
    """Holds the small files of a checkpoint against what would be written."""
    for title, text in beside.items():
        path = target / title
        if not path.is_file() or path.read_text("utf-8") != text:
            raise CheckpointError.taken("checkpoint", target, f"another {title}")


def _check_room(folder: Path, files: Sequence[File]) -> None:
    # Not ``st_size``, which counts the holes of a file that is not filled yet. The unit
    # of ``st_blocks`` is 512 bytes whatever the disk's blocks are (stat(2)).
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
