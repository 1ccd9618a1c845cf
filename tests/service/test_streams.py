import os
import signal
import subprocess
import sys
import threading

import grpc
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xxhash
from jax.sharding import NamedSharding, PartitionSpec

import shardinit
from shardinit.core.init_fn import InitFn
from shardinit.errors import SelectError, ServiceError, SpecError
from shardinit.models import ModelSpec, build, register
from shardinit.service.server import windows
from shardinit.service.server.config import Config
from shardinit.service.server.front import Front
from shardinit.service.server.server import Server
from shardinit.service.wire.limits import Limits
from shardinit.service.wire.service_pb2_grpc import InitServiceStub
from shardinit.v1 import service_pb2, spec_pb2

pytestmark = pytest.mark.once

SMALL = Config(block_bytes=4096, limits=Limits(chunk_bytes=1000))


@register("stream-test")
def build_stream_test(config):
    def init(key):
        a, b, c, d = jax.random.split(key, 4)
        return {
            "w": jax.random.normal(a, (50, 96)),
            "deep": jax.random.normal(b, (3, 7, 11, 32), jnp.bfloat16),
            "qr": jax.random.orthogonal(c, 32),
            "key": jax.random.split(d, 3),
            "one": jnp.ones(()),
            "table": np.arange(6.0, dtype=np.float32),
            "none": jnp.zeros((0, 4)),
            "scale": jnp.full((50, 96), 0.3),
            "wide": jnp.full((9, 31), 1 + 2j, jnp.complex64) * 3,
            "rows": jnp.broadcast_to(jnp.arange(96.0), (50, 96)),
        }

    return InitFn(init, name="stream-test")


@register("stream-endless")
def build_stream_endless(config):
    return InitFn(lambda key: {"zeros": jnp.zeros((1 << 15, 1 << 25))})


@register("stream-large")
def build_stream_large(config):
    return InitFn(lambda key: {"w": jax.random.bits(key, (1 << 22,))})


SPEC = ModelSpec("stream-test", {})


def plain(seed=7):
    tree = jax.jit(build(SPEC).fn)(jax.random.key(seed))
    tree["key"] = jax.random.key_data(tree["key"])
    return {name: np.asarray(array) for name, array in tree.items()}


@pytest.fixture(scope="module")
def small():
    with Server(SMALL) as running:
        yield running


@pytest.fixture
def reader(small, tmp_path):
    with shardinit.connect(small.address, timeout=30, cache_dir=tmp_path) as made:
        yield made


def same(ours, theirs):
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert ours.tobytes() == theirs.tobytes()


def test_numpy_gives_the_bits_of_plain_jit(reader):
    ours, theirs = reader.numpy(SPEC, 7), plain()
    assert list(ours) == sorted(theirs)
    for name, array in ours.items():
        same(array, theirs[name])


@pytest.mark.parametrize(
    ("path", "window"),
    [
        ("w", np.s_[3:40:2, ::-1]),
        ("deep", np.s_[-1, ..., 4]),
        ("w", np.s_[7]),
        ("qr", np.s_[5:9]),
        ("key", np.s_[1]),
        ("one", ...),
        ("w", np.s_[4:4]),
    ],
)
@pytest.mark.few(2)
def test_a_window_is_that_of_the_whole(reader, path, window):
    same(reader.read(SPEC, 7, path, window), plain()[path][window])


@pytest.mark.slow
def test_keys_of_all_kinds_mean_the_same(reader):
    words = np.array([0, 7], np.uint32)
    for key in (7, jax.random.key(7), jax.random.PRNGKey(7), words):
        same(reader.read(SPEC, key, "w"), plain()["w"])
    with pytest.raises(SpecError, match="key"):
        reader.read(SPEC, jax.random.key(7, impl="rbg"), "w")
    with pytest.raises(TypeError, match="seed"):
        reader.read(SPEC, "7", "w")


