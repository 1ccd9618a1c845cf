"""Pots: what there is for all callers together, and who has how much of it.

One caller alone may have all. When a pot is full and another comes, whoever has most of
it, over its weight and with what is asked for, gives up what it took last: that is the
one who comes, who is refused, or another, who goes on later. So what somebody holds
keeps nobody else from a share. Where there are more callers than places, one who has
nothing gets the place of one who has had it for a turn.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Hashable
from typing import NamedTuple

_TURN = 60.0  # seconds after which a place is another's who has none


class Taken(NamedTuple):
    """What a caller took.

    Attributes:
      caller, weight: who, and its share against that of others.
      amount: how much.
    """

    caller: str
    amount: int
    weight: int = 1


class Shares:
    """How much each caller has, by the items that it took.

    Attributes:
      total: of all callers together.
    """

    def __init__(self) -> None:
        self.total = 0
        self._taken: dict[Hashable, Taken] = {}
        self._items: dict[str, dict[Hashable, None]] = {}  # the last one last
        self._amounts: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._taken)

    @property
    def callers(self) -> Collection[str]:
        """Those who have anything."""
        return self._items.keys()

    def add(self, item: Hashable, taken: Taken) -> None:
        """Notes what a caller takes, as its last."""
        self._taken[item] = taken
        self._items.setdefault(taken.caller, {})[item] = None
        had = self._amounts.get(taken.caller, 0)
        self._amounts[taken.caller] = had + taken.amount
        self.total += taken.amount

    def remove(self, item: Hashable) -> Taken | None:
        """Forgets what a caller took; None if that is not there."""
        taken = self._taken.pop(item, None)
        if taken is not None:
            self.total -= taken.amount
            self._amounts[taken.caller] -= taken.amount
            del self._items[taken.caller][item]
            if not self._items[taken.caller]:
                del self._items[taken.caller], self._amounts[taken.caller]
        return taken

    def use(self, item: Hashable) -> None:
        """Has an item come last of its caller's, if it is there."""
        if item in self._taken:
            items = self._items[self._taken[item].caller]
            items[item] = items.pop(item)

    def first(self, caller: str) -> Hashable:
        """What a caller took, or used, the longest time ago."""
        return next(iter(self._items[caller]))

    def last(self, caller: str) -> Hashable:
        """What a caller took last."""
        return next(reversed(self._items[caller]))

    def load(self, caller: str) -> float:
        """How much a caller has, over its weight."""
        return self._amounts[caller] / self._taken[self.last(caller)].weight


class Pot:
    """Places, or bytes, that are taken for a while.

    Args:
      capacity: of all together; one item alone may be more.
      turn: seconds after which who has nothing gets another's place.
    """

    def __init__(self, capacity: int, turn: float = _TURN):
        self._capacity = capacity
        self._turn = turn
        self._shares = Shares()
        self._holders: dict[Hashable, tuple[float, Callable[[], None]]] = {}

    def take(self, item: Hashable, taken: Taken, give_up: Callable[[], None]) -> bool:
        """Takes a part of the pot, perhaps from others.

        Args:
          item: what it is for.
          taken: who asks, and for how much.
          give_up: called when the part has become another's.

        Returns:
          whether it was had.
        """
        new = taken.caller not in self._shares.callers
        self._shares.add(item, taken)
        given: list[tuple[Hashable, Taken]] = []
        while self._shares.total > self._capacity and len(self._shares) > 1:
            last = self._last(taken.caller, new)
            gone = self._shares.remove(last)
            if gone is None or last == item:  # nobody else has more
                for other in reversed(given):
                    self._shares.add(*other)
                return False
            given.append((last, gone))
        for other, _ in given:
            self._holders.pop(other)[1]()
        self._holders[item] = time.monotonic(), give_up
        return True

    def leave(self, item: Hashable) -> None:
        """Gives back what was taken, if it still is."""
        self._shares.remove(item)
        self._holders.pop(item, None)

    def _last(self, caller: str, new: bool) -> Hashable:
        """What goes for a caller, who has nothing yet if it is ``new``."""
        shares, now = self._shares, time.monotonic()

        def rank(who: str) -> tuple[bool, float, bool]:
            since, _ = self._holders.get(shares.last(who), (math.inf, None))
            return new and now - since > self._turn, shares.load(who), who == caller

        return shares.last(max(shares.callers, key=rank))
