"""Whether tracing a function draws from NumPy's or Python's own random state.

Such numbers enter the trace as constants: no key gives them again, and every process of
a job has others. Only the two global states are watched; a generator object of the
user's own is not seen.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


class Watch:
    """What was seen of the random states.

    Attributes:
      moved: whether one has moved since the watch began.
    """

    moved: bool = False


@contextmanager
def watched() -> Iterator[Watch]:
    """Watches both states; the answer is there when the block has ended."""
    before, seen = _states(), Watch()
    try:
        yield seen
    finally:
        seen.moved = _states() != before


def _states() -> tuple[Any, ...]:
    kind, words, *rest = np.random.get_state()
    return random.getstate(), kind, np.asarray(words).tobytes(), tuple(rest)
