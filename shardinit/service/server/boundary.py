"""Boundary: what holds for every call, written once.

Each call of the init service gets a request id (the caller's, if it gave one), a line
in the log, a count and a span when it ends, and a status for whatever was raised
inside. Who calls is known by token, certificate or address; a call without a token, or
one too many of its caller, is refused, and that is counted and said too. A request
that does not parse, or is beyond the limits, is the caller's fault and says so. The
handlers behind all this are left with their subject.

A message is waited for here, not in gRPC, and not for ever: a call that is only begun
holds nothing but its place on its connection, and that only for a while.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from grpc import aio

from shardinit.errors import ServiceError, SpecError
from shardinit.service.server.auth import Caller, Tokens, folder_of
from shardinit.service.server.config import Config
from shardinit.service.server.telemetry import Metrics
from shardinit.service.server.tracing import span
from shardinit.service.wire.errors import (
    REQUEST_ID,
    Refusal,
    code_of,
    to_status,
    trailing,
)
from shardinit.service.wire.versions import SERVICE

log = logging.getLogger("shardinit.service")

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HEALTH = "/grpc.health.v1.Health/"
_LARGE = 32 << 10  # bytes of a request that is read beside the event loop
_CALLERS = 4096  # callers whose pace is remembered, beside those that wait
_AGAIN = 1.0  # seconds after which a caller with too many calls may ask again


class _CallerGoneError(Exception):
    """Nobody is there to be answered."""


@dataclass
class Call:
    """One call, for its handler and for the log.

    Attributes:
      request_id: the caller's, or one that was made.
      caller: who calls; equal for all calls of one.
      weight, folder: of the caller.
      trace: its span, as W3C's ``traceparent``; empty without one.
      code: how it has ended.
      received, sent: bytes of messages.
    """

    request_id: str
    caller: str = ""
    weight: int = 1
    folder: str = ""
    trace: str = ""
    code: str = "UNKNOWN"
    received: int = 0
    sent: int = 0


class Pace:
    """Bytes a second of each caller: who has had more waits before the next message.

    Args:
      rate: bytes a second for a weight of 1; 0 for no bound.
    """

    def __init__(self, rate: int):
        self._rate = rate
        self._until: dict[str, float] = {}

    async def wait(self, call: Call, size: int) -> None:
        """Returns when the caller may have more, beyond a second's worth at once."""
        if not self._rate:
            return
        now = time.monotonic()
        begin = max(self._until.get(call.caller, 0.0), now)
        self._until[call.caller] = begin + size / (self._rate * call.weight)
        if len(self._until) > _CALLERS:
            self._until = {k: end for k, end in self._until.items() if end > now}
        await asyncio.sleep(max(0.0, begin - now - 1.0))


def _let_go(error: BaseException | None) -> None:
    """Forgets the frames that an error came through, once it has been told.

    They hold what the call held, an upload of megabytes and the job that failed with
    this error: a circle, which Python's collector takes for a few small objects.
    """
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _take_back(counts: Counter[str], name: str) -> None:
    counts[name] -= 1
    if not counts[name]:
        del counts[name]


