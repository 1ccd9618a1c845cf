"""Servicer: the calls of the init service.

Each is short: read the request, let the core do its work once for all who ask the
same, and write the answer; whatever holds for every call has been seen to before
(``boundary``). A model is traced, cut and exported, which costs memory in the size of
its programs and not of its weights; the bytes of weights are computed as they are sent,
a block at a time.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc

from shardinit.core.run.lazy import open as open_lazily
from shardinit.errors import ServiceError, SpecError
from shardinit.service.server import streams, uploads
from shardinit.service.server.boundary import remaining
from shardinit.service.server.checkpoints import Checkpoints
from shardinit.service.server.config import Config
from shardinit.service.server.model_cache import ModelCache
from shardinit.service.server.telemetry import Metrics
from shardinit.service.wire import messages as wire
from shardinit.service.wire import versions
from shardinit.service.wire.service_pb2_grpc import InitServiceServicer
from shardinit.v1 import service_pb2

log = logging.getLogger("shardinit.service")


class Servicer(InitServiceServicer):
    """Answers from registered models.

    Args:
      config: how to serve.
      metrics: where bytes are counted.
    """

    def __init__(self, config: Config | None = None, metrics: Metrics | None = None):
        self._config = config or Config()
        self._metrics = metrics or Metrics()
        self._draining = threading.Event()
        self._ahead = ThreadPoolExecutor(self._config.streams, "shardinit-ahead")
        self._models = ModelCache(self._config)
        self._checkpoints = Checkpoints(self._config, self._models)
        self._metrics.watch(
            "cache_bytes",
            "Bytes of plans, programs and descriptions that are kept",
            lambda: self._models.bytes,
        )

    def hand_back(self) -> None:
        """Ends running streams and writes, so that clients go on elsewhere."""
        self._draining.set()
        self._checkpoints.stop()

    def GetVersion(
        self, request: service_pb2.GetVersionRequest, context: grpc.ServicerContext
    ) -> service_pb2.GetVersionResponse:
        """The newest protocol version that both sides speak."""
        return versions.negotiate(request)

    def ListModels(
        self, request: service_pb2.ListModelsRequest, context: grpc.ServicerContext
    ) -> service_pb2.ListModelsResponse:
        """All registered models; one that is broken is listed bare."""
        from shardinit.models import builder, model_names

        response = service_pb2.ListModelsResponse()
        for name in model_names():
            info = response.models.add(name=name)
            try:
                info.config_schema.update(dict(builder(name).schema))
            except Exception:  # the other models are still there to be used
                log.warning("model %r cannot be used", name, exc_info=True)
                info.ClearField("config_schema")
        return response

    def DescribeModel(
        self, request: service_pb2.DescribeModelRequest, context: grpc.ServicerContext
    ) -> service_pb2.DescribeModelResponse:
        """The leaves of a model and where they lie."""
        return self._models.describe(request, remaining(context))

    def GetProgram(
        self, request: service_pb2.GetProgramRequest, context: grpc.ServicerContext
    ) -> Iterator[service_pb2.GetProgramResponse]:
        """A header, then the program's bytes."""
        spec = wire.spec_from_proto(request.spec)
        if not isinstance(spec, str):  # before a build that helps nobody
            versions.check_jax(request.jax_version, versions.jax_version())
        built = self._models.program(spec, remaining(context))
        versions.check_jax(request.jax_version, built.jax_version)
        header = service_pb2.ProgramHeader(
            size=len(built.data),
            sha256=built.sha256,
            fingerprint=built.fingerprint,
            jax_version=built.jax_version,
        )
        yield service_pb2.GetProgramResponse(header=header)
        if request.known_sha256 != built.sha256:
            step = self._config.limits.chunk_bytes
            for chunk in wire.chunks_to_proto(built.data, step):
                yield service_pb2.GetProgramResponse(chunk=chunk)

    def StreamShards(
        self, request: service_pb2.StreamShardsRequest, context: grpc.ServicerContext
    ) -> Iterator[bytes | service_pb2.StreamShardsResponse]:
        """The bytes of windows, block by block."""
        spec = wire.spec_from_proto(request.spec)
        plan = self._models.plan(spec, remaining(context))
        key = wire.key_from_proto(request.key)
        try:
            tree = open_lazily(plan, key, memory_limit=self._config.whole_bytes)
        except TypeError as error:  # a key of another kind than the model's
            raise SpecError("key", [("key", str(error))]) from error
        windows = streams.read_windows(request, tree)
        for message in streams.send(
            windows, request.resume, self._config, self._ahead, self._alive
        ):
            yield message
            if isinstance(message, bytes):
                self._metrics.sent.inc(len(message))

    def WriteCheckpoint(
        self, request: service_pb2.WriteCheckpointRequest, context: grpc.ServicerContext
    ) -> Iterator[service_pb2.WriteCheckpointResponse]:
        """Progress, then the receipt."""
        return self._checkpoints.write(request, context)

    def UploadProgram(
        self,
        request_iterator: Iterator[service_pb2.UploadProgramRequest],
        context: grpc.ServicerContext,
    ) -> service_pb2.UploadProgramResponse:
        """Keeps a client's program under its digest."""
        return uploads.take(request_iterator, self._models, self._config)

    def _alive(self) -> None:
        if self._draining.is_set():
            raise ServiceError(
                "StreamShards",
                "the server is stopping",
                remedy="Go on with another replica from where the stream ended",
                code="UNAVAILABLE",
            )
