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
from pathlib import Path
from typing import Any

import numpy as np

import shardinit
from shardinit.errors import ServiceError, SpecError
from shardinit.service import wire
from shardinit.service.boundary import remaining
from shardinit.service.config import Config
from shardinit.service.places import resolve
from shardinit.service.sources import Sources
from shardinit.v1 import service_pb2

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
      sources: plans of specs.
    """

    def __init__(self, config: Config, sources: Sources):
        self._config = config
        self._sources = sources
        self._lock = threading.Lock()
        self._jobs: dict[Path, _Job] = {}
        self._stopping = False

    def write(
        self, request: service_pb2.WriteCheckpointRequest, context: Any
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
        plan = self._sources.plan(
            wire.spec_from_proto(request.spec), remaining(context)
        )
        key = wire.key_from_proto(request.key)
        job = self._started(_Job(target, request.format, plan, key, self._config))
        yield from job.watch(context, request.detach)
        done = job.result()
        answer = service_pb2.CheckpointReceipt(uri=str(target), receipt_json=done)
        yield service_pb2.WriteCheckpointResponse(receipt=answer)

    def stop(self) -> None:
        """Ends all writes and waits a little for them."""
        with self._lock:
            self._stopping = True
            jobs = list(self._jobs.values())
        for job in jobs:
            job.cancel("the server is stopping")
        for job in jobs:
            job.join(_STOP_SECONDS)

    def _started(self, new: _Job) -> _Job:
        with self._lock:
            running = {p: job for p, job in self._jobs.items() if job.running}
            self._jobs = running
            job = running.get(new.target)
            if job is not None and job.identity != new.identity:
                raise _taken(new.target, "another model or key is being written there")
            if job is None and new.is_done():
                return new
            if job is not None and job.stopping:
                raise ServiceError(
                    "WriteCheckpoint",
                    "an earlier write to that place is about to stop",
                    remedy="Ask again: the next goes on where it was",
                    code="UNAVAILABLE",
                )
            if job is None:
                if self._stopping or len(running) >= self._config.streams:
                    raise ServiceError(
                        "WriteCheckpoint",
                        f"{len(running)} writes run already, or the server is stopping",
                        remedy="Ask again later",
                        code="UNAVAILABLE" if self._stopping else "RESOURCE_EXHAUSTED",
                    )
                job = self._jobs[new.target] = new
                job.start()
            job.watchers += 1
            return job


def _taken(target: Path, why: str) -> ServiceError:
    return ServiceError(
        f"checkpoint {str(target)!r}",
        why,
        "a name that is free",
        "Nothing is overwritten: choose another name",
        code="ALREADY_EXISTS",
    )


class _Stopped(Exception):
    """Raised inside a write to end it."""


class _Job:
    """One write. Made for every call, started only if no equal one runs."""

    def __init__(self, target: Path, form: int, plan: Any, key: Any, config: Config):
        from shardinit.core.operands import key_words

        try:
            words = np.asarray(key_words(key, plan.cut)).tobytes().hex()
        except TypeError as error:  # a key of another kind than the model's
            raise SpecError("checkpoint", [("key", str(error))]) from error
        self.target = target
        self.identity = (form, plan.fingerprint, words)
        self._form, self._plan, self._key = form, plan, key
        self._config = config
        suffix = service_pb2.CheckpointFormat.Name(form).rpartition("_")[2].lower()
        self._receipt_path = target.with_name(f"{target.name}.{suffix}.receipt.json")
        self.watchers = 0
        self._lock = threading.Lock()
        self._detached = False
        self._written = 0
        self._stop = ""
        self._receipt: str | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="shardinit-checkpoint")
        self._thread.daemon = True

    @property
    def running(self) -> bool:
        """Whether it has started and not ended."""
        return self._thread.is_alive()

    @property
    def stopping(self) -> bool:
        """Whether it was told to end."""
        return bool(self._stop)

    def is_done(self) -> bool:
        """Whether an equal write is complete already, with its receipt.

        Raises:
          ServiceError: something else is there.
        """
        from shardinit.verify.receipt import Receipt

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
        self._receipt = text
        return True

    def start(self) -> None:
        """Begins to write."""
        self._thread.start()

    def watch(
        self, context: Any, detach: bool
    ) -> Iterator[service_pb2.WriteCheckpointResponse]:
        """Progress until the job has ended; counted in ``watchers`` beforehand."""
        self._detached |= detach
        total, said = self._plan.total_bytes, -1
        try:
            while self._thread.is_alive() and context.is_active():
                self._thread.join(_SECONDS)
                if self._written != said:
                    said = self._written
                    progress = service_pb2.CheckpointProgress(
                        bytes_done=said, bytes_total=total
                    )
                    yield service_pb2.WriteCheckpointResponse(progress=progress)
        finally:
            with self._lock:
                self.watchers -= 1
                if not self.watchers and not self._detached:
                    self.cancel("its caller has gone")

    def result(self) -> str:
        """The receipt of a job that has ended.

        Raises:
          ServiceError: it was stopped.
          Exception: whatever it failed with.
        """
        if self._receipt is not None:
            return self._receipt
        if self._error is None or isinstance(self._error, _Stopped):
            raise ServiceError(
                f"checkpoint {str(self.target)!r}",
                f"the write was stopped: {self._stop or 'its caller has gone'}",
                remedy="Ask again: it goes on where it was",
                code="UNAVAILABLE",
            )
        raise self._error

    def cancel(self, why: str) -> None:
        """Has the job end at the next window."""
        self._stop = self._stop or why

    def join(self, seconds: float) -> None:
        """Waits for the end of a job that has started."""
        if self._thread.ident is not None:
            self._thread.join(seconds)

    def _run(self) -> None:
        try:
            if self._form == service_pb2.CHECKPOINT_FORMAT_ORBAX:
                self._orbax()
            else:
                self._safetensors()
            self._receipt = self._receipt_path.read_text()
        except BaseException as error:  # told to whoever watches
            self._error = error

    def _check(self) -> None:
        if self._stop:
            raise _Stopped

    def _sign(self, values: Any) -> None:
        """Writes the receipt: before the checkpoint has its name, never after."""
        shardinit.receipt(self._plan, self._key, values).save(self._receipt_path)

    def _safetensors(self) -> None:
        from shardinit.storage import safetensors
        from shardinit.verify.digest_numpy import Digester

        memory = self._config.whole_bytes
        tree = shardinit.open(self._plan, self._key, memory_limit=memory)
        digester = Digester({x.path: (x.shape, x.dtype) for x in tree.values()})

        def seen(path: str, start: tuple[int, ...], window: np.ndarray) -> None:
            self._check()
            digester.add(path, start, window)
            self._written += window.nbytes

        safetensors.write(
            self.target,
            tree,
            max_memory=memory,
            on_window=seen,
            before_publish=lambda: self._sign(digester.digest()),
        )

    def _orbax(self) -> None:
        from shardinit.storage import orbax

        size, most = self._plan.total_bytes, self._config.model_bytes
        if size > most:
            raise ServiceError(
                "WriteCheckpoint",
                f"Orbax needs the whole model in memory, {size:,} bytes",
                f"at most {most:,}",
                "Write safetensors, which are written by windows",
                code="RESOURCE_EXHAUSTED",
            )

        def made(done: int, total: int) -> None:
            self._check()
            self._written = size * done // (2 * total)  # then they are to be written

        params = shardinit.compile_plan(self._plan)(self._key, made)
        self._sign(params)
        orbax.save(self.target, params)
        self._written = size
