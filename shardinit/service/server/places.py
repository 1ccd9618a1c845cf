"""Places: where on the server's storage a client may write.

Decided component by component: below one of the operator's folders, through no
symbolic link, over nothing that is there. What a client names is a name and nothing
else; it is never expanded, and a folder outside is never even looked at.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path

from shardinit.errors import ServiceError
from shardinit.v1 import service_pb2


def resolve(uri: str, roots: Sequence[Path], folder: str = "") -> Path:
    """The place that a URI names; only looks, makes nothing.

    Args:
      uri: an absolute path, or a ``file://`` URI.
      roots: the folders that the operator allows the caller.
      folder: the caller's own, below a root; empty for all of the root.

    Raises:
      ServiceError: a client may not write there.
    """
    if not roots:
        raise ServiceError(
            "WriteCheckpoint",
            "the operator allows no folder",
            remedy="Serve with --checkpoint-root, or write it in the job",
            code="UNIMPLEMENTED",
        )
    path = _plain_path(uri)
    for root in roots:
        base = Path(os.path.abspath(root))
        own = base / folder
        if path != base and path.is_relative_to(base):
            if path == own or not path.is_relative_to(own):
                raise _refused(uri, f"it is not below {str(own)!r}, the caller's own")
            _look(uri, base, path.relative_to(base).parts)
            return path
    raise _refused(uri, "it is below no folder that the operator allows the caller")


def _plain_path(uri: str) -> Path:
    """The path of a URI, in which nothing is to be expanded."""
    text = uri.removeprefix("file://")
    parts = text.split("/")
    plain = all(p not in ("", ".", "..") for p in parts[1:])
    if not text.startswith("/") or not plain or not text.isprintable():
        raise _refused(uri, "it is no plain absolute path")
    return Path(text)


def room(target: Path) -> int:
    """Bytes that are free where a checkpoint is to be."""
    there = next(folder for folder in target.parents if folder.exists())
    return shutil.disk_usage(there).free


def _look(uri: str, base: Path, parts: tuple[str, ...]) -> None:
    """Looks at every component below ``base``."""
    here = base
    for part in parts[:-1]:
        here = here / part
        if os.path.lexists(here) and not stat.S_ISDIR(os.lstat(here).st_mode):
            raise _refused(uri, f"{part!r} is a link, or no folder")
    for name in (parts[-1], f"{parts[-1]}.unfinished"):
        if os.path.islink(here / name):
            raise _refused(uri, f"{name!r} is a link")


def _refused(uri: str, why: str) -> ServiceError:
    return ServiceError(
        f"uri {uri[:200]!r}",
        why,
        "an absolute path, or file:// URI, below a folder that the operator allows",
        code="PERMISSION_DENIED",
        denied="place",
    )


def receipt_of(target: Path, form: int) -> Path:
    """Where the receipt of a checkpoint is: beside it, by its format."""
    suffix = service_pb2.CheckpointFormat.Name(form).rpartition("_")[2].lower()
    return target.with_name(f"{target.name}.{suffix}.receipt.json")


def taken(target: Path, why: str) -> ServiceError:
    """The refusal of a name that something else has."""
    return ServiceError(
        f"checkpoint {str(target)!r}",
        why,
        "a name that is free",
        "Nothing is overwritten: choose another name",
        code="ALREADY_EXISTS",
    )
