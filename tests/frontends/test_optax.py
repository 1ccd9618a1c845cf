"""Parameters with the state of their optimizer, each leaf where its parameter lies."""

import dataclasses
from typing import Any, NamedTuple

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from penzai import pz
from penzai.models import simple_mlp

import shardinit
from shardinit.errors import InitFnError, ShardingError, StructureMismatchError
from shardinit.frontends import equinox as from_equinox
from shardinit.frontends import haiku as from_haiku
from shardinit.frontends import linen as from_linen
from shardinit.frontends import nnx as from_nnx
from shardinit.frontends import penzai as from_penzai
from shardinit.frontends.optax import with_optimizer
from tests.core.bits import differing

NAMES = ("embed", "mlp")
RULES = shardinit.AxisRules([("embed", "data"), ("mlp", "model")])
X = jax.ShapeDtypeStruct((2, 128), jnp.float32)


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


class MLP(nn.Module):
    boxed: bool = True

    @nn.compact
    def __call__(self, x):
        wrap = nn.with_logical_partitioning if self.boxed else lambda init, names: init
        for size, names in ((256, NAMES), (128, NAMES[::-1])):
            kernel = wrap(nn.initializers.normal(), names)
            x = nn.BatchNorm(use_running_average=True)(x)
            x = nn.Dense(size, kernel_init=kernel)(x)
        return x


class Layers(nnx.Module):
    def __init__(self, rngs):
        made = nnx.with_partitioning(nnx.initializers.normal(), NAMES)
        self.layers = nnx.List(
            [nnx.Linear(128, 128, kernel_init=made, rngs=rngs) for _ in range(2)]
        )
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = self.drop(layer(x))
        return x


MODELS = {
    "linen": (lambda: from_linen.init_fn(MLP(), X), lambda made: made["params"]),
    "nnx": (lambda: from_nnx.init_fn(Layers), lambda made: nnx.state(made, nnx.Param)),
}


def is_kernel(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


def labels(params):
    return jax.tree.map(lambda x: "matrix" if x.ndim > 1 else "vector", params)


OPTIMIZERS = {
    "adam": optax.adamw(1e-3),
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.lion(1e-3)),
    "masked": optax.masked(optax.adam(1e-3), is_kernel),
    "partitioned": optax.multi_transform(
        {"matrix": optax.adam(1e-3), "vector": optax.sgd(1e-2, momentum=0.9)}, labels
    ),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=1e-3),
    "bfloat16": optax.adam(1e-3, mu_dtype=jnp.bfloat16),
    "every fourth step": optax.MultiSteps(
        optax.adam(1e-3), 4
    ).gradient_transformation(),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Quantised:
    """A moment in 8 bits, with a scale for each column."""

    values: Any
    scale: Any


def quantised_momentum():
    class State(NamedTuple):
        mu: Any

    def quantised(x):
        return Quantised(jnp.zeros(x.shape, jnp.int8), jnp.ones(x.shape[-1:]))

    def init(params):
        return State(jax.tree.map(quantised, params))

    return optax.GradientTransformation(init, lambda g, s, p=None: (g, s))


def test_moments_of_8_bits_lie_where_their_parameters_lie(mesh):
    def init(key):
        return {"w": jax.random.normal(key, (8, 16)), "b": jnp.zeros((16,))}

    named = shardinit.InitFn(init, axes={"w": ("in", "out"), "b": ("out",)})
    fn = with_optimizer(named, quantised_momentum())
    rules = shardinit.AxisRules([("in", "data"), ("out", "model")])
    plan = shardinit.plan(fn, mesh=mesh, rules=rules)
    lies = {leaf.path: tuple(leaf.sharding.spec) for leaf in plan.leaves}
    assert lies["opt_state/mu/w/values"] == ("data", "model")
    assert lies["opt_state/mu/b/values"] == ("model",)
    assert lies["opt_state/mu/w/scale"] in ((), (None,))  # by no coincidence of sizes
    assert lies["opt_state/mu/b/scale"] == ("model",)


