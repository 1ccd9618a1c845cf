"""Turns: the jobs that wait, and whose comes next.

Of the callers that wait, the one whose jobs have taken the least of the workers' time
comes next, in proportion to its weight. Who comes anew is on a par with who has had
least.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from shardinit.service.server.pipe import Piece, Task

_CALLERS = 4096  # whose time is remembered
_JOB = 0.001  # seconds that any job counts for, at its begin


@dataclass(eq=False)
class Job:
    """Something for a worker to do.

    Attributes:
      task: what it is asked.
      caller, weight: who asks, and its share of the workers, for fairness.
      model: what it is about; a worker that holds it is quicker.
      quick: whether a worker that holds the model is done in no time.
      piece: called with each piece, whose bytes are another's afterwards.
      answers: the messages of the answer.
    """

    task: Task
    caller: str = ""
    model: bytes = b""
    weight: int = 1
    quick: bool = False
    piece: Callable[[Piece], None] = lambda piece: None
    answers: list[bytes] = field(default_factory=list)
    done: asyncio.Future[None] = field(init=False)
    asked: float = field(default_factory=time.monotonic)
    left: float | None = None
    begun: bool = False  # a part of the answer has come
    tried: bool = False

    def __post_init__(self) -> None:
        self.done = asyncio.get_running_loop().create_future()

    def end(self, error: Exception | None = None) -> None:
        """Tells whoever waits that the job is done, or why it is not."""
        if self.done.done():
            return
        if error is None:
            self.done.set_result(None)
        else:
            # Its frames hold the job, which would then hold itself, with all its bytes.
            self.done.set_exception(error.with_traceback(None))
            self.done.exception()  # seen: nobody may wait for it any more


class Turns:
    """Jobs that no worker has begun; its length is their number."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, list[Job]] = OrderedDict()
        self._taken: dict[str, float] = {}  # seconds over weight, by caller
        self._least = 0.0  # what whoever was served last had taken

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, job: Job, first: bool = False) -> None:
        """Lets a job wait, behind its caller's others or before them."""
        jobs = self._waiting.setdefault(job.caller, [])
        jobs.insert(0 if first else len(jobs), job)

    def remove(self, job: Job) -> None:
        """Forgets a job, if it waits at all."""
        jobs = self._waiting.get(job.caller, [])
        if job in jobs:
            jobs.remove(job)
            if not jobs:
                del self._waiting[job.caller]

    def take(self, suits: Callable[[Job], bool]) -> Job | None:
        """The job that comes next of those that suit, which then waits no more."""
        for caller in sorted(self._waiting, key=self._taken_by):
            found = next((job for job in self._waiting[caller] if suits(job)), None)
            if found is not None:
                self._least = self._taken_by(caller)
                self._waiting.move_to_end(caller)  # the others come first now
                self.remove(found)
                self.charge(found, _JOB)
                return found
        return None

    def charge(self, job: Job, seconds: float) -> None:
        """Notes what a caller has taken of the workers' time."""
        self._taken[job.caller] = self._taken_by(job.caller) + seconds / job.weight
        if len(self._taken) > _CALLERS:
            least = self._least
            self._taken = {k: had for k, had in self._taken.items() if had > least}

    def _taken_by(self, caller: str) -> float:
        return max(self._taken.get(caller, 0.0), self._least)
