"""Orbax checkpoints: plain Orbax restores them on any mesh, and so do we."""

import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import shardinit
from shardinit.errors import CheckpointError, StructureMismatchError
from shardinit.frontends import linen as from_linen
from shardinit.frontends import nnx as from_nnx
from shardinit.frontends.optax import with_optimizer
from shardinit.storage import orbax
from tests.core.bits import differing


def model(key):
    a, b = jax.random.split(key)
    return {
        "layers": [
            {"kernel": jax.random.normal(a, (16, 64))},
            {"kernel": jax.random.normal(b, (16, 64), jnp.bfloat16)},
        ],
        "pair": (jnp.ones(3), jnp.arange(8)),
        "scale": jnp.float32(2.5),
        "key": b,
    }


@pytest.fixture(scope="module")
def saved(mesh, tmp_path_factory):
    folder = tmp_path_factory.mktemp("orbax") / "out"
    rules = shardinit.fsdp(min_bytes=0)
    orbax.save(folder, shardinit.init(model, 3, mesh=mesh, rules=rules))
    return folder


SMALL = {
    "w": np.arange(6.0, dtype=np.float32).reshape(2, 3),
    "t": (np.ones(3, np.int32),),
}
METADATA = (
    "_METADATA",
    "_CHECKPOINT_METADATA",
    "_sharding",
    "manifest.ocdbt",
    "array_metadatas/process_0",
)


_DAMAGE = """
import pathlib, sys
import jax, jax.numpy as jnp
from shardinit.errors import CheckpointError
from shardinit.storage import orbax
from tests.core.bits import differing
from tests.storage.test_orbax import METADATA, SMALL
folder, step = pathlib.Path(sys.argv[1]), int(sys.argv[2])
orbax.save(folder, jax.tree.map(jnp.asarray, SMALL))
for name in METADATA:
    data = (folder / name).read_bytes()
    for place in range(0, len(data), step):
        for mask in (1, 0x80):
            damaged = bytearray(data)
            damaged[place] ^= mask
            (folder / name).write_bytes(damaged)
            try:
                got = orbax.restore(folder)
            except CheckpointError:
                continue
            # Without our note, of which Orbax keeps no sum, its tuples are lists.
            got = {**got, "t": tuple(got["t"])}
            assert differing(got, SMALL) == [], (name, place, mask)
    (folder / name).write_bytes(data)
"""


@pytest.mark.parametrize("step", [31, pytest.param(1, marks=pytest.mark.slow)])
def test_any_byte_of_its_metadata_may_be_changed(tmp_path, step):
    # A process of its own: where Orbax fails, it leaves coroutines that never ran.
    command = [sys.executable, "-c", _DAMAGE, str(tmp_path / "out"), str(step)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_what_is_said_of_tuples_is_held_against_the_tree(tmp_path):
    orbax.save(tmp_path / "out", jax.tree.map(jnp.asarray, SMALL))
    path = tmp_path / "out" / "_CHECKPOINT_METADATA"
    text = path.read_text()
    for change in (("/t", "/w"), ('"tuples"', '"tuple"'), ("{", "", 1)):
        path.write_text(text.replace(*change))
        with pytest.raises(CheckpointError, match="cannot be read"):
            orbax.restore(tmp_path / "out")


def test_plain_orbax_restores_it_on_another_mesh(saved):
    mesh = jax.make_mesh((4, 2), ("x", "y"))

    def abstract(leaf):
        spec = PartitionSpec("x") if leaf.shape[:1] == (16,) else PartitionSpec()
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)
        )

    expected = shardinit.init(model, 3)
    with ocp.StandardCheckpointer() as checkpointer:
        got = checkpointer.restore(saved, jax.tree.map(abstract, expected))
    assert differing(got, expected) == []
    assert got["layers"][0]["kernel"].sharding.spec == PartitionSpec("x")


def test_it_is_restored_by_rules(saved):
    mesh = jax.make_mesh((8,), ("z",))
    rules = shardinit.PathRules([("kernel", PartitionSpec(None, "z"))])
    got = orbax.restore(saved, mesh=mesh, rules=rules)
    expected = shardinit.init(model, 3)
    assert got["layers"][1]["kernel"].sharding.spec == PartitionSpec(None, "z")
    assert shardinit.digest(got).root == shardinit.digest(expected).root
    assert shardinit.digest(orbax.restore(saved)).root == shardinit.digest(got).root


def boxed_dense():
    kernel = nn.with_partitioning(nn.initializers.normal(), ("x", None))
    shape = jax.ShapeDtypeStruct((2, 16), jnp.float32)
    return from_linen.init_fn(nn.Dense(8, kernel_init=kernel), shape)


