"""Worker: the process that traces, builds and computes, one job at a time.

Started by `shardinit.service.server.process`; it alone imports JAX. It may be killed
at any moment and owns nothing that anybody would miss. A signal to a group, as a
terminal's Ctrl-C or a supervisor's SIGTERM, is the business of the process that
listens: it drains, and this one ends when that one does.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import logging
import os
import queue
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from google.protobuf import message_factory
from google.protobuf.message import Message

from shardinit.errors import FindingsWarning, ServiceError
from shardinit.models import load_package
from shardinit.service.server.config import Config
from shardinit.service.server.pipe import COUNTS, Frames, Kind, Piece, Task, map_memory
from shardinit.service.server.tracing import span
from shardinit.service.wire.errors import code_of, to_status
from shardinit.v1 import service_pb2

Answer: TypeAlias = Message | bytes | Piece

if TYPE_CHECKING:
    from shardinit.service.server.servicer import Servicer

log = logging.getLogger("shardinit.service")

_METHODS = service_pb2.DESCRIPTOR.services_by_name["InitService"].methods
_REQUESTS = {m.name: message_factory.GetMessageClass(m.input_type) for m in _METHODS}
# What has no call's name, and what a call's stream is made of as a whole.
_REQUESTS |= {
    "UploadProgram": service_pb2.ProgramChunk,
    "PrepareCheckpoint": service_pb2.WriteCheckpointRequest,
}
_PARENT_DIES = 1  # PR_SET_PDEATHSIG


class _Forward(logging.Handler):
    """Sends log records to the process that listens."""

    def __init__(self, frames: Frames):
        super().__init__()
        self._frames = frames

    def emit(self, record: logging.LogRecord) -> None:
        trace = None
        if record.exc_info:
            trace = logging.Formatter().formatException(record.exc_info)
        line = {
            "name": record.name,
            "level": record.levelno,
            "text": record.getMessage(),
            "trace": trace,
        }
        self._frames.send(Kind.LOG, json.dumps(line).encode())


def answer(frames: Frames, memory: memoryview, servicer: Servicer, task: Task) -> None:
    """Does one job, in a span of its own, and sends what comes of it."""
    with span(f"worker/{task.method}", [("traceparent", task.trace)]) as opened:
        opened.end(_answer(frames, memory, servicer, task))


def _answer(frames: Frames, memory: memoryview, servicer: Servicer, task: Task) -> str:
    """Does a job; returns the name of the status code that it ended with."""
    try:
        request = _REQUESTS[task.method].FromString(task.request)
        servicer.models.owner = task.owner
        used = 0
        for item in _items(getattr(servicer, task.method)(request)):
            if isinstance(item, Piece):
                memory[used : used + len(item.data)] = item.data
                used += len(item.data)
                counts = COUNTS.pack(len(item.data), item.times)
                frames.send(Kind.PIECE, counts + item.header.SerializeToString())
            else:
                data = item if isinstance(item, bytes) else item.SerializeToString()
                frames.send(Kind.ANSWER, data)
    except Exception as error:
        if code_of(error).name == "INTERNAL":
            text = "%s request_id=%s failed"
            log.error(text, task.method, task.request_id, exc_info=error)
        status = to_status(error, task.request_id)
        frames.send(Kind.FAILED, status.SerializeToString())
        return code_of(error).name
    frames.send(Kind.DONE)
    return "OK"


def _items(made: Message | bytes | Iterable[Answer]) -> Iterable[Answer]:
    return (made,) if isinstance(made, Message | bytes) else made


def _prepare(
    config: Config, modules: Sequence[str], evicted: Callable[[], None]
) -> Servicer:
    """Imports what the jobs need.

    Raises:
      ServiceError: a module cannot be imported, or has no models.
    """
    for name in config.models:
        try:
            load_package(name)
        except Exception as error:  # whatever a stranger's module raises
            raise ServiceError(
                f"--models {name}",
                " ".join(f"{type(error).__name__}: {error}".split()),
                "a module with models",
                code="FAILED_PRECONDITION",
            ) from error
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception:  # nobody named it: the other models are there to be used
            log.warning("the models of %r are not here", name, exc_info=True)
    from shardinit.service.server.servicer import Servicer

    return Servicer(config, evicted)


def main() -> None:
    """Serves the process whose number is the third argument."""
    numbers = [int(text) for text in sys.argv[1:4]]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DIES, signal.SIGKILL)
    if os.getppid() != numbers[2]:
        return  # it ended before it could be told
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    frames = Frames(socket.socket(fileno=numbers[0]))
    modules, settings = frames.receive()[1].split(b"\n", 1)
    config = Config.from_json(settings)
    logging.basicConfig(level=logging.INFO, handlers=[_Forward(frames)])
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("shardinit").setLevel(logging.INFO)
    logging.captureWarnings(True)
    warnings.simplefilter("ignore", FindingsWarning)  # they travel with the answer
    try:
        evicted = partial(frames.send, Kind.EVICTED)
        servicer = _prepare(config, json.loads(modules), evicted)
        models = servicer.ListModels(service_pb2.ListModelsRequest())
    except Exception as error:
        frames.send(Kind.FAILED, to_status(error, "start").SerializeToString())
        return
    memory = map_memory(numbers[1], config.block_bytes)
    frames.send(Kind.READY, models.SerializeToString())
    tasks: queue.SimpleQueue[Task] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(frames, tasks), daemon=True).start()
    while True:
        answer(frames, memory, servicer, tasks.get())


def _read(frames: Frames, tasks: queue.SimpleQueue[Task]) -> None:
    """Takes in jobs; ends the process when there is nobody left to ask for any."""
    try:
        while True:
            tasks.put(Task.unpack(frames.receive()[1]))
    except (EOFError, OSError):
        os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
