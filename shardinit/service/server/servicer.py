"""Servicer: the calls of the init service, as a worker answers them.

Each is short: read the request, let the core do its work, and give back the message or
the messages of the answer. Whatever holds for every call has been seen to before, in
the process that listens (``boundary``), and so has whatever is known already
(``front``): this is what takes time. A model is traced, cut and exported, which costs
memory in the size of its programs and not of its weights; the bytes of weights are
computed a block at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

from google.protobuf.message import Message

from shardinit.core.run.lazy import LazyTree
from shardinit.core.run.lazy import open as open_lazily
from shardinit.errors import SpecError, WholeLeafError
from shardinit.models import builder, model_names
from shardinit.service.server import checkpoints, windows
from shardinit.service.server.cache import Kept
from shardinit.service.server.config import Config
from shardinit.service.server.model_cache import ModelCache
from shardinit.service.server.pipe import Piece
from shardinit.service.server.windows import Wanted
from shardinit.service.wire import messages as wire
from shardinit.v1 import service_pb2

log = logging.getLogger("shardinit.service")

_STREAM_BYTES = 1 << 20  # what an open stream takes, beside a leaf that is held whole


class Servicer:
    """Answers from registered models, and from programs of the store.

    Args:
      config: how to serve.
      evicted: called for each plan that was kept and goes to make room.

    Attributes:
      models: what is kept of them.
    """

    def __init__(self, config: Config, evicted: Callable[[], None] = lambda: None):
        self._config = config
        self.models = ModelCache(config, evicted)
        most = 4 * config.whole_bytes + 16 * _STREAM_BYTES
        self._open: Kept[list[Wanted]] = Kept(most, _held)

    def ListModels(
        self, request: service_pb2.ListModelsRequest
    ) -> service_pb2.ListModelsResponse:
        """All registered models; one that is broken is listed bare."""
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
        self, request: service_pb2.DescribeModelRequest
    ) -> service_pb2.DescribeModelResponse:
        """The leaves of a model and where they lie."""
        return self.models.describe(request)

    def GetProgram(
        self, request: service_pb2.GetProgramRequest
    ) -> Iterator[Message | bytes]:
        """The program's header, then its bytes."""
        yield from self.models.program(wire.spec_from_proto(request.spec))

    def StreamShards(self, request: service_pb2.StreamShardsRequest) -> Iterator[Piece]:
        """The bytes that come next, as many as are computed at a time."""
        place = request.resume
        asked = service_pb2.StreamShardsRequest()
        asked.CopyFrom(request)
        asked.ClearField("resume")
        name = self.models.owner, asked.SerializeToString(deterministic=True)
        found = self._open.get(name)
        if found is None:
            found = windows.read(request, self._tree(request))
            self._open.put(name, found)
        windows.check_place(found, place)
        try:
            yield from windows.pieces(found, place, self._config.block_bytes)
        except WholeLeafError as error:
            raise windows.too_large(error, "StreamShards") from error

    def PrepareCheckpoint(self, request: service_pb2.WriteCheckpointRequest) -> bytes:
        """What a checkpoint will be, held against what is at its place."""
        return checkpoints.prepare(self.models, request, self._config).to_json()

    def WriteCheckpoint(
        self, request: service_pb2.WriteCheckpointRequest
    ) -> Iterator[service_pb2.WriteCheckpointResponse]:
        """Progress, then the receipt."""
        return checkpoints.write(self.models, request, self._config)

    def UploadProgram(
        self, request: service_pb2.ProgramChunk
    ) -> service_pb2.ProgramHeader:
        """The header of a client's program, which is all of the chunk."""
        return self.models.check(request.data)

    def _tree(self, request: service_pb2.StreamShardsRequest) -> LazyTree:
        plan = self.models.plan(wire.spec_from_proto(request.spec))
        key = wire.key_from_proto(request.key)
        try:
            return open_lazily(plan, key, memory_limit=self._config.whole_bytes)
        except TypeError as error:  # a key of another kind than the model's
            raise SpecError("key", [("key", str(error))]) from error


def _held(wanted: list[Wanted]) -> int:
    in_full = (window.leaf.nbytes for window in wanted if window.leaf.whole)
    return _STREAM_BYTES + max(in_full, default=0)
