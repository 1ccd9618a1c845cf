import asyncio
import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import replace

import grpc
import jax
import numpy as np
import psutil
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from grpc_status import rpc_status

import shardinit
from shardinit.errors import ServiceError
from shardinit.models import ModelSpec, build
from shardinit.service.server.admission import Call, Pace
from shardinit.service.server.auth import Caller
from shardinit.service.server.config import Config
from shardinit.service.server.front import Front
from shardinit.service.server.model_cache import ModelCache
from shardinit.service.server.server import SERVICE, Server, _loop
from shardinit.service.server.store import Store
from shardinit.service.server.turns import Job
from shardinit.service.wire.chunks import Joined
from shardinit.service.wire.errors import from_rpc_error
from shardinit.service.wire.limits import Limits
from shardinit.service.wire.messages import spec_to_proto
from shardinit.service.wire.service_pb2_grpc import InitServiceStub
from shardinit.v1 import service_pb2
from tests.service.conftest import until

pytestmark = pytest.mark.once

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def check(channel, service):
    stub = health_pb2_grpc.HealthStub(channel)
    return stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status


def test_a_worker_is_told_every_setting(tmp_path):
    said = Config(
        listen="unix:/x",
        tls_cert=tmp_path / "cert",
        models=("ours", "theirs"),
        workers=3,
        message_seconds=0.5,
        allow_upload=True,
        checkpoint_roots=(tmp_path, tmp_path / "other"),
        limits=Limits(layers=7),
    )
    assert Config.from_json(said.to_json()) == said
    assert Config.from_json(Config().to_json()) == Config()


def test_health_is_said_for_the_whole_and_for_each_service(server):
    with grpc.insecure_channel(server.address) as channel:
        for name in ("", SERVICE, "grpc.health.v1.Health"):
            assert check(channel, name) == SERVING
        with pytest.raises(grpc.RpcError) as caught:
            check(channel, "no.such.Service")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_the_end_of_one_server_does_not_touch_another(server, client):
    with Server() as other, grpc.insecure_channel(other.address) as channel:
        assert check(channel, SERVICE) == SERVING
    with grpc.insecure_channel(server.address) as channel:
        assert check(channel, SERVICE) == SERVING
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service=SERVICE), timeout=10
        )
        assert next(watch).status == SERVING
        watch.cancel()
    assert client.models()


