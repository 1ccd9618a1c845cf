"""Targets: whether a file or folder can be written, asked before the work begins."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shardinit.errors import ShardinitError

_LONGEST = ".receipt.json"  # what stands beside a folder has its name


def check_target(out: str, *, folder: bool = False) -> Path:
    """The absolute path of a target that can be written.

    Args:
      out: as it was typed.
      folder: whether a folder is written; else a file.

    Raises:
      ShardinitError: it has no folder to lie in, or nothing may be written there, or
        a folder has the name of the file.
    """
    target = Path(os.path.abspath(out))
    above, where = target.parent, f"target {out!r}"
    with writing(out), suppress(FileNotFoundError, NotADirectoryError):
        os.lstat(f"{target}{_LONGEST if folder else ''}")  # is the name too long?
    if not folder and target.is_dir():
        raise ShardinitError(where, "it is a folder", "the name of a file")
    if not above.exists():
        remedy = f"mkdir -p {above}"
        raise ShardinitError(where, f"there is no folder {above}", remedy=remedy)
    if not above.is_dir():
        raise ShardinitError(where, f"{above} cannot be written (Not a directory)")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ShardinitError(where, f"{above} cannot be written (Permission denied)")
    return target


@contextmanager
def writing(out: str) -> Iterator[None]:
    """An error of the operating system names the target as it was typed."""
    try:
        yield
    except OSError as error:
        raise ShardinitError(f"target {out!r}", error.strerror or str(error)) from error
