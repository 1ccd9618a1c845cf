import contextlib
import errno
import json
import os
import threading
import time
from pathlib import Path

import grpc
import jax
import numpy as np
import psutil
import pytest

import shardinit
from shardinit.core.init_fn import InitFn
from shardinit.errors import ServiceError, SpecError
from shardinit.models import ModelSpec, build, register
from shardinit.service.server import checkpoints, writes
from shardinit.service.server.config import Config
from shardinit.service.server.model_cache import ModelCache
from shardinit.service.server.server import Server
from shardinit.service.wire.messages import key_to_proto, spec_to_proto
from shardinit.service.wire.service_pb2_grpc import InitServiceStub
from shardinit.storage import orbax, safetensors
from shardinit.storage.unfinished import unfinished
from shardinit.v1 import service_pb2
from shardinit.verify.digest.host import Digester
from tests.service.conftest import until

pytestmark = pytest.mark.once


@register("checkpoint-test")
def build_checkpoint_test(config):
    """With a folder as ``gate``, writes wait at their third window until it says so."""
    if "gate" in config:  # in the worker that writes
        Digester.add = waiting(Digester.add, Path(config["gate"]))

    def init(key):
        keys = jax.random.split(key, 8)
        return {"w": [jax.random.normal(k, (16, 64)) for k in keys]}

    return InitFn(init, name="checkpoint-test")


def waiting(add, gate):
    def wait(self, path, start, window):
        with (gate / "windows").open("a") as windows:
            windows.write(f"{os.getpid()}\n")
        while len(seen(gate)) > 2 and not (gate / "go").exists():
            time.sleep(0.02)
        add(self, path, start, window)

    return add if add.__name__ == "wait" else wait


def seen(gate):
    """The process that wrote, for each window."""
    path = gate / "windows"
    return path.read_text().split() if path.exists() else []


SPEC = ModelSpec("checkpoint-test", {})


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


@pytest.fixture
def writer(root, tmp_path):
    with (
        Server(Config(checkpoint_roots=(root,))) as server,
        shardinit.connect(
            server.address, timeout=30, cache_dir=tmp_path / "cache"
        ) as client,
    ):
        yield client


def plain(seed=3):
    return jax.jit(build(SPEC).fn)(jax.random.key(seed))


@pytest.mark.parametrize("format", ["safetensors", "orbax"])
@pytest.mark.few(1)
def test_a_checkpoint_holds_the_weights_and_comes_with_its_receipt(
    writer, root, format
):
    seen = []
    path = root / "new" / "folder" / "model"
    written = writer.write_checkpoint(
        SPEC, 3, path, format=format, progress=lambda *done: seen.append(done)
    )
    assert written.uri == str(path)
    params = {"safetensors": safetensors.load, "orbax": orbax.restore}[format](path)
    restored = jax.tree.leaves(params)
    for a, b in zip(restored, jax.tree.leaves(plain()), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    shardinit.verify_receipt(written.receipt, plain())
    assert written.receipt.root == shardinit.digest(plain()).root
    assert seen[-1] == (8 * 16 * 64 * 4,) * 2
    again = writer.write_checkpoint(SPEC, 3, f"file://{path}", format=format)
    assert again.receipt_json == written.receipt_json


def test_a_write_that_has_no_room_is_not_begun(writer, root, monkeypatch):
    size = 8 * 16 * 64 * 4 + Config().free_bytes
    monkeypatch.setattr(writes, "room", lambda target: size - 1)
    with pytest.raises(ServiceError, match="are free") as caught:
        writer.write_checkpoint(SPEC, 3, root / "model")
    assert (caught.value.code, caught.value.limit) == ("RESOURCE_EXHAUSTED", "disk")
    assert caught.value.request_id
    assert not list(root.iterdir())
    monkeypatch.setattr(writes, "room", lambda target: size)
    assert writer.write_checkpoint(SPEC, 3, root / "model").uri


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("/etc/model", "no folder"),
        ("relative/model", "plain absolute"),
        ("s3://bucket/model", "plain absolute"),
        ("{root}", "no folder"),
        ("{root}/../model", "plain absolute"),
        ("{root}/./model", "plain absolute"),
        ("{root}//model", "plain absolute"),
        ("{root}-other/model", "no folder"),
        ("{root}/a\0b", "plain absolute"),
        ("{root}/link/model", "link"),
        ("{root}/dangling", "link"),
        ("{root}/file/model", "link, or no folder"),
    ],
)
@pytest.mark.few(3)
def test_nothing_is_written_anywhere_else(writer, root, tmp_path, uri, why):
    outside = tmp_path / "outside"
    outside.mkdir()
    (root / "link").symlink_to(outside)
    (root / "dangling").symlink_to(outside / "model")
    (root / "file").write_text("")
    with pytest.raises(ServiceError, match=why) as caught:
        writer.write_checkpoint(SPEC, 3, uri.format(root=root))
    assert caught.value.code == "PERMISSION_DENIED"
    assert not list(outside.iterdir())
    assert sorted(p.name for p in root.iterdir()) == ["dangling", "file", "link"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("x" * 199 + "é", "a last part of 201 bytes"),
        ("x/" * 512, "characters; at most"),
    ],
)
def test_a_place_that_is_too_long_is_a_fault_of_its_field(writer, root, name, why):
    with pytest.raises(SpecError, match=why) as caught:
        writer.write_checkpoint(SPEC, 3, f"{root}/{name}")
    assert [field for field, _ in caught.value.faults] == ["uri"]


