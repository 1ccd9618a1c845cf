"""Admission: who calls, whether they may, and how much they have in hand already.

A caller is known by token, certificate or address, in this order. A call without a
token, without the role it needs, or one too many of its caller or connection, is
refused.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message
from grpc import aio

from shardinit.errors import ServiceError
from shardinit.service.server.auth import Caller, Tokens, folder_of
from shardinit.service.server.config import Config
from shardinit.service.server.pipe import Task
from shardinit.service.server.pots import Taken
from shardinit.service.server.turns import Job
from shardinit.service.wire.versions import SERVICE
from shardinit.v1 import service_pb2, spec_pb2

NOBODY = Caller("")  # until it is known who calls
_HEALTH = "/grpc.health.v1.Health/"
_ROLES = {f"/{SERVICE}/WriteCheckpoint": "write", f"/{SERVICE}/UploadProgram": "upload"}
_CALLERS = 4096  # callers whose pace is remembered, beside those that wait
_SAID = 1024  # characters of a request's text that are logged
_AGAIN = 1.0  # seconds after which a caller with too many calls may ask again


@dataclass(eq=False)
class Call:
    """One call, for its handler and for the log.

    Attributes:
      request_id: the caller's, or one that was made.
      who: who calls.
      trace: its span, as W3C's ``traceparent``; empty without one.
      code: how it has ended.
      model, program, place: what it is about: a model's name, the SHA-256 of a
        program in hex, where a checkpoint goes. As they were asked for, also of a
        request that is refused; empty where they do not apply.
      received, sent: bytes of messages.
    """

    request_id: str
    who: Caller = NOBODY
    trace: str = ""
    code: str = "UNKNOWN"
    model: str = ""
    program: str = ""
    place: str = ""
    received: int = 0
    sent: int = 0
    _clock: asyncio.Timeout | None = None
    _why: ServiceError | None = None

    @asynccontextmanager
    async def within(self, seconds: float | None, limit: str) -> AsyncIterator[None]:
        """Ends what runs inside when the time is up, or it is told to end.

        Args:
          seconds: that it may take; None for any.
          limit: which limit says so.

        Raises:
          ServiceError: it was ended.
        """
        try:
            async with asyncio.timeout(seconds) as self._clock:
                yield
        except TimeoutError:
            if self._clock is None or not self._clock.expired():
                raise
            raise self._why or ServiceError(
                "",
                f"the call has taken {seconds:g} s",
                "less: this deadline is the server's, whatever the caller's is",
                code="DEADLINE_EXCEEDED",
                limit=limit,
            ) from None

    def end(self, why: ServiceError) -> None:
        """Ends the call wherever it is; its caller is told why."""
        if self._clock is not None and not self._clock.expired() and self._why is None:
            self._why = why
            self._clock.reschedule(0)

    def takes(self, amount: int) -> Taken:
        """A part of what there is for all, taken by this call's caller."""
        return Taken(self.caller, amount, self.who.weight)

    def asks(self, request: Message) -> None:
        """Takes down what a request is about, whatever else is wrong with it."""
        match request:
            case service_pb2.UploadProgramRequest(header=header):
                self.program = self.program or header.sha256[:32].hex()
            case service_pb2.WriteCheckpointRequest(uri=uri):
                self.place = uri[:_SAID]
        spec = getattr(request, "spec", None)
        if isinstance(spec, spec_pb2.ModelSpec):
            self.model = spec.named.model[:_SAID]
            self.program = spec.program_sha256[:32].hex()

    def line(self) -> dict[str, Any]:
        """What is logged of it, by name."""
        return {
            "request_id": self.request_id,
            "caller": self.caller,
            "model": self.model,
            "program": self.program,
            "place": self.place,
            "received_bytes": self.received,
            "sent_bytes": self.sent,
        }

    @property
    def caller(self) -> str:
        """The caller's name, equal for all calls of one."""
        return self.who.name

    def job(
        self, method: str, request: bytes, spec: spec_pb2.ModelSpec | None = None
    ) -> Job:
        """What a worker is to do for this call.

        Args:
          method: name of the worker's method.
          request: its serialised message.
          spec: the model that it is about, if any.
        """
        model = spec.SerializeToString(deterministic=True) if spec is not None else b""
        owner = self.scope(spec)
        task = Task(method, self.request_id, request, self.trace, owner)
        return Job(task, self.caller, owner.encode() + model, self.who.weight)

    def scope(self, spec: spec_pb2.ModelSpec | None) -> str:
        """Whose what is kept of a model is: an uploaded program's is its owner's."""
        return self.who.owner if spec is not None and spec.program_sha256 else ""


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
        self._until[call.caller] = begin + size / (self._rate * call.who.weight)
        if len(self._until) > _CALLERS:
            self._until = {k: end for k, end in self._until.items() if end > now}
        await asyncio.sleep(max(0.0, begin - now - 1.0))


class Admission:
    """Lets calls in, and keeps count of those that are.

    Args:
      config: how many calls a caller may have, and connections an address.
      tokens: those that are let in; None lets everybody in.
    """

    def __init__(self, config: Config, tokens: Tokens | None = None):
        self._config = config
        self._tokens = tokens
        self._calls: Counter[str] = Counter()
        # By address, the calls of each of its ports: a connection that has none is
        # seen by gRPC alone, and ends when it is idle.
        self._connections: dict[str, Counter[str]] = {}

    @contextmanager
    def admitted(
        self, method: str, call: Call, context: aio.ServicerContext
    ) -> Iterator[None]:
        """Finds out who calls and whether they may; keeps count of them.

        Raises:
          ServiceError: without a token or the role, or with too many calls already.
        """
        call.who = self._caller(method, context)
        caller = call.caller
        role = _ROLES.get(method, "read")
        if role not in call.who.roles:
            raise ServiceError(
                "",
                f"{caller} may not {role}",
                f"a token with the role {role!r}",
                code="PERMISSION_DENIED",
                denied=f"role:{role}",
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
                raise ServiceError("", "no valid bearer token", code="UNAUTHENTICATED")
            return caller
        if identities:
            names = b" ".join(identities).decode(errors="replace")
            name = f"certificate {names}"
            return Caller(name, folder=folder_of(names), owner=name)
        return Caller(context.peer().rpartition(":")[0])  # without its port


def _take_back(counts: Counter[str], name: str) -> None:
    counts[name] -= 1
    if not counts[name]:
        del counts[name]
