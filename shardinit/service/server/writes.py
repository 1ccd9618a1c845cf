"""Writes: checkpoints that are being written, each by a worker of its own.

A call watches a write. A second call for the same model, key and place watches the same
write; when the last watcher of one that was not detached goes away, its worker is
killed, and what it wrote stays for the next to go on with. So it is of one that stands
still, whose program may never end. One that gives its place to another caller's goes on
where it was when there is a place for it. What was not completed leaves no receipt.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from functools import partial
from pathlib import Path

from shardinit.errors import ServiceError, SpecError
from shardinit.service.server.admission import Call
from shardinit.service.server.config import Config
from shardinit.service.server.leftovers import remove_abandoned
from shardinit.service.server.pipe import Kind, Prepared, Task
from shardinit.service.server.places import receipt_of, resolve, room, taken
from shardinit.service.server.pool import Pool
from shardinit.service.server.pots import Pot
from shardinit.service.server.process import START, DiedError, Process
from shardinit.service.server.telemetry import Metrics
from shardinit.service.wire.errors import code_of
from shardinit.v1 import service_pb2

log = logging.getLogger("shardinit.service")

_FORMATS = (
    service_pb2.CHECKPOINT_FORMAT_SAFETENSORS,
    service_pb2.CHECKPOINT_FORMAT_ORBAX,
)
_SWEEP = 3600.0  # seconds between two looks for abandoned writes
_TICK = 1.0  # seconds between two looks for a place
_AGAIN = 5.0  # seconds after which there may be room for another write


class Writes:
    """The writes of one server.

    Args:
      config: the folders that are allowed, and how many at a time.
      pool: has a worker prepare a write.
      metrics: where they are counted.
    """

    def __init__(self, config: Config, pool: Pool, metrics: Metrics):
        self._config = config
        self._pool = pool
        self._metrics = metrics
        self._running: dict[Path, _Write] = {}
        self._places = Pot(config.writes)
        running = self._running.__len__
        metrics.watch("active_checkpoints", "Running checkpoints", running)
        self._stopping = False
        self._sweeping = asyncio.create_task(self._sweep())

    async def write(
        self, request: service_pb2.WriteCheckpointRequest, call: Call
    ) -> AsyncGenerator[bytes, None]:
        """Progress of a write, then its receipt; starts it if it does not run.

        Raises:
          SpecError: the spec, the key or the format has faults.
          ServiceError: no folder is allowed, the place is not, or is taken; too many
            writes run; the model is too large for the format.
        """
        roots = call.who.its_roots(self._config.checkpoint_roots)
        target = resolve(request.uri, roots, call.who.folder)
        call.place = str(target)
        if request.format not in _FORMATS:
            raise SpecError("checkpoint", [("format", "missing, or not known here")])
        job = call.job("PrepareCheckpoint", request.SerializeToString(), request.spec)
        (answer,) = await self._pool.run(job)
        prepared = Prepared.from_json(answer)
        if prepared.receipt:
            for message in _complete(target, prepared):
                yield message.SerializeToString()
            return
        write = self._joined(target, prepared, job.task, call)
        write.watchers += 1
        write.detached |= request.detach
        try:
            async with aclosing(write.watch()) as messages:
                async for message in messages:
                    yield message
        finally:
            write.watchers -= 1
            if not write.watchers and not write.detached:
                write.stop("its caller has gone")

    def stop(self) -> None:
        """Ends all writes."""
        self._stopping = True
        for write in self._running.values():
            write.stop("the server is stopping")

    async def close(self) -> None:
        """Ends all writes and waits for their workers' end."""
        self.stop()
        self._sweeping.cancel()
        running = [write.task for write in self._running.values()]
        await asyncio.gather(*running, return_exceptions=True)

    async def _sweep(self) -> None:
        """Removes what abandoned writes have left, now and from time to time."""
        while True:
            for root in self._config.checkpoint_roots:
                age = self._config.unfinished_seconds
                for path in await asyncio.to_thread(remove_abandoned, root, age):
                    log.info("%s: abandoned, and removed", path)
            await asyncio.sleep(_SWEEP)

    def _joined(
        self, target: Path, prepared: Prepared, task: Task, call: Call
    ) -> _Write:
        """The write to watch: an equal one that runs, or a new one, started."""
        write = self._running.get(target)
        if write is None:
            self._reserve(target, prepared)
            take = partial(
                self._places.take,
                target,
                call.takes(1),
                lambda: self._running[target].pause(),
            )
            if self._stopping or not take():
                raise ServiceError(
                    "WriteCheckpoint",
                    "its caller's share of the writes run already, or the server stops",
                    remedy="Ask again later",
                    code="UNAVAILABLE" if self._stopping else "RESOURCE_EXHAUSTED",
                    limit="" if self._stopping else "writes",
                    retry_after=None if self._stopping else _AGAIN,
                )
            task = task._replace(method="WriteCheckpoint")
            written = self._metrics.written.inc
            write = _Write(self._config, target, prepared, task, written, take)
            self._running[target] = write
            write.task.add_done_callback(partial(self._ended, target))
        if write.prepared.identity != prepared.identity:
            raise taken(target, "another model or key is being written there")
        if write.stopped:
            raise write.told_to_stop()
        return write

    def _ended(self, target: Path, task: asyncio.Task[None]) -> None:
        """Takes note of how a write has ended, which nobody may wait for."""
        del self._running[target]
        self._places.leave(target)
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        code = "OK" if error is None else "CANCELLED"
        if isinstance(error, Exception):
            code = code_of(error).name
        self._metrics.checkpoints.labels(code).inc()

    def _reserve(self, target: Path, prepared: Prepared) -> None:
        """Refuses a write that is too large, or has no room beside those that run.

        Raises:
          ServiceError: it is, or has none.
        """
        size, most = prepared.total_bytes, self._config.checkpoint_bytes
        if size > most:
            raise ServiceError(
                f"checkpoint {str(target)!r}",
                f"{size:,} bytes",
                f"at most {most:,}",
                code="RESOURCE_EXHAUSTED",
                limit="checkpoint-bytes",
            )
        left = sum(write.left for write in self._running.values())
        free = room(target) - left - self._config.free_bytes
        begun = sum(
            file.stat().st_size
            for file in target.with_name(f"{target.name}.unfinished").rglob("*")
            if file.is_file()
        )
        if size - begun > free:
            raise ServiceError(
                f"checkpoint {str(target)!r}",
                f"{size:,} bytes, and {max(free, 0):,} are free",
                "room for the whole checkpoint",
                "Ask again when there is room",
                code="RESOURCE_EXHAUSTED",
                limit="disk",
            )


