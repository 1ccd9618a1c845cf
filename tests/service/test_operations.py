import os
import signal
import socket
import subprocess
import sys
import threading

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

import shardinit
from shardinit.errors import ServiceError
from shardinit.service import servicer as servicing
from shardinit.service.server import SERVICE, Server, check_listen
from shardinit.v1 import service_pb2

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def check(channel, service):
    stub = health_pb2_grpc.HealthStub(channel)
    return stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status


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
    assert methods == ["GetVersion", "ListModels", "DescribeModel", "GetProgram"]


def test_health_answers_while_every_thread_is_busy():
    inside, release = threading.Semaphore(0), threading.Event()

    class Busy(servicing.Servicer):
        def ListModels(self, request, context):
            inside.release()
            release.wait(20)
            return service_pb2.ListModelsResponse()

    with (
        Server(servicer=Busy(), workers=2) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        call = channel.unary_unary("/shardinit.v1.InitService/ListModels")
        running = [call.future(b"", timeout=20) for _ in range(4)]
        assert inside.acquire(timeout=10)
        assert inside.acquire(timeout=10)
        assert check(channel, SERVICE) == SERVING
        release.set()
        for future in running:
            future.result()


def test_stopping_says_not_serving_and_finishes_what_runs():
    inside, release = threading.Event(), threading.Event()

    class Slow(servicing.Servicer):
        def ListModels(self, request, context):
            inside.set()
            release.wait(20)
            return service_pb2.ListModelsResponse()

    server = Server(servicer=Slow())
    server.start()
    with grpc.insecure_channel(server.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service=SERVICE), timeout=30
        )
        assert next(watch).status == SERVING
        call = channel.unary_unary("/shardinit.v1.InitService/ListModels")
        running = call.future(b"", timeout=20)
        assert inside.wait(10)
        stopping = threading.Thread(target=server.stop, args=(10,))
        stopping.start()
        assert next(watch).status == NOT_SERVING
        watch.cancel()
        release.set()
        assert running.result() == b""
        stopping.join(10)
        assert not stopping.is_alive()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_the_server_and_it_exits_with_0(number, spec, tmp_path):
    command = [sys.executable, "-m", "shardinit", "serve", "--listen", "127.0.0.1:0"]
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
            process.send_signal(number)
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 0
    assert "Traceback" not in out + err
    assert "ListModels OK" in err


@pytest.mark.parametrize(
    "listen", ["0.0.0.0:1", "[::]:1", "10.1.2.3:1", "example.com:1", "192.168.0.1:0"]
)
def test_an_address_that_others_can_reach_is_refused(listen):
    with pytest.raises(ServiceError, match="reached from other machines") as caught:
        Server(listen)
    assert caught.value.code == "FAILED_PRECONDITION"


@pytest.mark.parametrize(
    "listen", ["", "localhost", ":1", "127.0.0.1:x", "[::1]:70000"]
)
def test_an_address_that_is_none_is_refused(listen):
    with pytest.raises(ServiceError, match="no host and port"):
        check_listen(listen)


def test_a_port_in_use_is_a_clear_error(server):
    with pytest.raises(ServiceError, match="cannot be bound"):
        Server(server.address)


def test_a_unix_socket_serves(tmp_path):
    with (
        Server(f"unix:{tmp_path}/s") as server,
        shardinit.connect(server.address, cache_dir=tmp_path / "cache") as client,
    ):
        assert "service-test" in client.models()


def test_nothing_of_a_stopped_server_stays_on_its_port():
    with Server() as server:
        host, port = server.address.rsplit(":", 1)
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind((host, int(port)))


def test_many_clients_at_once_build_a_program_once(spec, tmp_path, monkeypatch):
    exports = []
    export = servicing.Servicer._export

    def counted(self, spec):
        exports.append(spec)
        return export(self, spec)

    monkeypatch.setattr(servicing.Servicer, "_export", counted)
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
    assert len(exports) == 1
    assert len(digests) == 8
    assert len(set(digests)) == 1
