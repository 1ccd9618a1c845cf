"""Process: one worker as the process that listens sees it.

It is spawned, never forked: threads of gRPC and locks that they hold do not survive a
fork. It leads a group of its own, so that whatever it starts ends with it, and it ends
when this process does: it reads the end of its pipe, and Linux tells it besides.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress

import psutil
from google.rpc import status_pb2

from shardinit.errors import ServiceError
from shardinit.models import registry
from shardinit.service.server.config import Config
from shardinit.service.server.pipe import (
    HEAD,
    Kind,
    Task,
    make_memory,
    map_memory,
)
from shardinit.service.wire.errors import Refusal

Take = Callable[[Kind, bytes], None]
START = 300.0  # seconds in which a worker must be ready
TICK = 0.25  # seconds between two looks at a worker
# By why a worker was killed: what its caller is told, and the setting that says so.
_EXCESS = {
    "memory": ("it takes more memory than a worker may", "worker_bytes"),
    "time": ("it takes more seconds than a worker may", "build_seconds"),
}


class DiedError(Exception):
    """A worker has ended in the middle of a job."""


class Process:
    """A worker, from its start to its end. Make it inside a running event loop.

    Args:
      config: how to serve.
      evicted: called for each plan that it kept and that goes to make room.

    Attributes:
      memory: what a job's pieces lie in.
      models: its models, as a serialised ListModelsResponse.
      why: why it was killed; empty if it was not.
    """

    def __init__(self, config: Config, evicted: Callable[[], None] = lambda: None):
        self.models = b""
        self.why = ""
        self._config = config
        self._evicted = evicted
        self._take: Take = lambda kind, data: None
        self._done: asyncio.Future[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        ours, theirs = socket.socketpair()
        self._socket = ours
        handle = make_memory(config.block_bytes)
        try:
            self.memory = map_memory(handle, config.block_bytes)
            kept = (theirs.fileno(), handle)
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "shardinit.service.server.worker"),
                    *map(str, (*kept, os.getpid())),
                ],
                env=_environment(),
                pass_fds=kept,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        finally:
            theirs.close()
            os.close(handle)
        self._usage = psutil.Process(self._process.pid)

    async def start(self) -> None:
        """Returns when it is ready for jobs.

        Raises:
          Refusal: it cannot begin, and says why.
          DiedError: it ended before.
        """
        self._reader, self._writer = await asyncio.open_connection(sock=self._socket)
        self._listening = asyncio.create_task(self._listen())
        modules = json.dumps(list(registry.registered_modules())).encode()
        settings = modules + b"\n" + self._config.to_json()

        def take(kind: Kind, data: bytes) -> None:
            self.models = data

        await self._ask(Kind.SETTINGS, settings, take)
        self._watching = asyncio.create_task(self._watch())

    async def run(self, task: Task, take: Take) -> None:
        """Has it do a job; returns when it is done.

        Args:
          task: the job.
          take: called with each part of the answer, at once.

        Raises:
          Refusal: the job failed.
          DiedError: the worker has ended.
        """
        await self._ask(Kind.JOB, task.pack(), take)

    def kill(self, why: str) -> None:
        """Ends it at once, with all that it started."""
        self.why = self.why or why
        if self._process.returncode is None:  # else its number may be another's
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def ended(self) -> int:
        """Waits for its end; returns its exit status."""
        status = await asyncio.to_thread(self._process.wait)
        self._listening.cancel()
        if self._watching is not None:
            self._watching.cancel()
        self._writer.close()
        return status

    @property
    def alive(self) -> bool:
        """Whether it can be asked for anything."""
        return not self._listening.done()

    def excess(self, method: str) -> ServiceError | None:
        """What to say of a call for which it took too much; None if it did not."""
        if self.why not in _EXCESS:
            return None
        got, setting = _EXCESS[self.why]
        return ServiceError(
            method,
            got,
            f"at most {getattr(self._config, setting):,}",
            code="RESOURCE_EXHAUSTED",
            limit=setting.replace("_", "-"),
        )

    async def _watch(self) -> None:
        """Kills it when it has more memory than a worker may, with all it started."""
        while True:
            await asyncio.sleep(TICK)
            # psutil reads a file of every process of the machine to find those.
            if await asyncio.to_thread(self._resident) > self._config.worker_bytes:
                self.kill("memory")

    def _resident(self) -> int:
        try:
            family = [self._usage, *self._usage.children(recursive=True)]
            return sum(process.memory_info().rss for process in family)
        except psutil.Error:  # it, or one of them, ends just now
            return 0

    async def _ask(self, kind: Kind, data: bytes, take: Take) -> None:
        if self._listening.done():
            raise DiedError
        self._take = take
        self._done = asyncio.get_running_loop().create_future()
        try:
            self._writer.write(HEAD.pack(kind, len(data)) + data)
            await self._done
        finally:
            self._take, self._done = lambda kind, data: None, None

    async def _listen(self) -> None:
        """Takes in what it says until it ends."""
        try:
            while True:
                head = await self._reader.readexactly(HEAD.size)
                kind, size = HEAD.unpack(head)
                data = await self._reader.readexactly(size)
                self._hear(Kind(kind), data)
        except (OSError, EOFError, ValueError):
            if self._done is not None and not self._done.done():
                self._done.set_exception(DiedError())

    def _hear(self, kind: Kind, data: bytes) -> None:
        if kind is Kind.LOG:
            _say(data)
        elif kind is Kind.EVICTED:
            self._evicted()
        elif self._done is None or self._done.done():
            return
        elif kind is Kind.FAILED:
            status = status_pb2.Status.FromString(data)
            self._done.set_exception(Refusal(status))
        elif kind is Kind.DONE:
            self._done.set_result(None)
        else:
            self._take(kind, data)
            if kind is Kind.READY:
                self._done.set_result(None)


def _environment() -> dict[str, str]:
    """This process's, with its search path; no accelerator unless it is asked for."""
    path = os.pathsep.join(part for part in sys.path if part)
    return {"JAX_PLATFORMS": "cpu", **os.environ, "PYTHONPATH": path}


def _say(data: bytes) -> None:
    """A line of its log, in this process's log."""
    line = json.loads(data)
    log = logging.getLogger(line["name"])
    if log.isEnabledFor(line["level"]):
        record = log.makeRecord(
            log.name, line["level"], "worker", 0, line["text"], (), None
        )
        record.exc_text = line["trace"]
        log.handle(record)