def shardings_by_optax(tx, state, params):
    """Optax's own function on the shardings of the parameters; None for all else."""
    return optax.tree_map_params(
        tx,
        lambda x, p: x if isinstance(x, optax.MaskedNode) else p.sharding,
        state,
        params,
        transform_non_params=lambda _: None,
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.few(4)
def test_moments_lie_where_optax_says_that_their_parameters_lie(mesh, model, optimizer):
    (make, trainable), tx = MODELS[model], OPTIMIZERS[optimizer]
    fn = make()
    made = shardinit.init(with_optimizer(fn, tx), 0, mesh=mesh, rules=RULES)
    assert differing(made["params"], shardinit.init(fn, 0)) == []
    params, state = trainable(made["params"]), made["opt_state"]
    want = jax.jit(tx.init)(params)
    assert jax.tree.structure(state) == jax.tree.structure(want)
    assert differing(state, want) == []
    placed = shardings_by_optax(tx, state, params)
    flat = jax.tree.leaves(placed, is_leaf=lambda x: x is None)
    for leaf, sharding in zip(jax.tree.leaves(state), flat, strict=True):
        whole = leaf.sharding.is_fully_replicated
        assert whole if sharding is None else leaf.sharding == sharding
    assert sum(not x.sharding.is_fully_replicated for x in jax.tree.leaves(state)) > 1


@pytest.mark.parametrize("model", MODELS)
def test_the_state_takes_a_step(mesh, model):
    (make, trainable), tx = MODELS[model], OPTIMIZERS["partitioned"]
    made = shardinit.init(with_optimizer(make(), tx), 0, mesh=mesh, rules=RULES)
    params = trainable(made["params"])
    step = jax.jit(lambda state, params: tx.update(params, state, params)[1])
    after = step(made["opt_state"], params)
    assert jax.tree.structure(after) == jax.tree.structure(made["opt_state"])


def placed(fn, mesh, **options):
    """Sharding spec of each leaf by path, one entry a dimension."""
    plan = shardinit.plan(fn, mesh=mesh, **options)
    return {
        leaf.path: (*leaf.sharding.spec, *[None] * (len(leaf.shape)))[: len(leaf.shape)]
        for leaf in plan.leaves
    }


def test_factored_moments_keep_the_names_of_their_axes(mesh):
    def fn(key):
        return {
            "square": jax.random.normal(key, (128, 128)),
            "stacked": jax.random.normal(key, (4, 256, 128)),
            "vector": jnp.ones(128),
        }

    axes = {"square": NAMES, "stacked": ("layers", *NAMES), "vector": ("embed",)}
    state = with_optimizer(shardinit.InitFn(fn, axes=axes), optax.adafactor(1e-3))
    got = placed(state, mesh, rules=RULES)
    # rows lack the largest axis, the last of equals; columns the second largest
    assert got["opt_state/0/v_row/square"] == ("data",)
    assert got["opt_state/0/v_col/square"] == ("model",)
    assert got["opt_state/0/v_row/stacked"] == (None, "model")
    assert got["opt_state/0/v_col/stacked"] == (None, "data")
    assert got["opt_state/0/v/vector"] == ("data",)
    assert got["opt_state/0/v/square"] == (None,)
    made = shardinit.init(state, 0, mesh=mesh, rules=RULES)
    want = optax.adafactor(1e-3).init(made["params"])
    assert differing(made["opt_state"], want) == []


@pytest.mark.parametrize("model", MODELS)
def test_adafactor_of_a_front_end(mesh, model):
    make, _ = MODELS[model]
    got = placed(with_optimizer(make(), optax.adafactor(1e-3)), mesh, rules=RULES)
    rows = {s for path, s in got.items() if "v_row" in path and "kernel" in path}
    columns = {s for path, s in got.items() if "v_col" in path and "kernel" in path}
    assert ("data",) in rows
    assert ("model",) in columns


def test_histories_and_lists_of_vectors_lie_by_the_axes_that_they_have(mesh):
    init = shardinit.InitFn(
        lambda key: {"w": jax.random.normal(key, (128, 128))}, axes={"w": NAMES}
    )
    got = placed(with_optimizer(init, optax.lbfgs()), mesh, rules=RULES)
    history = "opt_state/0/diff_params_memory/w"
    assert got[history] == (None, "data", "model")
    assert got["opt_state/0/weights_memory"] == (None,)
    got = placed(with_optimizer(init, optax.sm3(1e-3)), mesh, rules=RULES)
    assert got["opt_state/0/mu/w/0"] == ("data",)
    assert got["opt_state/0/mu/w/1"] == ("model",)


def test_what_belongs_to_no_parameter_is_never_placed_by_its_shape(mesh):
    def init(params):
        table = jnp.zeros((128, 256))
        return {"table": table, "count": jnp.int32(0), "mean": params}

    tx = optax.GradientTransformation(init, lambda *_: None)
    base = shardinit.InitFn(
        lambda key: {"w": jax.random.normal(key, (128, 256))}, axes={"w": NAMES}
    )
    plan = shardinit.plan(with_optimizer(base, tx), mesh=mesh, rules=RULES)
    spec = {leaf.path: tuple(leaf.sharding.spec) for leaf in plan.leaves}
    assert spec["opt_state/mean/w"] == ("data", "model")
    assert spec["opt_state/table"] == (None, None)
    assert not [f for f in plan.findings if f.kind == "same-key"]
    assert [f.leaves for f in plan.findings if f.kind == "replicated"] == [
        ("opt_state/table",)
    ]


def test_a_parameter_that_is_the_whole_tree_has_its_moments(mesh):
    base = shardinit.InitFn(lambda key: jax.random.normal(key, (128, 256)), axes=NAMES)
    got = placed(with_optimizer(base, optax.adam(1e-3)), mesh, rules=RULES)
    assert got["opt_state/0/mu"] == ("data", "model")
    assert got["opt_state/0/count"] == ()


def test_what_the_optimizer_cannot_train_is_said():
    def fn(key):
        return {"w": jax.random.normal(key, (8, 32)), "stats": jnp.zeros(4)}

    tx = optax.multi_transform({"all": optax.adam(1e-3)}, {"w": "all"})
    with pytest.raises(InitFnError, match="trainable="):
        with_optimizer(fn, tx)
    some = with_optimizer(fn, tx, trainable=lambda tree: {"w": tree["w"]})
    [inner] = shardinit.init(some, 0)["opt_state"].inner_states.values()
    assert list(inner.inner_state[0].mu) == ["w"]


# ---- states of the user's own --------------------------------------------------------


def train_state(boxed):
    def fn(key):
        module = MLP(boxed)
        variables = module.init(key, jnp.zeros(X.shape))
        return TrainState.create(
            apply_fn=module.apply, params=variables["params"], tx=optax.adafactor(1e-3)
        )

    return fn


def test_a_train_state_of_boxed_parameters(mesh):
    got = placed(train_state(True), mesh, rules=RULES)
    assert got["params/Dense_0/kernel/value"] == ("data", "model")
    assert got["opt_state/0/v_row/Dense_0/kernel/value"] == ("data",)
    assert got["opt_state/0/v_col/Dense_0/kernel/value"] == ("model",)


def test_state_lies_by_the_path_rules_of_its_parameters(mesh):
    rules = shardinit.PathRules([("^params/.*kernel", PartitionSpec("data", "model"))])
    got = placed(train_state(False), mesh, rules=rules)
    assert got["opt_state/0/v_row/Dense_0/kernel"] == ("data",)
    own = [("^opt_state/.*v_row", PartitionSpec("model")), *rules.rules]
    got = placed(train_state(False), mesh, rules=shardinit.PathRules(own))
    assert got["opt_state/0/v_row/Dense_0/kernel"] == ("model",)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Mine:
    step: Any
    weights: Any
    slow: Any
    opt: Any


def test_a_dataclass_of_the_users_own(mesh):
    def fn(key):
        weights = nn.Dense(256).init(key, jnp.zeros((1, 128)))["params"]
        momentum = jax.tree.map(jnp.zeros_like, weights)
        return Mine(jnp.int32(0), weights, momentum, optax.adam(1e-3).init(weights))

    rules = shardinit.PathRules([("^weights/kernel", PartitionSpec("data", "model"))])
    got = placed(fn, mesh, rules=rules)
    assert got["opt/0/mu/kernel"] == ("data", "model")
    assert got["slow/kernel"] == (None, None)
    got = placed(fn, mesh, rules=rules, opt_state="slow/**")
    assert got["slow/kernel"] == ("data", "model")


def test_moments_without_the_boxes_of_their_parameters_lie_with_them(mesh):
    def init(key):
        params = MLP().init(key, jnp.ones((2, 128)))["params"]
        return {"params": params, "m": nn.meta.unbox(params)}

    plan = shardinit.plan(init, mesh=mesh, rules=RULES, opt_state="m/**")
    specs = {leaf.path: tuple(leaf.sharding.spec) for leaf in plan.leaves}
    assert specs["m/Dense_0/kernel"] == ("data", "model")
    assert specs["params/Dense_0/kernel/value"] == ("data", "model")


def test_an_nnx_optimizer_lies_with_its_model(mesh):
    class Training(nnx.Module):
        def __init__(self, rngs):
            self.model = Layers(rngs)
            self.optimizer = nnx.Optimizer(
                self.model, optax.adafactor(1e-3), wrt=nnx.Param
            )

    fn = from_nnx.init_fn(Training)
    got = placed(fn, mesh, rules=RULES)
    state = "optimizer/opt_state/0"
    assert got[f"{state}/v_row/layers/0/kernel"] == ("data",)
    assert got[f"{state}/v_col/layers/0/kernel"] == ("model",)
    made = shardinit.init(fn, 0, mesh=mesh, rules=RULES)
    assert isinstance(made.optimizer, nnx.Optimizer)


# ---- further than the parameters -----------------------------------------------------


def plain(key):
    w, v = jax.random.split(key)
    return {
        "w": jax.random.normal(w, (128, 256)),
        "v": jax.random.normal(v, (128, 6)),
        "b": jnp.ones(4),
    }


BY_MODEL = shardinit.PathRules(
    [("^params/w", PartitionSpec(None, "model")), (".", PartitionSpec())]
)


def test_zero_shards_the_state_over_axes_that_parameters_leave_free(mesh):
    state = with_optimizer(plain, optax.adam(1e-3))
    zero = shardinit.fsdp("data", min_bytes=1024)
    got = placed(state, mesh, rules=BY_MODEL, opt_rules=zero)
    assert got["params/w"] == (None, "model")
    assert got["opt_state/0/mu/w"] == ("data", "model")
    assert got["opt_state/0/mu/v"] == ("data", None)
    assert got["opt_state/0/nu/b"] == (None,)
    together = shardinit.fsdp("model", "data", min_bytes=0)
    got = placed(state, mesh, rules=BY_MODEL, opt_rules=together)
    assert got["opt_state/0/mu/v"] == (("model", "data"), None)
    made = shardinit.init(state, 0, mesh=mesh, rules=BY_MODEL, opt_rules=zero)
    assert differing(made["params"], shardinit.init(plain, 0)) == []


def test_path_rules_for_the_state_alone(mesh):
    state = with_optimizer(plain, optax.adam(1e-3))
    rules = shardinit.PathRules([("mu/w$", PartitionSpec("model", "data"))])
    got = placed(state, mesh, rules=BY_MODEL, opt_rules=rules)
    assert got["opt_state/0/mu/w"] == ("model", "data")
    assert got["opt_state/0/nu/w"] == (None, "model")
    unknown = shardinit.fsdp("nowhere")
    with pytest.raises(ShardingError, match=r"opt_rules.*nowhere"):
        shardinit.plan(state, mesh=mesh, opt_rules=unknown)
    with pytest.raises(ShardingError, match="opt_rules"):
        shardinit.plan(state, mesh=mesh, opt_rules="data")
    with pytest.raises(ShardingError, match="opt_rules: given without a mesh"):
        shardinit.plan(state, opt_rules=shardinit.fsdp())
    place = NamedSharding(mesh, PartitionSpec())
    with pytest.raises(ShardingError, match="opt_rules and out_shardings: both"):
        shardinit.plan(state, out_shardings=place, opt_rules=shardinit.fsdp())


def test_the_state_is_kept_in_the_memory_of_the_host(mesh):
    state = with_optimizer(plain, optax.adam(1e-3))
    host = shardinit.Placement(None, memory_kind="pinned_host")
    made = shardinit.init(state, 0, mesh=mesh, rules=BY_MODEL, opt_rules=host)
    moment, weight = made["opt_state"][0].mu["w"], made["params"]["w"]
    assert moment.sharding.memory_kind == "pinned_host"
    assert moment.sharding.spec == weight.sharding.spec
    assert weight.sharding.memory_kind == "device"
    assert not np.asarray(moment).any()


# ---- everything else takes it --------------------------------------------------------


def test_the_parameters_of_a_checkpoint_get_their_optimizer(mesh):
    make, trainable = MODELS["linen"]
    fn = make()
    tx = OPTIMIZERS["adam"]
    options = {"mesh": mesh, "rules": RULES}
    restored = shardinit.init(fn, 7, **options)
    state = with_optimizer(fn, tx)
    got = shardinit.init_missing({"params": restored}, state, 0, **options)
    assert differing(got["params"], restored) == []
    assert differing(got["opt_state"], tx.init(trainable(restored))) == []
    again = shardinit.init_missing(got, state, 1, **options)
    assert all(map(lambda a, b: a is b, *map(jax.tree.leaves, (again, got))))


def test_state_that_repeats_parameters_repeats_those_of_the_checkpoint(mesh):
    def weights(key):
        return {"w": jax.random.normal(key, (128, 256)), "b": jnp.zeros(256)}

    restored = jax.tree.map(jnp.ones_like, weights(jax.random.key(0)))
    tx = optax.contrib.schedule_free_sgd(1e-3)
    state = with_optimizer(weights, tx)
    got = shardinit.init_missing({"params": restored}, state, 0)
    assert differing(got["opt_state"], tx.init(restored)) == []
    assert got["opt_state"].z["w"] is not got["params"]["w"]
    wide = optax.GradientTransformation(
        lambda params: jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), None
    )
    with pytest.raises(StructureMismatchError, match=r"'opt_state/w'.*tx\.init"):
        shardinit.init_missing({"params": restored}, with_optimizer(weights, wide), 0)


