"""Layout: which tensor lies where in which file, as Hugging Face lays them out.

A safetensors file is eight bytes with the length of its header, the header (JSON: name,
dtype, shape and place of every tensor), and the tensors' bytes without a gap. Nothing
in it depends on a value, so the whole layout of a checkpoint is known before a single
number is, and its parts can be filled in any order.

A model larger than ``max_shard_size`` is cut into files of at most that size (a larger
tensor has a file of its own) named ``model-00001-of-00003.safetensors``, and
``model.safetensors.index.json`` says which file has which tensor.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from shardinit.core.leaf_spec import LeafSpec
from shardinit.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Where a file keeps the paths of tensors whose names do not say them.
PATHS = "shardinit.paths"
_MAX_HEADER = 100_000_000  # as the safetensors library has it
_DTYPES = {
    "BOOL": np.dtype(bool),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
    "C64": np.dtype(np.complex64),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


@dataclass(frozen=True)
class Tensor(LeafSpec):
    """One tensor of a checkpoint: the leaf that it is of, and where it stands.

    Attributes:
      name: what the file calls it.
      offset: of its first byte in the file.
    """

    name: str
    offset: int = 0


@dataclass(frozen=True)
class File:
    """One file of a checkpoint: its name, its header, its tensors and its size."""

    name: str
    header: bytes
    tensors: tuple[Tensor, ...]
    size: int


def parse_size(size: int | str, where: str) -> int:
    """Bytes, as a number or as text such as ``"5GB"`` or ``"512MiB"``.

    Raises:
      CheckpointError: it is neither, or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise CheckpointError(where, repr(size), "bytes, such as 5GB or 512MiB")
    return int(float(match[1]) * unit)


def tensor_name(path: str) -> str:
    """A leaf's path as a tensor's name: dots between the keys."""
    name = path.replace("/", ".").replace("~1", "/").replace("~0", "~")
    return name or "value"


def plan_files(
    leaves: Iterable[tuple[str, Sequence[int], Any]],
    max_shard_size: int,
    name: Callable[[str], str] = tensor_name,
) -> list[File]:
    """Lays leaves out in files.

    Args:
      leaves: path, shape and dtype of each, in order.
      max_shard_size: bytes of tensors in a file.
      name: from a path to the tensor's name.

    Raises:
      CheckpointError: a dtype that the format does not have, or two leaves of one name.
    """
    groups: list[list[Tensor]] = [[]]
    names: dict[str, str] = {}
    room = max_shard_size
    for path, shape, dtype in leaves:
        dtype = np.dtype(dtype)
        if dtype not in _CODES:
            raise CheckpointError(
                f"leaf {path!r}",
                f"its dtype {dtype} cannot be kept in safetensors",
                "one of " + ", ".join(d.name for d in _CODES),
                "Use the orbax format",
            )
        called = name(path)
        if called in names or called == "__metadata__":
            raise CheckpointError(
                f"leaf {path!r}",
                f"its name {called!r} is taken by {names.get(called, 'the format')!r}",
                "a name for each leaf",
                "Pass a name= that tells them apart",
            )
        names[called] = path
        tensor = Tensor(path, tuple(int(n) for n in shape), dtype, called)
        if tensor.nbytes > room and groups[-1]:
            groups.append([])
            room = max_shard_size
        room -= tensor.nbytes
        groups[-1].append(tensor)
    files = []
    for number, group in enumerate(groups, 1):
        title = SINGLE
        if len(groups) > 1:
            title = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        files.append(_file(title, group))
    return files


def _file(title: str, group: list[Tensor]) -> File:
    # Wide elements first, so that every tensor begins at a multiple of its element.
    group = sorted(group, key=lambda x: -x.dtype.itemsize)
    # As ``transformers`` writes it into its own files.
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    odd = {x.name: x.path for x in group if _path(x.name) != x.path}
    if odd:
        entries["__metadata__"][PATHS] = json.dumps(odd)
    ends = list(itertools.accumulate((x.nbytes for x in group), initial=0))
    for x, place in zip(group, itertools.pairwise(ends), strict=True):
        code = _CODES[x.dtype]
        entries[x.name] = {"dtype": code, "shape": list(x.shape), _PLACE: list(place)}
    text = json.dumps(entries, separators=(",", ":")).encode()
    # As the safetensors library pads it; else no tensor begins at a multiple of its
    # element, and a mapped file cannot be viewed as an array.
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    tensors = (
        replace(x, offset=len(header) + begin)
        for x, begin in zip(group, ends, strict=False)
    )
    return File(title, header, tuple(tensors), len(header) + ends[-1])


