"""Unfinished: a folder that is being written, and what of it is done.

A checkpoint is written in ``NAME.unfinished`` beside its place and gets its name when
it is complete, in one step of the file system; so a folder of that name is a whole
checkpoint, always. The unfinished folder keeps a journal: what is being written, then
a line with place and checksum for every part that is. A writer that is killed at any
point leaves a folder that the next one takes over: it believes only parts whose bytes
still have the journal's checksum.

The folder itself is locked, and the system drops the lock of a dead process.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from shardinit.errors import CheckpointError
from shardinit.extras import needs

with needs("crc32c", "shardinit[checkpoint]"):
    import crc32c

_JOURNAL = "journal.jsonl"


class Unfinished:
    """The folder, while this process writes it.

    Attributes:
      folder: where the files are, under the name for the time being.
      done: checksums by (file, first byte, bytes), as an earlier writer noted them.
    """

    def __init__(self, folder: Path, target: Path, done: dict, journal: int):
        self.folder = folder
        self.done: dict[tuple[str, int, int], int] = done
        self._target = target
        self._journal = journal

    def note(self, file: str, offset: int, data: memoryview) -> None:
        """Notes that ``data`` was written to a file at ``offset``."""
        line = json.dumps([file, offset, len(data), checksum(data)]) + "\n"
        # One call for a line: with O_APPEND the lines of two threads do not mix. It is
        # not synced; a line counts only if the bytes that it is about have its
        # checksum.
        os.write(self._journal, line.encode())

    def holds(self, file: str, offset: int, data: memoryview) -> bool:
        """Whether ``data`` is what was noted for its place."""
        return self.done.get((file, offset, len(data))) == checksum(data)

    def publish(self) -> None:
        """Gives the folder its name; all files must have been synced.

        Raises:
          CheckpointError: there is something of that name by now.
        """
        # To sync a file does not sync the folder's entry for it: fsync(2).
        sync_folder(self.folder)
        try:
            # Over an empty folder POSIX lets it; over one that has something in it
            # never.
            os.rename(self.folder, self._target)
        except OSError as error:
            raise CheckpointError.taken("checkpoint", self._target) from error
        os.unlink(self._target / _JOURNAL)
        sync_folder(self._target.parent)


def checksum(data: memoryview) -> int:
    """CRC-32C, which the processor computes as fast as memory gives."""
    return crc32c.crc32c(data)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_free(target: Path) -> None:
    """Refuses a target that exists; an empty folder will do.

    Raises:
      CheckpointError: there is something of that name.
    """
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError.taken("checkpoint", target)


@contextmanager
def unfinished(target: Path, what: str, *, anew: bool = False) -> Iterator[Unfinished]:
    """Opens the unfinished folder of ``target``, new or as it was left.

    Args:
      target: the checkpoint's name.
      what: what is to be written; the same text for whoever may go on with it.
      anew: whether what was left of something else is removed.

    Raises:
      CheckpointError: the target exists, another process is writing it, what was left
        is something else (unless ``anew``), or the system cannot lock a folder.
    """
    locks = _locks(target)
    check_free(target)
    folder = target.with_name(target.name + ".unfinished")
    os.makedirs(folder, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(locks, handle, folder, target)
        try:
            check_free(target)
        except CheckpointError:  # a writer before us has just finished
            with suppress(OSError):
                os.rmdir(folder)
            raise
        done = _read_journal(folder, what, anew=anew)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        journal = os.open(folder / _JOURNAL, flags, 0o644)
        try:
            if done is None:
                # By this mark a server knows what it may remove in the end.
                head = {"writes": what} | ({"anew": True} if anew else {})
                os.write(journal, (json.dumps(head) + "\n").encode())
            yield Unfinished(folder, target, done or {}, journal)
        finally:
            os.close(journal)
    finally:
        os.close(handle)


def _locks(target: Path) -> Any:
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows, where folders cannot be synced either
        raise CheckpointError(
            f"checkpoint {str(target)!r}",
            f"{sys.platform} has no locks on folders",
            "a system with them, such as Linux or macOS",
            "Write it there; reading works anywhere",
        ) from None
    return fcntl


def _lock(fcntl: Any, handle: int, folder: Path, target: Path) -> None:
    """Locks the folder, which must still be the one of that name."""
    mine = False
    with suppress(BlockingIOError, FileNotFoundError):
        # Not ``lockf``: locks of POSIX end when the process closes any other handle of
        # the file, and do not hold between its threads (fcntl(2)).
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever held the lock before may have given the folder its final name since it
        # was opened here.
        mine = os.path.samestat(os.fstat(handle), os.stat(folder))
    if not mine:
        raise CheckpointError(
            f"checkpoint {str(target)!r}",
            "another process is writing it",
            "one writer at a time",
        )


def _read_journal(folder: Path, what: str, *, anew: bool) -> dict | None:
    """What the journal notes as done; None if there is none yet."""
    path = folder / _JOURNAL
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        if any(folder.iterdir()):
            raise CheckpointError.taken("checkpoint", folder) from None
        return None
    # A line that the end of its writer cut short is not there.
    whole = text[: text.rfind(b"\n") + 1]
    os.truncate(path, len(whole))
    if not whole:
        return None
    try:
        head, *lines = [json.loads(line) for line in whole.splitlines()]
        done = {(str(f), int(at), int(size)): int(crc) for f, at, size, crc in lines}
        same = head["writes"] == what
    except (ValueError, TypeError, KeyError):
        done, same = {}, False
    if not same and anew:
        # The journal goes last: without it the rest would be somebody else's.
        for path in sorted(folder.iterdir(), key=lambda path: path.name == _JOURNAL):
            path.unlink()
        return None
    if not same:
        raise CheckpointError(
            f"checkpoint {str(folder)!r}",
            "what was begun there is something else",
            "the same model, key and settings",
            "Remove it to begin anew, or go on with what it was begun with",
        )
    return done
