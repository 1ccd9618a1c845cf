"""What a limit or a missing permission refuses is named in the error, and counted."""

import grpc
import jax
import pytest
from grpc_status import rpc_status

from shardinit.core.init_fn import InitFn
from shardinit.models import ModelSpec, register
from shardinit.service.server import writes
from shardinit.service.server.config import Config
from shardinit.service.server.server import Server
from shardinit.service.wire.errors import from_rpc_error
from shardinit.service.wire.limits import Limits
from shardinit.service.wire.messages import spec_to_proto
from shardinit.service.wire.service_pb2_grpc import InitServiceStub
from shardinit.v1 import service_pb2

pytestmark = pytest.mark.once

READER, WRITER = "reader-token-of-many", "writer-token-of-many"
SAFETENSORS = service_pb2.CHECKPOINT_FORMAT_SAFETENSORS
ORBAX = service_pb2.CHECKPOINT_FORMAT_ORBAX


@register("refusals-plain")
def build_plain(config):
    return InitFn(lambda key: {"w": jax.random.normal(key, (16, 64))})


@register("refusals-whole")
def build_whole(config):
    """A leaf of which no window can be computed alone."""
    return InitFn(lambda key: {"w": jax.random.orthogonal(key, 64)})


@register("refusals-large")
def build_large(config):
    return InitFn(lambda key: {"w": jax.random.normal(key, (256, 256))})


@register("refusals-many")
def build_many(config):
    return InitFn(lambda key: {str(i): jax.random.bits(key) for i in range(200)})


PLAIN, WHOLE, LARGE, MANY = (
    spec_to_proto(ModelSpec(f"refusals-{name}", {}))
    for name in ("plain", "whole", "large", "many")
)


class Asking:
    """Calls of one server, each with what it is refused for."""

    def __init__(self, folder):
        self.root = folder / "root"
        tokens = folder / "tokens"
        tokens.write_text(f"reader read {READER}\nwriter read,write,upload {WRITER}\n")
        self.config = Config(
            token_file=tokens,
            checkpoint_roots=(self.root,),
            allow_upload=True,
            whole_bytes=4096,
            model_bytes=1000,
            checkpoint_bytes=200_000,
            cache_bytes=1000,
            limits=Limits(response_bytes=2000, program_bytes=300),
        )

    def connect(self, address):
        self.channel = grpc.insecure_channel(address)
        self.stub = InitServiceStub(self.channel)

    def ask(self, method, request, token=WRITER):
        metadata = (("authorization", f"Bearer {token}"),) if token else ()
        answer = getattr(self.stub, method)(request, timeout=60, metadata=metadata)
        return list(answer) if hasattr(answer, "__iter__") else [answer]

    def write(self, spec=PLAIN, name="model", form=SAFETENSORS, token=WRITER):
        uri = str(self.root / "writer" / name) if "/" not in name else name
        request = service_pb2.WriteCheckpointRequest(spec=spec, uri=uri, format=form)
        request.key.seed = 0
        return self.ask("WriteCheckpoint", request, token)

    def stream(self, spec=PLAIN):
        request = service_pb2.StreamShardsRequest(spec=spec)
        request.key.seed = 0
        request.windows.add(path="w")
        return self.ask("StreamShards", request)


@pytest.fixture(scope="module")
def asking(tmp_path_factory):
    made = Asking(tmp_path_factory.mktemp("refusals"))
    with Server(made.config) as server:
        made.server = server
        made.connect(server.address)
        with made.channel:
            yield made


REFUSED = {
    "whole-bytes": lambda x: x.stream(WHOLE),
    "response_bytes": lambda x: x.ask(
        "DescribeModel", service_pb2.DescribeModelRequest(spec=MANY)
    ),
    "program_bytes": lambda x: x.ask(
        "GetProgram", service_pb2.GetProgramRequest(spec=PLAIN)
    ),
    "model-bytes": lambda x: x.write(form=ORBAX),
    "checkpoint-bytes": lambda x: x.write(LARGE),
    "place": lambda x: x.write(name="/elsewhere/model"),
    "role": lambda x: x.write(token=READER),
    "unauthenticated": lambda x: x.write(token=None),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_refused_says_why_and_is_counted(asking, reason):
    count = asking.server.metrics.refused.labels(reason)._value
    before = count.get()
    with pytest.raises(grpc.RpcError) as caught:
        REFUSED[reason](asking)
    assert count.get() == before + 1
    error = from_rpc_error(caught.value, "call")
    code = caught.value.code()
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        assert error.limit == reason
    elif code is grpc.StatusCode.PERMISSION_DENIED:
        assert error.denied == {"role": "role:write"}.get(reason, reason)
    else:
        assert code is grpc.StatusCode.UNAUTHENTICATED
        assert reason == "unauthenticated"
    details = {x.type_url.rpartition(".")[2] for x in _details(caught.value)}
    assert ("QuotaFailure" in details) == bool(error.limit)
    assert "RetryInfo" not in details  # none of these is of use to be asked again


def _details(error):
    return rpc_status.from_call(error).details


def test_a_checkpoint_that_needs_a_leaf_whole_says_which_limit_that_is_beyond(asking):
    with pytest.raises(grpc.RpcError) as caught:
        asking.write(WHOLE, name="whole")
    error = from_rpc_error(caught.value, "call")
    assert (error.code, error.limit) == ("RESOURCE_EXHAUSTED", "whole-bytes")
    assert "--whole-bytes" in error.remedy


def test_checkpoints_are_counted_by_how_they_ended(asking, monkeypatch):
    metrics = asking.server.metrics
    ended, written = metrics.checkpoints.labels("OK")._value, metrics.written._value
    before = ended.get(), written.get()
    asking.write(name="counted")
    assert (ended.get(), written.get()) == (before[0] + 1, before[1] + 16 * 64 * 4)
    running = metrics.registry.get_sample_value("shardinit_active_checkpoints")
    assert running == 0
    kept = asking.config.free_bytes + 16 * 64 * 4 - 1
    monkeypatch.setattr(writes, "room", lambda target: kept)
    refused = metrics.refused.labels("disk")._value.get()
    with pytest.raises(grpc.RpcError):
        asking.write(name="too-much")
    assert metrics.refused.labels("disk")._value.get() == refused + 1
    monkeypatch.setattr(writes, "room", lambda target: kept + 1)
    asking.write(name="just-enough")
