"""Boundary: what holds for every call of the init service, written once.

Each call gets a request id (the caller's, if it gave one), a line in the log, a count
and a span when it ends, and a status for whatever was raised inside. A request that
does not parse is the caller's fault and says so. Calls wait for a thread of their own
kind, short or long, in a queue that is bounded: one more is refused, by threads that
do nothing else. The servicer behind all this is left with its subject.
"""

from __future__ import annotations

import logging
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from shardinit.errors import ServiceError, SpecError
from shardinit.service.auth import refusal
from shardinit.service.status import REQUEST_ID, code_of, to_status
from shardinit.service.telemetry import Metrics, span

log = logging.getLogger("shardinit.service")

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_FOREVER = 1e8  # seconds
_KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


class Pool(ThreadPoolExecutor):
    """Threads, with the number of calls that wait for one in ``waiting``."""

    def __init__(self, threads: int, name: str):
        super().__init__(threads, thread_name_prefix=f"shardinit-{name}")
        self._count = threading.Lock()
        self.waiting = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """As any executor; counts until ``fn`` begins."""
        self._add(1)

        def begin() -> Any:
            self._add(-1)
            return fn(*args, **kwargs)

        return super().submit(begin)

    def _add(self, number: int) -> None:
        with self._count:
            self.waiting += number


class Boundary(grpc.ServerInterceptor):
    """Wraps the handlers of one service; other services pass through.

    Args:
      service: full name of the service.
      short: threads of short calls.
      long: threads of the calls that ``long_calls`` names.
      spare: threads that say refusals.
      long_calls: names of methods that send or write bytes.
      queue: calls that may wait for each pool.
      metrics: where calls are counted.
    """

    def __init__(
        self,
        service: str,
        *,
        short: Pool,
        long: Pool,
        spare: Pool,
        long_calls: frozenset[str],
        queue: int,
        metrics: Metrics,
    ):
        self._prefix = f"/{service}/"
        self._pools = (short, long)
        self._long_calls = long_calls
        self._queue = queue
        self._metrics = metrics
        self._busy = refusal(
            spare,
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "too many calls wait already; ask again later",
        )

    def intercept_service(
        self, continuation: Callable[[Any], Any], handler_call_details: Any
    ) -> Any:
        """Returns the handler of a call, wrapped if it is the service's own."""
        handler = continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(self._prefix):
            return handler
        name = method.removeprefix(self._prefix)
        pool = self._pools[name in self._long_calls]
        if pool.waiting >= self._queue:
            self._metrics.calls.labels(name, "RESOURCE_EXHAUSTED").inc()
            return self._busy
        kind = next(k for k in _KINDS if getattr(handler, k) is not None)
        behaviour = getattr(handler, kind)
        wrap = self._streaming if handler.response_streaming else self._unary
        wrapped = wrap(method, behaviour)
        wrapped.experimental_thread_pool = pool  # type: ignore[attr-defined]
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(
            wrapped,
            _tolerant(handler.request_deserializer),
            _as_it_is(handler.response_serializer),
        )

    def _unary(self, method: str, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        def call(request: Any, context: grpc.ServicerContext) -> Any:
            with self._watched(method, request, context):
                return behaviour(request, context)

        return call

    def _streaming(
        self, method: str, behaviour: Callable[..., Any]
    ) -> Callable[..., Any]:
        def call(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            with self._watched(method, request, context):
                yield from behaviour(request, context)

        return call

    @contextmanager
    def _watched(
        self, method: str, request: Any, context: grpc.ServicerContext
    ) -> Iterator[None]:
        name = method.removeprefix(self._prefix)
        request_id = _request_id(context)
        context.set_trailing_metadata(((REQUEST_ID, request_id),))
        active = self._metrics.active.labels(name)
        active.inc()
        begin = time.monotonic()
        status, outcome = None, "OK"
        with span(method.strip("/"), context.invocation_metadata()) as ended:
            try:
                if isinstance(request, Exception):
                    raise request
                yield
            except GeneratorExit:
                outcome = "CANCELLED"
                raise
            except Exception as error:
                outcome = code_of(error).name
                status = to_status(error, request_id)
                if outcome == "INTERNAL":
                    log.error("%s request=%s failed", name, request_id, exc_info=error)
            finally:
                ended(outcome)
                seconds = time.monotonic() - begin
                active.dec()
                self._metrics.calls.labels(name, outcome).inc()
                self._metrics.seconds.labels(name).observe(seconds)
                fields = {
                    "method": name,
                    "code": outcome,
                    "seconds": round(seconds, 6),
                    "request_id": request_id,
                    "peer": context.peer(),
                }
                text = "%s %s %.3f s request=%s"
                log.info(text, name, outcome, seconds, request_id, extra=fields)
        if status is not None:
            context.abort_with_status(status)


def _tolerant(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Returns the error as the request, since an error here would be INTERNAL."""

    def parse_or_fault(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError:
            text = "no valid message, or nested deeper than protobuf allows"
            return SpecError("request", [("request", text)])

    return parse_or_fault


def _as_it_is(serialise: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    """Lets through what a handler has serialised itself, to save copies."""

    def to_bytes(message: Any) -> bytes:
        return message if isinstance(message, bytes) else serialise(message)

    return to_bytes


def _request_id(context: grpc.ServicerContext) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID and isinstance(value, str) and _ID.fullmatch(value):
            return value
    return uuid.uuid4().hex


def remaining(context: grpc.ServicerContext) -> float | None:
    """Seconds until the caller's deadline; None without one.

    Raises:
      ServiceError: the caller has gone (CANCELLED).
    """
    if not context.is_active():
        raise ServiceError("", "the caller has gone", code="CANCELLED")
    left = context.time_remaining()
    # Without a deadline some versions of gRPC give None, others centuries.
    return None if left is None or left > _FOREVER else max(left, 0.0)