@pytest.mark.slow
def test_programs_select_and_receipts_take_it(mesh, tmp_path):
    state = with_optimizer(MODELS["nnx"][0](), OPTIMIZERS["adam"])
    program = shardinit.export_plan(state)
    by_function = placed(state, mesh, rules=RULES)
    assert placed(program, mesh, rules=RULES) == by_function
    plan = shardinit.plan(state, mesh=mesh, rules=RULES)
    made = shardinit.compile_plan(plan)(3)
    receipt = shardinit.receipt(plan, 3, made)
    shardinit.verify_receipt(receipt, shardinit.init(program, 3))
    some = shardinit.init(state, 3, select="opt_state/**")
    assert differing(some["opt_state"], made["opt_state"]) == []
    assert isinstance(some["params"].layers[0].kernel.get_value(), jax.ShapeDtypeStruct)
    abstract = plan.abstract()
    assert jax.tree.structure(abstract) == jax.tree.structure(made)


def equinox_parts():
    fn = from_equinox.init_fn(eqx.nn.MLP, 64, 8, 64, 2)
    return fn, lambda made: eqx.filter(made, eqx.is_inexact_array)


def haiku_parts():
    def forward(x):
        return hk.BatchNorm(True, True, 0.9)(hk.nets.MLP([64])(x), True)

    net = hk.transform_with_state(forward)
    return from_haiku.init_fn(net, jnp.ones((2, 64))), lambda made: made[0]


def penzai_parts():
    fn = from_penzai.init_fn(simple_mlp.MLP.from_config, feature_sizes=[64, 8])
    return fn, lambda made: pz.unbind_params(made, freeze=True)[1]


@pytest.mark.parametrize("parts", [equinox_parts, haiku_parts, penzai_parts])
def test_what_is_trained_is_what_the_framework_trains(mesh, parts):
    fn, trainable = parts()
    tx, rules = optax.adam(1e-3), shardinit.fsdp("model", min_bytes=0)
    for given in ({}, {"trainable": trainable}):
        made = shardinit.init(
            with_optimizer(fn, tx, **given), 0, mesh=mesh, rules=rules
        )
        params, state = trainable(made["params"]), made["opt_state"]
        assert jax.tree.structure(state[0].mu) == jax.tree.structure(params)
        pairs = zip(*map(jax.tree.leaves, (params, state[0].mu)), strict=True)
        assert all(one.sharding == other.sharding for one, other in pairs)
        assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(params))
