"""Orthogonal matrices that shard: how orthogonal, how random, and what a device holds.

The oracle for values is plain ``jax.jit`` of the same initializer, within 1e-6; between
meshes, windows and programs it is every bit.
"""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

import shardinit
from shardinit.initializers import delta_orthogonal, orthogonal

KEY = jax.random.key(7)


def error(leaf, column_axis=-1, scale=1.0):
    """Largest difference of the smaller Gram matrix from scale² times the identity."""
    matrix = np.moveaxis(np.asarray(leaf, np.float64), column_axis, -1)
    matrix = matrix.reshape(-1, matrix.shape[-1])
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    gram = tall.T @ tall
    return np.abs(gram - scale**2 * np.eye(len(gram))).max()


@pytest.mark.parametrize(
    ("shape", "column_axis"),
    [
        ((300, 200), -1),
        ((200, 300), -1),
        ((256, 256), 0),
        ((3, 3, 20, 64), -1),
        ((64, 5, 40), 0),
        ((3000, 50), -1),  # thin: all reflections are one block
        ((50, 3000), -1),
        ((9, 1), -1),
        ((1, 5), -1),
        ((33, 2), -1),
        ((1, 1), -1),
    ],
)
@pytest.mark.few(3)
def test_columns_or_rows_are_orthonormal(shape, column_axis):
    leaf = orthogonal(column_axis=column_axis)(KEY, shape)
    assert leaf.shape == shape
    assert leaf.dtype == jnp.float32
    assert error(leaf, column_axis) < 1e-5


@pytest.mark.slow
def test_scale_and_dtype_are_those_asked_for():
    assert error(orthogonal(3.0)(KEY, (40, 30)), scale=3.0) < 1e-4
    half = orthogonal(dtype=jnp.bfloat16)(KEY, (40, 30))
    full = orthogonal()(KEY, (40, 30))
    assert half.dtype == jnp.bfloat16
    assert np.array_equal(half, full.astype(jnp.bfloat16))


@pytest.mark.parametrize("shape", [(5, 3), (40, 2)])
def test_matrices_are_uniform_over_all_orthogonal_ones(shape):
    """Entries have the mean, variance and fourth moment of the Haar measure."""
    keys = jax.random.split(KEY, 4000)
    many = np.asarray(jax.jit(jax.vmap(lambda k: orthogonal()(k, shape)))(keys))
    size = shape[0]
    assert np.abs(many.mean(0)).max() < 0.05 / np.sqrt(size) * 2
    assert np.allclose((many**2).mean(0) * size, 1, atol=0.12)
    assert np.allclose((many**4).mean(0) * size * (size + 2) / 3, 1, atol=0.25)
    # The product of two entries of one column, which orthogonality alone leaves open.
    assert np.abs((many[:, 0, 0] * many[:, 1, 0]).mean()) * size < 0.1


def model(key):
    keys = jax.random.split(key, 3)
    return {
        "square": orthogonal(2.0, dtype=jnp.bfloat16)(keys[0], (48, 48)),
        "thin": orthogonal()(keys[1], (640, 8)),
        "kernel": delta_orthogonal()(keys[2], (3, 3, 16, 24)),
    }


def placed(mesh, spec):
    axes = {"square": 0, "thin": 0, "kernel": 2}
    return {
        name: NamedSharding(mesh, PartitionSpec(*[None] * lead, *spec))
        for name, lead in axes.items()
    }


@pytest.mark.slow
def test_every_mesh_window_and_program_gives_the_same_bits(mesh):
    plain = jax.jit(model)(KEY)
    made = shardinit.init(model, KEY, out_shardings=placed(mesh, ("model", "data")))
    for name, leaf in made.items():
        exact, close = np.asarray(plain[name]), 1e-6 if name != "square" else 1e-2
        made_here = np.asarray(leaf, np.float32)
        assert np.allclose(made_here, exact.astype(np.float32), atol=close), name

    long = jax.make_mesh((8, 1), ("data", "model"))
    program = shardinit.export_plan(shardinit.plan(model))
    others = [
        shardinit.init(model, KEY, out_shardings=placed(long, ("data", None))),
        shardinit.init(program, KEY, out_shardings=placed(mesh, (None, "data"))),
    ]
    for other in others:
        for name, leaf in made.items():
            assert np.array_equal(leaf, other[name]), name
    window = shardinit.read(model, KEY, "square", (slice(13, 41), slice(5, 9)))
    assert np.array_equal(window, np.asarray(made["square"])[13:41, 5:9])