def test_reflection_lists_the_service_with_all_that_it_has(server):
    with grpc.insecure_channel(server.address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert SERVICE in database.get_services()
        file = database.FindFileContainingSymbol(SERVICE)
    methods = [m.name for m in file.service[0].method]
    assert set(methods) >= {
        "GetVersion",
        "ListModels",
        "DescribeModel",
        "GetProgram",
        "StreamShards",
        "WriteCheckpoint",
        "UploadProgram",
    }


def test_health_answers_while_every_worker_is_busy(gate):
    with (
        Server(Config(workers=1)) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        call = InitServiceStub(channel).DescribeModel
        running = [call.future(gate.request(width), timeout=20) for width in (8, 16)]
        assert until(lambda: gate.begun)
        for name in ("", SERVICE):
            assert check(channel, name) == SERVING
        gate.open()
        for future in running:
            future.result()


def test_the_service_serves_when_a_worker_is_up_and_the_front_before():
    server = Server()
    server.start()
    with grpc.insecure_channel(server.address) as channel:
        assert check(channel, "") == SERVING
        server.wait_ready()
        assert until(lambda: check(channel, SERVICE) == SERVING)
        assert check(channel, "") == SERVING
    server.stop(0)


def test_stopping_says_not_serving_and_finishes_what_runs(gate):
    server = Server()
    server.start()
    server.wait_ready()
    with grpc.insecure_channel(server.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service=SERVICE), timeout=30
        )
        assert next(watch).status == SERVING
        running = InitServiceStub(channel).DescribeModel.future(gate.request())
        assert until(lambda: gate.begun)
        stopping = threading.Thread(target=server.stop, args=(10,))
        stopping.start()
        assert next(watch).status == NOT_SERVING
        watch.cancel()
        gate.open()
        assert running.result().fingerprint
        stopping.join(10)
        assert not stopping.is_alive()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.few(1)
def test_a_signal_drains_the_server_and_it_exits_with_0(number, spec, tmp_path):
    command = [sys.executable, "-m", "shardinit", "serve", "--listen", "127.0.0.1:0"]
    command += ["--models", "shardinit.bench.serving_models"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
    ) as process:
        try:
            address = process.stdout.readline().split()[-1]
            with shardinit.connect(address, cache_dir=tmp_path) as client:
                assert "decoder" in client.models()
                unseeded = ModelSpec("bench-constant", {"rows": 4096})
                assert client.describe(unseeded).findings
            process.send_signal(number)
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 0
    assert "Traceback" not in out + err
    assert "ListModels OK" in err
    assert "Warning" not in err  # a caller's findings go to the caller


SLOW = """
import time
from shardinit.models import register

@register("slow-to-build")
def build(config):
    print("building", flush=True)
    time.sleep(60)
"""


def test_a_build_that_runs_does_not_hold_up_the_end(tmp_path):
    (tmp_path / "slow_to_build.py").write_text(SLOW)
    command = [sys.executable, "-m", "shardinit", "serve", "--listen", "127.0.0.1:0"]
    path = os.pathsep.join([str(tmp_path), *sys.path])
    kept = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    with subprocess.Popen(
        [*command, "--models", "slow_to_build", "--grace", "0.5"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=kept | {"PYTHONPATH": path},
    ) as process:
        try:
            address = process.stdout.readline().split()[-1]
            with grpc.insecure_channel(address) as channel:
                request = service_pb2.DescribeModelRequest()
                request.spec.named.model = "slow-to-build"
                call = InitServiceStub(channel).DescribeModel.future(request)
                assert process.stdout.readline() == "building\n"
                process.terminate()
                process.wait(timeout=20)
                call.cancel()
        finally:
            process.kill()
    assert process.returncode == 0


@pytest.mark.parametrize(
    "listen", ["0.0.0.0:1", "[::]:1", "10.1.2.3:1", "example.com:1", "192.168.0.1:0"]
)
def test_an_address_that_others_can_reach_is_refused(listen):
    with pytest.raises(ServiceError, match="reached from other machines") as caught:
        Server(Config(listen))
    assert caught.value.code == "FAILED_PRECONDITION"


@pytest.mark.parametrize(
    "listen", ["", "localhost", ":1", "127.0.0.1:x", "[::1]:70000"]
)
def test_an_address_that_is_none_is_refused(listen):
    with pytest.raises(ServiceError, match="no host and port"):
        Config(listen).check()


def test_a_port_in_use_is_a_clear_error(server):
    with pytest.raises(ServiceError, match="cannot be bound"):
        Server(Config(server.address))


def test_a_server_that_cannot_begin_gives_its_port_back(server):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = "{}:{}".format(*free.getsockname())
    for busy in ({"health_listen": server.address}, {"metrics_listen": server.address}):
        with pytest.raises(ServiceError):
            Server(Config(address, **busy))
    with Server(Config(address)) as other:
        assert other.address == address


def test_a_unix_socket_serves(tmp_path):
    with (
        Server(Config(f"unix:{tmp_path}/s")) as server,
        shardinit.connect(server.address, cache_dir=tmp_path / "cache") as client,
    ):
        assert "service-test" in client.models()


def test_a_socket_of_a_live_server_is_left_alone_with_one_clear_error(tmp_path):
    with Server(Config(f"unix:{tmp_path}/s")) as server:
        command = [sys.executable, "-m", "shardinit", "serve", "--listen"]
        done = subprocess.run(
            [*command, server.address], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 1
        assert "another server listens on this socket" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        with grpc.insecure_channel(server.address) as channel:
            assert check(channel, SERVICE) == SERVING


def test_nothing_of_a_stopped_server_stays_on_its_port():
    with Server() as server:
        host, port = server.address.rsplit(":", 1)
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind((host, int(port)))


def built(server, method):
    """How often workers have built for a method."""
    return server.metrics.built.labels(method)._sum.get() and sum(
        bucket.get() for bucket in server.metrics.built.labels(method)._buckets
    )


def test_many_clients_at_once_build_a_program_once(spec, tmp_path):
    digests = []

    def ask(address, number):
        with shardinit.connect(address, cache_dir=tmp_path / str(number)) as client:
            digests.append(client.program(spec).sha256)

    with Server() as server:
        threads = [
            threading.Thread(target=ask, args=(server.address, i)) for i in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert built(server, "GetProgram") == 1
    assert len(digests) == 8
    assert len(set(digests)) == 1


def scrape(server):
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics") as page:
        lines = page.read().decode().splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {name: float(value) for name, value in pairs}


def test_metrics_count_what_was_done(spec, tmp_path):
    with (
        Server(Config(metrics_listen="127.0.0.1:0")) as server,
        shardinit.connect(server.address, cache_dir=tmp_path) as client,
    ):
        client.numpy(spec, 0)
        with pytest.raises(ServiceError):
            client.program("0" * 64)
        figures = scrape(server)
    assert figures['shardinit_calls_total{code="OK",method="StreamShards"}'] == 1
    assert figures['shardinit_calls_total{code="NOT_FOUND",method="GetProgram"}'] == 1
    assert figures['shardinit_call_seconds_count{method="DescribeModel"}'] == 1
    assert figures["shardinit_stream_bytes_total"] > 8 * 64 * 4 * 2
    assert figures["shardinit_cache_bytes"] > 0
    assert figures['shardinit_active_calls{method="StreamShards"}'] == 0


def test_plans_that_a_worker_lets_go_are_counted(tmp_path):
    """A worker keeps one of these; what the process that listens keeps is small."""
    with (
        Server(Config(workers=1, cache_bytes=20_000)) as server,
        shardinit.connect(server.address, cache_dir=tmp_path) as client,
    ):
        for width in (64, 65, 66):
            client.describe(ModelSpec("service-test", {"width": width}))
        assert server.metrics.evicted._value.get() == 2


def test_a_metrics_port_in_use_is_a_clear_error():
    with (
        Server(Config(metrics_listen="127.0.0.1:0")) as server,
        pytest.raises(ServiceError, match="metrics address"),
    ):
        Server(Config(metrics_listen=server.metrics_address))


def details(error):
    """The details of a status by the names of their messages."""
    found = rpc_status.from_call(error).details
    return {detail.type_url.rpartition(".")[2]: detail for detail in found}


def test_builds_beyond_the_queue_are_refused_with_the_time_to_ask_again(gate):
    with (
        Server(Config(workers=1, queue=2)) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        call = InitServiceStub(channel).DescribeModel
        running = [call.future(gate.request(8), timeout=30)]
        assert until(lambda: gate.begun)
        running += [call.future(gate.request(16 + i), timeout=30) for i in range(2)]
        assert until(lambda: server._pool.waiting == 2)
        for i in range(3):
            with pytest.raises(grpc.RpcError) as caught:
                call(gate.request(32 + i), timeout=10)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            found = details(caught.value)
            failure = error_details_pb2.QuotaFailure()
            assert found["QuotaFailure"].Unpack(failure)
            assert [v.subject for v in failure.violations] == ["queue"]
            assert "RetryInfo" in found
        assert check(channel, SERVICE) == SERVING
        # Whoever asks for what is being built waits for that, and takes no place.
        running.append(call.future(gate.request(8), timeout=30))
        gate.open()
        assert len([future.result() for future in running]) == 4


def test_a_client_asks_a_busy_server_again_within_its_time(gate, tmp_path):
    with (
        Server(Config(workers=1, queue=1)) as server,
        shardinit.connect(server.address, timeout=30, cache_dir=tmp_path) as client,
        shardinit.connect(server.address, timeout=3, cache_dir=tmp_path) as hasty,
    ):
        threads = [
            threading.Thread(target=client.describe, args=(gate.spec(8 + i),))
            for i in range(2)
        ]
        threads[0].start()
        assert until(lambda: gate.begun)
        threads[1].start()
        assert until(lambda: server._pool.waiting == 1)
        with pytest.raises(ServiceError, match="builds wait") as caught:
            hasty.describe(gate.spec(32))
        assert (caught.value.code, caught.value.limit) == (
            "RESOURCE_EXHAUSTED",
            "queue",
        )
        threading.Timer(0.5, gate.open).start()
        assert client.describe(gate.spec(64)).fingerprint
        for thread in threads:
            thread.join()


@pytest.mark.slow
def test_a_build_ends_with_the_last_who_waits_for_it(gate):
    with (
        Server(Config(workers=1)) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        call = InitServiceStub(channel).DescribeModel
        both = [call.future(gate.request(), timeout=30) for _ in range(2)]
        assert until(lambda: gate.begun)
        (pid,) = gate.begun
        both[0].cancel()
        time.sleep(1.5)
        assert psutil.pid_exists(int(pid))
        both[1].cancel()
        assert until(lambda: not psutil.pid_exists(int(pid)), 5)
        killed = server.metrics.killed.labels("left")._value
        assert until(lambda: killed.get() == 1)
        gate.open()
        assert call(gate.request(), timeout=30).fingerprint  # by another worker


@pytest.mark.parametrize(
    ("setting", "reason"), [("build_seconds", "time"), ("worker_bytes", "memory")]
)
def test_a_build_that_takes_too_much_is_ended_with_its_worker(gate, setting, reason):
    config = replace(Config(workers=1), **{setting: 1})
    with Server(config) as server, grpc.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            InitServiceStub(channel).DescribeModel(gate.request(), timeout=30)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        failure = error_details_pb2.QuotaFailure()
        assert details(caught.value)["QuotaFailure"].Unpack(failure)
        (limit,) = [violation.subject for violation in failure.violations]
        assert limit == setting.replace("_", "-")
        assert until(lambda: server.metrics.killed.labels(reason)._value.get())


def test_a_worker_that_dies_is_replaced_and_its_job_done_by_another(gate):
    with (
        Server(Config(workers=1)) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        future = InitServiceStub(channel).DescribeModel.future(gate.request())
        assert until(lambda: gate.begun)
        os.kill(int(gate.begun[0]), signal.SIGKILL)
        assert until(lambda: len(gate.begun) == 2)
        gate.open()
        assert future.result(timeout=30).fingerprint
        assert server.metrics.killed.labels("died")._value.get() == 1


def test_workers_end_with_the_process_that_listens():
    command = [sys.executable, "-m", "shardinit", "serve", "--listen", "127.0.0.1:0"]
    kept = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=kept
    ) as process:
        process.stdout.readline()
        family = psutil.Process(process.pid)
        assert until(lambda: family.children(recursive=True))
        workers = family.children(recursive=True)
        process.kill()
        assert until(lambda: not any(worker.is_running() for worker in workers), 5)


def test_one_caller_s_builds_do_not_keep_another_s_behind_them(gate, tokens):
    """Three of one caller wait when the other comes: it is served second."""
    with (
        Server(Config(workers=1, token_file=tokens)) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        call, order = InitServiceStub(channel).DescribeModel, []

        def ask(token, width):
            made = call.future(
                gate.request(width),
                timeout=30,
                metadata=(("authorization", f"Bearer {token}"),),
            )
            made.add_done_callback(lambda _: order.append(token))
            return made

        asked = [ask("the-first-token-of-two", 8 + i) for i in range(4)]
        assert until(lambda: server._pool.waiting == 3)
        asked.append(ask("the-second-token-of-two", 64))
        assert until(lambda: server._pool.waiting == 4)
        gate.open()
        for future in asked:
            future.result()
        assert until(lambda: len(order) == 5)
    assert order.index("the-second-token-of-two") <= 2


@pytest.fixture
def tokens(tmp_path):
    path = tmp_path / "tokens"
    path.write_text("the-first-token-of-two\nthe-second-token-of-two\n")
    return path


def test_a_caller_has_so_many_calls_and_another_is_served(gate, tokens):
    with (
        Server(Config(caller_calls=2, token_file=tokens)) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = InitServiceStub(channel)
        mine, other = (
            (("authorization", f"Bearer the-{which}-token-of-two"),)
            for which in ("first", "second")
        )
        running = [
            stub.DescribeModel.future(gate.request(), metadata=mine) for _ in range(2)
        ]
        assert until(lambda: gate.begun)
        ask = service_pb2.GetVersionRequest(min=1, max=1)
        with pytest.raises(grpc.RpcError) as caught:
            stub.GetVersion(ask, timeout=10, metadata=mine)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert {"QuotaFailure", "RetryInfo"} <= set(details(caught.value))
        assert from_rpc_error(caught.value, "").limit == "caller-calls"
        assert stub.GetVersion(ask, timeout=10, metadata=other).version == 1
        gate.open()
        for future in running:
            future.result()


def test_callers_share_the_workers_by_weight(gate, tmp_path):
    """While both wait, one of weight 3 has three builds for each one of the other."""
    path = tmp_path / "tokens"
    path.write_text(
        "light read the-light-token-of-two\nheavy read the-heavy-one-of-two 3"
    )
    order = []
    with (
        Server(Config(workers=1, token_file=path)) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        call = InitServiceStub(channel).DescribeModel
        turns, asked = server._pool._turns, []
        turns.charge = lambda job, seconds: type(turns).charge(turns, job, 1.0 / 2)

        def ask(token, width):
            bearer = (("authorization", f"Bearer {token}"),)
            asked.append(call.future(gate.request(width), timeout=60, metadata=bearer))
            asked[-1].add_done_callback(lambda _: order.append(token))

        ask("the-light-token-of-two", 8)
        assert until(lambda: gate.begun)
        for i in range(8):
            ask("the-light-token-of-two", 9 + i)
            ask("the-heavy-one-of-two", 99 + i)
        assert until(lambda: len(turns) == 16)
        gate.open()
        for future in asked:
            future.result()
        assert until(lambda: len(order) == 17)
    assert order[1:9].count("the-heavy-one-of-two") == 6


def test_an_address_has_so_many_connections_and_another_call_waits(gate):
    options = [("grpc.use_local_subchannel_pool", 1)]
    with (
        Server(Config(peer_connections=1)) as server,
        grpc.insecure_channel(server.address, options) as first,
        grpc.insecure_channel(server.address, options) as second,
    ):
        running = InitServiceStub(first).DescribeModel.future(gate.request())
        assert until(lambda: gate.begun)
        ask = service_pb2.GetVersionRequest(min=1, max=1)
        assert InitServiceStub(first).GetVersion(ask, timeout=10).version == 1
        with pytest.raises(grpc.RpcError) as caught:
            InitServiceStub(second).GetVersion(ask, timeout=10)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert {"QuotaFailure", "RetryInfo"} <= set(details(caught.value))
        assert from_rpc_error(caught.value, "").limit == "peer-connections"
        gate.open()
        running.result()
        stub = InitServiceStub(second)
        assert until(lambda: not server._boundary._admission._connections)
        assert stub.GetVersion(ask, timeout=10).version == 1


def test_a_caller_waits_who_has_had_its_bytes_of_a_second(monkeypatch):
    waits = []

    async def sleep(seconds):
        waits.append(round(seconds))

    monkeypatch.setattr(asyncio, "sleep", sleep)

    async def send(call):
        for _ in range(4):
            await pace.wait(call, 10_000)

    pace = Pace(1000)
    asyncio.run(send(Call("", Caller("one"))))
    asyncio.run(send(Call("", Caller("ten", weight=10))))
    assert waits == [0, 9, 19, 29, 0, 0, 1, 2]


def test_a_connection_that_is_idle_or_old_ends_and_calls_go_on(spec, tmp_path):
    config = Config(idle_seconds=1, connection_seconds=1, ping_seconds=0.5)
    with (
        Server(config) as server,
        shardinit.connect(server.address, cache_dir=tmp_path) as client,
    ):
        for _ in range(3):
            assert client.read(spec, 0, "bias").shape == (64,)
            time.sleep(0.7)


def test_a_message_that_does_not_come_ends_its_call():
    stop = threading.Event()

    def never():
        stop.wait(20)
        yield b""

    with (
        Server(Config(message_seconds=0.2)) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        for path in (
            f"/{SERVICE}/GetVersion",
            "/grpc.health.v1.Health/Check",
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        ):
            with pytest.raises(grpc.RpcError) as caught:
                next(channel.stream_stream(path)(never(), timeout=20))
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert from_rpc_error(caught.value, "").limit == "message-seconds"
            assert "no message" in caught.value.details()
        stop.set()


@pytest.mark.slow
def test_calls_that_come_by_the_thousand_at_one_moment_are_all_answered():
    options = [("grpc.use_local_subchannel_pool", 1)]
    request = service_pb2.GetVersionRequest(min=1, max=1)
    with Server() as server, contextlib.ExitStack() as stack:
        stubs = []
        for _ in range(10):
            channel = grpc.insecure_channel(server.address, options)
            stubs.append(InitServiceStub(stack.enter_context(channel)))
            stubs[-1].GetVersion(request)
        _loop().call_soon_threadsafe(time.sleep, 1)  # it takes up none meanwhile
        futures = [s.GetVersion.future(request) for s in stubs for _ in range(150)]
        assert {future.result(timeout=30).version for future in futures} == {1}


def test_streams_beyond_the_limit_are_asked_for_again(spec, tmp_path):
    inside, release = threading.Semaphore(0), threading.Event()

    class Slow(Front):
        async def _next(self, going, call):
            inside.release()
            while not release.is_set():
                await asyncio.sleep(0.02)
            return await super()._next(going, call)

    with (
        Server(Config(streams=1), front=Slow) as server,
        shardinit.connect(server.address, cache_dir=tmp_path) as client,
    ):
        got = []
        threads = [
            threading.Thread(target=lambda: got.append(client.numpy(spec, 0)))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        assert inside.acquire(timeout=10)
        assert client.models()
        assert not inside.acquire(timeout=0.2)
        release.set()
        for thread in threads:
            thread.join()
        assert server.metrics.refused.labels("streams")._value.get() >= 2
    assert len(got) == 3


@pytest.mark.slow
def test_a_stream_that_runs_at_the_end_is_handed_to_the_next_server(spec, tmp_path):
    begun, resumed = threading.Event(), []

    class Slow(Front):
        async def StreamShards(self, request, call):
            resumed.append((request.resume.window, request.resume.offset))
            async for message in super().StreamShards(request, call):
                yield message
                if len(resumed) == 1:
                    begun.set()
                    await asyncio.sleep(0.1)

    config = Config(block_bytes=4096, limits=Limits(chunk_bytes=256))
    first = Server(config, front=Slow)
    first.start()
    got = []
    with shardinit.connect(first.address, timeout=30, cache_dir=tmp_path) as client:
        thread = threading.Thread(target=lambda: got.append(client.numpy(spec, 0)))
        thread.start()
        assert begun.wait(20)
        first.stop(grace=0.5)
        with Server(Config(first.address), front=Slow):
            thread.join(30)
        assert len(resumed) >= 2
        assert resumed[1] > (0, 0)
    plain = jax.jit(build(spec).fn)(jax.random.key(0))
    assert got[0]["head"].tobytes() == np.asarray(plain["head"]).tobytes()


def test_a_call_is_a_span_of_the_caller_s_trace(client, server):
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    from opentelemetry import trace
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import (
        InMemorySpanExporter,
    )

    exporter, provider = InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    parent = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"
    with grpc.insecure_channel(server.address) as channel:
        channel.unary_unary("/shardinit.v1.InitService/ListModels")(
            b"", metadata=(("traceparent", parent),), timeout=10
        )
    for _ in range(100):
        if exporter.get_finished_spans():
            break
        time.sleep(0.05)
    (span,) = exporter.get_finished_spans()
    assert span.name == "shardinit.v1.InitService/ListModels"
    assert f"{span.context.trace_id:032x}" in parent
    assert span.attributes["rpc.grpc.status_code"] == "OK"


def test_a_worker_s_job_is_a_span_below_that_of_its_call(tmp_path):
    pytest.importorskip("opentelemetry.sdk.trace")
    number = "0123456789abcdef0123456789abcdef"
    parent = (("traceparent", f"00-{number}-0123456789abcdef-01"),)
    noted = tmp_path / "spans"
    with (
        Server(Config(workers=1)) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        for width in (8, 9):
            spec = ModelSpec("service-traced", {"file": str(noted), "width": width})
            request = service_pb2.DescribeModelRequest(spec=spec_to_proto(spec))
            call = InitServiceStub(channel).DescribeModel
            call(request, timeout=30, metadata=parent)
        assert until(lambda: noted.exists() and noted.read_text().endswith("\n"))
    name, trace, _ = noted.read_text().splitlines()[-1].split()
    assert (name, trace) == ("worker/DescribeModel", number)


def test_a_program_is_registered_and_then_asked_for_by_digest(mesh, tmp_path):
    def own(key):
        return {"w": jax.random.normal(key, (16, 64))}

    program = shardinit.export_plan(shardinit.plan(own))
    url = f"file://{tmp_path}/objects"
    with (
        Server(Config(allow_upload=True, objects=url)) as server,
        shardinit.connect(server.address, cache_dir=tmp_path / "a") as client,
        shardinit.connect(server.address, cache_dir=tmp_path / "b") as other,
    ):
        digest = client.upload(program)
        assert client.upload(program) == digest == program.sha256
        plain = np.asarray(jax.jit(own)(jax.random.key(1))["w"])
        for kept in server._store.folder.iterdir():  # as a replica that has none
            kept.unlink()
        # Anybody can say of a program that it is another, so that is not believed.
        own_name = shardinit.InitProgram(program.content, untrusted=True).fingerprint
        assert other.describe(digest, mesh).fingerprint == own_name
        for via in ("program", "stream"):
            ours = other.init(digest, 1, mesh=mesh, via=via)
            assert np.asarray(ours["w"]).tobytes() == plain.tobytes()
        assert other.numpy(digest, 1)["w"].tobytes() == plain.tobytes()


def test_an_upload_whose_caller_goes_is_no_fault_of_the_server(caplog):
    go_on = threading.Event()

    def messages():
        header = service_pb2.UploadHeader(size=1000, sha256=bytes(32))
        yield service_pb2.UploadProgramRequest(header=header)
        go_on.wait(20)

    with (
        Server(Config(allow_upload=True)) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        call = InitServiceStub(channel).UploadProgram.future(messages())
        active = server.metrics.active.labels("UploadProgram")._value
        failed = server.metrics.calls.labels("UploadProgram", "INTERNAL")._value
        for running in (1, 0):
            for _ in range(500):
                if active.get() == running:
                    break
                time.sleep(0.02)
            assert active.get() == running
            call.cancel()
        assert failed.get() == 0
        go_on.set()
    assert not [r for r in caplog.records if r.levelname == "ERROR"]


def test_a_program_that_would_not_be_kept_is_refused(tmp_path):
    program = shardinit.export_plan(shardinit.plan(lambda key: jax.random.bits(key)))
    with (
        Server(Config(allow_upload=True, cache_bytes=1000)) as server,
        shardinit.connect(server.address, cache_dir=tmp_path) as client,
        pytest.raises(ServiceError, match="would not be kept") as caught,
    ):
        client.upload(program)
    assert caught.value.code == "RESOURCE_EXHAUSTED"


def test_a_program_of_most_of_the_cache_is_built_once(spec, tmp_path):
    size = len(shardinit.export_plan(shardinit.plan(build(spec))).to_bytes())
    with Server(Config(cache_bytes=size + 1000)) as server:
        for number in range(3):
            folder = tmp_path / str(number)
            with shardinit.connect(server.address, cache_dir=folder) as client:
                digest = client.program(spec).sha256
            with shardinit.connect(server.address, cache_dir=folder / "x") as client:
                assert client.program(digest).sha256 == digest
        assert built(server, "GetProgram") == 1


@pytest.mark.slow
def test_a_store_is_shared_by_servers_and_survives_them(tmp_path):
    program = shardinit.export_plan(shardinit.plan(lambda key: jax.random.bits(key)))
    config = Config(store=tmp_path / "store", allow_upload=True)
    with (
        Server(config) as server,
        shardinit.connect(server.address, cache_dir=tmp_path / "a") as client,
    ):
        digest = client.upload(program)
    with (
        Server(config) as server,
        shardinit.connect(server.address, cache_dir=tmp_path / "b") as client,
    ):
        assert client.program(digest).to_bytes() == program.to_bytes()
        assert list(client.numpy(digest, 0))


def test_what_is_kept_of_a_program_counts_its_functions(tmp_path):
    program = shardinit.export_plan(shardinit.plan(lambda key: jax.random.bits(key)))
    store = Store(tmp_path, 1 << 20)
    models = ModelCache(Config(store=tmp_path))
    store.put(models.check(program.to_bytes()), program.to_bytes(), "")
    models.plan(program.sha256)
    assert models.bytes > len(program.content)


def test_an_upload_is_refused_unless_the_operator_allows_it(client):
    program = shardinit.export_plan(shardinit.plan(lambda key: jax.random.bits(key)))
    with pytest.raises(ServiceError, match="does not allow") as caught:
        client.upload(program)
    assert caught.value.code == "UNIMPLEMENTED"


@pytest.fixture(scope="module")
def uploads():
    with Server(Config(allow_upload=True)) as running:
        yield running


@pytest.mark.parametrize(
    "how", ["flip", "cut", "gap", "more", "name", "headless", "size"]
)
@pytest.mark.few(3)
def test_a_faulty_upload_is_refused_and_let_go(uploads, how):
    program = shardinit.export_plan(shardinit.plan(lambda key: jax.random.bits(key)))
    data, digest = bytearray(program.to_bytes()), bytes.fromhex(program.sha256)
    if how == "flip":
        data[len(data) // 2] ^= 1
    size = len(data)
    if how == "name":
        digest = bytes(32)
    if how == "size":
        size = 1 << 60
    Upload, Chunk = service_pb2.UploadProgramRequest, service_pb2.ProgramChunk
    header = service_pb2.UploadHeader(size=size, sha256=digest)
    middle = 100 + (how == "gap")
    messages = [
        Upload(header=header),
        Upload(chunk=Chunk(offset=0, data=bytes(data[:100]))),
        Upload(chunk=Chunk(offset=middle, data=bytes(data[100:]))),
    ]
    messages = {"cut": messages[:-1], "headless": messages[1:]}.get(how, messages)
    if how == "more":
        messages.append(Upload(chunk=Chunk(offset=len(data), data=b"x")))
    gc.collect()
    kept = _jobs()  # of servers that still run; kept, so that none takes their places
    others = set(map(id, kept))
    gc.disable()  # it may be long in coming: to it an upload is one small object
    try:
        with (
            grpc.insecure_channel(uploads.address) as channel,
            pytest.raises(grpc.RpcError) as caught,
        ):
            InitServiceStub(channel).UploadProgram(iter(messages), timeout=20)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert until(lambda: all(id(x) in others for x in _jobs()))
    finally:
        gc.enable()
    del kept


def _jobs():
    # by type: what isinstance asks of a strange object may be code that warns
    return [x for x in gc.get_objects() if issubclass(type(x), (Job, Joined))]


def test_one_spec_is_built_once_for_all_meshes_and_calls(gate, tmp_path):
    gate.open()
    with (
        Server(Config(workers=1)) as server,
        shardinit.connect(server.address, cache_dir=tmp_path) as client,
    ):
        for mesh in (None, {"a": 2}, {"a": 4}, {"b": 8}):
            client.describe(gate.spec(), mesh)
        client.program(gate.spec())
        client.numpy(gate.spec(), 0)
        client.numpy(gate.spec(), 1)
    assert len(gate.begun) == 1
