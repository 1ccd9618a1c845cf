"""safetensors: what the official library reads, written by windows, surviving kills."""

import fcntl
import functools
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import safetensors
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec

import shardinit
from shardinit.core.paths import keys_of, nested
from shardinit.errors import CheckpointError, ReceiptMismatchError
from shardinit.frontends.optax import with_optimizer
from shardinit.storage import filling, layout
from shardinit.storage import safetensors as st
from shardinit.storage.windows import windows
from shardinit.verify.digest.host import Digester
from tests.core.bits import raw

pytestmark = pytest.mark.once


def model(key):
    a, b = jax.random.split(key)
    return {
        "layers": [
            {"kernel": jax.random.normal(k, (24, 3, 40)), "bias": jnp.zeros(40)}
            for k in (a, b)
        ],
        "embed": jax.random.normal(key, (1000, 32), jnp.bfloat16),
        "odd": jax.random.normal(b, (7, 13)),
        "scale": jnp.float32(2.5),
        "key": b,
    }


@functools.cache
def lazy(seed):
    return shardinit.open(model, seed)


@functools.cache
def weights(seed):
    return shardinit.init(model, seed)


def official(folder):
    """All tensors as the official library reads them."""
    found = {}
    for name in sorted(os.listdir(folder)):
        if name.endswith(".safetensors"):
            found |= safetensors.numpy.load_file(os.path.join(folder, name))
    return found


def names(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="."): x for p, x in leaves}


def assert_holds(folder, tree):
    found, expected = official(folder), names(tree)
    assert set(found) == set(expected)
    for name, leaf in expected.items():
        assert found[name].tobytes() == raw(leaf), name


@pytest.mark.parametrize("shard", ["1GB", 20_000, 1000])
@pytest.mark.parametrize("memory", ["1GiB", 8 * 512])
@pytest.mark.few(1)
def test_the_official_library_reads_a_model_written_by_windows(tmp_path, shard, memory):
    source = lazy(3)
    st.write(tmp_path / "out", source, max_shard_size=shard, max_memory=memory)
    expected = weights(3)
    assert_holds(tmp_path / "out", expected)
    assert os.listdir(tmp_path) == ["out"]
    digester = Digester({path: (x.shape, x.dtype) for path, x in source.items()})
    for path, start, window in st.read_windows(tmp_path / "out", 512):
        digester.add(path, start, window)
    assert digester.digest().root == shardinit.digest(expected).root


@pytest.mark.parametrize("memory", ["1GiB", 8 * 512])
def test_arrays_with_any_sharding_are_written(tmp_path, mesh, memory):
    params = shardinit.init(model, 3, mesh=mesh, rules=shardinit.fsdp(min_bytes=0))
    st.write(tmp_path / "out", params, max_memory=memory)
    assert_holds(tmp_path / "out", weights(3))
    st.write(tmp_path / "host", {"x": np.arange(30).reshape(5, 6)[:, ::2]})
    assert official(tmp_path / "host")["x"].tolist()[1] == [6, 8, 10]


