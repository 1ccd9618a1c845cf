"""What a caller has set around a call: meshes, devices, guards, as around jit."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import shardinit
from shardinit import deferred, module


def fn(key):
    return {
        "w": jax.random.normal(key, (16, 64)),
        "full": jax.random.gamma(key, 2.0, (64,)),
        "table": jnp.arange(64.0) * 3,
        "keys": jax.random.split(key, 2),
    }


PLAIN = jax.tree.map(
    np.asarray, {k: v for k, v in jax.jit(fn)(jax.random.key(0)).items() if k != "keys"}
)
KINDS = [
    (AxisType.Auto, AxisType.Auto),
    (AxisType.Explicit, AxisType.Explicit),
    (AxisType.Auto, AxisType.Explicit),
]


def check(**options):
    made = shardinit.init(fn, 0, **options)
    lazy = shardinit.open(fn, 0)
    for name, want in PLAIN.items():
        np.testing.assert_array_equal(made[name], want)
        np.testing.assert_array_equal(lazy[name][3:7], want[3:7])
    arrays = {name: made[name] for name in PLAIN}
    assert shardinit.digest(arrays).root == shardinit.digest(PLAIN).root
    return made


@pytest.mark.slow
@pytest.mark.parametrize("kinds", KINDS, ids=str)
def test_inside_set_mesh(kinds):
    outer = jax.make_mesh((2, 4), ("data", "model"), axis_types=kinds)
    inner = jax.make_mesh((4,), ("x",), devices=jax.devices()[4:])
    failed = []

    def from_a_thread():
        try:
            with jax.set_mesh(outer):
                check()
        except Exception as error:
            failed.append(error)

    with jax.set_mesh(outer):
        for options in ({}, {"mesh": outer}, {"mesh": inner}):
            check(rules=shardinit.fsdp(min_bytes=0) if options else None, **options)
        thread = threading.Thread(target=from_a_thread)
        thread.start()
        thread.join()
    assert not failed


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_spec_in_the_function_means_the_mesh_that_is_set(kind):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)

    def stated(key):
        if kind == AxisType.Explicit:
            return jax.random.normal(key, (16, 64), out_sharding=P("data"))
        w = jax.random.normal(key, (16, 64))
        return jax.lax.with_sharding_constraint(w, P("data"))

    with jax.set_mesh(mesh):
        got = shardinit.init(stated, 0, mesh=mesh)
    assert got.sharding.is_equivalent_to(jax.NamedSharding(mesh, P("data")), 2)
    np.testing.assert_array_equal(got, PLAIN["w"])


def test_inside_a_transfer_guard(mesh):
    key = jax.random.key(0)
    with jax.transfer_guard("disallow"):
        made = shardinit.init(fn, key, mesh=mesh)
        window = shardinit.read(fn, key, "w", (slice(0, 2), ...))
    np.testing.assert_array_equal(made["table"], PLAIN["table"])
    np.testing.assert_array_equal(window, PLAIN["w"][:2])


def test_seeds_and_names_inside_a_transfer_guard(mesh):
    waiting = [deferred.UninitializedParameter(lambda key: key, "a")]
    with jax.transfer_guard("disallow"):
        plan = shardinit.plan(fn, mesh=mesh)
        made = shardinit.compile_plan(plan)(0)
        receipt = shardinit.receipt(plan, 0, made)
        shardinit.verify_receipt(receipt, made)
        shardinit.init_missing({"w": made["w"]}, fn, 0, mesh=mesh)
        assert shardinit.diff(fn, fn).same
        deferred.initialize_parameters(waiting, 0)
        module.Linear(4).init(0, jax.ShapeDtypeStruct((2, 8), jnp.float32))
    with jax.transfer_guard("disallow_explicit"):
        assert shardinit.digest(made).root == receipt.root


@pytest.mark.slow
def test_without_a_mesh_leaves_lie_on_the_default_device():
    device = jax.devices()[3]
    with jax.default_device(device):
        made = check()
    assert made["w"].devices() == {device}