def test_a_write_that_is_refused_leaves_no_folder(writer, root):
    wrong = (
        (ModelSpec("no-such-model", {}), 3, SpecError),
        (SPEC, jax.random.key(3, impl="rbg"), SpecError),
    )
    for spec, key, error in wrong:
        with pytest.raises(error):
            writer.write_checkpoint(spec, key, root / "new" / "folder" / "model")
    assert not list(root.iterdir())


def test_nothing_is_overwritten(writer, root):
    writer.write_checkpoint(SPEC, 3, root / "model")
    (root / "mine").mkdir()
    (root / "mine" / "file").write_text("precious")
    others = (
        (SPEC, 4, "model", "safetensors"),
        (SPEC, 3, "model", "orbax"),
        (SPEC, 3, "mine", "safetensors"),
    )
    for spec, key, name, format in others:
        with pytest.raises(ServiceError, match="there already") as caught:
            writer.write_checkpoint(spec, key, root / name, format=format)
        assert caught.value.code == "ALREADY_EXISTS"
    assert (root / "mine" / "file").read_text() == "precious"
    assert [p.name for p in (root / "mine").iterdir()] == ["file"]


def test_a_server_without_folders_writes_nothing(client, spec, tmp_path):
    with pytest.raises(ServiceError, match="allows no folder") as caught:
        client.write_checkpoint(spec, 0, tmp_path / "model")
    assert caught.value.code == "UNIMPLEMENTED"


@pytest.mark.slow
def test_a_model_too_large_for_orbax_is_refused(root, tmp_path):
    with (
        Server(Config(checkpoint_roots=(root,), model_bytes=1000)) as server,
        shardinit.connect(server.address, cache_dir=tmp_path / "cache") as client,
    ):
        with pytest.raises(ServiceError, match="Write safetensors") as caught:
            client.write_checkpoint(SPEC, 3, root / "model", format="orbax")
        assert caught.value.code == "RESOURCE_EXHAUSTED"
        assert client.write_checkpoint(SPEC, 3, root / "model").uri
        key = jax.random.key(0, impl="rbg")
        with pytest.raises(SpecError, match="key"):
            client.write_checkpoint(SPEC, key, root / "other")


@pytest.fixture
def held(tmp_path):
    """A folder for the gate, and a spec whose writes wait there."""
    gate = tmp_path / "gate"
    gate.mkdir()
    yield gate, ModelSpec("checkpoint-test", {"gate": str(gate)})
    (gate / "go").touch()