def test_only_the_bytes_of_the_window_are_sent(small, reader):
    def sent():
        return small.metrics.sent._value.get()

    before = sent()
    reader.read(SPEC, 7, "w", np.s_[10:12])
    assert 0 < sent() - before < 2 * 96 * 4 + 100


def test_select_takes_some_leaves_and_knows_all_names(reader):
    assert list(reader.numpy(SPEC, 7, select=["w", "d*"])) == ["deep", "w"]
    with pytest.raises(SelectError):
        reader.numpy(SPEC, 7, select="no")
    with pytest.raises(SelectError):
        reader.read(SPEC, 7, "no")


@pytest.mark.parametrize("rules", [None, shardinit.fsdp("model", min_bytes=0)])
def test_init_by_stream_equals_init_by_program(client, mesh, spec, rules):
    asked = []
    receive = client.receive
    client.receive = lambda *a: asked.extend(a[2]) or receive(*a)
    ours = client.init(spec, 3, mesh=mesh, rules=rules, via="stream")
    theirs = client.init(spec, 3, mesh=mesh, rules=rules)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
        same(np.asarray(a), np.asarray(b))
    assert len(asked) == len(set(asked))


@pytest.mark.slow
def test_init_by_stream_takes_shardings_selection_and_keys(reader, mesh):
    out = {"w": NamedSharding(mesh, PartitionSpec("data", "model"))}
    whole = NamedSharding(mesh, PartitionSpec())
    out = {name: out.get(name, whole) for name in plain()}
    seen = []
    ours = reader.init(
        SPEC,
        jax.random.key(7),
        out_shardings=out,
        select=["w", "key"],
        via="stream",
        progress=lambda *done: seen.append(done),
    )
    assert ours["w"].sharding == out["w"]
    same(np.asarray(ours["w"]), plain()["w"])
    assert jnp.issubdtype(ours["key"].dtype, jax.dtypes.prng_key)
    same(np.asarray(jax.random.key_data(ours["key"])), plain()["key"])
    assert isinstance(ours["qr"], jax.ShapeDtypeStruct)
    assert seen == [(1, 2), (2, 2)]


def test_init_by_stream_puts_leaves_into_the_memory_that_is_asked_for(reader, mesh):
    split = NamedSharding(mesh, PartitionSpec("data"), memory_kind="pinned_host")
    whole = NamedSharding(mesh, PartitionSpec(), memory_kind="pinned_host")
    out = dict.fromkeys(plain(), whole) | {"w": split}
    ours = reader.init(SPEC, 7, out_shardings=out, select=["w", "key"], via="stream")
    assert ours["w"].sharding == split
    assert ours["key"].sharding.memory_kind == "pinned_host"
    same(np.asarray(ours["w"]), plain()["w"])


def request_of(*windows, **more):
    named = spec_pb2.ModelSpec(named=spec_pb2.NamedModel(model="stream-test"))
    key = service_pb2.RootKey(seed=7)
    return service_pb2.StreamShardsRequest(
        spec=named, key=key, windows=[service_pb2.Window(**w) for w in windows], **more
    )


@pytest.fixture
def stub(small):
    with grpc.insecure_channel(small.address) as channel:
        yield InitServiceStub(channel)


def test_the_stream_keeps_its_grammar(stub):
    request = request_of(
        {"path": "w", "start": [1, 2], "shape": [20, 90]}, {"path": "one"}
    )
    text, data = "", b""
    for message in stub.StreamShards(request, timeout=20):
        part = message.WhichOneof("part")
        text += part[0]
        if part == "chunk" and text.count("e") == 0:
            assert message.chunk.offset == len(data)
            assert 0 < len(message.chunk.data) <= 1000
            data += message.chunk.data
    assert text == "h" + "c" * text.count("c", 0, -3) + "e" + "hce"
    assert data == plain()["w"][1:21, 2:92].tobytes()


