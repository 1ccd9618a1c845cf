"""Checkpoints: writes on the server's own storage, which outlive a call if asked to.

A write is a job with a thread of its own; a call watches one. A second call for the
same model, key and place watches the same job; when the last watcher of a job that was
not detached goes away, the job stops, and what it wrote stays for the next to go on
with. A checkpoint has its name when it is complete, and its receipt beside it, so that
asking once more gives the receipt again and writes nothing.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from shardinit.core.plan.plan import Plan
from shardinit.core.prng.root_key import KeyLike, as_key
from shardinit.core.run.arguments import key_words
from shardinit.core.run.compile import compile_plan
from shardinit.core.run.lazy import open as open_lazily
from shardinit.errors import ServiceError, SpecError
from shardinit.service.server.boundary import remaining
from shardinit.service.server.config import Config
from shardinit.service.server.model_cache import ModelCache
from shardinit.service.server.places import resolve
from shardinit.service.wire import messages as wire
from shardinit.v1 import service_pb2
from shardinit.verify.digest.host import Digester
from shardinit.verify.receipt import Receipt
from shardinit.verify.receipt import receipt as make_receipt

_SECONDS = 0.25  # between two messages of progress
_STOP_SECONDS = 10.0
_FORMATS = (
    service_pb2.CHECKPOINT_FORMAT_SAFETENSORS,
    service_pb2.CHECKPOINT_FORMAT_ORBAX,
)


class Checkpoints:
    """The writes of one server.

    Args:
      config: the folders that are allowed, and memory.
      models: plans of specs.
    """

    def __init__(self, config: Config, models: ModelCache):
        self._config = config
        self._models = models
        self._lock = threading.Lock()
        self._jobs: dict[Path, _Job] = {}
        self._stopping = False

    def write(
        self, request: service_pb2.WriteCheckpointRequest, context: grpc.ServicerContext
    ) -> Iterator[service_pb2.WriteCheckpointResponse]:
        """Progress of a write, then its receipt; starts it if it does not run.

        Raises:
          SpecError: the spec, the key or the format has faults.
          ServiceError: no folder is allowed, the place is not, or is taken; too many
            writes run; the model is too large for the format.
        """
        target = resolve(request.uri, self._config.checkpoint_roots)
        if request.format not in _FORMATS:
            raise SpecError("checkpoint", [("format", "missing, or not known here")])
        spec = wire.spec_from_proto(request.spec)
        plan = self._models.plan(spec, remaining(context))
        key = wire.key_from_proto(request.key)
        new = _Job(target, request.format, plan, key, self._config)
        with self._lock:
            job = self._joined(new)
            job.watchers += 1
            job.detached |= request.detach
        try:
            yield from job.watch(context)
        finally:
            with self._lock:
                job.watchers -= 1
                if not job.watchers and not job.detached:
                    job.cancel("its caller has gone")
        if job.done.done():
            receipt = service_pb2.CheckpointReceipt(
                uri=str(target), receipt_json=job.done.result()
            )
            yield service_pb2.WriteCheckpointResponse(receipt=receipt)

    def stop(self) -> None:
        """Ends all writes and waits a little for them."""
        with self._lock:
            self._stopping = True
            jobs = list(self._jobs.values())
        for job in jobs:
            job.cancel("the server is stopping")
        wait([job.done for job in jobs], _STOP_SECONDS)

    def _joined(self, new: _Job) -> _Job:
        """The job to watch: an equal one that runs, or the new one, started."""
        running = {p: job for p, job in self._jobs.items() if not job.done.done()}
        self._jobs = running
        job = running.get(new.target)
        if job is None:
            if new.is_done():
                return new
            if self._stopping or len(running) >= self._config.streams:
                raise ServiceError(
                    "WriteCheckpoint",
                    f"{len(running)} writes run already, or the server is stopping",
                    remedy="Ask again later",
                    code="UNAVAILABLE" if self._stopping else "RESOURCE_EXHAUSTED",
                )
            job = running[new.target] = new
            job.start()
        if job.identity != new.identity:
            raise _taken(new.target, "another model or key is being written there")
        if job.stopping:
            raise job.stopped()
        return job


def _taken(target: Path, why: str) -> ServiceError:
    return ServiceError(
        f"checkpoint {str(target)!r}",
        why,
        "a name that is free",
        "Nothing is overwritten: choose another name",
        code="ALREADY_EXISTS",
    )


class _Job:
    """One write. Made for every call, started only if no equal one runs.

    Attributes:
      target: the checkpoint's name.
      identity: what is written: format, function and key.
      done: its receipt, when it is there, or what it failed with.
      watchers, detached: who is interested; under the lock of all jobs.
    """

    def __init__(
        self, target: Path, form: int, plan: Plan, key: KeyLike, config: Config
    ):
        try:
            words = np.asarray(key_words(as_key(key), plan.cut)).tobytes().hex()
        except TypeError as error:  # a key of another kind than the model's
            raise SpecError("checkpoint", [("key", str(error))]) from error
        size, most = plan.total_bytes, config.model_bytes
        if form == service_pb2.CHECKPOINT_FORMAT_ORBAX and size > most:
            raise ServiceError(
                "WriteCheckpoint",
                f"Orbax needs the whole model in memory, {size:,} bytes",
                f"at most {most:,}",
                "Write safetensors, which are written by windows",
                code="RESOURCE_EXHAUSTED",
            )
        self.target = target
        self.identity = (form, plan.fingerprint, words)
        self.done: Future[str] = Future()
        self.watchers = 0
        self.detached = False
        self._form, self._plan, self._key = form, plan, key
        self._memory = config.whole_bytes
        suffix = service_pb2.CheckpointFormat.Name(form).rpartition("_")[2].lower()
        self._receipt_path = target.with_name(f"{target.name}.{suffix}.receipt.json")
        self._written = 0
        self._stop = ""

    @property
    def stopping(self) -> bool:
        """Whether it was told to end."""
        return bool(self._stop)

    def is_done(self) -> bool:
        """Whether an equal write is complete already, with its receipt.

        Raises:
          ServiceError: something else is there.
        """
        if not os.path.lexists(self.target):
            return False
        try:
            text = self._receipt_path.read_text()
            found = Receipt.from_json(text)
        except (OSError, ValueError):
            raise _taken(self.target, "something is there already") from None
        words = np.array(found.key, np.uint32).tobytes().hex()
        if (found.fingerprint, words) != self.identity[1:]:
            raise _taken(self.target, "another model or key is there already")
        self._written = self._plan.total_bytes
        self.done.set_result(text)
        return True

    def start(self) -> None:
        """Begins to write."""
        name = "shardinit-checkpoint"
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def watch(
        self, context: grpc.ServicerContext
    ) -> Iterator[service_pb2.WriteCheckpointResponse]:
        """Progress until the job has ended, or its caller has gone."""
        said, ended = -1, False
        while not ended and context.is_active():
            ended = bool(wait([self.done], _SECONDS).done)
            if self._written != said:
                said = self._written
                progress = service_pb2.CheckpointProgress(
                    bytes_done=said, bytes_total=self._plan.total_bytes
                )
                yield service_pb2.WriteCheckpointResponse(progress=progress)

    def cancel(self, why: str) -> None:
        """Has the job end at the next window."""
        self._stop = self._stop or why

    def stopped(self) -> ServiceError:
        """What a write that was told to end has to say."""
        return ServiceError(
            f"checkpoint {str(self.target)!r}",
            f"the write was stopped: {self._stop}",
            remedy="Ask again: it goes on where it was",
            code="UNAVAILABLE",
        )

    def check(self) -> None:
        """Goes on unless it was told to end."""
        if self.stopping:
            raise self.stopped()

    def _run(self) -> None:
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            if self._form == service_pb2.CHECKPOINT_FORMAT_ORBAX:
                self._orbax()
            else:
                self._safetensors()
            self.done.set_result(self._receipt_path.read_text())
        except BaseException as error:  # told to whoever watches
            self.done.set_exception(error)

    def _sign(self, values: Any) -> None:
        """Writes the receipt: before the checkpoint has its name, never after."""
        make_receipt(self._plan, self._key, values).save(self._receipt_path)

    def _safetensors(self) -> None:
        from shardinit.storage import safetensors

        tree = open_lazily(self._plan, self._key, memory_limit=self._memory)
        digester = Digester({x.path: (x.shape, x.dtype) for x in tree.values()})

        def seen(path: str, start: tuple[int, ...], window: np.ndarray) -> None:
            self.check()
            digester.add(path, start, window)
            self._written += window.nbytes

        safetensors.write(
            self.target,
            tree,
            max_memory=self._memory,
            on_window=seen,
            before_publish=lambda: self._sign(digester.digest()),
        )

    def _orbax(self) -> None:
        from shardinit.storage import orbax

        size = self._plan.total_bytes

        def made(done: int, total: int) -> None:
            self.check()
            self._written = size * done // (2 * total)  # then they are to be written

        params = compile_plan(self._plan)(self._key, made)
        self._sign(params)
        orbax.save(self.target, params)
        self._written = size