def begin(client, spec, root, detach):
    """A watch of a write that has begun, by a client that may go away."""
    request = service_pb2.WriteCheckpointRequest(
        spec=spec_to_proto(spec),
        key=key_to_proto(3),
        uri=str(root / "model"),
        format=service_pb2.CHECKPOINT_FORMAT_SAFETENSORS,
        detach=detach,
    )
    gate = Path(spec.config["gate"])
    with grpc.insecure_channel(client.target) as channel:
        answers = InitServiceStub(channel).WriteCheckpoint(request, timeout=60)
        assert next(answers).progress.bytes_total == 8 * 16 * 64 * 4
        assert until(lambda: len(seen(gate)) > 2)
        answers.cancel()


@pytest.mark.slow
def test_a_detached_write_goes_on_without_its_caller(writer, root, held):
    gate, spec = held
    begin(writer, spec, root, detach=True)
    time.sleep(0.5)
    (gate / "go").touch()
    assert until((root / "model").exists)
    written = writer.write_checkpoint(spec, 3, root / "model")
    shardinit.verify_receipt(written.receipt, plain())
    assert len(set(seen(gate))) == 1  # one process has written all


def workers():
    """Processes of checkpoints and others that this one has started."""
    return {child.pid for child in psutil.Process().children(recursive=True)}


@pytest.mark.slow
def test_another_write_stops_with_its_caller_and_the_next_goes_on(writer, root, held):
    gate, spec = held
    writer.describe(spec)
    before = workers()
    begin(writer, spec, root, detach=False)
    assert until(lambda: workers() <= before)
    assert not (root / "model").exists()
    (gate / "go").touch()
    written = writer.write_checkpoint(spec, 3, root / "model")
    shardinit.verify_receipt(written.receipt, plain())
    assert sorted(p.name for p in root.iterdir()) == [
        "model",
        "model.safetensors.receipt.json",
    ]


@pytest.mark.slow
def test_a_write_that_stands_still_is_ended_and_its_place_is_free(root, tmp_path, held):
    gate, spec = held
    config = Config(checkpoint_roots=(root,), writes=1, build_seconds=6)
    with (
        Server(config) as server,
        shardinit.connect(
            server.address, timeout=60, cache_dir=tmp_path / "cache"
        ) as client,
    ):
        with pytest.raises(ServiceError) as caught:
            client.write_checkpoint(spec, 3, root / "model")
        assert caught.value.code == "RESOURCE_EXHAUSTED"
        assert caught.value.limit == "build-seconds"
        assert not psutil.pid_exists(int(seen(gate)[0]))
        assert [path.name for path in root.iterdir()] == ["model.unfinished"]
        assert client.write_checkpoint(SPEC, 3, root / "other").uri
        (gate / "go").touch()
        written = client.write_checkpoint(spec, 3, root / "model")
        shardinit.verify_receipt(written.receipt, plain())


@pytest.mark.slow
def test_the_name_of_a_write_that_was_cut_off_is_free(writer, root, held):
    gate, spec = held
    writer.describe(spec)
    before = workers()
    begin(writer, spec, root, detach=False)
    assert until(lambda: workers() <= before)
    (gate / "go").touch()
    written = writer.write_checkpoint(spec, 4, root / "model")
    shardinit.verify_receipt(written.receipt, plain(4))


