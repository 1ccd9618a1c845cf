import asyncio
import socket
import threading
import time

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

import shardinit
from shardinit.errors import ServiceError, ShardingError, SpecError
from shardinit.models import ModelSpec, build, builder, example_config
from shardinit.service.server.config import Config
from shardinit.service.server.front import Front
from shardinit.service.server.server import Server
from shardinit.service.server.servicer import Servicer
from shardinit.service.wire import errors as status
from shardinit.service.wire.limits import Limits
from shardinit.service.wire.service_pb2_grpc import InitServiceStub
from shardinit.v1 import service_pb2, spec_pb2
from tests.service.conftest import until

pytestmark = pytest.mark.once

MESH = {"data": 2, "model": 4}


@pytest.fixture
def stub(server):
    with grpc.insecure_channel(server.address) as channel:
        yield InitServiceStub(channel)


def named(**config):
    message = spec_pb2.ModelSpec(named=spec_pb2.NamedModel(model="service-test"))
    message.named.config.update(config)
    return message


def violations(error):
    """What a client of another make would read from the status."""
    status = rpc_status.from_call(error)
    assert status is not None
    request = error_details_pb2.BadRequest()
    assert any(detail.Unpack(request) for detail in status.details)
    return {v.field: v.description for v in request.field_violations}


def test_an_unknown_model_is_a_spec_error(client):
    with pytest.raises(SpecError) as caught:
        client.describe(ModelSpec("no-such-model", {}))
    assert [field for field, _ in caught.value.faults] == ["model"]
    assert "no-such-model" in caught.value.faults[0][1]


def test_the_faults_of_a_config_are_those_that_a_local_build_has(client):
    config = example_config("tinyllama-1.1b") | {
        "num_attention_heads": -3,
        "hiden_size": 5,
        "vocab_size": "many",
    }
    spec = ModelSpec("decoder", config)
    with pytest.raises(SpecError) as local:
        build(spec)
    assert len(local.value.faults) >= 3
    for call in (client.describe, client.program):
        with pytest.raises(SpecError) as remote:
            call(spec)
        assert remote.value.faults == local.value.faults
        assert str(remote.value) == str(local.value)


def test_faults_are_field_violations_for_any_client(stub):
    request = service_pb2.DescribeModelRequest(spec=named(width="x", bogus=1))
    with pytest.raises(grpc.RpcError) as caught:
        stub.DescribeModel(request, timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert set(violations(caught.value)) == {"width", "bogus"}


def test_the_caller_s_request_id_comes_back(stub):
    call = stub.ListModels.with_call(
        service_pb2.ListModelsRequest(),
        timeout=10,
        metadata=(("x-request-id", "job-17"),),
    )[1]
    assert ("x-request-id", "job-17") in [tuple(m) for m in call.trailing_metadata()]


def deep(levels):
    value = 1
    for _ in range(levels):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"a": "x" * 5000}, "a"),
        ({f"k{i}": "x" * 4000 for i in range(20)}, "config"),
        ({"k" * 500: 1}, "config key 'kkkkkkkkkkkkkkkk'…"),
        ({"a": deep(20)}, "a" + ".a" * 15),
        ({"num_hidden_layers": 1e9}, "num_hidden_layers"),
        ({"n_routed_experts": 4000, "num_hidden_layers": 100}, "n_routed_experts"),
        ({"a": [1.0, float("inf")]}, "a[1]"),
    ],
    ids=["text", "size", "key", "depth", "layers", "experts", "infinite"],
)
def test_a_config_beyond_the_limits_is_refused(client, config, field):
    with pytest.raises(SpecError) as caught:
        client.describe(ModelSpec("decoder", config))
    assert [f for f, _ in caught.value.faults] == [field]


def test_a_width_that_would_fill_the_memory_is_refused_at_once(client):
    config = example_config("tinyllama-1.1b") | {"hidden_size": 2**53}
    with pytest.raises(SpecError, match="rotary") as caught:
        client.describe(ModelSpec("decoder", config))
    assert [field for field, _ in caught.value.faults] == ["head_dim"]


def test_a_name_beyond_the_limits_is_refused(client):
    with pytest.raises(SpecError) as caught:
        client.program(ModelSpec("m" * 1000, {}))
    assert caught.value.faults == (("model", "1000 characters; at most 128"),)


def field(number, data):
    """One length-delimited field of a message, as protobuf writes it."""
    size, length = len(data), bytearray()
    while size > 127:
        length.append(size & 127 | 128)
        size >>= 7
    return bytes([number << 3 | 2]) + bytes(length) + bytes([size]) + data