@pytest.mark.parametrize(
    ("window", "field"),
    [
        ({"path": "no"}, "windows[0].path"),
        ({"path": "w", "start": [1]}, "windows[0]"),
        ({"path": "w", "start": [1, 1], "shape": [50, 1]}, "windows[0]"),
        ({"path": "w", "start": [2**63, 0], "shape": [2**63, 1]}, "windows[0]"),
        ({"path": "w" * 5000}, "windows[0].path"),
        ({"path": "w", "shape": [1] * 40}, "windows[0].shape"),
    ],
)
def test_a_window_that_is_not_there_is_a_fault(stub, window, field):
    from tests.service.test_faults import violations

    with pytest.raises(grpc.RpcError) as caught:
        list(stub.StreamShards(request_of(window), timeout=20))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert list(violations(caught.value)) == [field]


@pytest.mark.parametrize("more", [{}, {"key": service_pb2.RootKey()}])
def test_a_request_without_windows_or_key_is_a_fault(stub, more):
    request = request_of(*([{"path": "w"}] if more else []))
    request.MergeFrom(service_pb2.StreamShardsRequest(**more))
    if more:
        request.ClearField("key")
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.StreamShards(request, timeout=20))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("path", ["w", "scale"])
@pytest.mark.parametrize("offset", [0, 1, 999, 1000, 5001, 50 * 96 * 4])
@pytest.mark.few(3)
def test_a_stream_is_resumed_at_any_byte_with_the_same_digest(stub, offset, path):
    windows = [{"path": "one"}, {"path": path}]
    resume = service_pb2.ShardPosition(window=1, offset=offset)
    messages = list(stub.StreamShards(request_of(*windows, resume=resume), timeout=20))
    header, *chunks, end = messages
    assert header.header.window == 1
    assert header.header.offset == offset
    data = b"".join(m.chunk.data for m in chunks)
    assert data == plain()[path].tobytes()[offset:]
    whole = list(stub.StreamShards(request_of({"path": path}), timeout=20))
    assert end.end.xxh3_128 == whole[-1].end.xxh3_128


@pytest.mark.slow
def test_windows_of_one_number_stand_among_others_in_order(stub):
    windows = [{"path": p} for p in ("scale", "w", "wide", "none", "scale", "rows")]
    windows[0] |= {"start": [3, 5], "shape": [7, 11]}
    made, digests = [], []
    for message in stub.StreamShards(request_of(*windows), timeout=20):
        if message.HasField("header"):
            assert message.header.window == len(made)
            made.append(b"")
        elif message.HasField("chunk"):
            assert message.chunk.offset == len(made[-1])
            made[-1] += message.chunk.data
        else:
            digests.append(message.end.xxh3_128)
    expected = [plain()[w["path"]] for w in windows]
    expected[0] = expected[0][3:10, 5:16]
    assert made == [array.tobytes() for array in expected]
    assert digests == [xxhash.xxh3_128(data).digest() for data in made]


@pytest.mark.parametrize("resume", [0, 1 << 41])
def test_a_terabyte_of_zeros_is_handed_back_when_the_server_ends(resume):
    named = spec_pb2.ModelSpec(named=spec_pb2.NamedModel(model="stream-endless"))
    request = request_of({"path": "zeros"})
    request.spec.CopyFrom(named)
    request.resume.offset = resume
    server = Server(Config())
    server.start()
    with grpc.insecure_channel(server.address) as channel:
        messages = InitServiceStub(channel).StreamShards(request)
        assert next(messages).HasField("header")
        threading.Timer(0.3, server.stop, (0.5,)).start()
        with pytest.raises(grpc.RpcError) as caught:
            for _ in messages:
                pass
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("offset", [(0, 50 * 96 * 4 + 1), (1, 0)])
def test_a_resume_beyond_the_end_is_a_fault(stub, offset):
    resume = service_pb2.ShardPosition(window=offset[0], offset=offset[1])
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.StreamShards(request_of({"path": "w"}, resume=resume), timeout=20))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_leaf_that_must_be_whole_is_refused_beyond_the_limit(tmp_path):
    with (
        Server(Config(whole_bytes=100)) as server,
        shardinit.connect(server.address, cache_dir=tmp_path) as client,
    ):
        same(client.read(SPEC, 7, "w"), plain()["w"])
        with pytest.raises(ServiceError, match=r"'qr'.*larger --whole-bytes") as caught:
            client.read(SPEC, 7, "qr")
    assert caught.value.code == "RESOURCE_EXHAUSTED"
    assert caught.value.limit == "whole-bytes"


