"""Store: init programs on a client's disk, by digest.

A program is fetched once for all processes of a user. Its name is its sha256, so a
damaged file is known by its name and fetched again. Which digest a spec had last time
is remembered beside it, so that asking again costs one header.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import platformdirs
from google.protobuf.message import DecodeError

from shardinit.core.program.envelope import content_of
from shardinit.errors import ProgramFormatError, ServiceError
from shardinit.files import write_file
from shardinit.v1 import program_pb2


def digest_of(data: bytes) -> str | None:
    """The sha256 (hex) of a serialised program; None if it is damaged."""
    try:
        envelope = program_pb2.InitProgram.FromString(data)
        content_of(envelope)
    except (DecodeError, ProgramFormatError):
        return None
    return envelope.sha256.hex()


class Store:
    """Programs in a folder, the least recently used removed beyond a number.

    A folder that cannot be written costs a download, not the run; one that the caller
    named must be usable.

    Args:
      folder: where; None for the user's cache folder.
      keep: how many programs stay.

    Raises:
      ServiceError: ``folder`` was given and cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, keep: int = 256):
        default = platformdirs.user_cache_path("shardinit") / "programs"
        self._folder = default if folder is None else Path(folder)
        self._keep = keep
        try:
            # For the user alone: whoever may write here could note another program's
            # digest for a spec, and programs are run.
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            # ``mkdir`` succeeds where the folder is there, whoever may write to it.
            if not os.access(self._folder, os.W_OK | os.X_OK):
                raise PermissionError("no permission to write")
        except OSError as error:
            if folder is not None:
                raise ServiceError(
                    f"cache folder {str(folder)!r}",
                    error.strerror or str(error),
                    "a folder that can be written",
                    code="FAILED_PRECONDITION",
                ) from error

    def read(self, digest: str) -> bytes | None:
        """The program of that digest, checked; None if it is not there or damaged."""
        path = self._folder / f"{digest}.program"
        try:
            data = path.read_bytes()
        except OSError:
            return None
        if digest_of(data) != digest:
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(OSError):
            # Set by hand: Linux mounts with ``relatime`` or ``noatime``, so that to
            # read a file seldom changes its time of access (mount(8)).
            os.utime(path)  # the time of last use decides what goes first
        return data

    def write(self, digest: str, data: bytes) -> None:
        """Keeps a program whose digest has been checked."""
        self._put(f"{digest}.program", data)
        self._prune()

    def remembered(self, spec: str) -> str | None:
        """The digest that the spec of this fingerprint had last time."""
        try:
            text = (self._folder / f"{spec}.spec").read_text()
        except (OSError, UnicodeDecodeError):
            return None
        return text if len(text) == 64 and text.isalnum() and text.isascii() else None

    def remember(self, spec: str, digest: str) -> None:
        """Notes the digest of a spec."""
        self._put(f"{spec}.spec", digest.encode())

    def _put(self, name: str, data: bytes) -> None:
        # A full disk, or no folder: the run goes on without a cache.
        with contextlib.suppress(OSError):
            write_file(self._folder / name, data)

    def _prune(self) -> None:
        for suffix in ("program", "spec"):
            with contextlib.suppress(OSError):
                files = sorted(
                    self._folder.glob(f"*.{suffix}"),
                    key=lambda path: path.stat().st_mtime,
                )
                for path in files[: max(len(files) - self._keep, 0)]:
                    path.unlink(missing_ok=True)
