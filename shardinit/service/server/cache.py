"""Cache: what was built once is not built again, and never twice at a time.

A thousand hosts of one job ask for the same program within a second. The first request
builds it; the others wait for that very build. What was built is kept while it is
used, within a bound in bytes, the least recently used going first. A failed build is
told to all that waited for it, and forgotten.

Who waits for a turn to build has begun nothing yet: a caller whose time is up leaves
those behind it undisturbed.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Generic, TypeVar

from shardinit.errors import ServiceError

Value = TypeVar("Value")


class BuildCache(Generic[Value]):
    """Least-recently-used values by key, bounded in bytes.

    Args:
      capacity: bytes of all values together; one that is larger is not kept.
      size: bytes of a value.
      builds: how many different values may be built at a time.
    """

    def __init__(self, capacity: int, size: Callable[[Value], int], builds: int = 2):
        self._capacity = capacity
        self._size = size
        self._builds = builds
        self._changed = threading.Condition()
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        self._running: dict[Hashable, Future[Value]] = {}
        self._bytes = 0

    def find(self, wanted: Callable[[Value], bool]) -> Value | None:
        """A value that is there and wanted."""
        with self._changed:
            for key, value in self._values.items():
                if wanted(value):
                    self._values.move_to_end(key)
                    return value
        return None

    def get(
        self, key: Hashable, build: Callable[[], Value], timeout: float | None = None
    ) -> Value:
        """The value of ``key``, built if it is not there.

        Args:
          key: what the value is of.
          build: makes it; runs in the calling thread, to its end.
          timeout: seconds to wait for another thread's build, or for a turn.

        Raises:
          ServiceError: the wait was too long (DEADLINE_EXCEEDED).
        """
        with self._changed:
            free = self._changed.wait_for(
                lambda: (
                    key in self._values
                    or key in self._running
                    or len(self._running) < self._builds
                ),
                timeout,
            )
            if not free:
                raise _too_long()
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
            future = self._running.get(key)
            mine = future is None
            if future is None:
                future = self._running[key] = Future()
        if not mine:
            try:
                return future.result(timeout)
            except FutureTimeoutError:
                raise _too_long() from None
        try:
            value = build()
        except BaseException as error:
            self._end(key)
            future.set_exception(error)
            raise
        self._end(key, value)
        future.set_result(value)
        return value

    def _end(self, key: Hashable, *made: Value) -> None:
        """Lets the next one build; keeps what was made, if it fits."""
        with self._changed:
            del self._running[key]
            self._changed.notify_all()
            for value in made:
                size = self._size(value)
                if size <= self._capacity:
                    self._values[key] = value
                    self._bytes += size
            while self._bytes > self._capacity:
                _, oldest = self._values.popitem(last=False)
                self._bytes -= self._size(oldest)

    @property
    def bytes(self) -> int:
        """Bytes of all values that are kept."""
        with self._changed:
            return self._bytes


def _too_long() -> ServiceError:
    return ServiceError(
        "",
        "the model is still being built",
        remedy="Ask again, or with a longer deadline",
        code="DEADLINE_EXCEEDED",
    )
