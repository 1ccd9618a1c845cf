"""Pool: the workers, which job is whose, and when a worker is killed.

Whose turn it is, ``turns`` says. A job that asks for what a worker holds already goes
to that worker; all others, which trace or build, leave one worker free for such quick
jobs where there are two or more.

A worker is killed, and replaced, when nobody waits for its job any more, when the job
takes too long, when it has grown too large. One that dies by itself has its job given
to another once; then whoever asked is told to ask again.
"""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

from shardinit.errors import ServiceError
from shardinit.service.server.config import Config
from shardinit.service.server.pipe import COUNTS, Kind, Piece
from shardinit.service.server.pots import Pot, Taken
from shardinit.service.server.process import START, TICK, DiedError, Process
from shardinit.service.server.telemetry import Metrics
from shardinit.service.server.turns import Job, Turns
from shardinit.service.wire.errors import Refusal
from shardinit.v1 import service_pb2

log = logging.getLogger("shardinit.service")

_LINGER = 1.0  # seconds that a job nobody waits for may take to end by itself
_KNOWN = 64  # models that a worker is thought to hold
_AGAIN = 1.0  # seconds after which to ask a busy server again


class _Slot:
    """A place for a worker, and the worker that is in it now."""

    def __init__(self) -> None:
        self.process: Process | None = None
        self.ready = False
        self.job: Job | None = None
        self.begun = 0.0
        self.building = False
        self.held: OrderedDict[bytes, None] = OrderedDict()

    def hold(self, model: bytes) -> None:
        """Notes that the worker holds a model."""
        self.held[model] = None
        self.held.move_to_end(model)
        if len(self.held) > _KNOWN:
            self.held.popitem(last=False)