def test_what_an_abandoned_write_left_is_removed_and_nothing_else(root, tmp_path):
    def leave(folder, age, *, anew=True):
        with (
            contextlib.suppress(KeyError),
            unfinished(folder.with_suffix(""), "a write", anew=anew) as begun,
        ):
            (begun.folder / "part").write_text("bytes")
            raise KeyError  # its writer ends
        then = time.time() - age
        os.utime(folder / "journal.jsonl", (then, then))
        return folder

    (root / "deep").mkdir()
    old = leave(root / "deep" / "old.unfinished", 100)
    kept = [
        leave(root / "new.unfinished", 1),
        leave(root / "a-job-s.unfinished", 100, anew=False),
        leave(tmp_path / "elsewhere.unfinished", 100),
        root / "link.unfinished" / "part",
        root / "mine.unfinished" / "file",
        root / "busy.unfinished",
    ]
    (root / "link.unfinished").symlink_to(kept[2])
    (root / "mine.unfinished").mkdir()
    (root / "mine.unfinished" / "file").write_text("precious")
    with unfinished(root / "busy", "a write", anew=True) as begun:
        os.utime(begun.folder / "journal.jsonl", (0, 0))
        with Server(Config(checkpoint_roots=(root,), unfinished_seconds=50)):
            assert until(lambda: not old.exists())
            assert all(path.exists() for path in kept)


@pytest.mark.slow
def test_two_callers_watch_one_write_and_a_third_model_is_kept_out(writer, root, held):
    gate, spec = held
    got = []

    def ask():
        got.append(writer.write_checkpoint(spec, 3, root / "model").receipt_json)

    both = [threading.Thread(target=ask) for _ in range(2)]
    for thread in both:
        thread.start()
    assert until(lambda: len(seen(gate)) > 2)
    with pytest.raises(ServiceError, match="being written") as caught:
        writer.write_checkpoint(spec, 4, root / "model")
    assert caught.value.code == "ALREADY_EXISTS"
    (gate / "go").touch()
    for thread in both:
        thread.join()
    assert got[0] == got[1]
    assert len(set(seen(gate))) == 1  # one process has written all


@pytest.mark.slow
def test_a_stopping_server_hands_a_write_to_the_next(root, tmp_path, held):
    gate, spec = held
    config = Config(checkpoint_roots=(root,))
    first = Server(config)
    first.start()
    got = []
    with shardinit.connect(first.address, cache_dir=tmp_path / "cache") as client:
        thread = threading.Thread(
            target=lambda: got.append(client.write_checkpoint(spec, 3, root / "model"))
        )
        thread.start()
        assert until(lambda: len(seen(gate)) > 2)
        first.stop(grace=0.5)
        assert not (root / "model").exists()
        (gate / "go").touch()
        with Server(Config(first.address, checkpoint_roots=(root,))):
            thread.join(30)
    shardinit.verify_receipt(got[0].receipt, plain())


@pytest.mark.parametrize("format", ["safetensors", "orbax"])
@pytest.mark.parametrize("reason", ["ENOSPC", "EFBIG"])
def test_a_full_disk_is_named_and_leaves_no_checkpoint(
    root, monkeypatch, format, reason
):
    def full(*args, **kwargs):
        (root / "model.x").write_text("")
        number = getattr(errno, reason)
        raise RuntimeError("deep inside") from OSError(number, os.strerror(number))

    module = {"safetensors": safetensors, "orbax": orbax}[format]
    name = {"safetensors": "write", "orbax": "save"}[format]
    monkeypatch.setattr(module, name, full)
    config = Config(checkpoint_roots=(root,))
    request = service_pb2.WriteCheckpointRequest(
        spec=spec_to_proto(SPEC),
        key=key_to_proto(3),
        uri=str(root / "model"),
        format=f"CHECKPOINT_FORMAT_{format.upper()}",
    )
    with pytest.raises(ServiceError, match="the disk is full") as caught:
        list(checkpoints.write(ModelCache(config), request, config))
    assert (caught.value.code, caught.value.limit) == ("RESOURCE_EXHAUSTED", "disk")
    assert [path.name for path in root.iterdir()] == ["model.x"]


def test_the_receipt_is_json_that_anybody_reads(writer, root):
    written = writer.write_checkpoint(SPEC, 3, root / "model")
    data = json.loads(written.receipt_json)
    assert data["seed"] == 3
    assert [leaf["path"] for leaf in data["leaves"]] == [f"w/{i}" for i in range(8)]
    assert os.path.isdir(written.uri)