def test_files_and_index_as_hugging_face_has_them(tmp_path):
    source = lazy(3)
    st.write(tmp_path / "out", source, max_shard_size=20_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    count = len(files)
    assert count > 2
    assert files == [
        f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
    ]
    assert index["metadata"]["total_size"] == source.nbytes
    assert sorted(os.listdir(tmp_path / "out")) == [
        *files,
        "model.safetensors.index.json",
    ]
    for file in files:
        with safetensors.safe_open(tmp_path / "out" / file, "np") as opened:
            assert opened.metadata()["format"] == "pt"
            tensors = [n for n, f in index["weight_map"].items() if f == file]
            assert set(opened.keys()) == set(tensors)
            sizes = [opened.get_tensor(n).nbytes for n in tensors]
            assert sum(sizes) <= 20_000 or len(sizes) == 1


@pytest.mark.parametrize("dtype", list(layout._CODES), ids=str)
def test_every_dtype_of_the_format(tmp_path, dtype):
    array = np.arange(12).reshape(3, 4).astype(dtype)
    st.write(tmp_path / "out", {"a": array, "b": np.ones((), dtype)})
    read = st.open(tmp_path / "out")
    assert read["a"].dtype == dtype
    assert read["a"].tobytes() == array.tobytes()
    with safetensors.safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        assert file.get_slice("a").get_shape() == [3, 4]


def test_empty_leaves_and_trees(tmp_path):
    st.write(tmp_path / "a", {"x": np.zeros((0, 3)), "y": np.ones(2)})
    assert official(tmp_path / "a")["x"].shape == (0, 3)
    st.write(tmp_path / "b", {})
    assert st.open(tmp_path / "b") == {}


def test_names_lead_back_to_paths(tmp_path):
    tree = {"a.b": np.ones(2), "c/d": {"~": np.zeros(3)}, "e": {"f": np.ones(4)}}
    st.write(tmp_path / "out", tree)
    assert set(official(tmp_path / "out")) == {"a.b", "c/d.~", "e.f"}
    assert set(st.open(tmp_path / "out")) == {"a.b", "c~1d/~0", "e/f"}
    st.write(tmp_path / "named", tree, name=lambda path: f"model.{path[0]}")
    assert set(official(tmp_path / "named")) == {"model.a", "model.c", "model.e"}
    assert set(st.open(tmp_path / "named")) == {"a.b", "c~1d/~0", "e/f"}


def test_two_leaves_of_one_name_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"'a.b' is taken by 'a.b'"):
        st.write(tmp_path / "out", {"a.b": np.ones(2), "a": {"b": np.ones(2)}})


def test_it_loads_sharded(tmp_path, mesh):
    st.write(tmp_path / "out", lazy(3), max_shard_size=20_000)
    expected = weights(3)
    rules = shardinit.PathRules([("embed", PartitionSpec("model", "data"))])
    got = st.load(tmp_path / "out", mesh=mesh, rules=rules)
    sharding = NamedSharding(mesh, PartitionSpec("model", "data"))
    assert got["embed"].sharding == sharding
    assert raw(got["embed"]) == raw(expected["embed"])
    assert raw(got["layers"]["1"]["kernel"]) == raw(expected["layers"][1]["kernel"])
    assert shardinit.digest(got) == shardinit.digest(st.load(tmp_path / "out"))


def test_windows_can_be_seen_as_they_are_written(tmp_path):
    from shardinit.verify.digest.devices import Digester

    source = lazy(3)
    digester = Digester({path: (x.shape, x.dtype) for path, x in source.items()})
    st.write(tmp_path / "out", source, max_memory=8 * 512, on_window=digester.add)
    assert digester.digest().root == shardinit.digest(weights(3)).root


