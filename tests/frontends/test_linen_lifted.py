"""Linen's lifted transforms and collections: jit's values, Flax's own shardings."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.linen import partitioning as _partitioning
from flax.linen.spmd import logical_to_mesh_axes
from jax.sharding import PartitionSpec as P

import shardinit
from shardinit.core.paths import path_str
from shardinit.frontends import linen

partitioning: Any = _partitioning  # its types know no lifted classes
lifted: Any = nn

RULES: Any = (("layers", None), ("embed", "data"), ("mlp", "model"), ("heads", "model"))
RULES += (("batch", "data"),)
LECUN = nn.initializers.lecun_normal()
X = jnp.ones((2, 32))


def boxed(names, init: Any = LECUN) -> Any:
    return nn.with_logical_partitioning(init, names)


class Block(nn.Module):
    """Parameters, statistics, a cache that is boxed and a variable that is drawn."""

    @nn.compact
    def __call__(self, x, _=None):
        up = nn.Dense(64, kernel_init=boxed(("embed", "mlp")))(x)
        up = nn.BatchNorm(use_running_average=False)(up)
        self.variable("cache", "key", boxed(("batch", "heads"), jnp.zeros), (2, 64))
        self.variable(
            "noise",
            "table",
            lambda: boxed(("embed", "mlp"))(self.make_rng("params"), (32, 64)),
        )
        down = nn.Dense(32, kernel_init=boxed(("mlp", "embed")))
        return x + down(nn.relu(up)), None


class Tower(nn.Module):
    """Blocks under a lifted transform."""

    lift: Any

    @nn.compact
    def __call__(self, x):
        return self.lift(self, x)


def unrolled(block):
    def lift(parent, x):
        for i in range(3):
            x, _ = block(name=f"layer_{i}")(x)
        return x

    return lift


def scanned(block, **settings):
    axes = {"params": 0, "batch_stats": 1, "cache": 0, "noise": 2}

    def lift(parent, x):
        told = {"variable_axes": axes, "split_rngs": {"params": True}, "length": 3}
        told["metadata_params"] = {nn.PARTITION_NAME: "layers"}
        return nn.scan(block, **told | settings)(name="layers")(x, None)[0]

    return lift


def mapped(parent, x):
    many = lifted.vmap(
        Block,
        variable_axes={"params": 0, "batch_stats": 0, "cache": 1, "noise": 2},
        split_rngs={"params": True},
        in_axes=None,
        axis_size=4,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return many(name="experts")(x)[0]


def one_for_all(parent, x):
    """Parameters that all members of the map share."""
    shared = nn.vmap(
        nn.Dense, variable_axes={"params": None}, split_rngs={"params": False}
    )
    return shared(32, kernel_init=boxed(("embed", "mlp")), name="shared")(x)


def transposed(parent, x):
    """A Dense whose kernel is kept transposed."""

    def turn(tree):
        return jax.tree.map(lambda w: w.T if w.ndim == 2 else w, tree)

    dense = nn.map_variables(nn.Dense, "params", turn, turn, init=True)
    return dense(64, name="turned")(x)


def of_remat_scan(parent, x):
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(32)(x)

    stack = nn.remat_scan(
        Plain,
        lengths=(2, 2),
        variable_axes={"params": 0},
        split_rngs={"params": True},
    )
    return stack(name="nested")(x)


PLAIN = ("map_variables", "remat_scan")  # without names
SAVE = jax.checkpoint_policies.checkpoint_dots
LIFTS = {
    "scan_remat": scanned(nn.remat(Block, prevent_cse=False)),
    "remat": unrolled(nn.remat(Block)),
    "remat_policy": unrolled(nn.remat(Block, policy=SAVE, prevent_cse=False)),
    "jit": unrolled(nn.jit(Block)),
    "scan": scanned(Block),
    "scan_shared": scanned(
        Block,
        variable_axes={"params": 0, "noise": 0, "batch_stats": 0},
        variable_broadcast="cache",
    ),
    "vmap": mapped,
    "vmap_shared": one_for_all,
    "map_variables": transposed,
    "remat_scan": of_remat_scan,
}


def check(module, mesh, want):
    """Holds every variable of every collection against jit and Flax's shardings.

    Args:
      module: takes ``X``.
      mesh: the devices.
      want: Flax's specs by path.
    """
    fn = linen.init_fn(module, X)
    plan = shardinit.plan(fn, mesh=mesh, rules=shardinit.AxisRules(RULES))
    got = jax.tree.leaves(nn.meta.unbox(shardinit.compile_plan(plan)(3)))
    variables = jax.jit(module.init)(jax.random.key(3), X)
    leaves, _ = jax.tree_util.tree_flatten_with_path(nn.meta.unbox(variables))
    assert [path_str(path) for path, _ in leaves] == [x.path for x in plan.leaves]
    for leaf, array, (_, right) in zip(plan.leaves, got, leaves, strict=True):
        assert np.array_equal(array, right), leaf.path
        rank = len(leaf.shape)
        assert leaf.sharding is not None
        spec = want.get(leaf.path) or P()
        assert jax.sharding.NamedSharding(mesh, spec).is_equivalent_to(
            leaf.sharding, rank
        ), (leaf.path, spec, leaf.sharding.spec)


def by_path(tree):
    flat, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: isinstance(x, P)
    )
    return {path_str(path): spec for path, spec in flat}


@pytest.mark.parametrize("name", LIFTS)
@pytest.mark.few(1)
def test_each_collection_lies_where_flax_puts_it_with_the_values_of_jit(name, mesh):
    module = Tower(LIFTS[name])
    variables = jax.eval_shape(module.init, jax.random.key(0), X)
    specs = lifted.logical_to_mesh(nn.get_partition_spec(variables), RULES)
    want = by_path(specs)
    assert any(any(spec) for spec in want.values() if spec) or name in PLAIN
    check(module, mesh, want)


class T5XLayer(nn.Module):
    """As T5X writes its layers: names stand in ``params_axes`` and ``cache_axes``."""

    @nn.compact
    def __call__(self, x, _=None):
        with_axes = partitioning.param_with_axes
        scale = with_axes("scale", nn.initializers.ones, (32,), axes=("embed",))
        wi = with_axes("wi", LECUN, (32, 64), jnp.float32, axes=("embed", "mlp"))
        wo = with_axes("wo", LECUN, (64, 32), jnp.float32, axes=("mlp", "embed"))
        partitioning.variable_with_axes(
            "cache", "cached_key", jnp.zeros, (2, 4, 8), axes=("batch", "heads", "kv")
        )
        return x + nn.relu(x * scale @ wi) @ wo, None


class T5X(nn.Module):
    how: str

    @nn.compact
    def __call__(self, x):
        embed = partitioning.param_with_axes(
            "embedding", LECUN, (64, 32), axes=("mlp", "embed")
        )
        x = x + embed[0]
        layer = partitioning.remat(T5XLayer, prevent_cse=False)
        if self.how == "unrolled":
            for i in range(2):
                x, _ = layer(name=f"layers_{i}")(x)
            return x
        if self.how == "vmap":
            lifted = partitioning.vmap_with_axes(
                T5XLayer,
                variable_axes={"params": 0, "cache": 1},
                split_rngs={"params": True},
                in_axes=None,
                axis_size=4,
                partitioning_axis_names={"params": "layers", "cache": "layers"},
            )
            return lifted(name="experts")(x)[0]
        scan = partitioning.scan_with_axes(
            layer,
            variable_axes={"params": 1, "cache": 0},
            split_rngs={"params": True},
            length=2,
            axis_name="layers",
            axes_collections=("params", "cache"),
        )
        return scan(name="decoder")(x, None)[0]


@pytest.mark.parametrize("how", ["scan", "unrolled", "vmap"])
@pytest.mark.few(1)
def test_t5x_names_place_parameters_and_caches(how, mesh):
    module = T5X(how)
    variables = jax.eval_shape(module.init, jax.random.key(0), X)
    want = {}
    for collection in ("params", "cache"):
        names = partitioning.get_axis_names(variables[f"{collection}_axes"])
        for path, axes in by_path(names).items():
            spec = logical_to_mesh_axes(tuple(axes), RULES)
            want[f"{collection}/{path}"] = spec
    assert len(want) >= 5
    check(module, mesh, want)
