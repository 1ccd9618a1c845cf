"""Retrying: a stream that breaks is asked for again, as long as that gets further.

gRPC retries a call only until its first answer has come (proposal A6, "committed"), so
a stream that has begun is taken up here, by whoever knows where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from tenacity import (
    RetryCallState,
    Retrying,
    stop_after_attempt,
    wait_random_exponential,
)

from shardinit.errors import ServiceError


def attempts(
    codes: Collection[str],
    place: Callable[[], tuple[int, ...]] = tuple,
    most: int = 8,
) -> Retrying:
    """What tries a stream again: iterated, or called with the function to run.

    Args:
      codes: status codes after which the stream is asked for again. A deadline that
        passes without anything new counts as a failure all the same.
      place: how far the stream has come, as numbers that grow.
      most: attempts in a row that get no further; the error of the last one is raised.
    """
    furthest = place()

    def again(state: RetryCallState) -> bool:
        nonlocal furthest
        error = state.outcome and state.outcome.exception()
        if not isinstance(error, ServiceError) or error.code not in codes:
            return False
        if place() > furthest:
            furthest, state.attempt_number = place(), 0
            return True
        return error.code != "DEADLINE_EXCEEDED"

    # Random waits: the hosts of a job lose a server all at once.
    wait = wait_random_exponential(multiplier=0.1, max=2.0)
    return Retrying(retry=again, stop=stop_after_attempt(most), wait=wait, reraise=True)