@pytest.mark.parametrize("most", [1, 100, 512, 4096, 1 << 30])
def test_windows_cover_each_tensor_once_in_order_of_its_bytes(most):
    leaves = [(str(s), s, np.int16) for s in [(), (5,), (7, 11), (3, 4, 50), (0, 2)]]
    (file,) = layout.plan_files(leaves, 1 << 40)
    for tensor in file.tensors:
        array = np.arange(tensor.nbytes // 2, dtype=np.int16).reshape(tensor.shape)
        data = b""
        for window in windows(file, most):
            if window.tensor is tensor:
                assert window.offset == tensor.offset + len(data)
                assert window.nbytes <= max(most, 2)
                data += array[window.region.slices].tobytes()
        assert data == array.tobytes()


def test_nothing_is_overwritten(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    st.write(target, {"x": np.ones(2)})  # an empty folder is no checkpoint
    before = (target / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="Nothing is overwritten"):
        st.write(target, {"x": np.zeros(2)})
    assert (target / "model.safetensors").read_bytes() == before
    (tmp_path / "file").write_text("precious")
    with pytest.raises(CheckpointError, match="Nothing is overwritten"):
        st.write(tmp_path / "file", {"x": np.zeros(2)})
    (tmp_path / "new.unfinished").mkdir()
    (tmp_path / "new.unfinished" / "notes.txt").write_text("precious")
    with pytest.raises(CheckpointError, match="Nothing is overwritten"):
        st.write(tmp_path / "new", {"x": np.zeros(2)})
    assert (tmp_path / "new.unfinished" / "notes.txt").read_text() == "precious"


@pytest.mark.parametrize("shard", ["1GB", 20_000])
def test_the_same_again_is_compared_and_not_written(tmp_path, shard):
    folder, source = tmp_path / "out", lazy(3)
    st.write(folder, source, max_shard_size=shard)
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    seen = []
    st.write(
        folder,
        weights(3),
        max_shard_size=shard,
        on_window=lambda path, *_: seen.append(path),
    )
    assert set(seen) == set(source)
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    other = {**weights(3), "scale": jnp.float32(3)}
    with pytest.raises(CheckpointError, match="its leaf 'scale' has other values"):
        st.write(folder, other, max_shard_size=shard)
    with pytest.raises(CheckpointError, match="a model of other leaves"):
        st.write(folder, {"x": np.ones(2)}, max_shard_size=shard)


def test_it_is_restored_into_a_plan(tmp_path, mesh):
    st.write(tmp_path / "out", weights(3))
    plan = shardinit.plan(model, mesh=mesh, rules=shardinit.fsdp(min_bytes=0))
    got = st.restore(tmp_path / "out", plan)
    assert jax.tree.structure(got) == plan.cut.tree
    for leaf, planned in zip(jax.tree.leaves(got), plan.leaves, strict=True):
        assert leaf.sharding == planned.sharding
        assert leaf.dtype == planned.dtype
    assert shardinit.digest(got) == shardinit.digest(weights(3))


def test_parameters_alone_are_restored_into_a_plan_with_an_optimizer(tmp_path, mesh):
    def params(key):
        return {"w": jax.random.normal(key, (16, 32))}

    st.write(tmp_path / "out", {"params": shardinit.init(params, 3)})
    tx = optax.adam(1e-3)
    plan = shardinit.plan(with_optimizer(params, tx), mesh=mesh)
    got = st.restore(tmp_path / "out", plan)
    assert shardinit.digest(got["params"]) == shardinit.digest(
        shardinit.init(params, 3)
    )
    assert jax.tree.structure(got["opt_state"]) == jax.tree.structure(
        tx.init(got["params"])
    )


def test_a_second_writer_is_refused(tmp_path):
    folder = tmp_path / "out.unfinished"
    folder.mkdir()
    held = os.open(folder, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        with pytest.raises(CheckpointError, match="another process is writing it"):
            st.write(tmp_path / "out", {"x": np.zeros(2)})
    finally:
        os.close(held)
    st.write(tmp_path / "out", {"x": np.zeros(2)})


class Stop(Exception):
    pass


def stopped(target, source, after, **options):
    """Writes until ``after`` windows were seen."""
    seen = []

    def stop(*window):
        seen.append(window)
        if len(seen) > after:
            raise Stop

    with pytest.raises(Stop):
        st.write(target, source, on_window=stop, **options)


def test_only_the_same_model_and_key_go_on(tmp_path):
    options = {"max_memory": 8 * 512}
    stopped(tmp_path / "out", lazy(3), 5, **options)
    assert os.listdir(tmp_path) == ["out.unfinished"]
    for other in (lazy(4), weights(3)):
        with pytest.raises(CheckpointError, match="what was begun there"):
            st.write(tmp_path / "out", other, **options)
    st.write(tmp_path / "out", lazy(3), max_memory=8 * 300)
    assert_holds(tmp_path / "out", weights(3))


def test_what_is_there_is_not_computed_again(tmp_path, monkeypatch):
    options = {"max_memory": 8 * 512}
    stopped(tmp_path / "out", lazy(3), 40, **options)
    reads = []
    real = filling.read_window

    def read(leaf, window):
        reads.append(window.offset)
        return real(leaf, window)

    monkeypatch.setattr(filling, "read_window", read)
    source = lazy(3)
    st.write(tmp_path / "out", source, **options)
    (file,) = layout.plan_files([(p, x.shape, x.dtype) for p, x in source.items()], 1e9)
    assert 0 < len(reads) <= len(list(windows(file, 512))) - 40


def test_damage_to_what_was_written_is_found_on_going_on(tmp_path):
    options = {"max_memory": 8 * 512}
    stopped(tmp_path / "out", lazy(3), 40, **options)
    path = tmp_path / "out.unfinished" / "model.safetensors"
    data = bytearray(path.read_bytes())
    for at in range(0, len(data), 777):
        data[at] ^= 1
    path.write_bytes(data)
    st.write(tmp_path / "out", lazy(3), **options)
    assert_holds(tmp_path / "out", weights(3))


def test_other_arrays_never_mix_with_those_of_a_writer_that_stopped(tmp_path):
    options = {"max_memory": 8 * 512}
    stopped(tmp_path / "out", weights(3), 40, **options)
    st.write(tmp_path / "out", weights(4), **options)
    assert_holds(tmp_path / "out", weights(4))


# Each round forks a writer that kills itself with SIGKILL at some file operation, once
# before it, once half done, once after it; then another goes on.
KILLS = """
import os, random, signal, sys
import numpy as np
import shardinit
from shardinit.storage import safetensors as st
from shardinit.storage.windows import windows

folder, rounds = sys.argv[1], int(sys.argv[2])
OPERATIONS = ("pwrite", "write", "fsync", "rename", "unlink", "truncate", "open")

def fn(key):
    import jax
    return {"a": jax.random.normal(key, (64, 32)), "b": jax.random.normal(key, (32,))}

def source(kind):
    if kind == "lazy":
        return shardinit.open(fn, 3)
    rng = np.random.default_rng(1)
    return {name: rng.standard_normal((50, 40)) for name in "abcdef"}

def arm(at, how):
    left = [at]
    def wrap(real):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0 and left[0] >= -1 - (how == "after"):
                if how == "half" and real is pwrite:
                    handle, data, offset = args
                    real(handle, data[: len(data) // 2], offset)
                if how == "after":
                    real(*args, **kwargs)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return call
    pwrite = os.pwrite
    for name in OPERATIONS:
        setattr(os, name, wrap(getattr(os, name)))

def write(target, kind, at=None, how=""):
    child = os.fork()
    if not child:
        weights = source(kind)
        if at is not None:
            arm(at, how)
        st.write(target, weights, max_memory=8 * 4000, max_shard_size=40_000)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def content(target):
    return {n: open(os.path.join(target, n), "rb").read() for n in os.listdir(target)}

rng = random.Random(7)
for kind, rounds in (("arrays", rounds), ("lazy", 2)):
    reference = os.path.join(folder, kind)
    assert write(reference, kind) == 0
    expected = content(reference)
    killed = 0
    for number in range(rounds):
        target = os.path.join(folder, f"{kind}-{number}")
        how = rng.choice(["before", "half", "after"])
        code = write(target, kind, rng.randrange(60 if kind == "arrays" else 20), how)
        killed += code == -signal.SIGKILL
        if os.path.exists(target):
            assert content(target).items() >= expected.items()
        else:
            if rng.random() < 0.5:
                write(target, kind, rng.randrange(40), "half")
            if not os.path.exists(target):
                assert write(target, kind) == 0
        assert content(target).items() >= expected.items()
        assert not os.path.exists(target + ".unfinished")
    print(kind, "killed", killed, "of", rounds)
    assert killed >= rounds // 2
"""


@pytest.mark.timeout(200)
@pytest.mark.slow
def test_a_writer_killed_at_any_point_is_taken_over(tmp_path):
    environment = {"JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"}
    environment["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path), "20"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=os.getcwd(),
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def test_a_full_disk_is_said_before_a_byte_is_written(tmp_path, monkeypatch):
    class Usage:
        free = 1000

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(CheckpointError, match="still to be written"):
        st.write(tmp_path / "out", {"x": np.ones(1000)})
    monkeypatch.undo()
    st.write(tmp_path / "out", {"x": np.ones(1000)})


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (np.zeros(4, ml_dtypes.int4), "dtype int4"),
        (np.array(["text"]), "dtype <U4"),
        (jax.ShapeDtypeStruct((3,), np.float32), "no values"),
    ],
)
def test_leaves_that_cannot_be_written_are_named(tmp_path, leaf, message):
    with pytest.raises(CheckpointError, match=f"leaf 'a/b'.*{message}"):
        st.write(tmp_path / "out", {"a": {"b": leaf}})
    assert os.listdir(tmp_path) == []


def test_a_leaf_that_must_be_whole_and_does_not_fit_is_named(tmp_path):
    def fn(key):
        return {"q": jax.nn.initializers.orthogonal()(key, (64, 64))}

    with pytest.raises(CheckpointError, match="leaf 'q'"):
        st.write(tmp_path / "out", shardinit.open(fn, 0), max_memory=4096)


@pytest.mark.parametrize("size", ["", "x", "5XB", "0", "-1", 0])
def test_sizes_that_are_none(tmp_path, size):
    with pytest.raises(CheckpointError, match="max_shard_size"):
        st.write(tmp_path / "out", {}, max_shard_size=size)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:100],
        lambda data: b"",
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data[:8] + b"[" * 40 + data[48:],
        lambda data: data.replace(b'"F32"', b'"F99"', 1),
        lambda data: data.replace(b'"shape":[1', b'"shape":[2', 1),
        lambda data: data[:-1],
    ],
)
def test_damaged_files_are_refused(tmp_path, damage):
    st.write(tmp_path / "out", {"x": np.ones((16, 4), np.float32)})
    path = tmp_path / "out" / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match="cannot be read"):
        st.open(tmp_path / "out")


