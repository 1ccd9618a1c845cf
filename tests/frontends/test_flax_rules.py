"""Rules mean what Flax means by them: its own functions are the oracle."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx
from flax.core.spmd import logical_axis_rules
from flax.linen import partitioning
from flax.linen.spmd import logical_to_mesh_axes
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import shardinit
from shardinit.errors import ShardingError
from shardinit.frontends import linen
from shardinit.frontends import nnx as nnx_frontend

MESH_AXES = ("data", "fsdp", "tensor", "stage")
WORDS = ("batch", "embed", "mlp", "heads", "kv", "vocab", "layers", *MESH_AXES[:2])
MESH = AbstractMesh((2, 2, 2, 2), MESH_AXES)

NAMES = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4, unique=True).flatmap(
    lambda names: st.tuples(
        *(st.one_of(st.just(name), st.just(name), st.none()) for name in names)
    )
)
AXES = st.lists(st.sampled_from(MESH_AXES), min_size=1, max_size=3, unique=True)
VALUES = st.one_of(st.none(), st.sampled_from(MESH_AXES), AXES.map(tuple))
RULES = st.lists(st.tuples(st.sampled_from(WORDS), VALUES), max_size=12)


def entries(spec, rank):
    """A partition spec as one tuple of mesh axes for each dimension."""
    listed = [
        () if e is None else (e,) if isinstance(e, str) else tuple(e) for e in spec
    ]
    return listed + [()] * (rank - len(listed))


def placed(fn, rules, mesh=MESH, **options):
    plan = shardinit.plan(fn, mesh=mesh, rules=rules, **options)
    return {
        leaf.path: entries(leaf.sharding.spec, len(leaf.shape))
        for leaf in plan.leaves
        if leaf.sharding is not None
    }


def named(names, **metadata):
    """An NNX model of one parameter with these names, 16 wide along each."""

    def build(rngs):
        return nnx.Dict(
            w=nnx.Param(jnp.zeros((16,) * len(names)), out_sharding=names, **metadata)
        )

    return build


def boxed(names, wrap=nn.with_logical_partitioning, **options):
    """A Linen module of one boxed parameter."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = wrap(jax.nn.initializers.normal(), names, **options)
            self.param("w", init, (16,) * len(names))
            return x

    return linen.init_fn(Model(), jnp.ones(1))


@settings(max_examples=40)
@given(NAMES, RULES)
@example(("kv", "heads"), [("heads", "tensor"), ("kv", "tensor"), ("kv", "data")])
@example(("embed", "mlp"), [("mlp", ("data", "fsdp")), ("embed", "data")])
@example(("layers", "embed"), [("layers", None), ("embed", "data"), ("layers", "data")])
def test_names_lie_where_flax_puts_them(names, rules):
    fn = shardinit.InitFn(lambda key: jnp.zeros((16,) * len(names)), axes=names)
    want = entries(logical_to_mesh_axes(names, rules), len(names))
    assert placed(fn, shardinit.AxisRules(rules))[""] == want


@given(NAMES, st.dictionaries(st.sampled_from(WORDS), VALUES, max_size=8))
def test_names_of_nnx_variables_pass_through_as_in_flax(names, rules):
    with logical_axis_rules(tuple(rules.items())), nnx.use_eager_sharding(False):
        variable = nnx.Param(jnp.zeros((16,) * len(names)), out_sharding=names)
        spec = entries(nnx.get_partition_spec(variable).get_raw_value(), len(names))
    used = [axis for entry in spec for axis in entry]
    if len(set(used)) < len(used) or not set(used) <= set(MESH_AXES):
        return  # Flax leaves a spec that no mesh takes; Linen's meaning counts
    got = placed(nnx_frontend.init_fn(named(names)), shardinit.AxisRules(rules))
    assert got["w"] == spec


def test_a_name_that_is_a_mesh_axis_passes_only_where_flax_lets_it():
    rules = shardinit.AxisRules([("mlp", "data")])
    names = ("tensor", "mlp")
    free = boxed(names, nn.with_partitioning)
    assert placed(free, rules)["params/w"] == [("tensor",), ("data",)]
    assert placed(boxed(names), rules)["params/w"] == [(), ("data",)]
    taken = boxed(("data", "mlp"), nn.with_partitioning)
    assert placed(taken, rules)["params/w"] == [(), ("data",)]


def test_a_name_that_stands_twice_is_refused_as_by_flax():
    rules = [("embed", "data"), ("embed", "fsdp")]
    with pytest.raises(ValueError, match="more than once"):
        logical_to_mesh_axes(("embed", "embed"), rules)
    with pytest.raises(ShardingError, match=r"leaf 'params/w'.*'embed' occurs more"):
        placed(boxed(("embed", "embed")), shardinit.AxisRules(rules))


def test_rules_that_a_leaf_brings_along():
    own = (("embed", "tensor"), ("mlp", "data"))
    names, want = ("embed", "mlp"), [("tensor",), ("data",)]
    variable = nnx_frontend.init_fn(named(names, sharding_rules=own))
    assert placed(variable, None)["w"] == want
    assert placed(boxed(names, rules=own), None)["params/w"] == want
    joined = placed(variable, shardinit.AxisRules([("mlp", "fsdp")]))
    assert joined["w"] == [("tensor",), ("fsdp",)]  # where they differ the plan's win


