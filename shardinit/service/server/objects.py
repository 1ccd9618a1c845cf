"""Objects: programs in an object store that replicas share, by their digest.

The folder of the store stays what the process that listens sends from and workers
read; what it lacks is fetched from here, and what comes into it is put here too.
Whoever may ask for a program has a mark beside it, an object of its own, so that
replicas which add owners at one moment don't undo each other's work. The mark is
written last: a program that has one is complete. Nothing is removed: for how long
objects are kept is a setting of the bucket.

An object store may take any time to answer, or none: it is asked on threads of its own,
and not for ever.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from google.protobuf.message import DecodeError

from shardinit.errors import ServiceError
from shardinit.extras import needs
from shardinit.v1 import service_pb2

Result = TypeVar("Result")
Stored = tuple[service_pb2.ProgramHeader, bytes, str]

PROGRAM, HEADER = ".program", ".header"
EVERYBODY = "registered models"  # owns what was built of them; no caller's name
_SECONDS = 30.0  # until an object store has answered
_AGAIN = 5.0  # seconds after which to ask one again that does not answer


def mark_of(owner: str) -> str:
    """How the name of an owner's mark ends: any name is one of a file."""
    return f".{hashlib.sha256(owner.encode()).hexdigest()}.owner"


class Objects:
    """Programs in an object store.

    Args:
      url: of the folder that they are in, as fsspec reads it: ``s3://bucket/programs``.

    Raises:
      ServiceError: fsspec knows no such store, or lacks the package for it.
    """

    def __init__(self, url: str):
        with needs("fsspec", "shardinit[objects]"):
            from fsspec.core import url_to_fs
        try:
            self._files, self._root = url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise ServiceError(
                f"objects {url!r}",
                str(error),
                "a URL that fsspec knows, and the package that it names",
                code="FAILED_PRECONDITION",
            ) from error
        self._threads = ThreadPoolExecutor(4, "shardinit-objects")

    async def put(
        self, header: service_pb2.ProgramHeader, data: bytes, owner: str
    ) -> None:
        """Keeps a program of an owner, who may not be the only one.

        Raises:
          ServiceError: the store does not take it.
        """
        path = self._path(header.sha256)

        def write() -> None:
            self._files.makedirs(self._root, exist_ok=True)
            self._files.pipe_file(path + PROGRAM, data)
            self._files.pipe_file(path + HEADER, header.SerializeToString())
            self._files.pipe_file(path + mark_of(owner), owner.encode())

        await self._ask(write)

    async def get(self, sha256: bytes, owners: Sequence[str]) -> Stored | None:
        """A program, what is known of it, and who has it; None if none of these does.

        Raises:
          ServiceError: the store does not answer.
        """
        path = self._path(sha256)

        def read() -> Stored | None:
            for owner in owners:
                if self._files.exists(path + mark_of(owner)):
                    break
            else:
                return None
            try:
                header = self._files.cat_file(path + HEADER)
                data = self._files.cat_file(path + PROGRAM)
                return service_pb2.ProgramHeader.FromString(header), data, owner
            except (FileNotFoundError, DecodeError):
                return None

        return await self._ask(read)

    def _path(self, sha256: bytes) -> str:
        return f"{self._root.rstrip('/')}/{sha256.hex()}"

    async def _ask(self, what: Callable[[], Result]) -> Result:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_SECONDS):
                return await loop.run_in_executor(self._threads, what)
        except Exception as error:  # each kind of store has its own
            raise ServiceError(
                "objects",
                f"the object store fails ({type(error).__name__}: {error})"[:300],
                remedy="Ask again later",
                code="UNAVAILABLE",
                retry_after=_AGAIN,
            ) from error