@pytest.mark.slow
def test_the_plan_offers_it_where_it_meets_the_stock_one():
    stock = {"w": jax.nn.initializers.orthogonal()}
    plan = shardinit.plan(lambda key: {"w": stock["w"](key, (64, 64))})
    assert "shardinit.initializers.orthogonal" in plan.leaves[0].whole
    assert "shardinit.initializers.orthogonal" in str(plan)
    assert not any(leaf.whole for leaf in shardinit.plan(model).leaves)


@pytest.mark.parametrize("shape", [(1024, 1024), (32768, 64)])
@pytest.mark.slow
def test_no_device_holds_the_matrix(shape):
    mesh = AbstractMesh((8,), ("data",))
    plan = shardinit.plan(lambda key: {"w": orthogonal()(key, shape)}, mesh=mesh)
    report = shardinit.audit(plan, "cpu:8")
    assert report.ok, str(report)
    (row,) = report.rows
    assert row.blockwise
    assert row.collectives == row.full_size == ()
    assert row.temporary_bytes < 4 * shape[0] * shape[1] // 2 + (1 << 20)
    assert "made block by block: w" in str(report)


@pytest.mark.slow
def test_stacked_layers_shard_over_layers_and_rows(mesh):
    def stacked(key):
        return jax.vmap(lambda k: orthogonal()(k, (64, 32)))(jax.random.split(key, 4))

    def mapped(key):
        return jax.lax.map(
            lambda k: orthogonal()(k, (64, 32)), jax.random.split(key, 4)
        )

    for fn in (stacked, mapped):
        plain = np.asarray(jax.jit(fn)(KEY))
        plan = shardinit.plan(
            fn, out_shardings=NamedSharding(mesh, PartitionSpec("data", "model"))
        )
        assert not plan.whole_leaves
        made = shardinit.compile_plan(plan)(KEY)
        assert np.allclose(made, plain, atol=1e-6)


STACKED = """
import jax, numpy as np, shardinit
from jax.sharding import NamedSharding, PartitionSpec
matrix = jax.nn.initializers.orthogonal()

def stacked(key):
    keys = jax.random.split(key, 32)
    return {"w": jax.vmap(lambda key: matrix(key, (128, 128)))(keys)}

mesh = jax.make_mesh((8,), ("data",))
place = NamedSharding(mesh, PartitionSpec("data"))
plan = shardinit.plan(stacked, out_shardings={"w": place})
(found,) = [x for x in plan.findings if x.kind == "computed-in-full"]
assert "one device of a process" in found.reason, found
made = shardinit.compile_plan(plan)(0)["w"]
assert made.sharding == place
assert (np.asarray(made) == jax.jit(stacked)(jax.random.key(0))["w"]).all()
"""


def test_stacked_stock_matrices_end_on_eight_devices():
    """By each of the devices they never did: the QRs wait for their own threads."""
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "OPENBLAS_NUM_THREADS": "1",  # else they take a minute where cores are few
    }
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STACKED],
        env=environment,
        check=True,
        timeout=240,
    )


@pytest.mark.slow
def test_a_delta_kernel_is_orthogonal_at_its_centre_and_zero_elsewhere():
    for shape, centre in [
        ((3, 3, 16, 24), (1, 1)),
        ((4, 16, 16), (1,)),
        ((1, 2, 5, 4, 6), (0, 0, 2)),
    ]:
        leaf = np.array(delta_orthogonal()(KEY, shape))
        assert error(leaf[centre]) < 1e-5
        leaf[centre] = 0
        assert not leaf.any()


def test_what_cannot_be_orthogonal_is_refused():
    with pytest.raises(ValueError, match="two axes or more"):
        orthogonal()(KEY, (5,))
    with pytest.raises(ValueError, match="real floating"):
        orthogonal()(KEY, (5, 5), jnp.int32)
    with pytest.raises(ValueError, match="three to five"):
        delta_orthogonal()(KEY, (5, 5))
    with pytest.raises(ValueError, match="as many outputs"):
        delta_orthogonal()(KEY, (3, 3, 8, 4))
    assert orthogonal()(KEY, (0, 4)).shape == (0, 4)