class Pool:
    """Workers. Make it inside a running event loop, and `close` it.

    Args:
      config: how many, and what they may take.
      metrics: where they are counted.

    Attributes:
      models: what ListModels answers, serialised; known when a worker is up.
      up: whether a worker is ready.
      on_change: called when that changes.
    """

    def __init__(self, config: Config, metrics: Metrics):
        self._config = config
        self._metrics = metrics
        self._changed = asyncio.Condition()
        self._turns = Turns()
        self._places = Pot(config.queue, turn=math.inf)  # they wait for their turn
        self._slots = [_Slot()]
        self.models: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.up = False
        self.on_change: Callable[[], None] = lambda: None
        self._tasks = [asyncio.create_task(self._fill(self._slots[0]))]
        self._tasks.append(asyncio.create_task(self._watch()))
        metrics.watch("workers", "Workers that are ready", self._count_ready)
        metrics.watch(
            "queue_waiting", "Jobs that wait for a worker", lambda: self.waiting
        )

    @property
    def waiting(self) -> int:
        """Number of jobs that no worker has begun."""
        return len(self._turns)

    async def run(self, job: Job) -> list[bytes]:
        """The answers of a job, when a worker has done it.

        Raises:
          Refusal: the job failed.
          ServiceError: too many wait, or the job took too much.
        """
        taken = Taken(job.caller, 1, job.weight)
        if not job.quick and not self._places.take(
            job, taken, partial(self._give_up, job)
        ):
            raise self._busy(job)
        self._turns.add(job)
        self._grow()
        try:
            await self._notify()
            await asyncio.shield(job.done)
        finally:
            self._places.leave(job)
            if not job.done.done():
                job.left = time.monotonic()
                self._turns.remove(job)
        return job.answers

    def _give_up(self, job: Job) -> None:
        """Leaves the place of a job that waits to another caller's."""
        self._turns.remove(job)
        job.end(self._busy(job))

    def _busy(self, job: Job) -> ServiceError:
        return ServiceError(
            job.task.method,
            f"{self._config.queue:,} builds wait already, its caller's share of them",
            remedy="Ask again later",
            code="RESOURCE_EXHAUSTED",
            limit="queue",
            retry_after=_AGAIN,
        )

    async def close(self) -> None:
        """Ends all workers."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for slot in self._slots:
            if slot.process is not None:
                slot.process.kill("stop")
                await slot.process.ended()

    def _grow(self) -> None:
        """Starts one more worker, if the others have work and there may be more."""
        busy = all(slot.job is not None for slot in self._slots)
        if (busy or self.waiting > 1) and len(self._slots) < self._config.workers:
            slot = _Slot()
            self._slots.append(slot)
            self._tasks.append(asyncio.create_task(self._fill(slot)))

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    # ---- one worker after another in its place ---------------------------------------

    async def _fill(self, slot: _Slot) -> None:
        """Keeps a worker in a slot, until it is cancelled."""
        pause = 0.0
        while True:
            process = slot.process = Process(self._config, self._metrics.evicted.inc)
            slot.held.clear()
            try:
                async with asyncio.timeout(START):
                    await process.start()
                pause = 0.0
                self._now_ready(slot, process)
                await self._work(slot, process)
            except Refusal as error:
                process.kill("refused")
                pause = min(2 * pause + 0.5, 30)
                if self.models.done():
                    log.error("a worker cannot begin: %s", error)
                else:  # who starts the server says it
                    self.models.set_exception(error)
                    self.models.exception()  # seen, whether somebody waits or not
            except (DiedError, TimeoutError):
                pause = min(2 * pause + 0.5, 30) if not slot.ready else 0.0
            finally:
                slot.ready = False
                process.kill("stop")
                self._say_up()
            why = process.why if process.why != "stop" else ""
            status = await process.ended()
            if (why or status) and why != "refused":  # that has been said
                self._metrics.killed.labels(why or "died").inc()
                log.warning("a worker has ended: %s", why or _ending(status))
            await asyncio.sleep(pause)

    def _now_ready(self, slot: _Slot, process: Process) -> None:
        slot.ready = True
        if not self.models.done() or self.models.exception() is not None:
            if self.models.done():
                self.models = asyncio.get_running_loop().create_future()
            self.models.set_result(process.models)
        self._say_up()

    def _say_up(self) -> None:
        up = any(slot.ready for slot in self._slots)
        if up != self.up:
            self.up = up
            self.on_change()

    async def _work(self, slot: _Slot, process: Process) -> None:
        """Does jobs until the worker ends.

        Raises:
          DiedError: it has ended.
        """
        while True:  # no name for a job here, which would keep it until the next comes
            await self._do(slot, process, await self._next(slot, process))

    async def _do(self, slot: _Slot, process: Process, job: Job) -> None:
        slot.job, slot.begun = job, time.monotonic()
        self._places.leave(job)
        slot.building = not (job.quick and job.model in slot.held)
        self._metrics.waited.observe(slot.begun - job.asked)
        try:
            await process.run(job.task, _taker(job, process.memory))
        except Refusal as error:
            job.end(error)
        except DiedError:
            self._died(job, process)
            raise
        else:
            if job.model:
                slot.hold(job.model)
            job.end()
        finally:
            taken = time.monotonic() - slot.begun
            self._turns.charge(job, taken)
            if slot.building:
                self._metrics.built.labels(job.task.method).observe(taken)
            slot.job, slot.building = None, False
            await self._notify()

    async def _next(self, slot: _Slot, process: Process) -> Job:
        """The job that a worker is to do now.

        Raises:
          DiedError: the worker has ended.
        """
        async with self._changed:
            while True:
                if not process.alive:
                    raise DiedError
                job = self._turns.take(partial(self._suits, slot))
                if job is not None:
                    return job
                await self._changed.wait()

    def _suits(self, slot: _Slot, job: Job) -> bool:
        """Whether a worker that is free should do a job, or leave it to another."""
        others = [other for other in self._slots if other is not slot and other.ready]
        if job.quick and job.model in slot.held:
            return True
        if job.model not in slot.held and _waits_for_holder(job, others):
            return False
        building = sum(other.building for other in others)
        return building < max(1, self._config.workers - 1)

    def _died(self, job: Job, process: Process) -> None:
        """Ends a job whose worker has ended, or gives it to another."""
        excess = process.excess(job.task.method)
        if excess is not None:
            job.end(excess)
        elif job.begun and not job.answers:
            job.end()  # the pieces that came are good, and whoever asked goes on there
        elif job.left is None and not (process.why or job.begun or job.tried):
            job.tried = True
            self._turns.add(job, first=True)
        else:
            text = "its worker has ended in the middle of it"
            job.end(
                ServiceError(
                    job.task.method, text, remedy="Ask again", code="UNAVAILABLE"
                ),
            )

    # ---- limits ----------------------------------------------------------------------

    async def _watch(self) -> None:
        """Kills workers that take too long, or whose work nobody wants."""
        while True:
            await asyncio.sleep(TICK)
            now = time.monotonic()
            for slot in self._slots:
                process, job = slot.process, slot.job
                if process is None or not slot.ready:
                    continue
                if not process.alive:
                    await self._notify()
                elif job is not None and now - slot.begun > self._config.build_seconds:
                    process.kill("time")
                elif job is not None and job.left and now - job.left > _LINGER:
                    process.kill("left")

    def _count_ready(self) -> int:
        return sum(slot.ready for slot in self._slots)


def _waits_for_holder(job: Job, slots: Sequence[_Slot]) -> bool:
    """Whether a job is left to a worker that holds its model and is soon free."""
    holders = [slot for slot in slots if job.model in slot.held]
    if job.quick and any(not slot.building for slot in holders):
        return True
    return any(slot.job is None for slot in holders)


def _taker(job: Job, memory: memoryview) -> Callable[[Kind, bytes], None]:
    """Gives a job the parts of its answer as they come."""
    used = 0

    def take(kind: Kind, data: bytes) -> None:
        nonlocal used
        job.begun = True
        if kind is Kind.PIECE:
            size, times = COUNTS.unpack_from(data)
            header = service_pb2.ShardHeader.FromString(data[COUNTS.size :])
            job.piece(Piece(header, memory[used : used + size], times))
            used += size
        else:
            job.answers.append(data)

    return take


def _ending(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"status {status}"
