"""The NNX front end gives the model's own values, names and object."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import shardinit
from shardinit.errors import InitFnError
from shardinit.frontends import nnx as front
from shardinit.frontends import optax as optax_front
from tests.core import bits


class Mlp(nnx.Module):
    def __init__(self, width, *, rngs):
        init = nnx.initializers.lecun_normal()
        self.up = nnx.Linear(
            width,
            4 * width,
            kernel_init=nnx.with_partitioning(init, ("embed", "mlp")),
            rngs=rngs,
        )
        self.down = nnx.Linear(4 * width, width, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.down(self.dropout(jax.nn.relu(self.up(x)))))


class Lists(nnx.Module):
    def __init__(self, *, rngs):
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(11)])
        self.heads = nnx.Dict(a=nnx.Linear(8, 2, rngs=rngs))


class Stacked(nnx.Module):
    def __init__(self, outer, inner, *, rngs):
        @nnx.split_rngs(splits=outer)
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "stages"})
        def stages(rngs):
            @nnx.split_rngs(splits=inner)
            @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
            def layers(rngs):
                return Mlp(8, rngs=rngs)

            return layers(rngs)

        self.before = nnx.Linear(8, 8, rngs=rngs)
        self.stages = stages(rngs)
        self.after = nnx.Linear(8, 8, rngs=rngs)  # draws on after the split


class Tied(nnx.Module):
    def __init__(self, *, rngs):
        self.embed = nnx.Embed(16, 8, rngs=rngs)
        self.head = self.embed
        self.kernel = self.embed.embedding


class KeepsRngs(nnx.Module):
    def __init__(self, *, rngs):
        self.a = nnx.Param(rngs.params.normal((4, 40)))
        self.b = nnx.Param(rngs.dropout.uniform((4, 40)))
        self.rngs = rngs
        self.forked = rngs.fork()
        self.table = nnx.data(jnp.arange(5.0))
        self.pair = nnx.Variable({"x": jnp.ones(2), "y": jnp.zeros(3)})


MODELS = {
    "mlp": (Mlp, (8,)),
    "lists": (Lists, ()),
    "stacked": (Stacked, (2, 3)),
    "tied": (Tied, ()),
    "rngs": (KeepsRngs, ()),
}


# compiles in a fraction of the time that threefry takes
KEY = jax.random.key(3, impl="unsafe_rbg")


def raw(leaf):
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def oracle(model, args, key):
    def state(key):
        with nnx.use_eager_sharding(False):
            return nnx.state(model(*args, rngs=nnx.Rngs(key)))

    return jax.jit(state)(key)


def same(got, want):
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype
        np.testing.assert_array_equal(raw(g), raw(w), strict=True)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.few(2)
def test_values_are_those_of_the_constructor(name):
    model, args = MODELS[name]
    same(jax.jit(front.init_fn(model, *args).fn)(KEY), oracle(model, args, KEY))


@pytest.mark.parametrize("name", MODELS)
def test_result_is_plain_nested_dicts_of_arrays(name):
    model, args = MODELS[name]
    init = front.init_fn(model, *args)
    tree = jax.eval_shape(init.fn, jax.random.key(0))

    def check(node):
        assert type(node) in (dict, jax.ShapeDtypeStruct)
        if type(node) is dict:
            for child in node.values():
                check(child)

    check(tree)
    names = jax.tree.structure(init.axes, is_leaf=lambda x: not isinstance(x, dict))
    assert names == jax.tree.structure(tree)


def test_list_paths_are_integers_in_order():
    init = front.init_fn(Lists)
    shapes = jax.eval_shape(init.fn, jax.random.key(0))
    assert list(shapes["layers"]) == list(range(11))
    assert shapes["layers"][10]["kernel"].shape == (4, 4)
    assert shapes["heads"]["a"]["kernel"].shape == (8, 2)


def test_axes_come_from_sharding_metadata():
    axes = front.init_fn(Stacked, 2, 3).axes
    assert axes["stages"]["up"]["kernel"] == ("stages", "layers", "embed", "mlp")
    assert axes["stages"]["down"]["kernel"] is None


@pytest.mark.parametrize(
    ("sharding", "names"),
    [
        (("a", None), ("a", None)),
        (jax.sharding.PartitionSpec("a"), ("a", None)),
        (jax.sharding.PartitionSpec(("a", "b"), "c"), (("a", "b"), "c")),
    ],
)
def test_axes_have_an_entry_for_each_dimension(sharding, names):
    def model(*, rngs):
        return nnx.Dict(w=nnx.Param(rngs.params.normal((4, 4)), out_sharding=sharding))

    assert front.init_fn(model).axes == {"w": names}


def test_state_of_stateful_layers_keeps_its_types():
    tree = jax.eval_shape(front.init_fn(Mlp, 8).fn, KEY)
    assert jax.dtypes.issubdtype(
        tree["dropout"]["rngs"]["key"].dtype, jax.dtypes.prng_key
    )
    assert tree["dropout"]["rngs"]["count"].dtype == jnp.uint32
    assert set(tree["norm"]) == {"bias", "mean", "scale", "var"}


def test_rebuild_gives_the_model_back():
    x = jnp.ones((4, 8))
    init = front.init_fn(Mlp, 8)
    model = init(KEY)
    with nnx.use_eager_sharding(False):
        want = Mlp(8, rngs=nnx.Rngs(KEY))
    assert type(model) is Mlp
    assert type(model.dropout.rngs) is nnx.RngStream
    assert type(model.up.kernel) is nnx.Param
    for _ in range(2):  # dropout and statistics advance alike
        np.testing.assert_allclose(model(x), want(x), rtol=1e-5)
    same(nnx.state(model, nnx.RngState), nnx.state(want, nnx.RngState))


def test_rebuilt_model_trains():
    model = front.init_fn(Mlp, 8)(KEY)

    @nnx.jit
    def step(model, x):
        grads = nnx.grad(lambda m: (m(x) ** 2).mean())(model)
        params = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads))

    before = np.asarray(model.down.kernel[...])
    step(model, jnp.arange(32.0).reshape(4, 8))
    assert (np.asarray(model.down.kernel[...]) != before).any()


def test_rebuild_shares_what_the_model_shares():
    model = front.init_fn(Tied)(KEY)
    assert model.head is model.embed
    assert model.kernel is model.embed.embedding


def test_rebuilt_rngs_go_on_where_the_constructor_stopped():
    key = jax.random.key(5)
    model = front.init_fn(KeepsRngs)(key)
    want = KeepsRngs(rngs=nnx.Rngs(key))
    assert raw(model.rngs.params()).tolist() == raw(want.rngs.params()).tolist()
    assert raw(model.forked.params()).tolist() == raw(want.forked.params()).tolist()


def test_rebuild_takes_shapes():
    init = front.init_fn(Mlp, 8)
    shapes = jax.eval_shape(init.fn, jax.random.key(0))
    assert init.rebuild(shapes).up.kernel.shape == (8, 32)


def test_rebuild_refuses_another_models_arrays():
    init = front.init_fn(Mlp, 8)
    with pytest.raises(InitFnError, match="Mlp"):
        init.rebuild({"up": jnp.ones(3)})


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_mesh_in_context_adds_no_constraint(kind):
    types = (getattr(jax.sharding.AxisType, kind),)
    with jax.set_mesh(jax.make_mesh((1,), ("x",), axis_types=types)):
        init = front.init_fn(Mlp, 8)
        jaxpr = str(jax.make_jaxpr(init.fn)(jax.random.key(0)))
    assert "sharding_constraint" not in jaxpr
    assert "reshard" not in jaxpr
    assert init.axes["up"]["kernel"] == ("embed", "mlp")


def test_a_model_that_needs_a_mesh_in_context_has_it():
    def make(*, rngs):
        weight = jax.random.normal(rngs.params(), (8, 32))
        spec = jax.P(None, "x")
        return nnx.Param(jax.lax.with_sharding_constraint(weight, spec))

    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        made = shardinit.init(front.init_fn(lambda **kw: nnx.Dict(w=make(**kw))), 0)
        want = jax.jit(lambda key: make(rngs=nnx.Rngs(key)).get_value())
        assert bits.differing(made.w.get_value(), want(jax.random.key(0))) == []


def test_building_allocates_nothing():
    def huge(*, rngs):
        return nnx.Linear(1 << 20, 1 << 20, rngs=rngs)  # 4 TiB

    shapes = jax.eval_shape(front.init_fn(huge).fn, jax.random.key(0))
    assert shapes["kernel"].size == 1 << 40


def test_the_trace_is_linear_in_depth():
    class Deep(nnx.Module):
        def __init__(self, depth, *, rngs):
            self.ws = nnx.List(
                nnx.Param(rngs.params.normal((2, 32))) for _ in range(depth)
            )

    def equations(depth):
        init = front.init_fn(Deep, depth)
        return len(jax.make_jaxpr(init.fn)(jax.random.key(0)).eqns)

    assert equations(40) == 2 * equations(20)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_keys_of_any_implementation(impl):
    key = jax.random.key(0, impl=impl)
    got = jax.jit(front.init_fn(KeepsRngs).fn)(key)
    assert got["rngs"]["default"]["key"].dtype == key.dtype
    same(got, oracle(KeepsRngs, (), key))


class Noisy(nnx.Module):
    def __init__(self, *, rngs):
        self.mlp = Mlp(32, rngs=rngs)
        self.noise = nnx.Param(jax.random.normal(rngs.noise(), (8, 32)))
        self.rngs = rngs


def test_streams_given_by_name_are_those_of_rngs(mesh):
    keys = {
        name: jax.random.key(i) for i, name in enumerate(("params", "noise", "dropout"))
    }
    init = front.init_fn(Noisy)
    plan = shardinit.plan(init, key=keys, mesh=mesh)
    model = shardinit.compile_plan(plan)(keys)
    with nnx.use_eager_sharding(False):
        want = jax.jit(lambda keys: nnx.state(Noisy(rngs=nnx.Rngs(**keys))))(keys)
    assert jax.tree.map(bits.raw, nnx.state(model)) == jax.tree.map(bits.raw, want)
    assert type(model.rngs.params) is nnx.RngStream
    assert jax.tree.map(bits.raw, nnx.state(init(keys))) == jax.tree.map(bits.raw, want)
    with_state = optax_front.with_optimizer(init, optax.adam(1e-3))
    state = shardinit.init(with_state, keys)
    assert np.array_equal(state["params"].noise, model.noise)