def test_a_request_nested_beyond_protobuf_is_the_caller_s_fault(server):
    value = b""
    for _ in range(500):
        struct = field(1, field(1, b"a") + field(2, value))
        value = field(5, struct)
    named = field(1, b"service-test") + field(2, struct)
    with grpc.insecure_channel(server.address) as channel:
        call = channel.unary_unary("/shardinit.v1.InitService/DescribeModel")
        with pytest.raises(grpc.RpcError) as caught:
            call(field(1, field(1, named)), timeout=10)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.RpcError) as caught:
            call(b"\xff\xff\xff", timeout=10)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_large_request_is_read_beside_the_event_loop(stub, monkeypatch):
    """A second of work on the loop would be a second without health."""
    where, check = [], Limits.check

    def noted(limits, message, *rest):
        where.append((type(message).__name__, threading.current_thread().name))
        return check(limits, message, *rest)

    monkeypatch.setattr(Limits, "check", noted)
    windows = [service_pb2.Window(path="no-such-leaf")] * 5000
    request = service_pb2.StreamShardsRequest(spec=named(width=64), windows=windows)
    request.key.seed = 0
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.StreamShards(request, timeout=30))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    threads = {thread for name, thread in where if name == "StreamShardsRequest"}
    assert threads
    assert "shardinit" not in threads


def test_a_request_of_megabytes_is_not_read(server):
    with grpc.insecure_channel(server.address) as channel:
        call = channel.unary_unary("/shardinit.v1.InitService/DescribeModel")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"x" * (2 << 20), timeout=10)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    ("mesh", "field"),
    [
        ({}, "mesh.axes"),
        ({"data": 0}, "mesh.axes[0].size"),
        ({"data": 1 << 40}, "mesh"),
        ({"x" * 200: 2}, "mesh.axes[0].name"),
        ({f"a{i}": 1 for i in range(40)}, "mesh.axes"),
    ],
    ids=["none", "zero", "huge", "name", "many"],
)
def test_a_faulty_mesh_is_refused_by_field(client, spec, mesh, field):
    with pytest.raises(SpecError) as caught:
        client.describe(spec, mesh)
    assert [f for f, _ in caught.value.faults] == [field]


def rules_of(*patterns):
    rules = spec_pb2.ShardingRules()
    for pattern in patterns:
        dimension = spec_pb2.Dimension(mesh_axes=["data"])
        rules.path_rules.rules.add(pattern=pattern, dimensions=[dimension])
    mesh = spec_pb2.MeshSpec(axes=[spec_pb2.MeshAxis(name="data", size=2)])
    return service_pb2.DescribeModelRequest(
        spec=named(width=64), mesh=mesh, rules=rules
    )


@pytest.mark.parametrize(
    "pattern", ["(", r"(a)\1", "(?=kernel)", "(?<!a)b", "x" * 300, "(?x)a b", "a{2000}"]
)
def test_a_pattern_that_re2_refuses_is_a_fault_that_says_so(stub, pattern):
    with pytest.raises(grpc.RpcError) as caught:
        stub.DescribeModel(rules_of("bias", pattern), timeout=10)
    found = violations(caught.value)
    assert list(found) == ["rules.path_rules.rules[1].pattern"]
    if len(pattern) < 256:
        assert "RE2 refuses" in found["rules.path_rules.rules[1].pattern"]


@pytest.mark.parametrize("pattern", ["(a+)+$", ".?" * 100 + "#", "(a|a)*" * 30 + "#"])
def test_a_pattern_that_would_backtrack_is_answered(stub, pattern):
    answer = stub.DescribeModel(rules_of(pattern, "kernel$"), timeout=20)
    dimensions = {
        leaf.path: [list(d.mesh_axes) for d in answer.kinds[leaf.kind].dimensions]
        for leaf in answer.leaves
    }
    assert dimensions["layer/0/kernel"] == [["data"]]
    assert dimensions["bias"] == []


def test_a_spec_of_nothing_and_rules_without_a_mesh_are_refused(stub):
    rules = spec_pb2.ShardingRules(fsdp=spec_pb2.FsdpRule(mesh_axes=["data"]))
    request = service_pb2.DescribeModelRequest(rules=rules)
    with pytest.raises(grpc.RpcError) as caught:
        stub.DescribeModel(request, timeout=10)
    assert set(violations(caught.value)) == {"spec", "rules"}