class Faulty:
    """Breaks a stream once at each of the messages that it is told."""

    def __init__(self, breaks, how):
        self.breaks, self.how, self.resumed = set(breaks), how, []

    def front(self, *given):
        faulty = self

        class Breaking(Front):
            async def StreamShards(self, request, call):
                place = request.resume
                faulty.resumed.append((place.window, place.offset))
                number = -1
                async for message in super().StreamShards(request, call):
                    number += 1
                    if number in faulty.breaks:
                        faulty.breaks.discard(number)
                        message = faulty.broken(message)
                        if faulty.how == "end":
                            return
                        if faulty.how == "skip":
                            continue
                    yield message

        return Breaking(*given)

    def broken(self, message):
        if self.how == "break":
            raise ServiceError("", "connection lost", code="UNAVAILABLE")
        if not isinstance(message, bytes):
            message = message.SerializeToString()
        return message[:-1] + bytes([message[-1] ^ 1])


@pytest.mark.parametrize("how", ["break", "end", "skip", "flip"])
@pytest.mark.few(1)
def test_a_stream_goes_on_after_every_kind_of_break(tmp_path, how):
    # messages 0: header, 1 and 11: chunks, 25: later, whatever it is
    faulty = Faulty({1, 6, 11, 25}, how)
    with (
        Server(SMALL, front=faulty.front) as server,
        shardinit.connect(server.address, timeout=20, cache_dir=tmp_path) as client,
    ):
        ours = client.numpy(SPEC, 7)
    for name, array in plain().items():
        same(ours[name], array)
    assert not faulty.breaks
    assert len(faulty.resumed) > 2
    assert faulty.resumed == sorted(faulty.resumed)


@pytest.mark.slow
def test_a_stream_that_never_gets_further_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)

    class Dead(Front):
        async def StreamShards(self, request, call):
            async for message in super().StreamShards(request, call):
                yield message
                raise ServiceError("", "connection lost", code="UNAVAILABLE")

    with (
        Server(front=Dead) as server,
        shardinit.connect(server.address, timeout=20, cache_dir=tmp_path) as client,
        pytest.raises(ServiceError, match="connection lost") as caught,
    ):
        client.numpy(SPEC, 7)
    assert caught.value.code == "UNAVAILABLE"


@pytest.mark.slow
def test_another_computation_behind_the_same_address_is_found_out(tmp_path):
    calls = []

    class Mixed(Front):
        """Another replica goes on, with another platform's bits."""

        async def StreamShards(self, request, call):
            calls.append(call)
            mine, number = len(calls), -1
            if mine == 2:
                request.key.seed += 1
            async for message in super().StreamShards(request, call):
                number += 1
                if mine == 1 and number == 3:
                    raise ServiceError("", "connection lost", code="UNAVAILABLE")
                yield message

    with (
        Server(SMALL, front=Mixed) as server,
        shardinit.connect(server.address, timeout=20, cache_dir=tmp_path) as client,
    ):
        same(client.read(SPEC, 7, "w"), plain()["w"])
    assert len(calls) == 3  # the mixture was noticed and asked for anew


