"""The cut: what is never merged, what always is, and what is refused."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shardinit
from shardinit.errors import InitFnError, UnsupportedConfigError

from .bits import differing, unlike_jit

SHAPE = (4, 32)


def normal(key, **changes):
    return jax.random.normal(key, SHAPE, **changes)


def pair(first, second):
    """An init function of two leaves whose programs must stay apart."""

    def fn(key):
        a, b = jax.random.split(key)
        return {"first": first(a), "second": second(b)}

    return fn


TABLE = np.linspace(0, 1, 128, dtype=np.float32).reshape(SHAPE)
LARGE = np.arange(300 * 300, dtype=np.float32).reshape(300, 300)


def changed(table, place, value):
    table = table.copy()
    table[place] = value
    return table


def times(table):
    return lambda key: jax.random.normal(key, table.shape) * table


def closure(value):
    return lambda key: normal(key) + value


def threshold(value):
    @jax.jit
    def inner(key):
        return jnp.where(normal(key) > value, 1.0, 0.0)

    return inner


# Each pair differs in one thing only.
PAIRS = {
    "contents of a captured array": (times(TABLE), times(changed(TABLE, (1, 2), 7))),
    "contents of a large one": (times(LARGE), times(changed(LARGE, (299, 299), -1))),
    "sign of a captured zero": (
        times(changed(TABLE, (0, 0), 0.0)),
        times(changed(TABLE, (0, 0), -0.0)),
    ),
    "NaN payload": (
        times(changed(TABLE, (0, 0), np.uint32(0x7FC00000).view(np.float32))),
        times(changed(TABLE, (0, 0), np.uint32(0x7FC00001).view(np.float32))),
    ),
    "captured dtype": (
        times(np.ones(SHAPE, np.float16)),
        times(np.ones(SHAPE, jnp.bfloat16)),
    ),
    "literal": (lambda k: normal(k) + 0.1, lambda k: normal(k) + 0.2),
    "literal in the last place": (
        lambda k: normal(k) + np.float32(0.1),
        lambda k: normal(k) + np.nextafter(np.float32(0.1), np.float32(1)),
    ),
    "sign of a literal zero": (
        lambda k: jnp.maximum(normal(k), -0.0),
        lambda k: jnp.maximum(normal(k), 0.0),
    ),
    "closure": (closure(1.5), closure(2.5)),
    "literal inside a nested jit": (threshold(0.5), threshold(0.25)),
    "dtype": (normal, lambda k: normal(k, dtype=jnp.bfloat16)),
    "shape": (normal, lambda k: jax.random.normal(k, (8, 32))),
    "bit width": (
        lambda k: jax.random.bits(k, SHAPE, "uint8").astype("uint32"),
        lambda k: jax.random.bits(k, SHAPE, "uint16").astype("uint32"),
    ),
    "parameter of a primitive": (
        lambda k: jax.lax.integer_pow(normal(k), 2),
        lambda k: jax.lax.integer_pow(normal(k), 3),
    ),
    "axis of a whole-leaf primitive": (
        lambda k: jnp.cumsum(jax.random.normal(k, (32, 32)), axis=0),
        lambda k: jnp.cumsum(jax.random.normal(k, (32, 32)), axis=1),
    ),
    "order of operands": (
        lambda k: normal(k) - TABLE,
        lambda k: TABLE - normal(k),
    ),
    "static slice": (
        lambda k: jax.random.normal(k, (8, 32))[:4],
        lambda k: jax.random.normal(k, (8, 32))[4:],
    ),
    "number of keys": (
        lambda k: jax.vmap(normal)(jax.random.split(k, 4))[:3],
        lambda k: jax.vmap(normal)(jax.random.split(k, 5))[:3],
    ),
    "key inside the leaf": (
        lambda k: normal(k) + normal(jax.random.key(1)),
        lambda k: normal(k) - normal(jax.random.key(1)),
    ),
}


def functions(plan):
    """The different functions of a plan: a program and the numbers it is given."""
    return {
        (
            leaf.source.program,
            *(d.data.tobytes() for d in leaf.operands if d.op == "words"),
        )
        for leaf in plan.cut.leaves
    }


@pytest.mark.parametrize("difference", sorted(PAIRS))
@pytest.mark.few(5)
def test_never_merged(difference, mesh):
    fn = pair(*PAIRS[difference])
    plan = shardinit.plan(fn, mesh=mesh)
    assert len(functions(plan)) == 2
    key = jax.random.key(0)
    assert differing(shardinit.compile_plan(plan)(key), jax.jit(fn)(key)) == []


def test_sharding_keeps_executables_apart(mesh):
    spec = jax.sharding.PartitionSpec
    fn = pair(normal, normal)
    shardings = {"first": spec("model"), "second": spec(None, "model")}
    assert len(shardinit.plan(fn, mesh=mesh, out_shardings=shardings).programs) == 2
    assert len(shardinit.plan(fn, mesh=mesh, out_shardings=spec("model")).programs) == 1


@pytest.mark.parametrize(
    "same",
    [
        pair(normal, normal),
        pair(times(TABLE), times(TABLE.copy())),
        pair(closure(1.5), closure(1.5)),
        pair(functools.partial(normal), jax.jit(normal)),
        pair(jax.jit(jax.jit(normal)), lambda k: normal(jax.random.clone(k))),
        pair(threshold(0.5), threshold(0.5)),
    ],
)
def test_equal_functions_are_merged(same):
    assert len(shardinit.plan(same).programs) == 1


CHANGES = st.sampled_from(
    [
        lambda x, v: x + v,
        lambda x, v: x / v,
        lambda x, v: jnp.where(x > v, x, v),
        lambda x, v: jnp.clip(x, -v, v),
        lambda x, v: x**2 + v,
        lambda x, v: jnp.exp(x * v).astype(jnp.bfloat16).astype(jnp.float32),
    ]
)


@settings(max_examples=12)
@given(
    CHANGES,
    st.floats(0.125, 9, width=32),
    st.floats(0.125, 9, width=32),
    st.booleans(),
)
def test_merged_exactly_when_the_number_is_the_same(change, one, other, as_array):
    def with_number(number):
        value = np.full(SHAPE, number, np.float32) if as_array else np.float32(number)
        return lambda key: change(normal(key), value)

    plan = shardinit.plan(pair(with_number(one), with_number(other)))
    assert len(functions(plan)) == (1 if np.float32(one) == np.float32(other) else 2)


def scaled(dtype, scales):
    """A factor a layer, as depth-scaled initializers have it."""

    def fn(key):
        make = (
            lambda k: jax.random.normal(k, SHAPE),
            lambda k: jax.random.uniform(k, SHAPE, minval=-1.0),
            lambda k: jax.random.truncated_normal(k, -2, 2, SHAPE),
            lambda k: jax.nn.initializers.he_normal()(k, SHAPE),
        )
        return [
            [(draw(jax.random.fold_in(key, i)) * s).astype(dtype) for draw in make]
            for i, s in enumerate(scales)
        ]

    return fn


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_factor_a_layer_is_an_operand(dtype, mesh):
    """Four programs for any number of depth-scaled layers; jit's bits all the same."""
    scales = [0.02 / np.sqrt(2 * (n + 1)) for n in range(8)] + [0.0, 1.0, -3.7, 1e30]
    fn = scaled(dtype, scales)
    plan = shardinit.plan(fn, mesh=mesh, rules=shardinit.fsdp(min_bytes=0))
    assert len(plan.programs) == 4
    other = shardinit.plan(scaled(dtype, [*scales[:-1], 1e29]), mesh=mesh)
    assert other.fingerprint != plan.fingerprint
    key = jax.random.key(6)
    assert differing(shardinit.compile_plan(plan)(key), jax.jit(fn)(key)) == []


