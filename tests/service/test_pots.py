"""What there is for all callers: one alone has all, and another who comes its share."""

import asyncio
import hashlib
import math
import threading
from functools import partial

import grpc
import jax
import pytest

import shardinit
from shardinit.errors import ServiceError
from shardinit.models import ModelSpec
from shardinit.service.server import pots
from shardinit.service.server.config import Config
from shardinit.service.server.front import Front
from shardinit.service.server.pots import Pot, Taken
from shardinit.service.server.server import Server
from shardinit.service.server.store import Store
from shardinit.service.wire.messages import key_to_proto, spec_to_proto
from shardinit.service.wire.service_pb2_grpc import InitServiceStub
from shardinit.v1 import service_pb2
from tests.service.conftest import until

pytestmark = pytest.mark.once

TOKENS = {"many": "the-token-of-many-calls", "few": "the-token-of-few-calls"}


class Asked:
    """What callers take of a pot, in order, and what they had to give up."""

    def __init__(self, capacity, **more):
        self.pot, self.gone = Pot(capacity, **more), []

    def take(self, item, caller, amount=1, weight=1):
        taken = Taken(caller, amount, weight)
        return self.pot.take(item, taken, partial(self.gone.append, item))


def test_one_caller_has_all_until_another_comes_who_gets_its_share():
    asked = Asked(4)
    assert [asked.take(f"a{i}", "a") for i in range(5)] == [True] * 4 + [False]
    assert [asked.take(f"b{i}", "b") for i in range(3)] == [True, True, False]
    assert asked.gone == ["a3", "a2"]
    assert not asked.take("a4", "a")  # it has its share
    asked.pot.leave("b0")
    assert asked.take("a4", "a")


def test_a_share_is_by_weight():
    asked = Asked(8)
    assert all(asked.take(f"a{i}", "a") for i in range(8))
    assert [asked.take(f"b{i}", "b", weight=3) for i in range(7)].count(True) == 6


def test_what_would_not_suffice_is_not_taken_from_anybody():
    asked = Asked(100)
    assert all(asked.take(f"a{i}", "a", 30) for i in range(3))
    assert not asked.take("b", "b", 80)
    assert asked.gone == []
    assert asked.take("c", "c", 10)  # as before
    assert asked.take("b", "b", 40)
    assert asked.gone == ["a2", "a1"]


def test_one_alone_may_have_more_than_there_is():
    asked = Asked(100)
    assert asked.take("a", "a", 300)
    assert not asked.take("more", "a", 1)
    assert asked.take("b", "b", 50)
    assert asked.gone == ["a"]


