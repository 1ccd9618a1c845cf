"""Boundary: what holds for every call of the init service, written once.

Each call gets a request id (the caller's, if it gave one), a line in the log, a count
and a span when it ends, and a status for whatever was raised inside. A request that
does not parse, or is beyond the limits, is the caller's fault and says so: a handler
sees none of these. Calls wait for a thread of their own
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
from typing import Any, ParamSpec, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from shardinit.errors import ServiceError, SpecError
from shardinit.service.server.auth import Continuation, refusal
from shardinit.service.server.config import Config
from shardinit.service.server.telemetry import Metrics, span
from shardinit.service.wire.errors import REQUEST_ID, code_of, to_status
from shardinit.service.wire.versions import SERVICE

log = logging.getLogger("shardinit.service")

_LONG_CALLS = frozenset({"StreamShards", "WriteCheckpoint", "UploadProgram"})
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_FOREVER = 1e8  # seconds
_KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
Request = Message | SpecError  # the latter for one that does not parse


class Pool(ThreadPoolExecutor):
    """Threads, with the number of calls that wait for one in ``waiting``.

    gRPC hands every call to the executor, whose queue has no end and says nothing: a
    server that is too busy would just become slower, without a word to its callers
    (https://github.com/grpc/grpc/issues/8616).
    """

    def __init__(self, threads: int, name: str):
        super().__init__(threads, thread_name_prefix=f"shardinit-{name}")
        self._count = threading.Lock()
        self.waiting = 0

    def submit(
        self,
        fn: Callable[Parameters, Result],
        /,
        *args: Parameters.args,
        **kwargs: Parameters.kwargs,
    ) -> Future[Result]:
        """As any executor; counts until ``fn`` begins."""
        self._add(1)

        def begin() -> Result:
            self._add(-1)
            return fn(*args, **kwargs)

        return super().submit(begin)

    def _add(self, number: int) -> None:
        with self._count:
            self.waiting += number


class Boundary(grpc.ServerInterceptor):
    """Wraps the handlers of the init service; other services pass through.

    Args:
      config: how many threads there are, how many calls may wait, what they may ask.
      metrics: where calls are counted.

    Attributes:
      short: threads of short calls.
      long: threads of the calls that send or write bytes.
      spare: threads that say refusals.
    """

    def __init__(self, config: Config, metrics: Metrics):
        self.short = Pool(config.workers, "call")
        self.long = Pool(config.streams, "stream")
        self.spare = Pool(1, "spare")
        self._queue = config.queue
        self._limits = config.limits
        self._metrics = metrics
        self._busy = refusal(
            self.spare,
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "too many calls wait already; ask again later",
        )

    def intercept_service(
        self,
        continuation: Continuation,
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """Returns the handler of a call, wrapped if it is the service's own."""
        handler: Any = continuation(handler_call_details)
        service, _, name = handler_call_details.method.strip("/").rpartition("/")
        if handler is None or service != SERVICE:
            return handler
        pool = self.long if name in _LONG_CALLS else self.short
        if pool.waiting >= self._queue:
            self._metrics.calls.labels(name, "RESOURCE_EXHAUSTED").inc()
            return self._busy
        kind = next(k for k in _KINDS if getattr(handler, k) is not None)
        wrap = self._streaming if handler.response_streaming else self._unary
        wrapped = wrap(name, getattr(handler, kind))
        # Where gRPC (1.80 to 1.85) looks for threads of a call's own. Without it all
        # calls share the server's, and long streams keep short calls waiting.
        wrapped.experimental_thread_pool = pool  # type: ignore[attr-defined]
        return getattr(grpc, f"{kind}_rpc_method_handler")(
            wrapped,
            _tolerant(handler.request_deserializer),
            _as_it_is(handler.response_serializer),
        )

    def _unary(self, name: str, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        def call(request: Any, context: grpc.ServicerContext) -> Any:
            with self._watched(name, context):
                return behaviour(self._checked(request), context)

        return call

    def _streaming(
        self, name: str, behaviour: Callable[..., Any]
    ) -> Callable[..., Any]:
        def call(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            with self._watched(name, context):
                yield from behaviour(self._checked(request), context)

        return call

    def _checked(
        self, request: Request | Iterator[Request]
    ) -> Message | Iterator[Message]:
        """The request, or the requests of a stream as they come, within the limits."""
        if isinstance(request, Request):
            return self._within(request)
        return map(self._within, request)

    def _within(self, request: Request) -> Message:
        if isinstance(request, SpecError):
            raise request
        faults = self._limits.check(request)
        if faults:
            spec = getattr(request, "spec", None)
            model = spec.named.model[: self._limits.name] if spec is not None else ""
            raise SpecError(model or "request", faults)
        return request

    @contextmanager
    def _watched(self, name: str, context: grpc.ServicerContext) -> Iterator[None]:
        request_id = _request_id(context)
        context.set_trailing_metadata(((REQUEST_ID, request_id),))
        active = self._metrics.active.labels(name)
        active.inc()
        begin = time.monotonic()
        status, outcome = None, "OK"
        with span(f"{SERVICE}/{name}", context.invocation_metadata()) as ended:
            try:
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


def _tolerant(parse: Callable[[bytes], Message]) -> Callable[[bytes], Request]:
    """Returns the error as the request, for a handler to raise.

    Raised here it would end the call as INTERNAL, "Exception deserializing request!",
    which blames the server (https://github.com/grpc/grpc/issues/31711).
    """

    def parse_or_fault(data: bytes) -> Request:
        try:
            return parse(data)
        except DecodeError:
            text = "no valid message, or nested deeper than protobuf allows"
            return SpecError("request", [("request", text)])

    return parse_or_fault


def _as_it_is(
    serialise: Callable[[Message], bytes],
) -> Callable[[Message | bytes], bytes]:
    """Lets through what a handler has serialised itself, to save copies."""

    def to_bytes(message: Message | bytes) -> bytes:
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
    # Without a deadline gRPC gives centuries, not the None that it documents; both are
    # allowed (https://github.com/grpc/grpc/issues/9423).
    return None if left is None or left > _FOREVER else max(left, 0.0)
