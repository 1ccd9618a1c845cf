"""Values at the edge of what the engine reads: plain jit's bits, or a clear refusal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import shardinit
from shardinit.errors import InitFnError

from .bits import differing

draw = jax.random
ROWS = np.arange(3, 40, 2)


def normal(key, dtype=jnp.float32):
    return draw.normal(key, (64, 64), dtype)


def scanned(key, length=8):
    def layer(key, _):
        key, own = draw.split(key)
        return key, draw.normal(own, (64,))

    return lax.scan(layer, key, None, length=length)[1]


PICKS = {
    "slice": lambda x: x[3:35],
    "strided slice": lambda x: x[1::3],
    "lookup": lambda x: x[ROWS],
    "dynamic slice": lambda x: lax.dynamic_slice(x, (4, 0), (32, 64)),
    "split": lambda x: jnp.split(x, 2)[1],
}
MOVES = {
    **PICKS,
    "reversed": lambda x: x[::-1],
    "transposed": lambda x: x.T,
    "reshaped": lambda x: x.reshape(32, 128),
    "tiled": lambda x: jnp.tile(x, (2, 1)),
    "broadcast": lambda x: jnp.broadcast_to(x, (2, 64, 64)),
    "stacked": lambda x: jnp.stack([x, x]),
}
BETWEEN = {
    "factors": (lambda x: x * 0.3, lambda x: x * 0.7),
    "the draw's factor": (lambda x: x, lambda x: x * 0.7),
    "divisors": (lambda x: x / 3.0, lambda x: x / 7.0),
    "shifts": (lambda x: x + 0.3, lambda x: x + 0.7),
}
VALUES = {
    "index drawn as uint8": lambda k: jnp.take(
        jnp.arange(300 * 64.0).reshape(300, 64),
        draw.randint(k, (64,), 0, 255, dtype=jnp.uint8),
        axis=0,
    ),
    "index drawn as int8": lambda k: jnp.take(
        jnp.arange(200 * 64.0).reshape(200, 64),
        draw.randint(k, (64,), 0, 127, dtype=jnp.int8),
        axis=0,
    ),
    "function applied at rows": lambda k: normal(k).at[ROWS].apply(jnp.exp),
    "function applied to integers": lambda k: (
        draw.randint(k, (16, 64), 0, 100).at[3:9].apply(lambda x: x * 2 + 1)
    ),
    "row added to integers": lambda k: (
        draw.randint(k, (64, 64), 0, 9).at[jnp.array([3, 60])].add(5)
    ),
    "constant by columns": lambda k: jnp.arange(384).reshape(8, 48).ravel(order="F"),
    "draw by columns": lambda k: normal(k).reshape(16, 256, order="F") + 1,
    "indices by columns": lambda k: normal(k)[
        jnp.arange(16).reshape(4, 4).ravel(order="F")
    ],
    "table of captured data": lambda k: (
        (x := jnp.asarray(np.arange(9900, dtype=np.uint16).reshape(300, 33)))
        .astype(jnp.float16)
        .astype(jnp.float32)
        / jnp.linalg.norm(x.astype(jnp.float32), axis=1, keepdims=True)
    ),
    "nothing reshaped": lambda k: jnp.sum(
        draw.randint(k, (2, 0, 3), 0, 9).reshape(-1)[None], axis=1
    ),
    "layers of a scan scaled": lambda k: scanned(k) * 0.02,
    "layers of a scan shifted": lambda k: scanned(k) - 2.0,
    "layers of a map shifted": lambda k: (
        lax.map(lambda key: draw.normal(key, (64,)), draw.split(k, 8)) + 3.0
    ),
    "barrier of the user's": lambda k: lax.optimization_barrier(normal(k) * 0.3) * 0.7,
    "barrier before a sum": lambda k: lax.optimization_barrier(normal(k) * 3) + 1,
    "mean of constants that a loop made": lambda k: jnp.mean(
        lax.map(lambda _: jnp.full((4, 64), 0.3), draw.split(k, 8)), 1
    ),
    "largest so far": lambda k: lax.associative_scan(
        jnp.maximum, draw.randint(k, (24,), 0, 100)
    ),
    "largest of more so far": lambda k: lax.associative_scan(
        jnp.maximum, draw.normal(k, (6, 64))
    ),
    "two shifts": lambda k: (normal(k) + 0.3)[::-1] + 0.7,
}


TABLE = np.arange(1, 65, dtype=np.float32) * np.float32(1.7)
DIVISORS = {
    "rows of a table": lambda x: x / TABLE,
    "columns of a table": lambda x: x / TABLE[:, None],
    "a full table": lambda x: x / np.outer(TABLE, TABLE[::-1]),
    "a count": lambda x: x / (jnp.arange(64.0) + 1),
    "a choice": lambda x: x / jnp.where(np.arange(64) > 5, 3.0, 7.0),
    "parts": lambda x: x / jnp.concatenate([jnp.full(32, 3.0), jnp.full(32, 7.0)]),
    "an update": lambda x: x / jnp.full(64, 3.0).at[ROWS].set(7.0),
    "rows divided": lambda x: x.at[ROWS].divide(3),
    "a slice divided": lambda x: x.at[3:9].divide(3),
    "columns divided": lambda x: x.at[:, ROWS].divide(3),
    "a diagonal, which is no constant": lambda x: x / (jnp.eye(64) + 3.0),
    "a long sum, which is none": lambda x: x / jnp.cumsum(jnp.ones((64, 64)), 0),
}


def beside(key, make, dtype):
    """Numbers that vary along one axis of a matrix of 64 rows and 96 columns."""
    shape = (96,) if "row" in make else (64, 1)
    if "known" in make:
        return np.linspace(0.5, 2, max(shape)).reshape(shape).astype(dtype)
    if "counted" in make:
        return jnp.linspace(0.5, 2, max(shape), dtype=dtype).reshape(shape)
    return draw.uniform(draw.fold_in(key, 1), shape, dtype, 0.5, 2)


# Factors and divisors that are narrower than what they scale.
BESIDE = {
    "times": lambda x, row: x * row,
    "over": lambda x, row: x / row,
    "under": lambda x, row: row / x,
    "scaled once": lambda x, row: x * 0.3 * row,
    "scaled before": lambda x, row: x * 0.3 * 0.7 * row,
    "scaled after": lambda x, row: row * x * 0.3,
    "both scaled": lambda x, row: (x * 0.7) * (0.3 * row),
    "divided before": lambda x, row: x / 0.3 / row,
    "shifted after": lambda x, row: x * row + 0.5,
    "shifted before": lambda x, row: (x - 1) * row,
    "turned": lambda x, row: (x * row).T,
    "two": lambda x, row: x * row * (row + 1),
    "spread before": lambda x, row: x * (jnp.broadcast_to(row, x.shape) + 1),
    "other axis": lambda x, row: (
        x * row / np.linspace(0.5, 2, 64).astype(x.dtype)[:, None]
    ),
    "of its own": lambda x, row: x / jnp.abs(x).max(0, keepdims=True) * row,
}


def odd(*shape):
    return lax.broadcasted_iota(jnp.int32, shape, 0) % 2 == 1


# A factor that was a truth value: a choice under jit, or a product with zeros of its
# sign, as something lies between or not.
MASKS = {
    "as it is": lambda k: normal(k) * odd(64, 64).astype(jnp.float32),
    "of rows": lambda k: normal(k) * odd(64).astype(jnp.float32),
    "of columns": lambda k: normal(k) * odd(64, 1).astype(jnp.float32),
    "transposed": lambda k: normal(k) * odd(64, 64).astype(jnp.float32).T,
    "looked up": lambda k: normal(k)[:19] * odd(64, 64).astype(jnp.float32)[ROWS],
    "drawn": lambda k: (
        normal(k) * draw.bernoulli(draw.fold_in(k, 1), 0.5, (64,)).astype(jnp.float32)
    ),
    "of a derivative": lambda k: jax.jacfwd(jnp.square)(draw.normal(k, (32,))),
    "of blocks": lambda k: jnp.kron(draw.normal(k, (8, 8)), jnp.eye(8)),
}


def same_as_jit(fn, mesh):
    key = draw.key(5)
    rules = shardinit.fsdp("data", min_bytes=0)
    made = shardinit.init(fn, key, mesh=mesh, rules=rules)
    assert differing(made, jax.jit(fn)(key)) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("make", ["row", "column", "known row", "known column"])
@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.few(16)
def test_what_a_row_scales_has_the_values_of_jit(name, make, dtype, mesh):
    def fn(key):
        return BESIDE[name](draw.normal(key, (64, 96), dtype), beside(key, make, dtype))

    same_as_jit(fn, mesh)


@pytest.mark.parametrize("name", ["times", "scaled once", "scaled before"])
def test_what_a_counted_row_scales_has_the_values_of_jit(name, mesh):
    def fn(key):
        row = beside(key, "counted row", "float32")
        return BESIDE[name](draw.normal(key, (64, 96)), row)

    same_as_jit(fn, mesh)


def test_a_factor_stays_with_what_is_transposed(mesh):
    row = np.linspace(0.5, 2, 64).astype(np.float32)
    same_as_jit(lambda k: draw.normal(k, (64, 96)).T * row, mesh)


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.few(6)
def test_values_are_those_of_jit(name, mesh):
    same_as_jit(VALUES[name], mesh)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.few(4)
def test_a_mask_gives_zeros_the_sign_that_jit_gives_them(name, mesh):
    same_as_jit(MASKS[name], mesh)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("divisor", DIVISORS)
@pytest.mark.few(4)
def test_divisions_by_what_no_key_reaches(divisor, dtype, mesh):
    # Uniform: a normal's last factor and a table are joined by JAX 0.10.2.
    def fn(key):
        return DIVISORS[divisor](draw.uniform(key, (64, 64), dtype)).astype(dtype)

    same_as_jit(fn, mesh)


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("move", PICKS)
@pytest.mark.few(6)
def test_a_pick_keeps_the_arithmetic_on_both_sides_apart(move, between, mesh):
    first, last = BETWEEN[between]
    same_as_jit(lambda key: last(PICKS[move](first(normal(key)))), mesh)


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.few(4)
def test_a_move_keeps_the_rounding_before_a_cast(move, mesh):
    def fn(key):
        drawn = normal(key, jnp.bfloat16) * jnp.bfloat16(0.3)
        return MOVES[move](drawn).astype(jnp.float32) * 3

    same_as_jit(fn, mesh)


@pytest.mark.parametrize(
    "fn",
    [
        lambda k: lax.iota(jnp.float32, 2**33),
        lambda k: jnp.flip(lax.iota(jnp.float32, 2**33)),
        lambda k: jnp.pad(jnp.ones(64, jnp.uint8), (2**32 + 8, 0)),
        lambda k: draw.bits(k, (2**33,), jnp.uint8),
        lambda k: draw.bits(k, (2**33,), jnp.uint8)[2**32 : 2**32 + 8],
    ],
)
def test_axes_beyond_32_bits_are_refused_by_name(fn):
    with pytest.raises(InitFnError, match=r"'big'.*at most 4,294,967,296 elements"):
        shardinit.plan(lambda key: {"big": fn(key)})


def test_a_leaf_without_values_is_refused_by_name():
    def fn(key):
        return {"w": normal(key), "tangent": np.zeros(8, jax.dtypes.float0)}

    with pytest.raises(InitFnError, match=r"'tangent'.*float0"):
        shardinit.plan(fn)


def test_float64_is_kept_apart_too(mesh):
    with jax.enable_x64(True):
        same_as_jit(lambda k: (normal(k, jnp.float64) * 0.3)[3:19] * 0.7, mesh)
        same_as_jit(lambda k: normal(k, jnp.float64) * (jnp.arange(64) % 3 > 0), mesh)


def test_debug_nans_names_the_leaf(mesh):
    def fn(key):
        return {"fine": jnp.ones((8, 32)), "broken": jnp.log(normal(key))}

    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="'broken'"):
        shardinit.init(fn, 0, mesh=mesh)


def weak_leaves(tree):
    return {name for name, leaf in tree.items() if getattr(leaf, "weak_type", False)}


def test_a_leaf_is_weakly_typed_where_jit_returns_it_so(mesh, tmp_path):
    def fn(key):
        return {
            "scale": 0.07,
            "count": 3,
            "table": jnp.full((16, 8), 0.5),
            "picked": jnp.where(draw.bernoulli(key, shape=(16, 8)), 1.0, 0.5),
            "strong": draw.normal(key, (16, 8)) * 0.1,
            "keys": draw.split(key, 8),
        }

    want = jax.jit(fn)(jax.random.key(0))
    assert weak_leaves(want) == {"scale", "count", "table", "picked"}
    rules = shardinit.fsdp("data", min_bytes=1)
    shardinit.export_plan(fn).save(tmp_path / "p")
    for source in (fn, shardinit.load_program(tmp_path / "p")):
        got = shardinit.init(source, 0, mesh=mesh, rules=rules)
        assert weak_leaves(got) == weak_leaves(want)
        assert differing(got, want) == []
        assert got["table"].sharding.spec == jax.P("data")
    left = shardinit.init(fn, 0, mesh=mesh, select="strong")
    assert left["scale"].weak_type