def _complete(
    target: Path, prepared: Prepared
) -> list[service_pb2.WriteCheckpointResponse]:
    """What is said of a checkpoint that is there already."""
    size = prepared.total_bytes
    progress = service_pb2.CheckpointProgress(bytes_done=size, bytes_total=size)
    receipt = service_pb2.CheckpointReceipt(
        uri=str(target), receipt_json=prepared.receipt
    )
    made = service_pb2.WriteCheckpointResponse
    return [made(progress=progress), made(receipt=receipt)]


class _Write:
    """One write: a worker, what it said last, and who wants to know.

    Attributes:
      prepared: what is written.
      watchers, detached: who is interested.
      stopped: why it was told to end; empty if it was not.
      task: ends when the worker has.
    """

    def __init__(
        self,
        config: Config,
        target: Path,
        prepared: Prepared,
        task: Task,
        written: Callable[[int], None],
        take: Callable[[], bool],
    ):
        self.prepared = prepared
        self.watchers = 0
        self.detached = False
        self.stopped = ""
        self._config = config
        self._target = target
        self._form = int(prepared.identity.partition(" ")[0])
        self._progress = self._receipt = b""
        self._count = self._done = 0
        self._written = written
        self._take = take
        self._placed = True
        self._news = asyncio.Condition()
        self._process: Process | None = None
        self.task = asyncio.create_task(self._run(task))

    @property
    def left(self) -> int:
        """Bytes that are still to be written."""
        return self.prepared.total_bytes - self._done

    async def watch(self) -> AsyncGenerator[bytes, None]:
        """What the worker says: of its progress the newest, and all of the end.

        Raises:
          Refusal, ServiceError: it was not written.
        """
        seen = 0
        while True:
            if self._count > seen:
                seen = self._count
                yield self._progress
                continue
            if self.task.done():
                self.task.result()
                yield self._receipt
                return
            told = asyncio.create_task(self._wait(seen))
            try:
                await asyncio.wait(
                    (told, self.task), return_when=asyncio.FIRST_COMPLETED
                )
            finally:
                told.cancel()

    def stop(self, why: str) -> None:
        """Ends it."""
        self.stopped = self.stopped or why
        if self._process is not None:
            self._process.kill("left")

    def pause(self) -> None:
        """Has it give up its place, and go on when there is one again."""
        self._placed = False
        if self._process is not None:
            self._process.kill("turn")

    def told_to_stop(self) -> ServiceError:
        """What a write that was told to end has to say."""
        return ServiceError(
            f"checkpoint {str(self._target)!r}",
            f"the write was stopped: {self.stopped or 'its worker has ended'}",
            remedy="Ask again: it goes on where it was",
            code="UNAVAILABLE",
        )

    async def _wait(self, seen: int) -> None:
        async with self._news:
            while self._count <= seen:
                await self._news.wait()

    async def _run(self, task: Task) -> None:
        while not (self._placed and await self._finished(task)):
            if self.stopped:
                raise self.told_to_stop()
            await asyncio.sleep(_TICK)
            self._placed = self._placed or self._take()

    async def _finished(self, task: Task) -> bool:
        """Whether a worker has written it, or was stopped for another write."""
        process = self._process = Process(self._config)
        try:
            async with asyncio.timeout(START):
                await process.start()
            async with asyncio.timeout(None) as self._patience:
                self._go_on()
                await process.run(task, self._hear)
            return True
        except (DiedError, TimeoutError) as error:
            if isinstance(error, TimeoutError):
                process.kill("time")
            if process.why == "turn":
                return False
            raise process.excess("WriteCheckpoint") or self.told_to_stop() from None
        finally:
            process.kill("stop")
            await process.ended()
            if not os.path.lexists(self._target):
                with suppress(OSError):
                    receipt_of(self._target, self._form).unlink()

    def _go_on(self) -> None:
        """Gives it as long as a build, until it has finished more."""
        now = asyncio.get_running_loop().time()
        self._patience.reschedule(now + self._config.build_seconds)

    def _hear(self, kind: Kind, data: bytes) -> None:
        self._go_on()
        said = service_pb2.WriteCheckpointResponse.FromString(data)
        if said.HasField("receipt"):
            self._receipt = data
            return
        more = max(said.progress.bytes_done - self._done, 0)  # it may have begun again
        self._written(more)
        self._done += more
        self._progress, self._count = data, self._count + 1
        self._told = asyncio.ensure_future(self._tell())

    async def _tell(self) -> None:
        async with self._news:
            self._news.notify_all()
