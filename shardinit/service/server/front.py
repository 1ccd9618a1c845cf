"""Front: the calls of the init service, in the process that listens.

What is known already is answered here: the version, the models, programs by digest,
whatever was asked before. Everything else is forwarded to a worker, whose method of the
same name answers it (``servicer``); calls that ask for the same wait for one answer.
So a call has a method here only where there is more to it than that.

This process imports no JAX and runs nobody's code but its own.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, suppress
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.message import Message

from shardinit.errors import ServiceError, SpecError
from shardinit.service.server.admission import Call
from shardinit.service.server.cache import BuildCache, Kept
from shardinit.service.server.config import Config
from shardinit.service.server.outgoing import Outgoing
from shardinit.service.server.pool import Pool
from shardinit.service.server.pots import Pot
from shardinit.service.server.store import EVERYBODY, Store, not_held
from shardinit.service.server.telemetry import Metrics
from shardinit.service.server.writes import Writes
from shardinit.service.wire import chunks, versions
from shardinit.v1 import service_pb2, spec_pb2

_METHODS = service_pb2.DESCRIPTOR.services_by_name["InitService"].methods
Program = tuple[service_pb2.ProgramHeader, bytes]
_NAMES = 1 << 16  # specs whose program's digest is remembered
_ENTRY = 512  # bytes that any answer takes which is kept
_AGAIN = 1.0  # seconds after which a busy server may be asked again


class Front:
    """Answers, or has a worker answer.

    Args:
      config: how to serve; its store is a folder.
      metrics: where bytes and caches are counted.
      pool: the workers.
      store: programs by digest.
    """

    def __init__(self, config: Config, metrics: Metrics, pool: Pool, store: Store):
        self._config = config
        self._metrics = metrics
        self._pool = pool
        self._store = store
        kept = config.cache_bytes
        self._answers: BuildCache[list[bytes]] = BuildCache(
            kept,
            lambda answers: _ENTRY + sum(map(len, answers)),
            metrics.seen,
            metrics.evicted.inc,
        )
        self._names: Kept[bytes] = Kept(_NAMES, lambda digest: 1)
        # Programs are kept in the store; here are those that are being built.
        self._programs: BuildCache[Program] = BuildCache(-1, lambda _: 0, metrics.seen)
        self._writes = Writes(config, pool, metrics)
        self._draining = asyncio.Event()
        self._streams = Pot(config.streams)
        self._uploads = Pot(config.upload_bytes)
        metrics.watch("cache_bytes", "Bytes of programs and answers kept", self._bytes)

    def handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        """The handlers of all calls, by name."""
        found = {}
        for method in _METHODS:
            kinds = [
                "stream" if streaming else "unary"
                for streaming in (method.client_streaming, method.server_streaming)
            ]
            make = getattr(grpc, f"{'_'.join(kinds)}_rpc_method_handler")
            request = message_factory.GetMessageClass(method.input_type)
            answer = message_factory.GetMessageClass(method.output_type)
            own: Any = getattr(self, method.name, None)
            if own is None:
                own = self._forwarded(method.name, stream=method.server_streaming)
            found[method.name] = make(own, request.FromString, answer.SerializeToString)
        return found

    def hand_back(self) -> None:
        """Ends running streams and writes, so that clients go on elsewhere."""
        self._draining.set()
        self._writes.stop()

    async def close(self) -> None:
        """Ends what outlives its calls."""
        await self._writes.close()

    async def GetVersion(
        self, request: service_pb2.GetVersionRequest, call: Call
    ) -> service_pb2.GetVersionResponse:
        """The newest protocol version that both sides speak."""
        return versions.negotiate(request)

    async def ListModels(
        self, request: service_pb2.ListModelsRequest, call: Call
    ) -> bytes:
        """The registered models that the caller may use, as a worker found them."""
        answer = await asyncio.shield(self._pool.models)
        only = call.who.models
        if only is None:
            return answer
        found = service_pb2.ListModelsResponse.FromString(answer).models
        models = [model for model in found if model.name in only]
        return service_pb2.ListModelsResponse(models=models).SerializeToString()

    async def GetProgram(
        self, request: service_pb2.GetProgramRequest, call: Call
    ) -> AsyncIterator[service_pb2.GetProgramResponse]:
        """A header, then the program's bytes."""
        await self._check(request.spec, call)
        digest = request.spec.program_sha256
        if digest:
            header, data = await asyncio.to_thread(self._store.read, digest)
        else:  # before a build that helps nobody
            versions.check_jax(request.jax_version, versions.jax_version())
            header, data = await self._built(request.spec, call)
        call.program = header.sha256.hex()
        versions.check_jax(request.jax_version, header.jax_version)
        yield service_pb2.GetProgramResponse(header=header)
        if request.known_sha256 != header.sha256:
            for chunk in chunks.cut(data, self._config.limits.chunk_bytes):
                yield service_pb2.GetProgramResponse(chunk=chunk)

    async def StreamShards(
        self, request: service_pb2.StreamShardsRequest, call: Call
    ) -> AsyncIterator[bytes | service_pb2.StreamShardsResponse]:
        """The bytes of windows, block by block; one is computed while another goes."""
        await self._check(request.spec, call)
        self._take(self._streams, "streams", 1, call)
        going = Outgoing(request, self._config.limits.chunk_bytes)
        coming = asyncio.create_task(self._next(going, call))
        try:
            while (messages := await coming) is not None:
                coming = asyncio.create_task(self._next(going, call))
                for message in messages:
                    self._check_draining()
                    if message is None:
                        await asyncio.sleep(0)
                        continue
                    yield message
                    if isinstance(message, bytes):
                        self._metrics.sent.inc(len(message))
        finally:
            self._streams.leave(call)
            coming.add_done_callback(_forget)
            coming.cancel()

    async def WriteCheckpoint(
        self, request: service_pb2.WriteCheckpointRequest, call: Call
    ) -> AsyncIterator[bytes]:
        """Progress, then the receipt."""
        await self._check(request.spec, call)
        async with aclosing(self._writes.write(request, call)) as messages:
            async for message in messages:
                yield message

    async def UploadProgram(
        self, requests: AsyncIterator[service_pb2.UploadProgramRequest], call: Call
    ) -> service_pb2.UploadProgramResponse:
        """Keeps a client's program under its digest, when a worker has tried it."""
        header = await self._announced(requests)
        found = await self._store.find(header.sha256, call.who.finds)
        if found is None:
            data = await self._taken(requests, header.size, call)
            chunk = service_pb2.ProgramChunk(data=data).SerializeToString()
            (answer,) = await self._pool.run(call.job("UploadProgram", chunk))
            found = service_pb2.ProgramHeader.FromString(answer)
            if found.sha256 != header.sha256:
                text = f"announced as {header.sha256.hex()}, it is {found.sha256.hex()}"
                raise SpecError("program", [("header.sha256", text)])
            await self._store.share(found, data, call.who.owner)
        return service_pb2.UploadProgramResponse(
            sha256=found.sha256, fingerprint=found.fingerprint
        )

    # ---- what they are made of -------------------------------------------------------

    def _forwarded(self, name: str, *, stream: bool) -> Callable[..., object]:
        """A handler that has a worker answer, once for all who ask the same."""

        async def ask(request: Any, call: Call) -> list[bytes]:
            spec = getattr(request, "spec", None)
            await self._check(spec, call)
            data = request.SerializeToString(deterministic=True)

            async def build() -> list[bytes]:
                return await self._pool.run(call.job(name, data, spec))

            key = (name, call.scope(spec), _digest(data))
            return await self._answers.get(key, build)

        async def one(request: Message, call: Call) -> bytes:
            (answer,) = await ask(request, call)
            return answer

        async def several(request: Message, call: Call) -> AsyncIterator[bytes]:
            for answer in await ask(request, call):
                yield answer

        return several if stream else one

    async def _check(self, spec: spec_pb2.ModelSpec | None, call: Call) -> None:
        """Holds a spec against what its caller may use; brings a program to workers.

        Raises:
          ServiceError: the model is not the caller's to use; the program is not there,
            or another's, which is told alike.
        """
        if spec is not None and spec.HasField("named"):
            call.who.check_model(spec.named.model)
        digest = spec.program_sha256 if spec is not None else b""
        if digest and await self._store.find(digest, call.who.finds) is None:
            raise not_held(digest)

    async def _built(self, spec: spec_pb2.ModelSpec, call: Call) -> Program:
        """The program of a registered model; built once, then found by its digest."""
        asked = service_pb2.GetProgramRequest(spec=spec)
        data = asked.SerializeToString(deterministic=True)
        name = _digest(data)

        async def build() -> Program:
            job = call.job("GetProgram", data, spec)
            head, program = await self._pool.run(job)
            header = service_pb2.ProgramHeader.FromString(head)
            await self._store.share(header, program, EVERYBODY)
            self._names.put(name, header.sha256)
            return header, program

        digest = self._names.get(name)
        if digest is not None:
            with suppress(ServiceError):  # it may have gone, for others
                found = await asyncio.to_thread(self._store.read, digest)
                self._metrics.seen(True)
                return found
        return await self._programs.get(name, build)

    async def _next(
        self, going: Outgoing, call: Call
    ) -> Iterator[bytes | service_pb2.StreamShardsResponse | None] | None:
        """The messages that come next of a stream; None at its end."""
        if going.ended:
            return None
        self._check_draining()
        data = going.asked.SerializeToString()
        with suppress(ServiceError):  # it may have gone meanwhile; workers may hold it
            await self._check(going.asked.spec, call)
        job = call.job("StreamShards", data, going.asked.spec)
        job.quick, job.piece = True, going.take
        await self._pool.run(job)
        return going.messages()

    def _check_draining(self) -> None:
        """Hands a stream back.

        Raises:
          ServiceError: the server stops.
        """
        if self._draining.is_set():
            raise ServiceError(
                "StreamShards",
                "the server is stopping",
                remedy="Go on with another replica from where the stream ended",
                code="UNAVAILABLE",
            )

    async def _announced(
        self, requests: AsyncIterator[service_pb2.UploadProgramRequest]
    ) -> service_pb2.UploadHeader:
        """What an upload will be, decided upon before any of it is taken in.

        Raises:
          SpecError: the stream does not begin with a header.
          ServiceError: the operator does not allow it, or keeps none of that size.
        """
        if not self._config.allow_upload:
            raise ServiceError(
                "UploadProgram",
                "the operator does not allow it",
                remedy="Ask by model and config, or serve with --allow-upload",
                code="UNIMPLEMENTED",
            )
        first = await anext(requests, None)
        if first is None or not first.HasField("header"):
            raise SpecError("program", [("header", "missing; it comes first")])
        if first.header.size > self._config.cache_bytes:
            raise ServiceError(
                "UploadProgram",
                f"a program of {first.header.size:,} bytes would not be kept",
                f"at most {self._config.cache_bytes:,}",
                "Serve with a larger --cache-bytes",
                code="RESOURCE_EXHAUSTED",
                limit="cache-bytes",
            )
        return first.header

    async def _taken(
        self,
        requests: AsyncIterator[service_pb2.UploadProgramRequest],
        size: int,
        call: Call,
    ) -> bytes:
        """The bytes of an upload, no more than were announced."""
        self._take(self._uploads, "upload-bytes", size, call)
        joined = chunks.Joined(size)
        try:
            async for message in requests:
                if not message.HasField("chunk"):
                    text = "another header inside the stream"
                    raise SpecError("program", [("chunk", text)])
                joined.add(message.chunk)
                self._metrics.uploaded.inc(len(message.chunk.data))
            return joined.result()
        except ValueError as error:
            if isinstance(error, SpecError):
                raise
            raise SpecError("program", [("chunk", str(error))]) from error
        finally:
            self._uploads.leave(call)

    def _take(self, pot: Pot, limit: str, amount: int, call: Call) -> None:
        """Has a call take its part of what there is, until another needs it more.

        Raises:
          ServiceError: the caller has its share already.
        """

        def give_up() -> None:
            call.end(self._busy(limit, "another caller has less"))

        if not pot.take(call, call.takes(amount), give_up):
            raise self._busy(limit, "the caller has its share already")

    def _busy(self, limit: str, why: str) -> ServiceError:
        most = getattr(self._config, limit.replace("-", "_"))
        return ServiceError(
            "",
            f"all {limit} are taken, and {why}",
            f"at most {most:,} of all callers together",
            remedy="Ask again later",
            code="RESOURCE_EXHAUSTED",
            limit=limit,
            retry_after=_AGAIN,
        )

    def _bytes(self) -> int:
        return self._store.bytes + self._answers.bytes


def _digest(request: bytes) -> bytes:
    """Stands for a request in what is kept: it may be a megabyte, its answer a line."""
    return hashlib.sha256(request).digest()


def _forget(task: asyncio.Task[object]) -> None:
    """Takes note of how a task has ended that nobody waits for, as asyncio wants."""
    if not task.cancelled():
        task.exception()
