"""Files: complete under their names, or not there.

Programs, receipts and executables are read by other processes while they are written,
and a machine may lose power meanwhile. So the bytes go to a temporary file in the same
folder, reach the disk, and only then get their name, in one step of the file system.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write_file(
    path: str | os.PathLike[str], data: bytes, *, replace: bool = True
) -> None:
    """Writes a file whole or not at all, with the mode that the umask gives.

    Args:
      path: the file.
      data: its content.
      replace: whether a file of that name may be replaced by another; one that has
        this content already is left as it is.

    Raises:
      FileExistsError: something else has the name and ``replace`` is false.
      OSError: the file cannot be written; what was there before is still there.

    Example:
      >>> import pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp(), "weights.init")
      >>> write_file(path, b"first")
      >>> write_file(path, b"second")
      >>> path.read_bytes()
      b'second'
    """
    target = Path(os.path.abspath(path))
    name = f".shardinit-{os.getpid()}-{secrets.token_hex(4)}"
    temporary = target.with_name(name)
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            # Without it a rename can reach the disk before the bytes (ext4, XFS).
            os.fsync(file.fileno())
        if replace:
            os.replace(temporary, target)
        else:
            _link(temporary, target, data)
    finally:
        temporary.unlink(missing_ok=True)


def _link(temporary: Path, target: Path, data: bytes) -> None:
    try:
        os.link(temporary, target)  # a rename would replace what is there
    except FileExistsError:
        if not target.is_file() or target.read_bytes() != data:
            raise