def test_fingerprint_is_of_the_function(mesh):
    base = shardinit.plan(pair(normal, normal))
    assert base.fingerprint == shardinit.plan(pair(normal, normal)).fingerprint
    assert (
        base.fingerprint == shardinit.plan(pair(normal, normal), mesh=mesh).fingerprint
    )
    others = [
        shardinit.plan(pair(*functions)).fingerprint for functions in PAIRS.values()
    ]
    renamed = shardinit.plan(lambda k: {"first": normal(k), "third": normal(k)})
    swapped = shardinit.plan(
        lambda k: dict(
            zip(("second", "first"), map(normal, jax.random.split(k)), strict=True)
        )
    )
    rbg = shardinit.plan(pair(normal, normal), key=jax.random.key(0, impl="rbg"))
    everything = [base.fingerprint, *others, renamed.fingerprint]
    everything += [swapped.fingerprint, rbg.fingerprint]
    assert len(set(everything)) == len(everything)


def test_counters_and_loops_derive_keys():
    """Arithmetic on constants, a carried key, stacked keys: all in the prelude."""

    def fn(key):
        count = jnp.uint32(0)
        out = []
        for _ in range(3):
            out.append(normal(jax.random.fold_in(key, count)))
            count = count + 1

        def step(carry, i):
            carry, sub = jax.random.split(carry)
            return carry, jax.random.fold_in(sub, i)

        last, keys = jax.lax.scan(step, key, jnp.arange(4), reverse=True)
        rows = jax.lax.map(normal, keys)
        return {"counted": out, "rows": rows, "last": normal(last)}

    plan = shardinit.plan(fn)
    assert not plan.whole_leaves
    assert len(plan.programs) == 2
    key = jax.random.key(8)
    assert differing(shardinit.compile_plan(plan)(key), jax.jit(fn)(key)) == []


