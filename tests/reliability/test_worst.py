import random
from contextlib import suppress

import grpc
import pytest

from shardinit.service.server.config import Config
from shardinit.service.server.server import Server
from shardinit.service.wire.service_pb2_grpc import InitServiceStub
from shardinit.v1 import service_pb2
from tests.reliability import clients, worst

pytestmark = pytest.mark.once


@pytest.mark.slow
def test_version_and_health_are_answered_beside_the_worst_clients():
    seen = worst.measure(5, 1)
    assert all(len(seconds) > 20 for seconds in seen["alone"].values())
    assert all(seen["among them"].values())
    assert all(seen["after"].values())


@pytest.mark.parametrize("way", [clients.deaf, clients.uploads, clients.large])
@pytest.mark.few(1)
def test_callers_who_go_are_no_fault_of_the_server(way, caplog, monkeypatch):
    monkeypatch.setattr(clients, "PATIENCE", 0.3)
    config = Config(models=("shardinit.bench.serving_models",), allow_upload=True)
    with Server(config) as server:
        for seed in range(5):
            with suppress(grpc.RpcError):
                way(server.address, random.Random(seed))
        with grpc.insecure_channel(server.address) as channel:
            version = service_pb2.GetVersionRequest(min=1, max=1)
            assert InitServiceStub(channel).GetVersion(version).version == 1
    faults = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert not faults
