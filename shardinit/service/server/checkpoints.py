"""Checkpoints: a worker that is started for one write does it, and ends.

A checkpoint has its name when it is complete, and its receipt beside it, so that
asking once more gives the receipt again and writes nothing. A worker that is killed
leaves what it wrote for the next to go on with.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

import numpy as np

from shardinit.core.plan.plan import Plan
from shardinit.core.prng.root_key import KeyLike, as_key
from shardinit.core.run.arguments import key_words
from shardinit.core.run.compile import compile_plan
from shardinit.core.run.lazy import open as open_lazily
from shardinit.core.types import Tree
from shardinit.errors import ServiceError, SpecError, WholeLeafError
from shardinit.service.server.config import Config
from shardinit.service.server.model_cache import ModelCache
from shardinit.service.server.pipe import Prepared
from shardinit.service.server.places import receipt_of, resolve, taken
from shardinit.service.server.windows import too_large
from shardinit.service.wire import messages as wire
from shardinit.v1 import service_pb2
from shardinit.verify.digest.host import Digester
from shardinit.verify.receipt import receipt as make_receipt
from shardinit.verify.receipt_record import Receipt

_ORBAX = service_pb2.CHECKPOINT_FORMAT_ORBAX


def prepare(
    models: ModelCache, request: service_pb2.WriteCheckpointRequest, config: Config
) -> Prepared:
    """Holds a request against the model and what is at its place.

    Raises:
      SpecError: the spec or the key has faults.
      ServiceError: something else is there, or the model is too large for Orbax.
    """
    target = resolve(request.uri, config.checkpoint_roots)
    plan = models.plan(wire.spec_from_proto(request.spec))
    key = wire.key_from_proto(request.key)
    try:
        words = np.asarray(key_words(as_key(key), plan.cut)).tobytes().hex()
    except TypeError as error:  # a key of another kind than the model's
        raise SpecError("checkpoint", [("key", str(error))]) from error
    size, most = plan.total_bytes, config.model_bytes
    if request.format == _ORBAX and size > most:
        raise ServiceError(
            "WriteCheckpoint",
            f"Orbax needs the whole model in memory, {size:,} bytes",
            f"at most {most:,}",
            "Write safetensors, which are written by windows",
            code="RESOURCE_EXHAUSTED",
            limit="model-bytes",
        )
    identity = f"{request.format} {plan.fingerprint} {words}"
    receipt = ""
    if os.path.lexists(target):
        receipt = _receipt_there(request, target, identity)
    return Prepared(identity, size, receipt)


def _receipt_there(
    request: service_pb2.WriteCheckpointRequest, target: Path, identity: str
) -> str:
    """The receipt of an equal write that is complete.

    Raises:
      ServiceError: something else is there.
    """
    try:
        text = receipt_of(target, request.format).read_text()
        found = Receipt.from_json(text)
    except (OSError, ValueError):
        raise taken(target, "something is there already") from None
    words = np.array(found.key, np.uint32).tobytes().hex()
    if f"{request.format} {found.fingerprint} {words}" != identity:
        raise taken(target, "another model or key is there already")
    return text


def write(
    models: ModelCache, request: service_pb2.WriteCheckpointRequest, config: Config
) -> Iterator[service_pb2.WriteCheckpointResponse]:
    """Progress of a write, then its receipt.

    Raises:
      CheckpointError: it cannot be written.
      ServiceError: the disk is full, or a leaf is too large to be computed whole.
    """
    target = resolve(request.uri, config.checkpoint_roots)
    plan = models.plan(wire.spec_from_proto(request.spec))
    key = wire.key_from_proto(request.key)
    made = _Write(target, request.format, plan, key, config.whole_bytes)
    said: SimpleQueue[int | BaseException | None] = SimpleQueue()

    def run() -> None:
        try:
            made.run(said.put)
            said.put(None)
        except BaseException as error:  # raised where it is asked for
            said.put(error)

    Thread(target=run, daemon=True).start()
    for got in iter(said.get, None):
        if isinstance(got, BaseException):
            raise _of_the_limits(target, got) from got
        progress = service_pb2.CheckpointProgress(
            bytes_done=got, bytes_total=plan.total_bytes
        )
        yield service_pb2.WriteCheckpointResponse(progress=progress)
    receipt = service_pb2.CheckpointReceipt(
        uri=str(target), receipt_json=made.receipt.read_text()
    )
    yield service_pb2.WriteCheckpointResponse(receipt=receipt)


def _of_the_limits(target: Path, error: BaseException) -> BaseException:
    """The error, or which limit was reached, however deep in it that stands."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, WholeLeafError):
            return too_large(cause, "WriteCheckpoint")
        # TensorStore, below Orbax, raises a ValueError without an errno, as in
        # https://github.com/google/orbax/issues/2837: the operating system's text in it
        # is all that tells a full disk. Nothing is compared that shardinit says itself.
        text = str(cause)
        number = getattr(cause, "errno", None)
        full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if full or "No space left" in text or "File too large" in text:
            return ServiceError(
                f"checkpoint {str(target)!r}",
                "the disk is full",
                "room for the whole checkpoint",
                "Nothing has that name; ask again when there is room",
                code="RESOURCE_EXHAUSTED",
                limit="disk",
            )
        cause = cause.__cause__ or cause.__context__
    return error


class _Write:
    """One write.

    Attributes:
      receipt: where its receipt is, when it has ended.
    """

    def __init__(self, target: Path, form: int, plan: Plan, key: KeyLike, memory: int):
        self.receipt = receipt_of(target, form)
        self._target, self._form = target, form
        self._plan, self._key = plan, key
        self._memory = memory

    def run(self, report: Callable[[int], None]) -> None:
        """Writes it; ``report`` is told the bytes that are done."""
        self._target.parent.mkdir(parents=True, exist_ok=True)
        report(0)
        try:
            if self._form == _ORBAX:
                self._orbax(report)
            else:
                self._safetensors(report)
        except BaseException:
            if not os.path.lexists(self._target):
                with suppress(OSError):
                    self.receipt.unlink()
            raise

    def _sign(self, values: Tree) -> None:
        """Writes the receipt: before the checkpoint has its name, never after."""
        make_receipt(self._plan, self._key, values).save(self.receipt, replace=True)

    def _safetensors(self, report: Callable[[int], None]) -> None:
        from shardinit.storage import safetensors

        tree = open_lazily(self._plan, self._key, memory_limit=self._memory)
        for leaf in tree.values():
            if leaf.whole and leaf.nbytes > self._memory:
                raise WholeLeafError(
                    f"leaf {leaf.path!r}",
                    f"any window of it needs all {leaf.nbytes:,} bytes ({leaf.whole})",
                    f"at most {self._memory:,} bytes",
                )
        digester = Digester({x.path: (x.shape, x.dtype) for x in tree.values()})
        done = 0

        def seen(path: str, start: tuple[int, ...], window: np.ndarray) -> None:
            nonlocal done
            digester.add(path, start, window)
            done += window.nbytes
            report(done)

        safetensors.write(
            self._target,
            tree,
            max_memory=self._memory,
            on_window=seen,
            before_publish=lambda: self._sign(digester.digest()),
            anew=True,
        )

    def _orbax(self, report: Callable[[int], None]) -> None:
        from shardinit.storage import orbax

        size = self._plan.total_bytes

        def made(done: int, total: int) -> None:
            report(size * done // (2 * total))  # then they are to be written

        params = compile_plan(self._plan)(self._key, made)
        self._sign(params)
        orbax.save(self._target, params)
        report(size)
