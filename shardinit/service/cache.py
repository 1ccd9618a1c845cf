"""Cache: what was built once is not built again, and never twice at a time.

A thousand hosts of one job ask for the same program within a second. The first request
builds it; the others wait for that very build. What was built is kept while it is
used, within a bound in bytes, the least recently used going first. A failed build is
told to all that waited for it, and forgotten.
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
        self._slots = threading.BoundedSemaphore(builds)
        self._lock = threading.Lock()
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        self._running: dict[Hashable, Future[Value]] = {}
        self._bytes = 0

    def find(self, key: Hashable) -> Value | None:
        """The value of ``key`` if it is there."""
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key]

    def get(
        self, key: Hashable, build: Callable[[], Value], timeout: float | None = None
    ) -> Value:
        """The value of ``key``, built if it is not there.

        Args:
          key: what the value is of.
          build: makes it; runs in the calling thread.
          timeout: seconds to wait for another thread's build, or for a free slot.

        Raises:
          ServiceError: the wait was too long (DEADLINE_EXCEEDED).
        """
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
            future = self._running.get(key)
            mine = future is None
            if future is None:
                future = self._running[key] = Future()
        if not mine:
            return self._wait(future, timeout)
        try:
            if not self._slots.acquire(timeout=-1 if timeout is None else timeout):
                raise _too_long()
            try:
                value = build()
            finally:
                self._slots.release()
        except BaseException as error:
            with self._lock:
                del self._running[key]
            future.set_exception(error)
            raise
        with self._lock:
            del self._running[key]
            self._keep(key, value)
        future.set_result(value)
        return value

    def _wait(self, future: Future[Value], timeout: float | None) -> Value:
        try:
            return future.result(timeout)
        except FutureTimeoutError:
            raise _too_long() from None

    def _keep(self, key: Hashable, value: Value) -> None:
        size = self._size(value)
        if size > self._capacity:
            return
        self._values[key] = value
        self._bytes += size
        while self._bytes > self._capacity:
            _, oldest = self._values.popitem(last=False)
            self._bytes -= self._size(oldest)

    @property
    def bytes(self) -> int:
        """Bytes of all values that are kept."""
        with self._lock:
            return self._bytes


def _too_long() -> ServiceError:
    return ServiceError(
        "",
        "the model is still being built",
        remedy="Ask again, or with a longer deadline",
        code="DEADLINE_EXCEEDED",
    )