def test_what_is_said_of_a_fault_fits_into_the_metadata_of_any_client():
    """8 KiB, whatever the letters are."""
    long = "\U0001f600" * 600
    for error in (
        ServiceError(long, long, long, long, code="NOT_FOUND"),
        ShardingError(long, long, long, long),
        SpecError(long, [(long, long)] * 9),
    ):
        made = status.to_status(error, "an-id")
        sent = status.trailing(made, "an-id")
        pairs = [(k, v if isinstance(v, bytes) else v.encode()) for k, v in sent]
        message = 3 * len(made.message.encode())  # percent-encoded
        # 32 bytes an entry are what HTTP/2 counts; binary values travel in base64
        size = sum(len(k) + 4 * len(v) / 3 + 32 for k, v in pairs)
        assert size + message < 8192, type(error)


def test_a_model_that_cannot_be_loaded_does_not_hide_the_others(monkeypatch):
    def broken(name):
        if name == "decoder":
            raise RuntimeError("its package is broken")
        return builder(name)

    monkeypatch.setattr("shardinit.service.server.servicer.builder", broken)
    answer = Servicer(Config()).ListModels(service_pb2.ListModelsRequest())
    models = {info.name: info.config_schema for info in answer.models}
    assert not models["decoder"].fields
    assert list(models["service-test"]["required"]) == ["width"]


def test_rules_that_do_not_fit_the_mesh_name_the_axis(client, spec):
    rules = shardinit.AxisRules([("out", "expert")])
    with pytest.raises(ServiceError, match="'expert'") as caught:
        client.describe(spec, MESH, rules)
    assert caught.value.code == "INVALID_ARGUMENT"
    assert "\n" not in str(caught.value)


def test_an_integer_that_the_wire_would_change_is_refused_here(client):
    with pytest.raises(SpecError, match=r"2\^53"):
        client.describe(ModelSpec("service-test", {"width": 2**53 + 1}))


def test_a_config_too_deep_to_be_sent_is_refused_here(client):
    with pytest.raises(SpecError, match="nested deeper"):
        client.describe(ModelSpec("service-test", {"a": deep(200)}))


@pytest.mark.parametrize("version", ["0.4.30", "0.10.1", "0.1"])
def test_an_older_jax_than_the_producer_s_is_told_so(
    client, spec, monkeypatch, version
):
    monkeypatch.setattr(
        "shardinit.service.client.programs.jax_version", lambda: version
    )
    monkeypatch.setattr("shardinit.service.wire.versions.jax_version", lambda: "0.10.2")
    with pytest.raises(
        ServiceError, match=rf"client has {version}.*0\.10\.2"
    ) as caught:
        client.program(spec)
    assert caught.value.code == "FAILED_PRECONDITION"
    assert "Install jax>=0.10.2" in str(caught.value)


@pytest.mark.parametrize("version", ["9999.1.0", ""])
def test_a_newer_jax_or_none_gets_the_program(stub, version):
    request = service_pb2.GetProgramRequest(spec=named(width=64), jax_version=version)
    first, *chunks = stub.GetProgram(request, timeout=30)
    assert first.header.size == sum(len(m.chunk.data) for m in chunks) > 0


def test_a_version_that_is_none_is_a_fault(stub):
    request = service_pb2.GetProgramRequest(
        spec=named(width=64), jax_version="newest", known_sha256=b"abc"
    )
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.GetProgram(request, timeout=10))
    assert set(violations(caught.value)) == {"jax_version", "known_sha256"}


def test_no_common_protocol_version_is_a_failed_precondition(stub):
    for low, high, code in ((2, 3, "FAILED_PRECONDITION"), (0, 1, "INVALID_ARGUMENT")):
        with pytest.raises(grpc.RpcError) as caught:
            stub.GetVersion(service_pb2.GetVersionRequest(min=low, max=high), timeout=9)
        assert caught.value.code().name == code
    answer = stub.GetVersion(service_pb2.GetVersionRequest(min=1, max=9), timeout=9)
    assert answer.version == 1


def test_an_internal_error_says_an_id_and_no_detail(client, caplog):
    with pytest.raises(ServiceError) as caught:
        client.describe(ModelSpec("service-test", {"width": 64, "fail": True}))
    assert caught.value.code == "INTERNAL"
    assert "secret" not in str(caught.value)
    (record,) = [r for r in caplog.records if r.levelname == "ERROR"]
    request_id = record.getMessage().split("request_id=")[1].split()[0]
    assert request_id in str(caught.value)
    assert "secret of the operator" in caplog.text


