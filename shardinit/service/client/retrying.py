"""Retrying: a stream that breaks is asked for again, as long as that gets further.

A busy server refuses a call and says when to ask again. The call is then repeated at a
random moment after that, until its own time is over.

gRPC retries a call only until its first answer has come ("committed" in
https://github.com/grpc/proposal/blob/master/A6-client-retries.md), so
a stream that has begun is resumed here, by the caller that knows its place.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection

from tenacity import (
    RetryCallState,
    Retrying,
    stop_after_attempt,
    wait_random_exponential,
)

from shardinit.errors import ServiceError

_ANSWER = 0.5  # seconds that an answer may need: with less left, asking says no more


def attempts(
    codes: Collection[str],
    place: Callable[[], tuple[int, ...]] = tuple,
    most: int = 8,
    seconds: float = 60.0,
) -> Retrying:
    """What tries a stream again: iterated, or called with the function to run.

    Args:
      codes: status codes after which the stream is asked for again. A deadline that
        passes without anything new counts as a failure all the same.
      place: how far the stream has come, as numbers that grow.
      most: attempts in a row that get no further; the error of the last one is raised.
      seconds: how long a busy server is asked again while that gets no further.
    """
    furthest, end = place(), time.monotonic() + seconds
    busy = 0.0  # seconds to wait for a server that said when to ask again

    def again(state: RetryCallState) -> bool:
        nonlocal furthest, end, busy
        error = _error_of(state)
        # tenacity asks this of every outcome, of those without an error too.
        if error is None or (error.code not in codes and error.retry_after is None):
            return False
        busy = (error.retry_after or 0.0) * random.uniform(1, 2)
        if place() > furthest:
            furthest, state.attempt_number = place(), 0
            end = time.monotonic() + seconds
            return True
        if error.retry_after is not None:
            state.attempt_number = 0
            return time.monotonic() + busy < end - _ANSWER
        return error.code != "DEADLINE_EXCEEDED"

    # Random waits: the hosts of a job lose a server all at once.
    usual = wait_random_exponential(multiplier=0.1, max=2.0)

    def wait(state: RetryCallState) -> float:
        return busy or usual(state)

    return Retrying(retry=again, stop=stop_after_attempt(most), wait=wait, reraise=True)


def _error_of(state: RetryCallState) -> ServiceError | None:
    error = state.outcome.exception() if state.outcome is not None else None
    return error if isinstance(error, ServiceError) else None
