"""Memory that nobody holds, given back to the system.

glibc keeps what is freed for the arena that it came from, and has eight of them a core,
of which gRPC's threads take a dozen. After ten seconds of uploads by eight clients a
process of 62 MB has 373, and trimmed still 148, since a trim leaves the end of each
arena but the first; with two arenas it has 64 (``python -m tests.reliability.rest``,
with and without MALLOC_ARENA_MAX=16). Its size is what operators watch and what a
container is killed for.
"""

from __future__ import annotations

import asyncio
import ctypes
import functools
import os
from collections.abc import Callable

_SECONDS = 10.0
_M_ARENA_MAX = -8  # of glibc's malloc.h
_ARENAS = 2


@functools.cache
def _glibc(name: str) -> Callable[..., int] | None:
    """A function of glibc's; None where the allocator is another's."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return None


def use_few_arenas() -> None:
    """Has the threads of this process that begin from now on share two arenas."""
    mallopt = _glibc("mallopt")
    if mallopt is not None and "MALLOC_ARENA_MAX" not in os.environ:
        mallopt(_M_ARENA_MAX, _ARENAS)


async def keep_trimmed() -> None:
    """Gives back what is free, every ten seconds, until it is cancelled."""
    trim = _glibc("malloc_trim")
    while trim is not None:
        await asyncio.sleep(_SECONDS)
        await asyncio.to_thread(trim, 0)  # an arena's owner waits while it is trimmed
