"""The promises of the contract, over random init functions.

(a) the values of plain ``jax.jit``, bit for bit; (b) one set of bits on every mesh;
(d) each distinct program once.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import shardinit
from shardinit.errors import WholeLeafError

from .bits import differing, raw, ulps
from .random_fns import (
    DISTRIBUTIONS,
    INITIALIZERS,
    MESHES,
    NARROW,
    draw_shardings,
    models,
)


def make_mesh(name):
    shape, axes = MESHES[name]
    return jax.make_mesh(shape, axes)


@settings(max_examples=5)
@given(data=st.data(), model=models(), seed=st.integers(0, 2**31 - 1))
def test_equals_plain_jit_on_every_mesh(data, model, seed):
    key = jax.random.key(seed)
    want = jax.jit(model)(key)
    for name in data.draw(st.permutations(sorted(MESHES)))[:2]:
        mesh = make_mesh(name)
        shardings = draw_shardings(data.draw, want, mesh)
        plan = shardinit.plan(model, out_shardings=shardings)
        assert not plan.whole_leaves
        got = shardinit.compile_plan(plan)(key)
        assert differing(got, want) == []
        for leaf, sharding in zip(
            jax.tree.leaves(got), jax.tree.leaves(shardings), strict=True
        ):
            assert leaf.sharding == sharding


@settings(max_examples=4)
@given(data=st.data(), model=models(NARROW), seed=st.integers(0, 2**31 - 1))
def test_narrow_leaves_have_one_set_of_bits(data, model, seed):
    """Where jit has several: two meshes and shardings, and the unsharded program."""
    key = jax.random.key(seed)
    one_device = shardinit.init(model, key)
    for name in data.draw(st.permutations(sorted(MESHES)))[:2]:
        shardings = draw_shardings(data.draw, one_device, make_mesh(name))
        got = shardinit.init(model, key, out_shardings=shardings)
        assert differing(got, one_device) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", sorted(DISTRIBUTIONS))
@pytest.mark.few(3)
def test_distributions_are_windowed_at_every_rank(name, dtype):
    """Ranks 0 to 4, narrow shards too: no whole-leaf program, jit's bits."""
    shapes = [(), (40,), (16, 32), (2, 4, 32), (2, 2, 8, 32)]

    def fn(key):
        draw = DISTRIBUTIONS[name]
        return [draw(key, shape, jnp.dtype(dtype)) for shape in shapes]

    key = jax.random.key(5)
    want = jax.jit(fn)(key)
    mesh = jax.make_mesh((2, 4) if dtype == "float32" else (1, 8), ("a", "b"))
    plan = shardinit.plan(fn, mesh=mesh, rules=shardinit.fsdp(min_bytes=0))
    assert not plan.whole_leaves
    assert differing(shardinit.compile_plan(plan)(key), want) == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_nothing_common_is_whole(dtype):
    """Every initializer and distribution, ranks 0 to 4, in four dtypes."""
    with jax.enable_x64(dtype == "float64"):

        def fn(key):
            out = {}
            for name, (make, least) in INITIALIZERS.items():
                for rank in range(least, 5):
                    out[f"{name}{rank}"] = make(key, (8,) * rank, jnp.dtype(dtype))
            for name, make in DISTRIBUTIONS.items():
                for rank in range(5):
                    out[f"{name}{rank}"] = make(key, (8,) * rank, jnp.dtype(dtype))
            return out

        assert shardinit.plan(fn).whole_leaves == ()


