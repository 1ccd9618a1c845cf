"""Leftovers: what abandoned checkpoints have left below the operator's roots.

A write that was cut off leaves ``NAME.unfinished`` for the next to go on with. When
nobody has for a while, it is removed.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path

_JOURNAL = "journal.jsonl"


def remove_abandoned(root: Path, seconds: float) -> list[Path]:
    """Removes unfinished folders that nobody has gone on with for a while.

    Those alone that were begun with ``anew``, as a server begins them: what a job began
    waits for that job. A link is never followed, and none that is being written goes.

    Args:
      root: where to look, at all depths.
      seconds: since anything of a folder was done.

    Returns:
      the folders that were removed.
    """
    before, removed = time.time() - seconds, []
    for here, folders, _, handle in os.fwalk(root):
        for name in [each for each in folders if each.endswith(".unfinished")]:
            folders.remove(name)
            with suppress(OSError, ValueError, AttributeError):  # not ours, or busy
                if _remove_older(handle, name, before):
                    removed.append(Path(here, name))
    return removed


def _remove_older(parent: int, name: str, before: float) -> bool:
    """Removes an unfinished folder of a server's; returns whether it was old enough."""
    import fcntl

    flags = os.O_RDONLY | os.O_NOFOLLOW
    folder = os.open(name, flags | os.O_DIRECTORY, dir_fd=parent)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with open(os.open(_JOURNAL, flags, dir_fd=folder), "rb") as journal:
            ours = json.loads(journal.readline()).get("anew") is True
            if not ours or os.fstat(journal.fileno()).st_mtime > before:
                return False
        # The journal goes last: without it the rest would be somebody else's.
        for file in sorted(os.listdir(folder), key=lambda file: file == _JOURNAL):
            os.unlink(file, dir_fd=folder)
        os.rmdir(name, dir_fd=parent)
        return True
    finally:
        os.close(folder)