def test_a_worker_that_dies_in_the_middle_of_a_stream_is_not_noticed(tmp_path):
    class Killing(Front):
        async def StreamShards(self, request, call):
            number = 0
            async for message in super().StreamShards(request, call):
                number += 1
                if number % 20 == 5:
                    for slot in self._pool._slots:
                        os.kill(slot.process._process.pid, signal.SIGKILL)
                yield message

    with (
        Server(SMALL, front=Killing) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = InitServiceStub(channel)
        whole = list(stub.StreamShards(request_of({"path": "w"}), timeout=60))
        data = b"".join(message.chunk.data for message in whole)
        assert data == plain()["w"].tobytes()
        assert whole[-1].end.xxh3_128 == xxhash.xxh3_128(data).digest()
        assert server.metrics.killed.labels("died")._value.get() >= 1


def test_a_reader_that_sleeps_holds_back_the_computation_and_no_worker():
    config = Config(block_bytes=1 << 16, workers=1, stall_seconds=3)
    with (
        Server(config) as server,
        grpc.insecure_channel(
            server.address, options=[("grpc.http2.bdp_probe", 0)]
        ) as channel,
    ):
        stub = InitServiceStub(channel)
        request = request_of({"path": "w"})
        request.spec.named.model = "stream-large"
        stream = stub.StreamShards(request, timeout=60)
        next(stream)
        pause, seen, sent = threading.Event(), -1, server.metrics.sent._value
        while seen != sent.get():  # until nothing moves any more
            seen = sent.get()
            pause.wait(0.3)
        assert seen < 4 << 20  # of 16 MiB
        assert list(stub.StreamShards(request_of({"path": "w"}), timeout=20))
        pause.wait(4)
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "taken nothing" in caught.value.details()


def test_a_client_that_goes_ends_the_computation(small, stub):
    done = threading.Event()
    active = small.metrics.active.labels("StreamShards")
    stream = stub.StreamShards(request_of(*[{"path": "w"}] * 2000), timeout=60)
    next(stream)
    assert active._value.get() == 1
    stream.cancel()
    for _ in range(200):
        if active._value.get() == 0:
            break
        done.wait(0.05)
    assert active._value.get() == 0


def test_numpy_needs_neither_jax_nor_flax(small, tmp_path):
    code = """
import sys, shardinit
from shardinit.models import ModelSpec
with shardinit.connect(sys.argv[1], cache_dir=sys.argv[2]) as client:
    spec = ModelSpec("stream-test", {})
    arrays = client.numpy(spec, 7, select="**")
    window = client.read(spec, 7, "deep", (0, slice(2, 4)))
print(arrays["w"].sum(), window.shape, window.dtype)
print([m for m in ("jax", "flax", "jaxlib") if m in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, small.address, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    numbers, modules = done.stdout.strip().split("\n")
    assert numbers == f"{plain()['w'].sum()!s} (2, 11, 32) bfloat16"
    assert modules == "[]"


@pytest.mark.parametrize(
    "shape", [(), (5,), (7, 3), (2, 9, 4), (1, 1, 1), (3, 5, 2, 2)]
)
@pytest.mark.parametrize("elements", [1, 3, 8, 10, 1000])
def test_blocks_cover_a_window_in_order_and_once(shape, elements):
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    out, shapes = [], set()
    while len(out) < array.size:
        block, first = windows.block_of(shape, elements, len(out))
        assert array[block.slices].shape == block.shape
        assert block.size <= elements
        out += array[block.slices].reshape(-1)[len(out) - first :].tolist()
        shapes.add(block.shape)
    assert out == array.reshape(-1).tolist()
    assert len(shapes) == 1


@pytest.mark.parametrize("shape", [(7, 3), (2, 9, 4)])
@pytest.mark.parametrize("elements", [1, 4, 10])
@pytest.mark.few(2)
def test_every_element_lies_in_its_block(shape, elements):
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    for at in range(array.size):
        block, first = windows.block_of(shape, elements, at)
        assert array[block.slices].reshape(-1)[at - first] == at