@pytest.mark.parametrize("name", sorted(INITIALIZERS))
@pytest.mark.few(3)
def test_narrow_shards_have_the_bits_of_wide_ones(name):
    """Width 1 to 16 a device on four meshes: one set of bits, where jit has several.

    The leaf is narrow too, so that jit itself is only near: within 4 units in the
    last place, its random bits being ours.
    """
    initializer, _ = INITIALIZERS[name]

    def fn(key):
        return initializer(key, (24, 8), jnp.float32)

    key = jax.random.key(11)
    want = jax.jit(fn)(key)
    seen = set()
    for mesh_name, spec in (
        ("2x4", PartitionSpec()),
        ("2x4", PartitionSpec("a", "b")),
        ("1x8", PartitionSpec(None, ("a", "b"))),
        ("8x1", PartitionSpec(("b", "a"))),
    ):
        sharding = NamedSharding(make_mesh(mesh_name), spec)
        got = shardinit.init(fn, key, out_shardings=sharding)
        assert ulps(got, want) <= 4
        seen.add(raw(got))
    assert len(seen) == 1


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
@pytest.mark.few(1)
def test_other_key_implementations(impl, mesh):
    """Their bits cannot be windowed: whole leaves, named in the plan, jit's values.

    A map draws them step by step, and only its steps are whole.
    """

    def fn(key):
        keys = jax.random.split(key, 3)
        stacked = jax.lax.map(lambda k: jax.random.normal(k, (8, 32)), keys)
        return {
            "folded": jax.random.normal(jax.random.fold_in(keys[0], 3), (16, 32)),
            "plain": jax.random.uniform(keys[1], (32, 8), jnp.bfloat16),
            "stacked": stacked,
        }

    key = jax.random.key(3, impl=impl)
    plan = shardinit.plan(fn, key=key, mesh=mesh, rules=shardinit.fsdp(min_bytes=0))
    assert [leaf.path for leaf in plan.whole_leaves] == ["folded", "plain"]
    assert impl in plan.whole_leaves[0].whole
    got = shardinit.compile_plan(plan)(key)
    assert differing(got, jax.jit(fn)(key)) == []


def test_raw_keys(mesh):
    def fn(key):
        key, sub = jax.random.split(key)
        rows = jax.random.split(sub, 4)
        return {
            "first": jax.random.normal(rows[0], (16, 32)),
            "rows": jax.vmap(lambda k: jax.random.normal(k, (4, 64)))(rows),
            "key": key,
            "all": rows,
        }

    key = jax.random.PRNGKey(9)
    got = shardinit.init(fn, key, mesh=mesh, rules=shardinit.fsdp(min_bytes=0))
    assert differing(got, jax.jit(fn)(key)) == []


def test_leaves_that_are_no_parameters(mesh):
    """Constants, copies, casts, keys, scalars, empty arrays, every dtype."""
    table = np.arange(6 * 40, dtype=np.float32).reshape(6, 40)

    def fn(key):
        base = jax.random.normal(key, (8, 64))
        ints = ("int8", "uint8", "int16", "uint16", "int32", "uint32")
        return {
            "captured": jnp.asarray(table),
            "used": jnp.asarray(table) * jax.random.uniform(key, (6, 40)),
            "base": base,
            "copy": base,
            "cast": base.astype(jnp.bfloat16),
            "key": key,
            "keys": jax.random.split(key, (2, 4)),
            "key_data": jax.random.key_data(jax.random.fold_in(key, 1)),
            "step": 0,
            "rate": 0.5,
            "flag": jnp.array(True),
            "empty": jnp.zeros((0, 8)),
            "scalar": jax.random.normal(jax.random.fold_in(key, 2)),
            "range": jnp.arange(64),
            "eye": jnp.eye(32),
            "complex": jax.random.normal(key, (4, 32), jnp.complex64),
            "ints": {t: jax.random.randint(key, (3, 32), 0, 99, t) for t in ints},
            "bits": {w: jax.random.bits(key, (4, 40), w) for w in ("uint8", "uint16")},
        }

    key = jax.random.key(1)
    got = shardinit.init(fn, key, mesh=mesh, rules=shardinit.fsdp(min_bytes=0))
    assert differing(got, jax.jit(fn)(key)) == []


def test_64_bit_types(mesh):
    with jax.enable_x64(True):

        def fn(key):
            return {
                "normal": jax.random.normal(key, (8, 64), jnp.float64),
                "uniform": jax.random.uniform(key, (8, 8, 32), jnp.float64),
                "truncated": jax.nn.initializers.he_normal()(key, (64, 32), "float64"),
                "bits": jax.random.bits(key, (8, 40), "uint64"),
                "ints": jax.random.randint(key, (8, 40), 0, 2**40, "int64"),
            }

        key = jax.random.key(1)
        plan = shardinit.plan(fn, mesh=mesh, rules=shardinit.fsdp(min_bytes=0))
        assert not plan.whole_leaves
        got = shardinit.compile_plan(plan)(key)
        assert differing(got, jax.jit(fn)(key)) == []


