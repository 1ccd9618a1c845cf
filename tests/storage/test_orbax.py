"""Orbax checkpoints: plain Orbax restores them on any mesh, and so do we."""

import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import shardinit
from shardinit.errors import CheckpointError
from shardinit.frontends import linen as from_linen
from shardinit.frontends import nnx as from_nnx
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
try:
    orbax.save(folder, tree)
except shardinit.errors.CheckpointError:
    print("REFUSED")
got = orbax.restore(folder, mesh=jax.make_mesh((4, 2), ("x", "y")))
assert not got["w"].is_fully_addressable
assert shardinit.digest(got) == shardinit.digest(tree)
print("EQUAL")
"""


@pytest.mark.timeout(200)
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
