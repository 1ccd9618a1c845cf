"""A client of another make: @grpc/grpc-js. ``make interop`` installs it."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from shardinit.service.server.config import Config
from shardinit.service.server.server import Server
from shardinit.service.wire.limits import Limits
from tests.service import test_streams

HERE = Path(__file__).parent


def test_a_node_client_reads_health_and_streams_a_window():
    if shutil.which("node") is None:
        pytest.skip("node is not here: the Node client is not tried")
    if not (HERE / "node_modules").is_dir():
        pytest.skip("run `make interop`: the Node client's packages are not installed")
    with Server(Config(limits=Limits(chunk_bytes=4000))) as server:
        done = subprocess.run(
            ["node", str(HERE / "client.js"), server.address, "stream-test", "w"],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    window = test_streams.plain()["w"][1:41]
    assert found["health"] == "SERVING"
    assert found["leaves"] == sorted(test_streams.plain())
    assert found["parts"] == "hcccce"
    assert found["header"] == {
        "window": 0,
        "shape": [40, 96],
        "dtype": "float32",
        "size": window.nbytes,
        "offset": 0,
    }
    assert found["bytes"] == window.nbytes
    assert found["sha256"] == hashlib.sha256(window.tobytes()).hexdigest()
    assert (found["code"], found["details"]) == ("INVALID_ARGUMENT", 1)
