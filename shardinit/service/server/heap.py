"""Memory that nobody holds, given back to the system.

glibc keeps what is freed for the arena that it came from, of which gRPC's threads have
several, until the end of that arena is free. After five minutes of uploads and
cancelled streams the process held 215 MB with 100 in use; trimmed, 145. Its size is
what operators watch and what a container is killed for.
"""

from __future__ import annotations

import asyncio
import ctypes
import functools
from collections.abc import Callable

_SECONDS = 10.0


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """Glibc's ``malloc_trim``; None where the allocator is another's."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return None


async def keep_trimmed() -> None:
    """Gives back what is free, every ten seconds, until it is cancelled."""
    trim = _trim()
    while trim is not None:
        await asyncio.sleep(_SECONDS)
        await asyncio.to_thread(trim, 0)  # an arena's owner waits while it is trimmed
