"""A client of another make: @grpc/grpc-js. ``make interop`` installs it."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest

import shardinit
from shardinit.errors import ServiceError
from shardinit.models import ModelSpec, build
from shardinit.service.server.config import Config
from shardinit.service.server.server import Server
from shardinit.service.wire.limits import Limits
from shardinit.v1 import service_pb2
from tests.service import test_streams

pytestmark = pytest.mark.once

HERE = Path(__file__).parent
CONFIG = Config(block_bytes=4096, limits=Limits(chunk_bytes=4000))


@pytest.fixture(autouse=True)
def node():
    if shutil.which("node") is None:
        pytest.skip("node is not here: the Node client is not tried")
    if not (HERE / "node_modules" / "hash-wasm").is_dir():
        pytest.skip("run `make interop`: the Node client's packages are not installed")


def run(*addresses):
    first, *others = addresses
    done = subprocess.run(
        ["node", str(HERE / "client.js"), first, "stream-test", "w", *others],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def leaves():
    """The SHA-256 of each leaf, in the order of the pytree."""
    arrays = sorted(test_streams.plain().items())
    return [hashlib.sha256(array.tobytes()).hexdigest() for _, array in arrays]


class Faulty(test_streams.Faulty):
    """As there, and busy for a moment."""

    def broken(self, message):
        if self.how == "shape":
            message = service_pb2.StreamShardsResponse()
            message.header.window = self.resumed[-1][0]
            return message
        if self.how == "busy":
            code, limit = "RESOURCE_EXHAUSTED", "streams"
            raise ServiceError("", "full", code=code, limit=limit, retry_after=0.05)
        return super().broken(message)


def test_a_node_client_reads_health_and_streams_a_model():
    with Server(CONFIG) as server:
        found = run(server.address)
    window = test_streams.plain()["w"][1:41]
    assert found["health"] == "SERVING"
    assert found["leaves"] == sorted(test_streams.plain())
    assert found["parts"] == "h" + "c" * -(-window.nbytes // 4000) + "e"
    assert found["header"] == {
        "window": 0,
        "shape": [40, 96],
        "dtype": "float32",
        "size": window.nbytes,
        "offset": 0,
    }
    assert found["sha256"] == leaves()
    assert found["resumed"] == [[0, 0]]
    assert (found["version"], found["id"]) == (1, True)
    plan = shardinit.plan(build(ModelSpec("stream-test", {})))
    assert found["program"] == shardinit.export_plan(plan).sha256
    assert found["held"]
    assert (found["code"], found["details"]) == ("INVALID_ARGUMENT", 1)


@pytest.mark.parametrize("how", ["break", "end", "skip", "flip", "busy", "shape"])
def test_a_node_client_goes_on_where_a_stream_broke(how):
    faulty = Faulty({9, 12, 16}, how)
    with Server(CONFIG, front=faulty.front) as first, Server(CONFIG) as second:
        found = run(first.address, second.address)
    assert found["sha256"] == leaves()
    assert len(found["resumed"]) >= 2
    assert found["resumed"] == sorted(found["resumed"])
