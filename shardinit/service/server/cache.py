"""Cache: what was built once is not built again, and never twice at a time.

A thousand hosts of one job ask for the same program within a second. The first request
has it built; the others wait for that very build, which ends when the last of them has
gone. What was built is kept while it is used, within a bound in bytes, the least
recently used going first. A failed build is told to all that waited for it, and
forgotten.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Hashable
from functools import partial
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Kept(Generic[Value]):
    """Least-recently-used values by key, bounded in bytes.

    Args:
      capacity: bytes of all values together; one that is larger is not kept.
      size: bytes of a value.
      evicted: called for each value that goes to make room.
    """

    def __init__(
        self,
        capacity: int,
        size: Callable[[Value], int],
        evicted: Callable[[], None] = lambda: None,
    ):
        self._capacity = capacity
        self._size = size
        self._evicted = evicted
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        self.bytes = 0

    def get(self, key: Hashable) -> Value | None:
        """The value of ``key``, if it is there."""
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def put(self, key: Hashable, value: Value) -> None:
        """Keeps a value, if it fits; others go for it."""
        if key in self._values or self._size(value) > self._capacity:
            return
        self._values[key] = value
        self.bytes += self._size(value)
        while self.bytes > self._capacity:
            _, oldest = self._values.popitem(last=False)
            self.bytes -= self._size(oldest)
            self._evicted()


class BuildCache(Generic[Value]):
    """Values that are built when they are first asked for. For one event loop.

    Args:
      capacity, size, evicted: as for `Kept`.
      seen: called with whether a value was there, or is being built, already.
    """

    def __init__(
        self,
        capacity: int,
        size: Callable[[Value], int],
        seen: Callable[[bool], None] = lambda hit: None,
        evicted: Callable[[], None] = lambda: None,
    ):
        self._kept: Kept[Value] = Kept(capacity, size, evicted)
        self._running: dict[Hashable, _Build[Value]] = {}
        self._seen = seen

    @property
    def bytes(self) -> int:
        """Bytes of all values that are kept."""
        return self._kept.bytes

    async def get(self, key: Hashable, build: Callable[[], Awaitable[Value]]) -> Value:
        """The value of ``key``; it is built if it is not there.

        Cancelling a call leaves the build to the others that wait for it, if any.
        """
        value = self._kept.get(key)
        running = self._running.get(key)
        self._seen(value is not None or running is not None)
        if value is not None:
            return value
        if running is None:
            running = self._running[key] = _Build(self._build(key, build))
            running.task.add_done_callback(partial(self._forget, key, running))
        running.waiting += 1
        try:
            return await asyncio.shield(running.task)
        finally:
            running.waiting -= 1
            if not running.waiting and not running.task.done():
                running.task.cancel()
                self._forget(key, running)

    async def _build(
        self, key: Hashable, build: Callable[[], Awaitable[Value]]
    ) -> Value:
        value = await build()
        self._kept.put(key, value)
        return value

    def _forget(
        self, key: Hashable, running: _Build[Value], ended: asyncio.Future | None = None
    ) -> None:
        """Has the next who asks begin anew, unless somebody has already."""
        if self._running.get(key) is running:
            del self._running[key]
        if ended is not None and not ended.cancelled():
            ended.exception()  # seen: nobody may wait for it any more


class _Build(Generic[Value]):
    """A build that runs, and how many wait for it."""

    def __init__(self, building: Coroutine[object, object, Value]):
        self.task = asyncio.create_task(building)
        self.waiting = 0