class Boundary(aio.ServerInterceptor):
    """Wraps every handler of a server.

    Args:
      config: what a call may take, and how long its messages.
      metrics: where calls are counted.
      tokens: those that are let in; None lets everybody in.
    """

    def __init__(self, config: Config, metrics: Metrics, tokens: Tokens | None = None):
        self._config = config
        self._metrics = metrics
        self._tokens = tokens
        self._calls: Counter[str] = Counter()
        # By address, the calls of each of its ports: a connection that has none is
        # seen by gRPC alone, and ends when it is idle.
        self._connections: dict[str, Counter[str]] = {}
        self._pace = Pace(config.caller_rate)
        # One, since threads that compute hold up the event loop, each as much again.
        self._large = ThreadPoolExecutor(1, "shardinit-large")

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The handler of a call, wrapped.

        To gRPC all are streams of bytes in both directions, which is the same on the
        wire: of any other kind it would call the handler when the message is there,
        and wait for that as long as it takes.
        """
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None
        serve = partial(self._serve, handler_call_details.method, handler)

        async def call(_: Any, context: aio.ServicerContext) -> None:
            await serve(context)

        return grpc.stream_stream_rpc_method_handler(call)

    async def _serve(
        self, method: str, handler: Any, context: aio.ServicerContext
    ) -> None:
        call = Call(_request_id(context))
        status = None
        with self._watched(method, call, context):
            try:
                with self._admitted(method, call, context):
                    await self._answer(method, handler, call, context)
                call.code = "OK"
            except asyncio.CancelledError:
                call.code = "CANCELLED"
                raise
            except _CallerGoneError as error:
                call.code = "CANCELLED"
                raise asyncio.CancelledError from error  # else gRPC ends it once more
            except aio.AbortError:  # another service's own way to say it
                call.code = "ABORTED"
                raise
            except Exception as error:
                call.code = code_of(error).name
                if call.code == "INTERNAL" and not isinstance(error, Refusal):
                    text = "%s request=%s failed"
                    log.error(text, method, call.request_id, exc_info=error)
                status = to_status(error, call.request_id)
                _let_go(error)
        if status is not None:
            metadata = trailing(status, call.request_id)
            try:
                await context.abort(code_of(Refusal(status)), status.message, metadata)
            except aio.InternalError as error:
                raise asyncio.CancelledError from error  # its caller has gone meanwhile

    async def _answer(
        self, method: str, handler: Any, call: Call, context: aio.ServicerContext
    ) -> None:
        behaviour = next(filter(None, (getattr(handler, kind) for kind in _KINDS)))
        write = self._writer(handler.response_serializer, call, context)
        given = call if method.startswith(f"/{SERVICE}/") else context
        async with aclosing(self._messages(handler, call, context)) as messages:
            request = messages if handler.request_streaming else await anext(messages)
            answers = behaviour(request, given)
            if not handler.response_streaming:
                await write(await answers)
                return
            async with aclosing(answers):  # at once, also where a write was cancelled
                async for answer in answers:
                    await write(answer)

    async def _messages(
        self, handler: Any, call: Call, context: aio.ServicerContext
    ) -> AsyncGenerator[Any, None]:
        """The caller's messages as they come, within the limits."""
        seconds = self._config.message_seconds
        while True:
            try:
                async with asyncio.timeout(seconds):
                    data: Any = await context.read()
            except TimeoutError:
                self._metrics.refused.labels("message-seconds").inc()
                raise ServiceError(
                    "request",
                    f"no message has come in {seconds:g} s",
                    code="DEADLINE_EXCEEDED",
                    limit="message-seconds",
                ) from None
            if data is aio.EOF:  # type: ignore[attr-defined]
                if not handler.request_streaming:
                    raise SpecError("request", [("request", "it has no message")])
                return
            call.received += len(data)
            within = partial(self._within, handler.request_deserializer, data)
            # To read a large one takes a second, in which nobody would be answered.
            if len(data) > _LARGE:
                loop = asyncio.get_running_loop()
                yield await loop.run_in_executor(self._large, within)
            else:
                yield within()

    def _writer(
        self,
        serialise: Callable[[Message], bytes],
        call: Call,
        context: aio.ServicerContext,
    ) -> Callable[[Message | bytes], Awaitable[None]]:
        """Sends messages; bytes go as they are, which saves copies."""
        seconds = self._config.stall_seconds

        async def write(message: Message | bytes) -> None:
            data = message if isinstance(message, bytes) else serialise(message)
            try:
                async with asyncio.timeout(seconds):
                    await context.write(data)
            except (aio.InternalError, aio.UsageError) as error:
                # What gRPC (1.85) says of a write that the caller's end overtakes.
                raise _CallerGoneError from error
            except TimeoutError:
                self._metrics.refused.labels("stall-seconds").inc()
                raise ServiceError(
                    "",
                    f"its reader has taken nothing for {seconds:g} s",
                    remedy="Ask again, and go on where it was",
                    code="UNAVAILABLE",
                    limit="stall-seconds",
                ) from None
            call.sent += len(data)
            await self._pace.wait(call, len(data))

        return write

    def _within(self, parse: Callable[[bytes], Message], data: bytes) -> Message:
        try:
            request = parse(data)
        except DecodeError:
            text = "no valid message, or nested deeper than protobuf allows"
            raise SpecError("request", [("request", text)]) from None
        if not request.DESCRIPTOR.full_name.startswith("shardinit."):
            return request
        limits = self._config.limits
        faults = limits.check(request)
        if faults:
            spec = getattr(request, "spec", None)
            model = spec.named.model[: limits.name] if spec is not None else ""
            raise SpecError(model or "request", faults)
        return request

    @contextmanager
    def _admitted(
        self, method: str, call: Call, context: aio.ServicerContext
    ) -> Iterator[None]:
        """Finds out who calls and whether they may; keeps count of them.

        Raises:
          ServiceError: without a token or the role, or with too many calls already.
        """
        name, roles, call.weight, call.folder = self._caller(method, context)
        caller = call.caller = name
        role = _ROLES.get(method, "read")
        if role not in roles:
            self._metrics.refused.labels("role").inc()
            raise ServiceError(
                "",
                f"{name} may not {role}",
                f"a token with the role {role!r}",
                code="PERMISSION_DENIED",
            )
        peer, _, port = context.peer().rpartition(":")
        ports = self._connections.setdefault(peer, Counter())
        if self._calls[caller] >= self._config.caller_calls:
            raise self._too_many("caller-calls", self._config.caller_calls)
        if port not in ports and len(ports) >= self._config.peer_connections:
            raise self._too_many("peer-connections", self._config.peer_connections)
        self._calls[caller] += 1
        ports[port] += 1
        try:
            yield
        finally:
            _take_back(self._calls, caller)
            _take_back(ports, port)
            if not ports:
                self._connections.pop(peer, None)

    def _too_many(self, limit: str, most: int) -> ServiceError:
        self._metrics.refused.labels(limit).inc()
        return ServiceError(
            "",
            f"its caller has too many {limit.partition('-')[2]} already",
            f"at most {most:,}",
            code="RESOURCE_EXHAUSTED",
            limit=limit,
            retry_after=_AGAIN,
        )

    def _caller(self, method: str, context: aio.ServicerContext) -> Caller:
        identities = list(context.peer_identities() or ())
        if self._tokens is not None and not method.startswith(_HEALTH):
            header = dict(context.invocation_metadata() or ()).get("authorization")
            caller = self._tokens.of_certificate(identities) if header is None else None
            if isinstance(header, str):
                caller = self._tokens.find(header)
            if caller is None:
                self._metrics.refused.labels("unauthenticated").inc()
                raise ServiceError("", "no valid bearer token", code="UNAUTHENTICATED")
            return caller
        if identities:
            names = b" ".join(identities).decode(errors="replace")
            return Caller(f"certificate {names}", folder=folder_of(names))
        return Caller(context.peer().rpartition(":")[0])  # without its port

    @contextmanager
    def _watched(
        self, method: str, call: Call, context: aio.ServicerContext
    ) -> Iterator[None]:
        """Counts a call and, when it has ended, tells of it."""
        service, _, name = method.strip("/").rpartition("/")
        context.set_trailing_metadata(((REQUEST_ID, call.request_id),))
        if service != SERVICE:
            yield
            # Of other services only refusals are worth a line: probes come all day.
            if call.code not in ("OK", "CANCELLED", "ABORTED"):
                log.info("%s %s peer=%s", method, call.code, context.peer())
            return
        active = self._metrics.active.labels(name)
        active.inc()
        begin = time.monotonic()
        with span(f"{SERVICE}/{name}", context.invocation_metadata()) as opened:
            call.trace = opened.trace
            try:
                yield
            finally:
                opened.end(call.code)
                seconds = time.monotonic() - begin
                active.dec()
                self._metrics.calls.labels(name, call.code).inc()
                self._metrics.seconds.labels(name).observe(seconds)
                fields = {
                    "method": name,
                    "code": call.code,
                    "seconds": round(seconds, 6),
                    "request_id": call.request_id,
                    "caller": call.caller,
                    "peer": context.peer(),
                    "received_bytes": call.received,
                    "sent_bytes": call.sent,
                }
                text = "%(method)s %(code)s %(seconds).3f s request=%(request_id)s"
                log.info(f"{text} caller=%(caller)s", fields, extra=fields)


_ROLES = {f"/{SERVICE}/WriteCheckpoint": "write", f"/{SERVICE}/UploadProgram": "upload"}
_KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


def _request_id(context: aio.ServicerContext) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID and isinstance(value, str) and _ID.fullmatch(value):
            return value
    return uuid.uuid4().hex
