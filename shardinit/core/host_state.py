"""What tracing a function takes from the host: random numbers, the process's number.

Such numbers enter the trace as constants. From NumPy's or Python's own random state no
key gives them again, and every process of a job has others; what depends on
``jax.process_index`` differs among processes by intention, and a leaf that does is not
one array. Only the two global random states and calls of ``jax.process_index`` by that
name are seen.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np


class Watch:
    """What was seen of the host's state.

    Attributes:
      moved: whether a random state has moved since the watch began.
      asked: whether the thread has asked for its process's number.
    """

    moved: bool = False
    asked: bool = False


class _ProcessIndex:
    """Stands in ``jax.process_index``'s place while any thread watches.

    Nothing but this name, which the user's function calls, tells that a trace depends
    on the process.
    """

    def __init__(self) -> None:
        self._real = jax.process_index
        self._lock = threading.Lock()
        self._watching: dict[int, list[tuple[Watch, int]]] = {}  # by thread, nested

    def __call__(self, *args: Any, **kwargs: Any) -> int:
        index = self._real(*args, **kwargs)
        for watch, offset in self._watching.get(threading.get_ident(), ()):
            watch.asked = True
            index += offset
        return index

    def enter(self, watch: Watch, offset: int) -> None:
        with self._lock:
            own = self._watching.setdefault(threading.get_ident(), [])
            own.append((watch, offset))
            jax.process_index = self

    def leave(self) -> None:
        with self._lock:
            own = self._watching[threading.get_ident()]
            own.pop()
            if not own:
                del self._watching[threading.get_ident()]
            if not self._watching:
                jax.process_index = self._real


_PROCESS_INDEX = _ProcessIndex()


@contextmanager
def watched(*, index_offset: int = 0) -> Iterator[Watch]:
    """Watches the host's state in this thread; the answer is there at the block's end.

    Args:
      index_offset: is added to the process's number, so that what depends on it shows.
    """
    before, seen = _states(), Watch()
    _PROCESS_INDEX.enter(seen, index_offset)
    try:
        yield seen
    finally:
        _PROCESS_INDEX.leave()
        seen.moved = _states() != before


def _states() -> tuple[Any, ...]:
    kind, words, *rest = np.random.get_state()
    # As bytes: ``!=`` of arrays is an array, and a tuple that holds one cannot be
    # compared.
    return random.getstate(), kind, np.asarray(words).tobytes(), tuple(rest)
