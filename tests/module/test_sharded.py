"""Under a mesh, as a plan, as a program, by window: the same bits everywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import shardinit
from shardinit import module as tx
from shardinit.errors import InitFnError, ModuleStateError, ShardingError
from shardinit.module.walk import modules
from tests.core.bits import differing
from tests.module.oracle import sequence

pytestmark = pytest.mark.once


class Block(tx.Module):
    """All three mechanisms in one module."""

    scale: jax.Array | tx.Initializer = tx.Parameter.node(axes=("embed",))
    table: jax.Array | None = tx.Cache.node(axes=(None, "embed"))
    gate: jax.Array | None = tx.Parameter.node(axes=("embed", "mlp"))

    def __init__(self):
        self.scale = tx.Initializer(lambda key: jax.random.uniform(key, (64,)))
        self.table = None
        self.gate = None
        self.up = tx.Linear(256, kernel_axes=("embed", "mlp"))
        self.down = tx.Linear(64, kernel_axes=("mlp", "embed"))

    def rng_init(self):
        noise = jax.random.uniform(tx.next_key(), (32, 64))
        self.table = noise * self.scale

    def __call__(self, x):
        if self.initializing():
            shape = (x.shape[-1], 256)
            self.gate = jax.random.normal(tx.next_key(), shape) * 0.02
        y = self.up(x * self.scale) * jax.nn.sigmoid(x @ self.gate)
        return self.down(y)


X = jax.ShapeDtypeStruct((2, 64), jnp.float32)
RULES = shardinit.AxisRules([("embed", "data"), ("mlp", "model")])


def by_plain_jax(key):
    """The documented sequence, spelled out; Flax folds sha1(1) into a layer's key."""
    import hashlib

    def kernel(key, shape):
        number = int.from_bytes(hashlib.sha1(b"\x01").digest()[:4], "big")
        key = jax.random.fold_in(key, np.uint32(number))
        return jax.nn.initializers.lecun_normal()(key, shape)

    keys = sequence(key)
    scale = jax.random.uniform(next(keys), (64,))
    table = jax.random.uniform(next(keys), (32, 64)) * scale
    gate = jax.random.normal(next(keys), (64, 256)) * 0.02
    up = kernel(next(keys), (64, 256))
    down = kernel(next(keys), (256, 64))
    return {
        "down": {"bias": jnp.zeros(64), "kernel": down},
        "gate": gate,
        "scale": scale,
        "table": table,
        "up": {"bias": jnp.zeros(256), "kernel": up},
    }


def as_dict(block):
    def linear(m):
        return {"bias": m.bias, "kernel": m.kernel}

    return {
        "down": linear(block.down),
        "gate": block.gate,
        "scale": block.scale,
        "table": block.table,
        "up": linear(block.up),
    }


@pytest.fixture(scope="module")
def oracle():
    return jax.jit(by_plain_jax)(jax.random.key(42))


def test_init_without_a_mesh_is_the_documented_sequence(oracle):
    assert differing(as_dict(Block().init(42, X)), oracle) == []


def test_init_on_a_mesh_has_the_same_bits_in_shards(oracle, mesh):
    made = Block().init(42, X, mesh=mesh, rules=RULES)
    assert isinstance(made, Block)
    assert made.initialized
    assert made.up.initialized
    assert differing(as_dict(made), oracle) == []
    assert made.gate.sharding.spec == P("data", "model")
    assert made.up.kernel.sharding.spec == P("data", "model")
    assert made.up.bias.sharding.spec == P("model")
    assert made.down.kernel.sharding.spec == P("model", "data")
    assert made.table.sharding.spec == P(None, "data")
    assert made.up.kernel.addressable_shards[0].data.shape == (32, 64)


@pytest.mark.slow
def test_path_rules_and_the_default(mesh):
    rules = shardinit.PathRules([("up/kernel", P(None, "model"))])
    made = Block().init(42, X, mesh=mesh, rules=rules)
    assert made.up.kernel.sharding.spec == P(None, "model")
    assert made.gate.sharding.spec == P()
    made = Block().init(42, X, mesh=mesh)
    assert made.up.kernel.addressable_shards[0].data.size == 64 * 256 // 8


def test_rules_that_do_not_fit_name_the_field(mesh):
    net = tx.Sequential(tx.Linear(3, kernel_axes=("embed", "mlp")))
    with pytest.raises(ShardingError, match="layers/0/"):
        net.init(42, X, mesh=mesh, rules=RULES)
    net = tx.Sequential(tx.Linear(8, kernel_axes=("embed",)))
    with pytest.raises(ShardingError, match="layers/0/kernel"):
        net.init(42, X, mesh=mesh, rules=RULES)


def test_init_fn_plans_exports_and_reads(oracle, mesh, tmp_path):
    fn = tx.init_fn(Block(), X)
    plan = shardinit.plan(fn, mesh=mesh, rules=RULES, strict=True)
    assert [leaf.path for leaf in plan.leaves] == [
        "down/bias",
        "down/kernel",
        "gate",
        "scale",
        "table",
        "up/bias",
        "up/kernel",
    ]
    run = shardinit.compile_plan(plan)
    one, two = run(42), run(43)
    assert differing(as_dict(one), oracle) == []
    assert one.up is not two.up
    assert differing(one, two) != []

    path = tmp_path / "block.init"
    shardinit.export_plan(plan).save(path)
    program = shardinit.load_program(path)
    assert differing(shardinit.init(program, 42, mesh=mesh), oracle) == []
    part = shardinit.read(program, 42, "up/kernel", (slice(3, 9), slice(128, 200)))
    assert np.array_equal(part, oracle["up"]["kernel"][3:9, 128:200])


