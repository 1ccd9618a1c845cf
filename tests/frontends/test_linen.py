"""The Linen front end gives module.init's values, the boxes' names, and the boxes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import shardinit
from shardinit.errors import InitFnError
from shardinit.frontends import linen as front
from tests.core.bits import differing


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        init = nn.initializers.lecun_normal()
        y = nn.Dense(
            4 * x.shape[-1],
            kernel_init=nn.with_logical_partitioning(init, ("embed", "mlp")),
        )(x)
        y = nn.BatchNorm(use_running_average=not train)(y)
        y = nn.Dropout(0.5, deterministic=not train)(nn.relu(y))
        down = nn.with_partitioning(init, ("mlp", "embed"))
        return x + nn.Dense(x.shape[-1], kernel_init=down, use_bias=False)(y)


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        def body(block, x, _):
            return block(x), None

        stack = nn.scan(
            body,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=3,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return stack(Block(), x, None)[0]


class Embedder(nn.Module):
    @nn.compact
    def __call__(self, batch):
        return nn.Embed(50, 32)(batch["tokens"]) + nn.Dense(32)(batch["x"])


class DataDependent(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.Dense(x.shape[-1])(x)
        self.param("mean", lambda _: y.mean(0))
        return y


# compiles in a fraction of the time that threefry takes
KEY = jax.random.key(2, impl="unsafe_rbg")
INPUT = np.linspace(-1, 1, 16, dtype=np.float32).reshape(2, 8)
MODULES = {
    "block": (Block(), (INPUT,), {}),
    "train": (Block(), (INPUT,), {"train": True}),
    "scan": (Scanned(), (INPUT,), {}),
    "embed": (Embedder(), ({"tokens": np.ones((2, 3), np.int32), "x": INPUT[:, None]},),
              {}),
    "data": (DataDependent(), (INPUT,), {}),
}  # fmt: skip


def shapes_of(tree):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "shape") else x,
        tree,
    )


def same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(g), np.asarray(w), strict=True)


@pytest.mark.parametrize("abstract", [False, True])
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.few(4)
def test_values_are_those_of_module_init(name, abstract):
    if name == "data" and abstract:
        pytest.skip("values of inputs are needed: see the test of the refusal")
    module, inputs, kwargs = MODULES[name]
    want = jax.jit(lambda k: nn.unbox(module.init(k, *inputs, **kwargs)))(KEY)
    given = shapes_of(inputs) if abstract else inputs
    same(jax.jit(front.init_fn(module, *given, **kwargs).fn)(KEY), want)


def test_axes_are_the_names_of_the_boxes():
    init = front.init_fn(Scanned(), INPUT)
    (params,) = init.axes["params"].values()
    assert params["Dense_0"]["kernel"] == ("layers", "embed", "mlp")
    assert params["Dense_0"]["bias"] is None
    assert params["Dense_1"]["kernel"] == ("layers", "mlp", "embed")
    structure = jax.tree.structure(init.axes, is_leaf=lambda x: not isinstance(x, dict))
    shapes = jax.eval_shape(init.fn, jax.random.key(0))
    assert structure == jax.tree.structure(shapes)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.few(2)
def test_rebuild_puts_the_boxes_back(name):
    module, inputs, kwargs = MODULES[name]
    want = jax.jit(lambda k: module.init(k, *inputs, **kwargs))(KEY)
    init = front.init_fn(module, *inputs, **kwargs)
    same(init.rebuild(jax.jit(init.fn)(KEY)), want)  # treedefs hold the boxes


def test_rebuild_refuses_another_modules_arrays():
    init = front.init_fn(Block(), INPUT)
    with pytest.raises(InitFnError, match="Block"):
        init.rebuild({"params": jnp.ones(3)})


def test_inputs_are_no_constants():
    inputs = np.full((1, 1000, 32), 0.5, np.float32)
    init = front.init_fn(Block(), inputs)
    assert sum(c.size for c in jax.make_jaxpr(init.fn)(jax.random.key(0)).consts) == 0


def test_neither_building_nor_tracing_allocates():
    huge = jax.ShapeDtypeStruct((1 << 20, 1 << 20), jnp.float32)  # 4 TiB
    init = front.init_fn(Block(), huge)
    shapes = jax.eval_shape(init.fn, jax.random.key(0))
    assert shapes["params"]["Dense_0"]["kernel"].size == 1 << 42


def test_variables_that_depend_on_input_values_are_named():
    with pytest.raises(InitFnError, match="params/mean") as caught:
        front.init_fn(DataDependent(), shapes_of(INPUT))
    assert caught.value.where == "params/mean"
    assert "arrays" in caught.value.remedy


@pytest.mark.parametrize("abstract", [False, True])
def test_modules_that_cannot_be_batched_still_work(abstract):
    @jax.custom_batching.custom_vmap
    def rigid(x):
        return x

    @rigid.def_vmap
    def _(axis_size, in_batched, x):
        raise NotImplementedError

    class Rigid(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(32)(rigid(x))

    init = front.init_fn(Rigid(), shapes_of(INPUT) if abstract else INPUT)
    same(jax.jit(init.fn)(KEY), jax.jit(Rigid().init)(KEY, INPUT))


def test_a_module_that_needs_a_mesh_in_context_has_it():
    class Constrained(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jax.lax.with_sharding_constraint(nn.Dense(32)(x), jax.P("x"))
            return nn.Dense(64)(x)

    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jnp.ones((2, 8))
    with jax.set_mesh(mesh):
        made = shardinit.init(front.init_fn(Constrained(), x), 0)
        want = jax.jit(Constrained().init)(jax.random.key(0), x)
    assert differing(made, want) == []


def test_a_mesh_in_context_changes_no_value():
    want = jax.jit(front.init_fn(Block(), INPUT).fn)(KEY)
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((1, 1), ("embed", "mlp"), axis_types=auto)
    rules = [("embed", "embed"), ("mlp", "mlp")]
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        init = front.init_fn(Block(), INPUT)
        same(jax.jit(init.fn)(KEY), want)
    assert init.axes["params"]["Dense_1"]["kernel"] == ("mlp", "embed")


def test_modules_without_inputs():
    class Table(nn.Module):
        @nn.compact
        def __call__(self):
            return self.param("table", nn.initializers.normal(), (4, 32))

    same(jax.jit(front.init_fn(Table()).fn)(KEY), jax.jit(Table().init)(KEY))
