"""Boundary: what holds for every call, written once.

Each call of the init service gets a request id (the caller's, if it gave one), a line
in the log, a count and a span when it ends, and a status for whatever was raised
inside. Who may call at all, ``admission`` says; its refusals are told as any other. A
request that does not parse, or is beyond the limits, is the caller's fault and says so.
The handlers behind all this are left with their subject.

A message is waited for here, not in gRPC, and not for ever: a call that is only begun
holds nothing but its place on its connection, and that only for a while.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from grpc import aio

from shardinit.errors import ServiceError, SpecError
from shardinit.service.server.admission import Admission, Call, Pace
from shardinit.service.server.auth import Tokens
from shardinit.service.server.config import Config
from shardinit.service.server.telemetry import Metrics
from shardinit.service.server.tracing import span
from shardinit.service.wire.errors import (
    REQUEST_ID,
    Refusal,
    code_of,
    reason_of,
    to_status,
    trailing,
)
from shardinit.service.wire.versions import SERVICE

log = logging.getLogger("shardinit.service")

_PLAIN = re.compile(r"[\w./:@%+\[\]-]+", re.ASCII)
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
Continuation = Callable[
    [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]
]
_DEADLINES = {  # the setting that bounds each call
    "GetVersion": "list_seconds",
    "ListModels": "list_seconds",
    "DescribeModel": "describe_seconds",
    "GetProgram": "describe_seconds",
    "StreamShards": "stream_seconds",
    "WriteCheckpoint": "write_seconds",
    "UploadProgram": "upload_seconds",
}
_ENDS = 0.05  # seconds in which a call that has ended is cancelled
_LARGE = 32 << 10  # bytes of a request that is read beside the event loop


class _CallerGoneError(Exception):
    """Nobody is there to be answered."""


def _let_go(error: BaseException | None) -> None:
    """Forgets the frames that an error came through, once it has been told.

    They hold what the call held, an upload of megabytes and the job that failed with
    this error: a circle, which Python's collector takes for a few small objects.
    """
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


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
        self._admission = Admission(config, tokens)
        self._pace = Pace(config.caller_rate)
        # One, since threads that compute hold up the event loop, each as much again.
        self._large = ThreadPoolExecutor(1, "shardinit-large")

    async def intercept_service(
        self,
        continuation: Continuation,
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """The handler of a call, wrapped.

        To gRPC all are streams of bytes in both directions, which is the same on the
        wire: of any other kind it would call the handler when the message is there,
        and wait for that as long as it takes.
        """
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        serve = partial(self._serve, handler_call_details.method, handler)

        async def call(_: object, context: aio.ServicerContext) -> None:
            await serve(context)

        return grpc.stream_stream_rpc_method_handler(call)

    async def _serve(
        self, method: str, handler: grpc.RpcMethodHandler, context: aio.ServicerContext
    ) -> None:
        call = Call(_request_id(context))
        status = None
        with self._watched(method, call, context):
            try:
                with self._admission.admitted(method, call, context):
                    async with call.within(*self._deadline(method)):
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
                    text = "%s request_id=%s failed"
                    log.error(text, method, call.request_id, exc_info=error)
                status = to_status(error, call.request_id)
                if reason := reason_of(status):
                    self._metrics.refused.labels(reason).inc()
                _let_go(error)
        if status is not None:
            # gRPC (1.85) never frees what it can't send, 500 bytes a call:
            # https://github.com/grpc/grpc/issues/43360
            if context.time_remaining() == 0:
                raise asyncio.CancelledError  # its caller has given up by itself
            metadata = trailing(status, call.request_id)
            try:
                await context.abort(code_of(Refusal(status)), status.message, metadata)
            except aio.InternalError as error:
                raise asyncio.CancelledError from error  # its caller has gone meanwhile

    def _deadline(self, method: str) -> tuple[float | None, str]:
        """Seconds that a call may take, and the name of that limit."""
        name = _DEADLINES.get(method.removeprefix(f"/{SERVICE}/"), "")
        seconds = getattr(self._config, name, None)
        return seconds, name.replace("_", "-")

    async def _answer(
        self,
        method: str,
        handler: grpc.RpcMethodHandler,
        call: Call,
        context: aio.ServicerContext,
    ) -> None:
        behaviour = next(filter(None, (getattr(handler, kind) for kind in _KINDS)))
        assert handler.response_serializer is not None  # as protobuf generates them
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
        self, handler: grpc.RpcMethodHandler, call: Call, context: aio.ServicerContext
    ) -> AsyncGenerator[Message, None]:
        """The caller's messages as they come, within the limits."""
        seconds = self._config.message_seconds
        parse = handler.request_deserializer
        assert parse is not None
        while True:
            try:
                async with asyncio.timeout(seconds):
                    data: Any = await context.read()
            except TimeoutError:
                raise ServiceError(
                    "request",
                    f"no message has come in {seconds:g} s",
                    code="DEADLINE_EXCEEDED",
                    limit="message-seconds",
                ) from None
            if data is aio.EOF:  # type: ignore[attr-defined]
                # So reads a call that has ended too: its caller has gone, or gRPC has
                # refused a message beyond `request_bytes`. Its cancellation follows.
                await asyncio.sleep(_ENDS)
                if not handler.request_streaming:
                    raise SpecError("request", [("request", "it has no message")])
                return
            call.received += len(data)
            within = partial(self._within, parse, data, call)
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
        most = self._config.limits.response_bytes

        async def write(message: Message | bytes) -> None:
            data = message if isinstance(message, bytes) else serialise(message)
            if len(data) > most:
                raise ServiceError(
                    "",
                    f"the answer has {len(data):,} bytes",
                    f"at most {most:,}",
                    "Ask for the program: it says the same, and comes in chunks",
                    code="RESOURCE_EXHAUSTED",
                    limit="response_bytes",
                )
            try:
                async with asyncio.timeout(seconds):
                    await context.write(data)
            except (aio.InternalError, aio.UsageError) as error:
                # What gRPC (1.85) says of a write that the caller's end overtakes.
                raise _CallerGoneError from error
            except TimeoutError:
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

    def _within(
        self, parse: Callable[[bytes], Message], data: bytes, call: Call
    ) -> Message:
        try:
            request = parse(data)
        except DecodeError:
            text = "no valid message, or nested deeper than protobuf allows"
            raise SpecError("request", [("request", text)]) from None
        if not request.DESCRIPTOR.full_name.startswith("shardinit."):
            return request
        call.asks(request)
        limits = self._config.limits
        faults = limits.check(request)
        if faults:
            spec = getattr(request, "spec", None)
            model = spec.named.model[: limits.name] if spec is not None else ""
            raise SpecError(model or "request", faults)
        return request

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
                fields = call.line() | {"peer": context.peer()}
                words = [f"{k}={_word(v)}" for k, v in fields.items() if v != ""]
                fields |= {"method": name, "code": call.code}
                fields |= {"seconds": round(seconds, 6)}
                text = "%s %s %.3f s %s"
                log.info(text, name, call.code, seconds, " ".join(words), extra=fields)


_KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


def _word(value: object) -> str:
    """A value of a line in the log, in quotes where it would not be one word."""
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


def _request_id(context: aio.ServicerContext) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID and isinstance(value, str) and _ID.fullmatch(value):
            return value
    return uuid.uuid4().hex