@pytest.mark.parametrize("how", ["flip", "cut", "gap", "headless", "empty"])
@pytest.mark.few(2)
def test_a_damaged_stream_is_an_error_and_leaves_no_file(spec, tmp_path, how):
    class Damaged(Front):
        async def GetProgram(self, request, call):
            answers = super().GetProgram(request, call)
            header, *chunks = [message async for message in answers]
            data = bytearray(b"".join(m.chunk.data for m in chunks))
            offset = 0
            if how == "flip":
                data[len(data) // 2] ^= 4
            elif how == "cut":
                del data[-1]
            elif how == "gap":
                offset = 1
            if how != "headless" and how != "empty":
                yield header
            if how != "empty":
                chunk = service_pb2.ProgramChunk(offset=offset, data=bytes(data))
                yield service_pb2.GetProgramResponse(chunk=chunk)

    cache = tmp_path / "cache"
    with (
        Server(front=Damaged) as server,
        shardinit.connect(server.address, cache_dir=cache) as client,
        pytest.raises(ServiceError) as caught,
    ):
        client.program(spec)
    assert caught.value.code == "DATA_LOSS"
    assert not list(cache.iterdir())


def test_a_stream_that_breaks_once_is_asked_for_again(spec, tmp_path):
    broken = []

    class Breaking(Front):
        async def GetProgram(self, request, call):
            async for message in super().GetProgram(request, call):
                yield message
                if not broken:
                    broken.append(True)
                    raise ServiceError("", "connection lost", code="UNAVAILABLE")

    with (
        Server(front=Breaking) as server,
        shardinit.connect(server.address, cache_dir=tmp_path) as client,
    ):
        assert client.program(spec).paths
    assert broken


def test_a_slow_server_is_an_error_at_the_deadline(spec, tmp_path):
    class Slow(Front):
        async def ListModels(self, request, call):
            await asyncio.sleep(20)
            return service_pb2.ListModelsResponse()

    with (
        Server(front=Slow) as server,
        shardinit.connect(server.address, timeout=1, cache_dir=tmp_path) as client,
        pytest.raises(ServiceError, match="caller's own deadline") as caught,
    ):
        client.models()
    assert caught.value.code == "DEADLINE_EXCEEDED"


def test_a_server_that_is_down_is_one_line_and_not_a_hang(spec, tmp_path):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{holder.getsockname()[1]}"
        with shardinit.connect(target, timeout=20, cache_dir=tmp_path) as client:
            for call in (client.models, lambda: client.init(spec, 0)):
                with pytest.raises(ServiceError, match="cannot be reached") as caught:
                    call()
                assert caught.value.code == "UNAVAILABLE"
                assert target in str(caught.value)
                assert "\n" not in str(caught.value)


def test_a_closed_client_says_so(server, tmp_path):
    client = shardinit.connect(server.address, cache_dir=tmp_path)
    client.close()
    client.close()
    with pytest.raises(ServiceError, match="closed"):
        client.models()


def test_a_cache_folder_that_cannot_be_written_is_named(server, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ServiceError, match="cache folder"):
        shardinit.connect(server.address, cache_dir=blocked / "cache")


@pytest.mark.parametrize("spec", [3, None, {"model": "decoder"}])
def test_something_that_is_no_spec_is_a_type_error(client, spec):
    with pytest.raises(TypeError, match="expected a shardinit"):
        client.describe(spec)


def test_callers_without_a_deadline_wait_for_one_build(server, gate):
    with grpc.insecure_channel(server.address) as channel:
        call = InitServiceStub(channel).DescribeModel
        first = call.future(gate.request())
        assert until(lambda: gate.begun)
        others = [call.future(gate.request()) for _ in range(3)]
        gate.open()
        fingerprints = {f.result(timeout=20).fingerprint for f in (first, *others)}
    assert len(fingerprints) == 1
    assert len(gate.begun) == 1


def test_each_caller_of_one_build_that_fails_is_told_its_own_request(server, gate):
    with grpc.insecure_channel(server.address) as channel:
        call = InitServiceStub(channel).DescribeModel
        calls = {}
        for name in ("job-1", "job-2"):
            metadata = (("x-request-id", name),)
            calls[name] = call.future(gate.request(width="x"), metadata=metadata)
            assert until(lambda: gate.begun)
        time.sleep(0.2)
        gate.open()
        for name, failed in calls.items():
            (told,) = (
                detail
                for detail in rpc_status.from_call(failed.exception(20)).details
                if detail.Is(error_details_pb2.RequestInfo.DESCRIPTOR)
            )
            info = error_details_pb2.RequestInfo.FromString(told.value)
            assert info.request_id == name
    assert len(gate.begun) == 1