def test_init_fn_of_a_part(mesh):
    fn = tx.init_fn(Block(), X)
    part = shardinit.init(fn, 42, mesh=mesh, rules=RULES, select="up/**")
    assert isinstance(part.up.kernel, jax.Array)
    assert isinstance(part.gate, tx.Initializer)
    assert not part.initialized
    with pytest.raises(InitFnError, match="cannot be rebuilt"):
        fn.rebuild({"up": 1})


def test_equal_layers_are_one_program(mesh):
    net = tx.Sequential(*[tx.Linear(64) for _ in range(20)])
    plan = shardinit.plan(tx.init_fn(net, X), mesh=mesh)
    assert len(plan.leaves) == 40
    assert len(plan.programs) == 2


def test_what_is_initialised_is_no_part_of_the_function(mesh):
    table = jnp.arange(64.0)
    net = tx.Sequential(tx.Linear(64), tx.Linear(64).init(1, X), tx.RMSNorm())
    net.layers[2].scale = table  # an array of a module that is not initialised
    fn = tx.init_fn(net, X)
    paths = [leaf.path for leaf in shardinit.plan(fn).leaves]
    assert paths == ["layers/0/bias", "layers/0/kernel", "layers/2/scale"]
    made = net.init(42, X, mesh=mesh)
    assert made.layers[1].kernel is net.layers[1].kernel
    whole = made.init(43, X, mesh=mesh)
    assert whole.layers[0].kernel is made.layers[0].kernel


@pytest.mark.slow
def test_typed_and_rbg_keys(mesh):
    net = tx.Sequential(tx.Linear(32), tx.Dropout(0.1))
    for impl in ("threefry2x32", "rbg"):
        key = jax.random.key(42, impl=impl)
        made = net.init(key, X, mesh=mesh)
        assert made.layers[1].rng.dtype == key.dtype
        plain = jax.jit(tx.init_fn(net, X).fn)(key)
        assert differing(made.layers[0].kernel, plain["layers"][0]["kernel"]) == []
    raw = net.init(jax.random.PRNGKey(42), X, mesh=mesh)
    assert raw.layers[1].rng.dtype == np.uint32


@pytest.mark.parametrize("box", ["with_logical_partitioning", "with_partitioning"])
def test_the_names_of_flax_boxes_in_fields_count(mesh, box):
    linen = pytest.importorskip("flax.linen")
    normal = linen.initializers.normal()
    normal = getattr(linen, box)(normal, ("embed", "mlp"))

    class Boxed(tx.Module):
        kernel: object = tx.Parameter.node(None)
        layers: object = tx.Parameter.node(None)

        def __init__(self):
            self.kernel = tx.Initializer(lambda key: normal(key, (8, 64)))

        def __call__(self, x):
            if self.initializing():
                self.layers = {"up": normal(tx.next_key(), (64, 8)), "b": jnp.ones(8)}
            return x

    rules = shardinit.AxisRules([("embed", "data"), ("mlp", "model")])
    made = Boxed().init(0, jnp.ones(8), mesh=mesh, rules=rules)
    kernels = jax.tree.leaves((made.kernel, made.layers["up"]))
    assert [x.sharding.spec for x in kernels] == [P("data", "model")] * 2
    assert made.layers["b"].sharding.is_fully_replicated
    plain = Boxed().init(0, jnp.ones(8))
    assert differing(plain, made) == []


class Mixed(tx.Module):
    table: jax.Array | None = tx.Parameter.node(None)

    def rng_init(self):
        self.table = jax.random.normal(tx.next_key(), (8, 64))

    @tx.compact
    def __call__(self, x):
        self.initializing()  # raises while there is no table
        second, first = tx.Linear(64), tx.Linear(64)
        return second(jax.nn.relu(first(x @ self.table)))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["sequence", "name"])
@pytest.mark.parametrize(
    "select", ["linear/**", "linear2/kernel", "table", ["table", "linear/bias"]]
)
def test_what_select_leaves_out_waits_and_a_later_init_fills_it(mesh, select, policy):
    x = jnp.ones((2, 8))
    fn = tx.init_fn(Mixed(), x, key_policy=policy)
    want = Mixed().init(3, x, key_policy=policy)
    some = shardinit.init(fn, 3, mesh=mesh, select=select)
    assert 0 < len(jax.tree.leaves(some)) < 5
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(some))
    with pytest.raises(ModuleStateError, match="before it was initialised"):
        some(x)
    through_jit = jax.jit(lambda m: m)(some)
    for part in (some, through_jit):
        for whole in (
            part.init(3, x),
            part.init(3, x, mesh=mesh),
            part.init(3),
            shardinit.init(tx.init_fn(part), 3, mesh=mesh),
            some.merge(shardinit.init(fn, 3)),
        ):
            assert all(module.initialized for _, module in modules(whole))
            assert differing(whole, want) == []


def test_what_waits_is_made_of_the_later_key():
    x = jnp.ones((2, 8))
    some = shardinit.init(tx.init_fn(Mixed(), x), 3, select="linear/**")
    whole = some.init(4, x)
    assert differing(whole.linear, some.linear) == []
    assert differing(whole.linear2, Mixed().init(4, x).linear2) == []
    assert whole(x).shape == (2, 64)
    fn = tx.init_fn(Mixed(), x)
    abstract = fn.rebuild(jax.eval_shape(fn.fn, jax.random.key(0)))
    assert isinstance(abstract.linear.kernel, jax.ShapeDtypeStruct)
    assert abstract.initialized