_PLACE = "data_offsets"


def _path(name: str) -> str:
    """The path that a name says without help."""
    return "" if name == "value" else name.replace(".", "/")


def index_json(files: Sequence[File]) -> str:
    """The text of the index of several files."""
    tensors = [(t, file.name) for file in files for t in file.tensors]
    total = sum(t.nbytes for t, _ in tensors)
    weight_map = {t.name: name for t, name in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return json.dumps(index, indent=2) + "\n"


# ---- reading -------------------------------------------------------------------------

# What JSON of another shape than the format's makes of its reader.
_UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
)


def read_files(folder: str | os.PathLike[str]) -> list[File]:
    """The layout of a checkpoint that is there.

    Raises:
      CheckpointError: the folder has none, or one that contradicts itself.
    """
    folder = os.fspath(folder)
    try:
        weight_map = _read_index(folder)
        names = [SINGLE] if weight_map is None else dict.fromkeys(weight_map.values())
        files = [_read_file(folder, name) for name in names]
    except FileNotFoundError as error:
        raise CheckpointError(
            f"checkpoint {folder!r}",
            f"{os.path.basename(error.filename)!r} is not there",
            f"{SINGLE}, or {INDEX} and its files",
        ) from error
    except _UNREADABLE as error:
        text = f"it cannot be read ({type(error).__name__}: {error})"[:300]
        raise CheckpointError(f"checkpoint {folder!r}", text) from error
    _check_index(folder, files, weight_map)
    return files


def _read_index(folder: str) -> dict[str, str] | None:
    """The file of each tensor, as an index says; None where there is no index."""
    if not os.path.exists(os.path.join(folder, INDEX)):
        return None
    with open(os.path.join(folder, INDEX), "rb") as file:
        found = dict(json.loads(file.read())["weight_map"])
    for name in found.values():
        if not isinstance(name, str) or os.path.basename(name) != name:
            raise ValueError("its index names files outside of the folder")
    return found


def _check_index(
    folder: str, files: Sequence[File], weight_map: dict[str, str] | None
) -> None:
    """Holds files against each other, and against their index."""
    tensors = [(tensor, file.name) for file in files for tensor in file.tensors]
    paths = Counter(tensor.path for tensor, _ in tensors)
    if twice := [path for path, count in paths.items() if count > 1]:
        raise CheckpointError(
            f"checkpoint {folder!r}", f"several of its tensors are leaf {twice[0]!r}"
        )
    found = {tensor.name: name for tensor, name in tensors}
    if weight_map not in (None, found):
        raise CheckpointError(
            f"checkpoint {folder!r}", "its files do not hold what its index says"
        )


# Not by the safetensors library: 0.8.0 reads bfloat16 into numpy, but of float8 it says
# "module 'numpy' has no attribute 'float8_e4m3fn'", and it gives no tensor's place.
def _read_file(folder: str, name: str) -> File:
    with open(os.path.join(folder, name), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise ValueError(f"{name} is cut short, or no safetensors file")
        header = file.read(length)
    entries: Mapping[str, Any] = json.loads(header)
    metadata = dict(entries.get("__metadata__", {}))
    paths = dict(json.loads(metadata.get(PATHS, "{}")))
    tensors = []
    for called, entry in entries.items():
        if called == "__metadata__":
            continue
        dtype = _DTYPES[entry["dtype"]]
        shape = tuple(int(n) for n in entry["shape"])
        begin, end = (int(n) for n in entry[_PLACE])
        right = min((begin, *shape)) >= 0 and 8 + length + end <= size
        if not right or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} says wrong places for {called!r}")
        path = str(paths.get(called, _path(called)))
        tensors.append(Tensor(path, shape, dtype, called, 8 + length + begin))
    return File(name, struct.pack("<Q", length) + header, tuple(tensors), size)