def test_optimizer_state_beside_parameters(mesh):
    optax = pytest.importorskip("optax")
    optimizer = optax.chain(optax.clip(1.0), optax.adamw(1e-3), optax.ema(0.9))

    def fn(key):
        keys = jax.random.split(key, 2)
        params = {
            "w": jax.nn.initializers.he_normal()(keys[0], (64, 32)),
            "b": jnp.zeros((32,)),
        }
        return {"params": params, "opt": optimizer.init(params)}

    key = jax.random.key(4)
    got = shardinit.init(fn, key, mesh=mesh, rules=shardinit.fsdp(min_bytes=0))
    assert differing(got, jax.jit(fn)(key)) == []


def test_one_compiled_plan_many_seeds_and_donation(mesh):
    def fn(key):
        return {
            "w": jax.random.normal(key, (16, 32)),
            "one": jnp.ones((16, 32)),
            "step": np.int32(3),
            "key": key,
        }

    rules = shardinit.fsdp(min_bytes=0)
    exe = shardinit.compile_plan(shardinit.plan(fn, mesh=mesh, rules=rules))
    consume = jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)
    for seed in (0, 1, 0):
        got = exe(seed)
        assert differing(got, jax.jit(fn)(jax.random.key(seed))) == []
        got.pop("key")
        consume(got)  # what was handed out is the caller's to give away


@pytest.mark.slow
def test_whole_leaves_are_the_same_on_every_mesh():
    """Reductions, QR and shuffles: whole on every device, jit's bits on all meshes."""

    def fn(key):
        keys = jax.random.split(key, 5)
        normal = jax.random.normal(keys[0], (16, 32))
        q, r = jnp.linalg.qr(jax.random.normal(keys[1], (32, 16)))
        return {
            "rows": normal / jnp.linalg.norm(normal, axis=1, keepdims=True),
            "cumulative": jnp.cumsum(jax.random.uniform(keys[2], (8, 32)), axis=1),
            "orthogonal": jax.nn.initializers.orthogonal()(keys[3], (32, 16)),
            "shuffled": jax.random.permutation(keys[4], 64),
            "gamma": jax.random.gamma(keys[0], 2.0, (8, 32)),
            "q": q,
            "r": r,
        }

    key = jax.random.key(2)
    want = jax.jit(fn)(key)
    for name in ("1x8", "2x4", "2x2x2"):
        mesh = make_mesh(name)
        plan = shardinit.plan(fn, mesh=mesh, rules=shardinit.fsdp(min_bytes=0))
        assert len(plan.whole_leaves) == 7
        assert len(plan.programs) == 6  # q and r share one decomposition
        assert differing(shardinit.compile_plan(plan)(key), want) == []
    with pytest.raises(WholeLeafError, match="cumulative"):
        shardinit.plan(fn, mesh=mesh, strict=True)
    gspmd = shardinit.init(fn, key, mesh=mesh, whole="gspmd")
    assert gspmd["q"].shape == (32, 16)


def stacked_layers(depth):
    def fn(key):
        layers = []
        for number in range(depth):
            k1, k2 = jax.random.split(jax.random.fold_in(key, number))
            layers.append(
                {
                    "up": jax.nn.initializers.lecun_normal()(k1, (32, 64)),
                    "down": jax.random.normal(k2, (64, 32)) * 0.02,
                    "scale": jnp.ones((32,)),
                }
            )
        return {"layers": layers, "embed": jax.random.normal(key, (64, 32))}

    return fn


@pytest.mark.slow
def test_programs_do_not_grow_with_depth(mesh):
    rules = shardinit.fsdp("data", min_bytes=0)
    plans = [shardinit.plan(stacked_layers(n), mesh=mesh, rules=rules) for n in (2, 64)]
    counts = [len(plan.programs) for plan in plans]
    assert counts == [4, 4]
    exe = shardinit.compile_plan(plans[1])
    assert len(exe.executables) == 4
    assert len({id(x) for x in exe.executables}) == 4


