"""Store: programs by digest, as files.

Whatever is built or uploaded lies here under its digest, where the process that
listens sends it from and workers read it. Without a folder of the operator's it is a
temporary one. A folder may be shared by replicas and survives a restart: a name never
means anything else, and a file has its name only when it is complete.

A program is found by those only who have a mark beside it: its owners, whose bytes came
with that digest, or everybody, if it is of a registered model. Without one, as an older
version left its programs, nobody finds it until it comes again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from google.protobuf.message import DecodeError

from shardinit.errors import ServiceError
from shardinit.files import write_file
from shardinit.service.server.objects import (
    EVERYBODY,
    HEADER,
    PROGRAM,
    Objects,
    mark_of,
)
from shardinit.service.server.pots import Shares, Taken
from shardinit.v1 import service_pb2

log = logging.getLogger("shardinit.service")


class Store:
    """Programs, bounded in bytes: the least recently used of who has most goes first.

    Args:
      folder: where they are; default a temporary folder.
      capacity: bytes of all of them together; one that is larger is not kept.
      objects: where to look for what is not here, and to put what comes.
      evicted: called for each program that goes to make room.

    Attributes:
      folder: where they are.

    Raises:
      ServiceError: nothing can be written there.
    """

    def __init__(
        self,
        folder: Path | None,
        capacity: int,
        objects: Objects | None = None,
        evicted: Callable[[], None] = lambda: None,
    ):
        self._evicted = evicted
        self._capacity = capacity
        self._objects = objects
        self._shares = Shares()  # of owners, by their marks
        self._counting = threading.Lock()
        self._temporary = None
        if folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="shardinit-")
            folder = Path(self._temporary.name)
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            found = [(path.stat(), path.stem) for path in folder.glob(f"*{PROGRAM}")]
            marks = [path.name.partition(".") for path in folder.glob("*.owner")]
        except OSError as error:
            raise ServiceError(
                f"store {str(folder)!r}",
                error.strerror or str(error),
                "a folder that can be written",
                code="FAILED_PRECONDITION",
            ) from error
        owners = {name: f".{mark}" for name, _, mark in marks}
        for stat, name in sorted(found, key=lambda one: one[0].st_mtime):
            self._count(name, stat.st_size, owners.get(name, ""))

    @property
    def bytes(self) -> int:
        """Bytes of all programs that are kept."""
        return self._shares.total

    async def find(
        self, sha256: bytes, owners: Sequence[str]
    ) -> service_pb2.ProgramHeader | None:
        """What is known of a program, which is fetched if other replicas have it.

        A program of others is looked for as one that there is not, in all steps.

        Args:
          sha256: its digest.
          owners: it is found if one of these has it.

        Raises:
          ServiceError: the object store does not answer.
        """
        found = self._owned(sha256, owners)
        if found is None and self._objects is not None:
            stored = await self._objects.get(sha256, owners)
            if stored is not None:
                await asyncio.to_thread(self.put, *stored)
                found = self._owned(sha256, owners)
        return found

    def _owned(
        self, sha256: bytes, owners: Sequence[str]
    ) -> service_pb2.ProgramHeader | None:
        name = sha256.hex()
        marks = [(self.folder / (name + mark_of(owner))).exists() for owner in owners]
        return self.header(sha256) if any(marks) else None

    async def share(
        self, header: service_pb2.ProgramHeader, data: bytes, owner: str
    ) -> None:
        """Keeps a program, for the other replicas too; errors as for `put`.

        Args:
          header: what is known of it.
          data: the program.
          owner: who may ask for it. What is everybody's any replica can build: that
            the object store fails is logged.

        Raises:
          ServiceError: the object store does not take it.
        """
        await asyncio.to_thread(self.put, header, data, owner)
        if self._objects is None:
            return
        try:
            await self._objects.put(header, data, owner)
        except ServiceError as error:
            if owner != EVERYBODY:
                raise
            log.warning("a program that was built stays here alone: %s", error)

    def put(self, header: service_pb2.ProgramHeader, data: bytes, owner: str) -> None:
        """Keeps a program of an owner, if it fits; others go for it.

        All is written also where it is there: the time tells of no other owner.

        Raises:
          ServiceError: the disk does not take it.
        """
        name = header.sha256.hex()
        if len(data) > self._capacity:
            return
        there = _header(self.folder, header.sha256) or header  # built, it says so
        try:
            for ending, content in (
                (HEADER, (header if owner == EVERYBODY else there).SerializeToString()),
                (PROGRAM, data),
                (mark_of(owner), owner.encode()),
            ):
                write_file(self.folder / (name + ending), content)
        except OSError as error:
            raise ServiceError(
                "store",
                f"it takes no more programs ({error.strerror})",
                remedy="Ask the operator for room",
                code="RESOURCE_EXHAUSTED",
                limit="store",
            ) from error
        self._count(name, len(data), mark_of(owner))

    def header(self, sha256: bytes) -> service_pb2.ProgramHeader | None:
        """What is known of a program; None if it is not here."""
        found = _header(self.folder, sha256)
        if found is not None:
            with self._counting:
                self._shares.use(sha256.hex())
        return found

    def read(self, sha256: bytes) -> tuple[service_pb2.ProgramHeader, bytes]:
        """A program, and what is known of it.

        Raises:
          ServiceError: it is not here.
        """
        self.header(sha256)  # it was used
        return read(self.folder, sha256)

    def close(self) -> None:
        """Removes the folder, if it is a temporary one."""
        if self._temporary is not None:
            self._temporary.cleanup()

    def _count(self, name: str, size: int, owner: str) -> None:
        """Counts a program, for which others go until all fit."""
        shares = self._shares
        with self._counting:
            shares.remove(name)
            while shares and shares.total + size > self._capacity:
                oldest = shares.first(max(shares.callers, key=shares.load))
                shares.remove(oldest)
                self._evicted()
                for path in self.folder.glob(f"{oldest}.*"):
                    with suppress(OSError):
                        path.unlink()
            shares.add(name, Taken(owner, size))


def read(folder: Path, sha256: bytes) -> tuple[service_pb2.ProgramHeader, bytes]:
    """A program of a store, and what is known of it.

    Raises:
      ServiceError: it is not there.
    """
    header, name = _header(folder, sha256), sha256.hex()
    if header is None:
        raise not_held(sha256)
    try:
        return header, (folder / (name + PROGRAM)).read_bytes()
    except OSError as error:
        raise not_held(sha256) from error


def _header(folder: Path, sha256: bytes) -> service_pb2.ProgramHeader | None:
    try:
        os.stat(folder / (sha256.hex() + PROGRAM))
        data = (folder / (sha256.hex() + HEADER)).read_bytes()
        return service_pb2.ProgramHeader.FromString(data)
    except (OSError, DecodeError):
        return None


def not_held(sha256: bytes) -> ServiceError:
    """What is said of a program that is not there, or another's."""
    return ServiceError(
        "program_sha256",
        f"no program {sha256.hex()[:16]}… is held here",
        remedy="Ask by model and config, or upload the program",
        code="NOT_FOUND",
    )
