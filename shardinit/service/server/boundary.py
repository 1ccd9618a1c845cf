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
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from grpc import aio

from shardinit.errors import ServiceError, SpecError
from shardinit.service.server.auth import Tokens
from shardinit.service.server.config import Config
from shardinit.service.server.telemetry import Metrics, span
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
_AGAIN = 1.0  # seconds after which a caller with too many calls may ask again


@dataclass(frozen=True)
class Call:
    """One call, for its handler.

    Attributes:
      request_id: the caller's, or one that was made.
      caller: who calls; equal for all calls of one.
    """

    request_id: str
    caller: str


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
        request_id = _request_id(context)
        status = None
        with self._watched(method, request_id, context) as ended:
            try:
                with self._admitted(method, context) as caller:
                    call = Call(request_id, caller)
                    own = method.startswith(f"/{SERVICE}/")
                    await self._answer(handler, call if own else context, context)
                ended("OK")
            except asyncio.CancelledError:
                ended("CANCELLED")
                raise
            except aio.AbortError:  # another service's own way to say it
                ended("ABORTED")
                raise
            except Exception as error:
                code = code_of(error).name
                if code == "INTERNAL" and not isinstance(error, Refusal):
                    text = "%s request=%s failed"
                    log.error(text, method, request_id, exc_info=error)
                ended(code)
                status = to_status(error, request_id)
        if status is not None:
            metadata = trailing(status, request_id)
            await context.abort(code_of(Refusal(status)), status.message, metadata)

    async def _answer(
        self, handler: Any, given: Any, context: aio.ServicerContext
    ) -> None:
        messages = self._messages(handler, context)
        request = messages if handler.request_streaming else await anext(messages)
        behaviour = next(filter(None, (getattr(handler, kind) for kind in _KINDS)))
        write = _writer(handler.response_serializer, context, self._config)
        answers = behaviour(request, given)
        if not handler.response_streaming:
            await write(await answers)
            return
        async for answer in answers:
            await write(answer)

    async def _messages(
        self, handler: Any, context: aio.ServicerContext
    ) -> AsyncIterator[Any]:
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
            yield self._within(handler.request_deserializer, data)

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
    def _admitted(self, method: str, context: aio.ServicerContext) -> Iterator[str]:
        """Who calls; keeps count of them.

        Raises:
          ServiceError: without a token, or with too many calls already.
        """
        caller = self._caller(method, context)
        if self._calls[caller] >= self._config.caller_calls:
            self._metrics.refused.labels("caller-calls").inc()
            raise ServiceError(
                "",
                "its caller has too many calls already",
                f"at most {self._config.caller_calls:,}",
                code="RESOURCE_EXHAUSTED",
                limit="caller-calls",
                retry_after=_AGAIN,
            )
        self._calls[caller] += 1
        try:
            yield caller
        finally:
            self._calls[caller] -= 1
            if not self._calls[caller]:
                del self._calls[caller]

    def _caller(self, method: str, context: aio.ServicerContext) -> str:
        if self._tokens is not None and not method.startswith(_HEALTH):
            header = dict(context.invocation_metadata() or ()).get("authorization", "")
            name = self._tokens.find(header) if isinstance(header, str) else ""
            if not name:
                self._metrics.refused.labels("unauthenticated").inc()
                raise ServiceError("", "no valid bearer token", code="UNAUTHENTICATED")
            return name
        identities = context.peer_identities()
        if identities:
            return "certificate " + b" ".join(identities).decode(errors="replace")
        return context.peer().rpartition(":")[0]  # the address without its port

    @contextmanager
    def _watched(
        self, method: str, request_id: str, context: aio.ServicerContext
    ) -> Iterator[Callable[[str], None]]:
        """Counts and tells a call; what is yielded is told how it has ended."""
        service, _, name = method.strip("/").rpartition("/")
        context.set_trailing_metadata(((REQUEST_ID, request_id),))
        if service != SERVICE:
            yield partial(self._tell_refused, method, context)
            return
        outcome = "UNKNOWN"

        def ended(code: str) -> None:
            nonlocal outcome
            outcome = code

        active = self._metrics.active.labels(name)
        active.inc()
        begin = time.monotonic()
        with span(f"{SERVICE}/{name}", context.invocation_metadata()) as told:
            try:
                yield ended
            finally:
                told(outcome)
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

    def _tell_refused(
        self, method: str, context: aio.ServicerContext, code: str
    ) -> None:
        """Of other services only refusals are worth a line: probes come all day."""
        if code not in ("OK", "CANCELLED", "ABORTED"):
            log.info("%s %s peer=%s", method, code, context.peer())


_KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


def _writer(
    serialise: Callable[[Message], bytes], context: aio.ServicerContext, config: Config
) -> Callable[[Message | bytes], Awaitable[None]]:
    """Sends messages; bytes go as they are, which saves copies."""

    async def write(message: Message | bytes) -> None:
        data = message if isinstance(message, bytes) else serialise(message)
        try:
            async with asyncio.timeout(config.stall_seconds):
                await context.write(data)
        except TimeoutError:
            raise ServiceError(
                "",
                f"its reader has taken nothing for {config.stall_seconds:g} s",
                remedy="Ask again, and go on where it was",
                code="UNAVAILABLE",
                limit="stall-seconds",
            ) from None

    return write


def _request_id(context: aio.ServicerContext) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID and isinstance(value, str) and _ID.fullmatch(value):
            return value
    return uuid.uuid4().hex