def test_any_byte_of_a_checkpoint_may_be_changed(tmp_path):
    """It is refused, is as good as before, or is found by the receipt."""
    params = {"a.b": jnp.arange(8.0), "c": jnp.ones(3, jnp.bfloat16)}
    plan = shardinit.plan(lambda _: params)
    receipt = shardinit.receipt(plan, 0, params)
    st.write(tmp_path / "out", params, max_shard_size=20)
    for path in sorted((tmp_path / "out").iterdir()):
        data = path.read_bytes()
        for place in range(len(data)):
            for mask in (1, 0x80):
                damaged = bytearray(data)
                damaged[place] ^= mask
                path.write_bytes(damaged)
                try:
                    got = st.open(tmp_path / "out")
                except CheckpointError:
                    continue
                tree = nested(map(keys_of, got), map(np.array, got.values()))
                try:
                    found = shardinit.verify_receipt(receipt, tree)
                except ReceiptMismatchError:
                    continue
                assert found.root == receipt.root
        path.write_bytes(data)


def test_missing_files_and_lying_indices_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="not there"):
        st.open(tmp_path)
    arrays = {name: np.ones(100) for name in "abc"}
    st.write(tmp_path / "out", arrays, max_shard_size=1000)
    index = tmp_path / "out" / "model.safetensors.index.json"
    text = index.read_text()
    index.write_text(text.replace("model-00001", "../evil"))
    with pytest.raises(CheckpointError, match="outside of the folder"):
        st.open(tmp_path / "out")
    index.write_text(text.replace('"a"', '"z"'))
    with pytest.raises(CheckpointError, match="what its index says"):
        st.open(tmp_path / "out")


GOOD = {"dtype": "F32", "shape": [4, 8], "data_offsets": [0, 128]}


@pytest.mark.parametrize(
    "head",
    [
        [],
        "x",
        {"a": 3},
        {"a": {**GOOD, "shape": [float("inf"), 8]}},
        {"a": GOOD, "__metadata__": 3},
        {"a": GOOD, "__metadata__": {layout.PATHS: "[1]"}},
        {"a": GOOD, "b": GOOD, "__metadata__": {layout.PATHS: '{"a": "b"}'}},
    ],
    ids=str,
)
def test_a_header_of_another_shape_is_refused(tmp_path, head):
    text = json.dumps(head).encode()
    file = tmp_path / layout.SINGLE
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(128))
    with pytest.raises(CheckpointError):
        st.open(tmp_path)


def test_keys_with_slashes_and_tildes_come_back(tmp_path):
    tree = {"mlp/~/linear_0": {"w": np.ones(3)}, "a~b": np.zeros(2)}
    st.write(tmp_path / "x", tree)
    loaded = st.load(tmp_path / "x")
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