@pytest.mark.parametrize("make", [lambda: model, boxed_dense])
def test_plain_orbax_restores_into_the_abstract_tree_of_a_plan(tmp_path, make):
    fn = make()
    params = shardinit.init(fn, 3, mesh=jax.make_mesh((8,), ("x",)))
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    plan = shardinit.plan(fn, mesh=mesh, select=lambda path: False)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "out", params)
        checkpointer.wait_until_finished()
        got = checkpointer.restore(tmp_path / "out", plan.abstract())
    assert jax.tree.structure(got) == jax.tree.structure(params)
    assert differing(got, params) == []
    where = [leaf.sharding for leaf in jax.tree.leaves(got)]
    assert where == [leaf.sharding for leaf in plan.leaves]


def test_an_abstract_model_is_the_model_that_init_gives():
    fn = from_nnx.init_fn(Module)
    plan = shardinit.plan(fn, mesh=jax.sharding.AbstractMesh((64,), ("x",)))
    abstract, model = plan.abstract(), shardinit.init(fn, 0)
    assert isinstance(abstract, Module)
    for shape, array in zip(*map(jax.tree.leaves, (abstract, model)), strict=True):
        assert (shape.shape, shape.dtype) == (array.shape, array.dtype)
    assert all(x.sharding.mesh == plan.mesh for x in jax.tree.leaves(abstract))


def test_nothing_is_overwritten(saved, tmp_path):
    before = sorted(os.walk(saved))
    with pytest.raises(CheckpointError, match="Nothing is overwritten"):
        orbax.save(saved, {"x": jnp.zeros(3)})
    assert sorted(os.walk(saved)) == before
    (tmp_path / "file").write_text("precious")
    with pytest.raises(CheckpointError, match="Nothing is overwritten"):
        orbax.save(tmp_path / "file", {"x": jnp.zeros(3)})


def test_what_the_disk_says_is_an_error_of_the_checkpoint(tmp_path, monkeypatch):
    def full(*_, **__):  # as TensorStore says it
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

    monkeypatch.setattr(ocp.StandardCheckpointer, "save", full)
    with pytest.raises(CheckpointError, match=r"cannot be written \(RESOURCE.*room"):
        orbax.save(tmp_path / "ckpt", {"w": jnp.ones(8)})


def test_the_same_again_is_compared_and_not_written(tmp_path):
    odd = {"nan": jnp.array([jnp.nan, -0.0]), "n": np.arange(3), "z": jnp.ones(2) * 1j}
    tree = {**shardinit.init(model, 3), **odd, "four": jnp.ones(4, jnp.int4)}
    orbax.save(tmp_path / "out", tree)
    before = sorted(os.walk(tmp_path))
    orbax.save(tmp_path / "out", tree)
    assert sorted(os.walk(tmp_path)) == before
    for change, says in (
        ({"nan": jnp.array([jnp.nan, 0.0])}, "its leaf 'nan' has other values"),
        ({"n": np.arange(3) + 1}, "its leaf 'n' has other values"),
        ({"key": jax.random.key(9)}, "its leaf 'key' has other values"),
        ({"more": jnp.ones(2)}, "a tree of other leaves"),
    ):
        with pytest.raises(CheckpointError, match=says):
            orbax.save(tmp_path / "out", {**tree, **change})
    assert sorted(os.walk(tmp_path)) == before


class Module(nnx.Module):
    def __init__(self, *, rngs):
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(11)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


@pytest.mark.parametrize("as_object", [True, False])
def test_a_model_object_is_written_without_its_classes(tmp_path, as_object):
    fn = from_nnx.init_fn(Module)
    arrays = shardinit.init(fn.fn, 3)
    orbax.save(tmp_path / "out", fn.rebuild(arrays) if as_object else arrays)
    got = orbax.restore(tmp_path / "out")
    assert shardinit.digest(got).root == shardinit.digest(arrays).root


def test_leaves_without_values_are_named(tmp_path):
    tree = {"a": {"b": jax.ShapeDtypeStruct((3,), np.float32)}}
    with pytest.raises(CheckpointError, match="leaf 'a/b'"):
        orbax.save(tmp_path / "out", tree)
    assert os.listdir(tmp_path) == []