def test_who_has_nothing_gets_the_place_of_one_who_had_it_for_a_turn(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(pots.time, "monotonic", lambda: now[0])
    asked = Asked(1, turn=60)
    assert asked.take("a", "a", weight=9)
    assert not asked.take("b", "b")
    now[0] = 61.0
    assert asked.take("b", "b")
    assert asked.gone == ["a"]
    assert not asked.take("a", "a", weight=1)
    patient = Asked(1, turn=math.inf)
    assert patient.take("a", "a")
    now[0] = 1e9
    assert not patient.take("b", "b")


def test_a_store_is_shared_by_owners_and_again_after_a_restart(tmp_path):
    def put(store, data, owner):
        sha256 = hashlib.sha256(data).digest()
        header = service_pb2.ProgramHeader(size=len(data), sha256=sha256)
        store.put(header, data, owner)
        return sha256

    store = Store(tmp_path, 10)
    for i in range(5):
        put(store, b"m%d" % i, "many")
    few = put(store, b"ff", "few")
    for _ in range(2):
        for i in range(5, 10):
            last = put(store, b"m%d" % i, "many")
        assert store.header(few) is not None
        assert store.header(last) is not None
        assert store.bytes == 10
        store = Store(tmp_path, 10)


@pytest.fixture
def tokens(tmp_path):
    path = tmp_path / "tokens"
    lines = (f"{name} read,write,upload {token}\n" for name, token in TOKENS.items())
    path.write_text("".join(lines))
    return path


def bearer(name):
    return (("authorization", f"Bearer {TOKENS[name]}"),)


def limit_of(future):
    with pytest.raises(grpc.RpcError) as caught:
        future.result(timeout=30)
    error = shardinit.service.wire.errors.from_rpc_error(caught.value, "")
    assert error.retry_after
    return error.code, error.limit


def test_builds_of_one_caller_that_wait_give_a_place_to_another_s(gate, tokens):
    with (
        Server(Config(workers=1, queue=2, token_file=tokens)) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        call = InitServiceStub(channel).DescribeModel

        def ask(name, width):
            return call.future(gate.request(width), timeout=60, metadata=bearer(name))

        running = [ask("many", 8)]
        assert until(lambda: gate.begun)
        for width in (16, 24):
            running.append(ask("many", width))
            assert until(lambda: server._pool.waiting == len(running) - 1)
        running.append(ask("few", 32))
        assert limit_of(running.pop(2)) == ("RESOURCE_EXHAUSTED", "queue")
        gate.open()
        assert all(future.result().fingerprint for future in running)


def test_streams_of_one_caller_give_a_place_to_another_s(spec, tokens, tmp_path):
    release, inside = threading.Event(), []

    class Slow(Front):
        async def _next(self, going, call):
            inside.append(call.caller)
            while call.caller == "many" and not release.is_set():
                await asyncio.sleep(0.02)
            return await super()._next(going, call)

    def connected(name):
        folder = tmp_path / name
        return shardinit.connect(server.address, cache_dir=folder, token=TOKENS[name])

    with (
        Server(Config(streams=2, token_file=tokens), front=Slow) as server,
        connected("many") as many,
        connected("few") as few,
    ):
        got = []
        threads = [
            threading.Thread(target=lambda: got.append(many.numpy(spec, 0)))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        assert until(lambda: len(inside) == 2)
        assert few.numpy(spec, 0)
        assert not got
        release.set()
        for thread in threads:
            thread.join()
    assert len(got) == 2


def test_uploads_of_one_caller_give_their_bytes_to_another_s(tokens, tmp_path):
    program = shardinit.export_plan(shardinit.plan(lambda key: jax.random.bits(key)))
    size, stop = len(program.to_bytes()), threading.Event()

    def endless(number):
        header = service_pb2.UploadHeader(size=size // 2, sha256=bytes([number] * 32))
        yield service_pb2.UploadProgramRequest(header=header)
        stop.wait(30)

    config = Config(
        token_file=tokens,
        allow_upload=True,
        upload_bytes=2 * size,
        message_seconds=60,
    )
    folder = tmp_path / "cache"
    with (
        Server(config) as server,
        grpc.insecure_channel(server.address) as channel,
        shardinit.connect(server.address, cache_dir=folder, token=TOKENS["few"]) as few,
    ):
        upload = InitServiceStub(channel).UploadProgram
        held = [
            upload.future(endless(i), timeout=60, metadata=bearer("many"))
            for i in range(4)
        ]
        assert until(lambda: server._front._uploads._shares.total == 4 * (size // 2))
        assert few.upload(program) == program.sha256
        ended = [future for future in held if future.done()]
        assert len(ended) == 2
        assert {limit_of(x) for x in ended} == {("RESOURCE_EXHAUSTED", "upload-bytes")}
        stop.set()


@pytest.mark.slow
def test_writes_of_one_caller_give_a_place_and_go_on_later(tokens, tmp_path):
    from tests.service.test_checkpoints import SPEC, seen

    gate, root = tmp_path / "gate", tmp_path / "root"
    gate.mkdir()
    config = Config(writes=2, token_file=tokens, checkpoint_roots=(root,))
    with (
        Server(config) as server,
        grpc.insecure_channel(server.address) as channel,
        shardinit.connect(
            server.address, cache_dir=tmp_path / "c", token=TOKENS["few"]
        ) as few,
    ):
        calls = []
        for i in range(2):
            request = service_pb2.WriteCheckpointRequest(
                spec=spec_to_proto(ModelSpec(SPEC.model, {"gate": str(gate)})),
                key=key_to_proto(i),
                uri=str(root / "many" / str(i)),
                format=service_pb2.CHECKPOINT_FORMAT_SAFETENSORS,
                detach=True,
            )
            call = InitServiceStub(channel).WriteCheckpoint
            calls.append(call(request, timeout=120, metadata=bearer("many")))
            assert next(calls[-1]).progress.bytes_total
        assert until(lambda: len(set(seen(gate))) == 2)
        assert few.write_checkpoint(SPEC, 0, root / "few" / "x").uri
        assert not (root / "many" / "0").exists()
        (gate / "go").touch()
        for call in calls:
            *_, last = call
            assert last.receipt.uri


def test_a_call_ends_at_the_server_s_deadline_or_at_the_caller_s(gate, tmp_path):
    def refused(timeout):
        with (
            shardinit.connect(
                server.address, timeout=timeout, cache_dir=tmp_path
            ) as client,
            pytest.raises(ServiceError) as caught,
        ):
            client.describe(gate.spec())
        assert caught.value.code == "DEADLINE_EXCEEDED"
        return caught.value

    with Server(Config(describe_seconds=2)) as server:
        error = refused(20)
        assert error.limit == "describe-seconds"
        assert "2 s" in error.got
        assert "this deadline is the server's" in error.expected
        error = refused(0.5)
        assert (error.limit, error.expected) == ("", "")
        assert "the caller's own deadline" in error.got
