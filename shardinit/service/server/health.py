"""Health: the standard service, by name.

``""`` is the process that listens: it lives. The init service's own name says whether a
worker is up, which is what a load balancer wants to know. The library's own servicer
forgets all watchers of a name when one of them leaves (grpcio-health-checking 1.81).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from grpc_health.v1 import health_pb2, health_pb2_grpc

from shardinit.errors import ServiceError

Status = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):
    """What is said of each service, for one event loop."""

    def __init__(self) -> None:
        self._said: dict[str, int] = {}
        self._ending = False
        self._changed = asyncio.Condition()

    async def say(self, name: str, serving: bool) -> None:
        """Says of a service whether it serves; of an ending server nothing does."""
        serving = serving and not self._ending
        self._said[name] = Status.SERVING if serving else Status.NOT_SERVING
        async with self._changed:
            self._changed.notify_all()

    async def end(self) -> None:
        """Says of all services that they do not serve, from now on."""
        self._ending = True
        for name in list(self._said):
            await self.say(name, False)

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: object
    ) -> health_pb2.HealthCheckResponse:
        """What is said of a service."""
        if request.service not in self._said:
            raise ServiceError(
                f"service {request.service[:200]!r}",
                "there is none of that name",
                " or ".join(map(repr, self._said)),
                code="NOT_FOUND",
            )
        return Status(status=self._said[request.service])

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: object
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """What is said of a service, and whenever that changes."""
        last = None
        while True:
            now = self._said.get(request.service, Status.SERVICE_UNKNOWN)
            if now != last:
                yield Status(status=now)
                last = now
            async with self._changed:
                if self._said.get(request.service, Status.SERVICE_UNKNOWN) == last:
                    await self._changed.wait()