def test_what_is_no_checkpoint_is_said(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            orbax.restore(folder)


# ---- into a plan ---------------------------------------------------------------------


def test_it_is_restored_into_a_plan(saved):
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    plan = shardinit.plan(model, mesh=mesh, rules=shardinit.fsdp(min_bytes=0))
    got = orbax.restore(saved, plan)
    assert differing(got, shardinit.init(model, 3)) == []
    assert jax.tree.structure(got) == plan.cut.tree
    where = [leaf.sharding for leaf in jax.tree.leaves(got)]
    assert where == [leaf.sharding for leaf in plan.leaves]


def test_parameters_alone_are_restored_into_a_plan_with_an_optimizer(tmp_path):
    fn, tx = boxed_dense(), optax.adam(1e-3)
    params = shardinit.init(fn, 3)
    orbax.save(tmp_path / "out", {"params": fn.state_of(params)})
    mesh = jax.make_mesh((8,), ("x",))
    plan = shardinit.plan(with_optimizer(fn, tx), mesh=mesh)
    got = orbax.restore(tmp_path / "out", plan)
    assert differing(got["params"], params) == []
    assert differing(got["opt_state"], tx.init(params["params"])) == []
    kernel = got["opt_state"][0].mu["kernel"]
    assert kernel.value.sharding.spec == PartitionSpec("x", None)


@pytest.mark.parametrize("above", [(), ("params",), ("params", "params")])
def test_parameters_need_no_key_of_the_training_state_above_them(tmp_path, above):
    fn, tx = boxed_dense(), optax.adam(1e-3)
    params = shardinit.init(fn, 3)
    tree = nn.meta.unbox(fn.state_of(params))["params"]
    for name in above:
        tree = {name: tree}
    orbax.save(tmp_path / "out", tree)
    plan = shardinit.plan(with_optimizer(fn, tx))
    got = orbax.restore(tmp_path / "out", plan)
    assert differing(got["params"], params) == []
    assert differing(got["opt_state"], tx.init(params["params"])) == []


def test_what_the_checkpoint_lacks_needs_a_key_if_it_is_drawn(saved):
    def more(key):
        return {**model(key), "head": jax.random.normal(key, (4, 32))}

    plan = shardinit.plan(more)
    with pytest.raises(StructureMismatchError, match=r"'head'.*Pass key="):
        orbax.restore(saved, plan)
    got = orbax.restore(saved, plan, key=5)
    assert differing(got["head"], shardinit.init(more, 5)["head"]) == []
    assert differing(got["scale"], shardinit.init(model, 3)["scale"]) == []
    fewer = shardinit.plan(lambda key: {"scale": jnp.float32(0)})
    with pytest.raises(StructureMismatchError, match="unexpected="):
        orbax.restore(saved, fewer)
    got = orbax.restore(saved, fewer, unexpected="**")
    assert got == {"scale": jnp.float32(2.5)}


def test_a_leaf_grows_while_it_is_restored(tmp_path, mesh):
    def embed(rows):
        return lambda key: {"embed": jax.random.normal(key, (rows, 32))}

    old = shardinit.init(embed(60), 1)
    orbax.save(tmp_path / "out", old)
    plan = shardinit.plan(embed(64), mesh=mesh, rules=shardinit.fsdp(min_bytes=0))
    got = orbax.restore(tmp_path / "out", plan, grow={"embed": "zeros"})["embed"]
    assert differing(np.asarray(got)[:60], old["embed"]) == []
    assert not np.asarray(got)[60:].any()
    assert got.sharding == plan.leaves[0].sharding
    for drawn in ("init", "mean_cov"):
        with pytest.raises(StructureMismatchError, match=r"'embed'.*Pass key="):
            orbax.restore(tmp_path / "out", plan, grow={"embed": drawn})


def test_a_whole_checkpoint_of_several_streams_needs_no_key(tmp_path):
    def draw(key):
        return {name: jax.random.normal(one, (8, 32)) for name, one in key.items()}

    keys = {"params": 0, "dropout": 1}
    made = shardinit.init(draw, keys)
    orbax.save(tmp_path / "out", made)
    plan = shardinit.plan(draw, key=keys)
    assert differing(orbax.restore(tmp_path / "out", plan), made) == []


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"w": jnp.ones(3), "f": jax.nn.relu}, "leaf 'f'.*got custom_jvp"),
        (jnp.ones(3), "expected a dict, list or tuple of arrays"),
        ({}, "expected a dict, list or tuple of arrays"),
    ],
)
def test_what_orbax_keeps_no_place_for_is_named(tmp_path, tree, said):
    with pytest.raises(CheckpointError, match=said):
        orbax.save(tmp_path / "out", tree)


# ---- what others write ---------------------------------------------------------------


def test_strings_numbers_and_empty_parts_of_others_are_restored(tmp_path):
    tree = {"w": jnp.ones(4), "name": "mine", "step": 3, "none": None, "empty": ()}
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "out", tree)
    got = orbax.restore(tmp_path / "out")
    assert jax.tree.structure(got) == jax.tree.structure(tree)
    assert got["name"] == "mine"
    assert int(got["step"]) == 3
    plan = shardinit.plan(lambda key: {"w": jax.random.normal(key, (4,))})
    got = orbax.restore(tmp_path / "out", plan, unexpected=["name", "step"])
    assert differing(got, {"w": np.ones(4, np.float32)}) == []


