"""Boundary: what holds for every call of the init service, written once.

Each call gets a request id (the caller's, if it gave one), one line in the log when it
ends, and a status for whatever was raised inside. A request that does not parse is the
caller's fault and says so. The servicer behind it is left with its subject.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from shardinit.errors import ServiceError, SpecError
from shardinit.service.status import REQUEST_ID, code_of, to_status

log = logging.getLogger("shardinit.service")

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Boundary(grpc.ServerInterceptor):
    """Wraps the handlers of one service; other services pass through.

    Args:
      service: full name of the service.
    """

    def __init__(self, service: str):
        self._prefix = f"/{service}/"

    def intercept_service(
        self, continuation: Callable[[Any], Any], handler_call_details: Any
    ) -> Any:
        """Returns the handler of a call, wrapped if it is the service's own."""
        handler = continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(self._prefix):
            return handler
        name = method.removeprefix(self._prefix)
        parse = _tolerant(handler.request_deserializer)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                _streaming(name, handler.unary_stream),
                parse,
                handler.response_serializer,
            )
        return grpc.unary_unary_rpc_method_handler(
            _unary(name, handler.unary_unary), parse, handler.response_serializer
        )


def _tolerant(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Returns the error as the request, since an error here would be INTERNAL."""

    def parse_or_fault(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError:
            text = "no valid message, or nested deeper than protobuf allows"
            return SpecError("request", [("request", text)])

    return parse_or_fault


def _unary(name: str, behaviour: Callable[..., Any]) -> Callable[..., Any]:
    def call(request: Any, context: grpc.ServicerContext) -> Any:
        with _watched(name, request, context):
            return behaviour(request, context)

    return call


def _streaming(name: str, behaviour: Callable[..., Any]) -> Callable[..., Any]:
    def call(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        with _watched(name, request, context):
            yield from behaviour(request, context)

    return call


@contextmanager
def _watched(name: str, request: Any, context: grpc.ServicerContext) -> Iterator[None]:
    request_id = _request_id(context)
    context.set_trailing_metadata(((REQUEST_ID, request_id),))
    begin = time.monotonic()
    status, outcome = None, "OK"
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
        seconds = time.monotonic() - begin
        log.info("%s %s %.3f s request=%s", name, outcome, seconds, request_id)
    if status is not None:
        context.abort_with_status(status)


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
    return None if left is None else max(left, 0.0)