def test_rules_of_flaxs_context_count_where_the_plan_has_none():
    fn = boxed(("embed", "mlp"))
    with nn.logical_axis_rules((("embed", "tensor"), ("mlp", "data"))):
        assert placed(fn, None)["params/w"] == [("tensor",), ("data",)]
        mine = shardinit.AxisRules([("embed", "stage")])
        assert placed(fn, mine)["params/w"] == [("stage",), ()]
        assert placed(fn, shardinit.fsdp())["params/w"] == [(), ()]  # 1 KiB

        def plain(key):
            w = jax.random.normal(key, (16, 16))
            return {"box": nn.LogicallyPartitioned(w, ("embed", "mlp"))}

        assert placed(plain, None)["box/value"] == [("tensor",), ("data",)]


def test_a_known_name_beside_an_unknown_one_counts_without_rules():
    fn = nnx_frontend.init_fn(named(("mlp", "tensor")))
    assert placed(fn, None)["w"] == [(), ("tensor",)]


def test_names_sown_by_param_with_axes():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = jax.nn.initializers.normal()
            w = partitioning.param_with_axes("w", init, (16, 16), axes=("embed", "mlp"))
            return x @ w, None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            scanned = partitioning.scan_with_axes(
                Block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=4,
            )
            return scanned(name="block")(x)[0]

    rules = [("mlp", "fsdp"), ("embed", "data"), ("layers", "stage")]
    x = jnp.ones((1, 16))
    axes = partitioning.get_axis_names(
        jax.eval_shape(Stack().init, jax.random.key(0), x)["params_axes"]
    )
    want = entries(logical_to_mesh_axes(tuple(axes["block"]["w"]), rules), 3)
    got = placed(linen.init_fn(Stack(), x), shardinit.AxisRules(rules))
    assert got["params/block/w"] == want


@pytest.mark.parametrize("axis", [0, 1])
def test_the_axis_that_a_scan_adds_to_a_box(axis):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_logical_partitioning(
                jax.nn.initializers.normal(), ("embed", "mlp")
            )
            return x @ self.param("w", init, (16, 16)), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            scanned = nn.scan(
                Block,
                variable_axes={"params": axis},
                split_rngs={"params": True},
                length=4,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            return scanned(name="block")(x)[0]

    rules = [("layers", "stage"), ("embed", "data"), ("mlp", "fsdp")]
    x = jnp.ones((1, 16))
    variables = jax.eval_shape(Stack().init, jax.random.key(0), x)
    spec = nn.get_partition_spec(variables)["params"]["block"]["w"]
    want = entries(logical_to_mesh_axes(spec, rules), 3)
    got = placed(linen.init_fn(Stack(), x), shardinit.AxisRules(rules))
    assert got["params/block/w"] == want


@pytest.mark.parametrize("metadata", [{}, {nnx.PARTITION_NAME: "layers"}])
def test_the_axis_that_vmap_adds_to_a_variable(metadata):
    def build(rngs):
        init = nnx.with_partitioning(nnx.initializers.normal(), ("embed", "mlp"))

        @nnx.split_rngs(splits=4)
        @nnx.vmap(transform_metadata=metadata)
        def layer(rngs):
            return nnx.Linear(16, 16, kernel_init=init, rngs=rngs)

        return layer(rngs)

    rules = [("layers", "stage"), ("embed", "data"), ("mlp", "fsdp")]
    with nnx.use_eager_sharding(False), logical_axis_rules(tuple(rules)):
        state = nnx.state(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
        spec = nnx.get_partition_spec(state)["kernel"].get_raw_value()
    got = placed(nnx_frontend.init_fn(build), shardinit.AxisRules(rules))
    assert got["kernel"] == entries(spec, 3)


def test_an_nnx_module_bridged_into_linen_keeps_its_names():
    init = nnx.with_partitioning(nnx.initializers.normal(), ("embed", "mlp"))
    module = nnx.bridge.to_linen(nnx.Linear, 16, 16, kernel_init=init)
    rules = shardinit.AxisRules([("embed", "data"), ("mlp", "fsdp")])
    got = placed(linen.init_fn(module, jnp.ones((2, 16))), rules)
    assert got["params/kernel"] == [("data",), ("fsdp",)]


def test_a_linen_module_bridged_into_nnx_keeps_its_names():
    init = nn.with_logical_partitioning(nn.initializers.normal(), ("embed", "mlp"))

    def build(rngs):
        module = nnx.bridge.ToNNX(nn.Dense(16, kernel_init=init), rngs=rngs)
        return module.lazy_init(jnp.ones((2, 16)))

    rules = shardinit.AxisRules([("embed", "data"), ("mlp", "fsdp")])
    assert placed(nnx_frontend.init_fn(build), rules)["kernel"] == [
        ("data",),
        ("fsdp",),
    ]


def test_a_variable_on_a_mesh_of_its_own():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    for names in (
        {"out_sharding": ("data", None), "mesh": mesh},
        {"out_sharding": NamedSharding(mesh, P("data"))},
    ):

        def build(rngs, names: Any = names):
            return nnx.Dict(w=nnx.Param(jnp.zeros((16, 16)), **names))

        made = shardinit.init(nnx_frontend.init_fn(build), 0)
        where = made.w.get_raw_value().sharding
        assert where.is_equivalent_to(NamedSharding(mesh, P("data")), 2)


@pytest.mark.parametrize("shape", [(2, 4), (8,)])
def test_init_inside_set_mesh(shape):
    axes = ("data", "model")[: len(shape)]
    mesh = jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(shape))
    with jax.set_mesh(mesh):
        fn = boxed(("embed", "mlp"))
        got = shardinit.init(
            fn, 0, mesh=mesh, rules=shardinit.AxisRules([("mlp", "data")])
        )
    assert got["params"]["w"].value.sharding.spec == P(None, "data")