@pytest.mark.slow
def test_windows_through_moves_of_elements(mesh):
    """Reshapes, transposes, joins, pads, updates and slices are pushed down."""

    def fn(key):
        keys = iter(jax.random.split(key, 16))
        draw = lambda *shape: jax.random.normal(next(keys), shape)  # noqa: E731
        return {
            "reshaped": draw(16, 40).reshape(8, 2, 5, 8),
            "merged": draw(4, 8, 32).reshape(32, 32),
            "transposed": draw(32, 8, 4).transpose(2, 0, 1),
            "joined": jnp.concatenate([draw(3, 32), jnp.zeros((2, 32)), draw(3, 32)]),
            "stacked": jnp.stack([draw(32), draw(32)], 1),
            "padded": jnp.pad(draw(6, 30), ((1, 1), (2, 0))),
            "flipped": draw(8, 32)[::-1, ::-1],
            "strided": draw(16, 64)[1::2, ::2],
            "updated": jax.lax.dynamic_update_slice(
                draw(8, 32), jnp.ones((2, 4)), (3, 8)
            ),
            "tiled": jnp.tile(draw(4, 8), (2, 4)),
            "repeated": jnp.repeat(draw(8, 1), 32, 1),
        }

    plan = shardinit.plan(fn, mesh=mesh, rules=shardinit.fsdp(min_bytes=0))
    assert not plan.whole_leaves
    key = jax.random.key(8)
    assert unlike_jit(shardinit.compile_plan(plan)(key), jax.jit(fn)(key)) == []


def test_calls_of_every_kind_and_small_floats(mesh):
    """custom_jvp, custom_vjp and remat are inlined; 8-bit floats are cast to."""

    @jax.custom_vjp
    def double(x):
        return x * 2 + 1

    double.defvjp(lambda x: (double(x), None), lambda _, g: (g,))

    def fn(key):
        keys = jax.random.split(key, 6)
        return {
            "custom_jvp": jax.nn.relu(normal(keys[0])),
            "custom_vjp": double(normal(keys[1])),
            "remat": jax.checkpoint(lambda k: jnp.sin(normal(k)))(keys[2]),
            "e4m3": normal(keys[3]).astype(jnp.float8_e4m3fn),
            "e5m2": normal(keys[4]).astype(jnp.float8_e5m2),
            "bool": normal(keys[5]) > 0,
        }

    plan = shardinit.plan(fn, mesh=mesh, rules=shardinit.fsdp(min_bytes=0))
    assert not plan.whole_leaves
    key = jax.random.key(4)
    assert differing(shardinit.compile_plan(plan)(key), jax.jit(fn)(key)) == []


def test_parts_of_one_array_are_computed_alone(mesh):
    """Leaves cut from a large intermediate stay windowed: nothing full-size exists."""

    def fn(key):
        fused = jax.random.normal(key, (3, 256, 256))
        return {name: fused[i] for i, name in enumerate("qkv")}

    plan = shardinit.plan(fn, mesh=mesh)
    assert not plan.whole_leaves
    assert (
        differing(shardinit.compile_plan(plan)(0), jax.jit(fn)(jax.random.key(0))) == []
    )


def test_a_scan_that_carries_more_than_keys_is_whole(mesh):
    def fn(key):
        def step(carry, k):
            carry = carry + jax.random.normal(k, (32,))
            return carry, carry

        return jax.lax.scan(step, jnp.zeros(32), jax.random.split(key, 4))[1]

    plan = shardinit.plan(fn, mesh=mesh)
    assert plan.whole_leaves[0].whole.startswith("scan")
    key = jax.random.key(0)
    assert differing(shardinit.compile_plan(plan)(key), jax.jit(fn)(key)) == []