def test_only_its_own_shard(mesh):
    """Temporaries stay under 1 MiB plus a tenth of the shard; no collective."""

    def fn(key):
        keys = jax.random.split(key, 4)
        return {
            "normal": jax.random.normal(keys[0], (4096, 1024)),
            "bf16": jax.nn.initializers.he_normal()(keys[1], (4096, 1024), "bfloat16"),
            "odd": jax.nn.initializers.normal()(keys[2], (4000, 1004)),
            "stacked": jax.vmap(lambda k: jax.random.normal(k, (512, 1000)))(
                jax.random.split(keys[3], 8)
            ),
        }

    spec = {
        "normal": PartitionSpec("data", "model"),
        "bf16": PartitionSpec(None, "model"),
        "odd": PartitionSpec("data", "model"),
        "stacked": PartitionSpec("data", "model"),
    }
    plan = shardinit.plan(fn, mesh=mesh, out_shardings=spec)
    for executable, program in zip(
        shardinit.compile_plan(plan).executables, plan.programs, strict=True
    ):
        shard = int(np.prod(program.shardings[0].shard_shape(program.shapes[0])))
        memory = executable.memory_analysis()
        assert memory.temp_size_in_bytes <= (1 << 20) + shard * 4 // 10
        text = executable.as_text()
        for collective in ("all-gather", "all-reduce", "all-to-all", "permute"):
            assert collective not in text


@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
@pytest.mark.few(1)
def test_inside_a_mesh_context(kind):
    """``jax.set_mesh`` around the call changes nothing, captured arrays included."""
    types = (getattr(jax.sharding.AxisType, kind),) * 2
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=types)
    placed = jax.device_put(
        np.arange(64.0, dtype=np.float32).reshape(2, 32),
        NamedSharding(mesh, PartitionSpec("a", "b")),
    )

    def fn(key):
        return {
            "w": jax.random.normal(key, (8, 64)),
            "scaled": jax.nn.initializers.he_normal()(key, (2, 32)) * placed,
            "orthogonal": jax.nn.initializers.orthogonal()(key, (8, 32)),
            "one": jnp.ones((8, 32)),
        }

    outside = shardinit.plan(fn, mesh=mesh)
    with jax.set_mesh(mesh):
        plan = shardinit.plan(fn, mesh=mesh)
        got = shardinit.compile_plan(plan)(3)
    assert plan.fingerprint == outside.fingerprint
    assert differing(got, shardinit.compile_plan(outside)(3)) == []


@pytest.mark.parametrize("devices", [None, 4])
def test_inside_the_context_of_another_mesh(mesh, devices):
    """The mesh that counts is the one that is given, or one device."""
    other = None
    if devices is not None:
        other = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("x",))

    def fn(key):
        return jax.random.normal(key, (8, 64))

    outside = shardinit.init(fn, 3, mesh=other)
    with jax.set_mesh(mesh):
        inside = shardinit.init(fn, 3, mesh=other)
    assert inside.sharding == outside.sharding
    assert differing(inside, outside) == []


@pytest.mark.slow
def test_products_with_a_broadcast_factor_agree_within_four_ulp(mesh):
    """XLA moves scalar factors into a row that a leaf is multiplied by, or not, from
    version to version: the exception to the first promise. Ours are one set of bits."""
    row = np.linspace(0.5, 2, 64).astype(np.float32)
    products = {
        "row": lambda k: jax.random.normal(k, (32, 64)) * row,
        "scaled row": lambda k: jax.random.normal(k, (32, 64)) * 0.3 * row,
        "drawn row": lambda k: (
            jax.random.normal(k, (32, 64))
            * jax.random.normal(jax.random.fold_in(k, 1), (64,))
        ),
    }
    key = jax.random.key(6)
    for name, fn in products.items():
        alone = shardinit.init(fn, key)
        assert ulps(alone, jax.jit(fn)(key)) <= 4, name
        spread = shardinit.init(fn, key, mesh=mesh, rules=shardinit.fsdp(min_bytes=0))
        assert differing(alone, spread) == []