def test_tuples_come_back_as_tuples(tmp_path):
    tree = {"a/b": (jnp.ones(4), [(jnp.zeros(2), ())]), "c": [jnp.ones(1)]}
    orbax.save(tmp_path / "out", tree)
    assert jax.tree.structure(orbax.restore(tmp_path / "out")) == jax.tree.structure(
        tree
    )


def test_the_steps_of_a_manager_are_found(tmp_path):
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        for step in (9, 10):
            state = ocp.args.StandardSave({"w": jnp.full(4, step)})
            more = ocp.args.StandardSave({"m": jnp.zeros(4)})
            notes = ocp.args.JsonSave({"note": "x"})
            args = {"params": state, "notes": notes} | (
                {"opt": more} if step > 9 else {}
            )
            manager.save(step, args=ocp.args.Composite(**args))
        manager.wait_until_finished()
    assert orbax.restore(tmp_path / "run" / "9")["w"][0] == 9
    assert orbax.restore(tmp_path / "run", item="params")["w"][0] == 10
    with pytest.raises(CheckpointError, match=r"'opt', 'params'.*item='opt'"):
        orbax.restore(tmp_path / "run")
    with pytest.raises(CheckpointError, match="no item 'ema'"):
        orbax.restore(tmp_path / "run", item="ema")


def test_dtypes_that_cannot_be_kept_are_refused_by_name(tmp_path):
    with pytest.raises(CheckpointError, match="leaf 'a/b': its dtype uint4"):
        orbax.save(tmp_path / "out", {"a": {"b": jnp.ones(8, jnp.uint4)}})
    assert os.listdir(tmp_path) == []
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "wide", {"w": np.ones(4)})
        checkpointer.wait_until_finished()
    with pytest.raises(CheckpointError, match=r"'w'.*float64.*jax_enable_x64"):
        orbax.restore(tmp_path / "wide")


class Tied(nnx.Module):
    def __init__(self, *, rngs):
        self.embed = nnx.Embed(8, 4, rngs=rngs)
        self.head = nnx.Linear(4, 8, use_bias=False, rngs=rngs)
        self.head.kernel = self.embed.embedding
        self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs)] * 2)


def test_a_weight_in_two_places_is_written_once_and_restored_into_both(tmp_path):
    fn = from_nnx.init_fn(Tied)
    orbax.save(tmp_path / "out", shardinit.init(fn, 3))
    plan = shardinit.plan(fn)
    written = shardinit.digest(orbax.restore(tmp_path / "out"))
    assert sorted(written.leaves) == sorted(leaf.path for leaf in plan.leaves)
    got = orbax.restore(tmp_path / "out", plan)
    assert got.head.kernel is got.embed.embedding
    assert got.blocks[0] is got.blocks[1]


JOB = """
import shardinit.errors
import sys
import jax, numpy as np
port, folder, rank = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(rank))
import shardinit
from shardinit.storage import orbax

def fn(key):
    return {"w": jax.random.normal(key, (16, 32)), "b": jax.numpy.ones(8)}

mesh = jax.make_mesh((2, 4), ("x", "y"))
tree = shardinit.init(fn, 3, mesh=mesh, rules=shardinit.fsdp(min_bytes=0))
orbax.save(folder, tree)
orbax.save(folder, tree)
try:
    orbax.save(folder, {**tree, "b": tree["b"] * 2})
except shardinit.errors.CheckpointError:
    print("REFUSED")
got = orbax.restore(folder, mesh=jax.make_mesh((4, 2), ("x", "y")))
assert not got["w"].is_fully_addressable
assert shardinit.digest(got) == shardinit.digest(tree)
print("EQUAL")
"""


@pytest.mark.timeout(200)
@pytest.mark.slow
def test_two_processes_write_one_checkpoint(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-c", JOB, port, str(tmp_path / "out")]
    environment = {"JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"}
    jobs = [
        subprocess.Popen(
            [*command, rank], stdout=-1, stderr=-1, text=True, env=environment
        )
        for rank in "01"
    ]
    try:
        done = [job.communicate(timeout=150) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    for out, err in done:
        assert "REFUSED\nEQUAL" in out, err[-3000:]
    expected = {"w": jax.random.normal(jax.random.key(3), (16, 32)), "b": jnp.ones(8)}
    got = orbax.restore(tmp_path / "out", mesh=jax.make_mesh((8,), ("z",)))
    assert differing(got, expected) == []