# ---- refusals ----------------------------------------------------------------------


def test_non_array_leaf():
    with pytest.raises(InitFnError, match=r"leaf 'b/name'.*returned a str"):
        shardinit.plan(lambda key: {"a": normal(key), "b": {"name": "adam"}})


def test_callback_is_named_by_its_leaf():
    def fn(key):
        host = jax.pure_callback(
            lambda: np.ones(3, np.float32), jax.ShapeDtypeStruct((3,), jnp.float32)
        )
        return {"good": normal(key), "bad": host * 2}

    with pytest.raises(InitFnError, match=r"leaf 'bad'.*pure_callback"):
        shardinit.plan(fn)


def test_side_effect_without_a_leaf():
    def fn(key):
        jax.debug.print("{}", key)
        return normal(key)

    with pytest.raises(InitFnError, match="side effect"):
        shardinit.plan(fn)


def test_tracer_from_outside_is_named_by_its_leaf():
    seen = []

    @jax.jit
    def outer(x):
        try:
            shardinit.plan(lambda key: {"fine": normal(key), "leak": normal(key) * x})
        except InitFnError as error:
            seen.append(str(error))
        return x

    outer(1.0)
    assert "leaf 'leak'" in seen[0]
    assert "outside jax.jit" in seen[0]


def test_control_flow_on_the_key():
    def fn(key):
        return normal(key) if jax.random.bernoulli(key) else jnp.zeros(SHAPE)

    with pytest.raises(InitFnError, match="traced value"):
        shardinit.plan(fn)


def test_unpartitionable_threefry_is_refused():
    with (
        jax.threefry_partitionable(False),
        pytest.raises(UnsupportedConfigError, match="size of the whole array"),
    ):
        shardinit.plan(normal)


@pytest.mark.parametrize("key", [1.5, "seed", True, np.zeros(3), None])
def test_bad_key(key):
    with pytest.raises(TypeError, match="key"):
        shardinit.init(normal, key) if key is not None else shardinit.init(normal, [])


def test_key_of_another_kind_than_planned():
    exe = shardinit.compile_plan(shardinit.plan(normal))
    with pytest.raises(TypeError, match="rbg"):
        exe(jax.random.key(0, impl="rbg"))


def test_not_callable():
    with pytest.raises(TypeError, match="callable"):
        shardinit.plan({"w": 1})


def test_nothing_is_allocated_by_a_plan():
    """A plan of 400 billion parameters is abstract."""

    def fn(key):
        return jax.random.normal(key, (1 << 20, 400_000))

    with mock.patch.object(jax, "device_put", side_effect=AssertionError):
        plan = shardinit.plan(fn, mesh=jax.sharding.AbstractMesh((4096,), ("x",)))
    assert plan.total_bytes == 4 * 400_000 << 20
    assert plan.bytes_per_device == plan.total_bytes // 4096


@pytest.mark.parametrize("seed", [1 << 63, -(1 << 63) - 1, 1 << 100])
def test_a_seed_that_no_key_can_hold(seed):
    with pytest.raises(ValueError, match="from -2\\*\\*63 to"):
        shardinit.init(normal, seed)


def test_inside_a_transformation(mesh):
    def outer(key):
        return shardinit.init(normal, key, mesh=mesh)

    key = jax.random.key(0)
    for run in (jax.jit(outer), lambda k: jax.eval_shape(outer, k)):
        with pytest.raises(InitFnError, match=r"inside jax\.jit"):
            run(key)
    with pytest.raises(InitFnError, match=r"inside jax\.jit"):
        jax.jit(lambda: outer(3))()
    with pytest.raises(TypeError, match="being traced"):
        jax.jit(lambda k: shardinit.read(normal, k, ""))(key)


def test_without_jit_nothing_is_planned():
    with (
        jax.disable_jit(),
        pytest.raises(UnsupportedConfigError, match=r"outside jax.disable_jit"),
    ):
        shardinit.init(normal, 0)


def test_a_numpy_array_of_text_is_named_by_its_leaf():
    with pytest.raises(InitFnError, match=r"leaf 'name'.*dtype <U5"):
        shardinit.plan(lambda key: {"name": np.array(["gpt-2"]), "w": normal(key)})
