"""Tables of constants, and numbers that depend on constants: one set of bits.

What the compiler knows while it compiles it may compute then, with other last places
than a loop has. Each test here compares windows of many sizes and places.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import shardinit
from shardinit.errors import ProgramFormatError
from shardinit.v1 import program_pb2 as pb

from .bits import differing

pytestmark = pytest.mark.filterwarnings("ignore::shardinit.errors.FindingsWarning")

TABLES = {
    "linspace": lambda n: jnp.linspace(-3, 0, n),
    "logspace": lambda n: jnp.logspace(-3, 0, n),
    "cosine of an index": lambda n: jnp.cos(jnp.arange(n) * 0.37),
    "window function": lambda n: 0.5 - 0.5 * jnp.cos(6.28 * jnp.arange(n) / (n - 1)),
    "scaled": lambda n: 0.3 * jnp.cos(jnp.arange(n) * 0.37),
    "of captured data": lambda n: jnp.log(np.linspace(0.1, 1, n, dtype=np.float32)),
    "in bfloat16": lambda n: jnp.exp(-jnp.arange(n) / n).astype(jnp.bfloat16),
    "positions": lambda n: jnp.sin(
        jnp.outer(jnp.arange(n), 10000 ** -jnp.linspace(0, 1, 64))
    ),
}
MIXED = {
    "times a table": lambda k, n: jax.random.normal(k, (n, n)) * jnp.linspace(0, 1, n),
    "times a row": lambda k, n: jax.random.normal(k, (n, n)) * np.linspace(0.5, 2, n),
    "plus a table": lambda k, n: (
        jax.random.normal(k, (n, n)) + jnp.sin(jnp.outer(jnp.arange(n), jnp.arange(n)))
    ),
    "a scale a layer": lambda k, n: jax.vmap(
        lambda k, s: jax.random.normal(k, (n, n)) * s
    )(jax.random.split(k, 8), jnp.exp(-jnp.arange(8.0))),
    "of a table's elements": lambda k, n: jnp.exp(jnp.linspace(0, 1, 64))[
        jax.random.randint(k, (n, n), 0, 64)
    ],
    "whole, then elementwise": lambda k, n: jnp.log1p(
        jnp.abs(jnp.cumsum(jax.random.normal(k, (n, n)), 0))
    ),
    "whole, then narrow": lambda k, n: jax.nn.softmax(jax.random.normal(k, (n, n)), 0),
}


def placed(*axes):
    mesh = jax.make_mesh((8,), ("x",))
    return NamedSharding(mesh, PartitionSpec(*axes))


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("length", [64, 128, 1000, 1024])
@pytest.mark.few(8)
def test_a_table_has_the_bits_of_jit_on_every_mesh(name, length):
    def fn(key):
        return {"table": TABLES[name](length)}

    want = jax.jit(fn)(0)
    assert differing(shardinit.init(fn, 0), want) == []
    spread = shardinit.init(fn, 0, out_shardings=placed("x"))
    assert differing(spread, want) == []
    assert not spread["table"].sharding.is_fully_replicated
    part = shardinit.read(fn, 0, "table", slice(3, length // 2))
    assert differing(part, np.asarray(want["table"])[3 : length // 2]) == []


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.few(2)
def test_a_program_carries_its_tables(name):
    def fn(key):
        return [TABLES[name](256), jax.random.normal(key, (256,)), TABLES[name](256)]

    plan = shardinit.plan(fn)
    assert len(plan.programs) == 1  # the random one
    program = shardinit.InitProgram.from_bytes(shardinit.export_plan(plan).to_bytes())
    assert program.fingerprint == plan.fingerprint
    assert len(program.message.functions) == 2
    want = jax.jit(fn)(jax.random.key(3))
    assert differing(shardinit.init(program, 3), want) == []
    assert differing(shardinit.init(program, 3, out_shardings=placed("x")), want) == []
    again = shardinit.export_plan(program)
    assert again.sha256 == program.sha256


def test_tables_differ_by_their_contents():
    def fn(scale):
        return lambda key: jnp.exp(np.linspace(0, scale, 64, dtype=np.float32))

    plans = [shardinit.plan(fn(scale)) for scale in (1.0, 2.0, 1.0)]
    first, second, third = (plan.fingerprint for plan in plans)
    assert first == third != second


@pytest.mark.parametrize(
    "move",
    [
        lambda x: jnp.tile(x, (2, 1)),
        lambda x: jnp.stack([x, x[::-1]]),
        lambda x: jnp.split(x, 2)[1],
        lambda x: jnp.unstack(x)[3],
        lambda x: jax.lax.dynamic_slice(x, (jnp.argmax(x[0]), 0), (1, 8)),
    ],
    ids=["tile", "stack", "split", "unstack", "dynamic_slice"],
)
def test_a_table_that_is_moved_about_stays_one(move):
    table = np.arange(64, dtype=np.float32).reshape(8, 8)
    assert shardinit.plan(lambda key: move(table)).leaves[0].is_hosted


def test_a_table_of_a_nested_call_keeps_its_fingerprint():
    table = np.arange(64, dtype=np.float32).reshape(8, 8)
    tiled = jax.jit(lambda x: jnp.tile(x, (2, 1)))
    assert shardinit.plan(lambda key: tiled(table)).fingerprint == (
        "7ab5b8ab3252f83bdc3c6e793b6a9950d70fdf6925f9c7886e894364ecb03e55"
    )


def test_a_large_table_is_windowed(mesh):
    def fn(key):
        angles = jnp.outer(jnp.arange(8192), 10000 ** -jnp.linspace(0, 1, 64))
        return jnp.cos(angles)

    (leaf,) = shardinit.plan(fn, mesh=mesh).leaves
    assert leaf.program == 0
    alone = shardinit.init(fn, 0)
    assert differing(alone, shardinit.init(fn, 0, out_shardings=placed("x"))) == []
    part = shardinit.read(fn, 0, "", (slice(7, 900), slice(1, 5)))
    assert differing(part, np.asarray(alone)[7:900, 1:5]) == []


def test_a_table_may_not_ask_for_operands_or_stand_before_the_rest():
    def fn(key):
        return jnp.linspace(0, 1, 64), jax.random.normal(key, (64,))

    program = shardinit.export_plan(fn)
    windowed, table = program.message.functions
    assert table.kind == pb.Function.KIND_TABLE
    swapped = type(program.message)()
    swapped.CopyFrom(program.message)
    swapped.functions[0].CopyFrom(table)
    swapped.functions[1].CopyFrom(windowed)
    with pytest.raises(ProgramFormatError, match="table stands before"):
        shardinit.InitProgram(swapped.SerializeToString()).as_cut()
    lying = type(program.message)()
    lying.CopyFrom(program.message)
    lying.functions[1].module = windowed.module
    made = shardinit.InitProgram(lying.SerializeToString())
    with pytest.raises(ProgramFormatError):
        shardinit.InitProgram.from_bytes(made.to_bytes())


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("size", [16, 96, 1024])
def test_what_is_made_of_constants_and_keys_has_one_set_of_bits(name, size):
    def fn(key):
        return MIXED[name](key, size)

    alone = shardinit.init(fn, 5)
    for axes in [("x",), (None, "x")]:
        spread = shardinit.init(fn, 5, out_shardings=placed(*axes))
        assert differing(spread, alone) == [], axes
    window = tuple(slice(1, 1 + n // 3) for n in alone.shape)
    part = shardinit.read(fn, 5, "", window)
    assert differing(part, np.asarray(alone)[window]) == []
    if size == 96:
        program = shardinit.export_plan(fn)
        spread = shardinit.init(program, 5, out_shardings=placed(None, "x"))
        assert differing(spread, alone) == []


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.slow
def test_one_element_has_the_bits_it_has_among_others(portable):
    """The compiler treats scalars by other rules than arrays."""

    def fn(key):
        one, two = jax.random.split(key)
        return {
            "line": jax.random.normal(one, (8,)) * 0.02,
            "column": jax.random.normal(two, (8, 1)) * 0.3,
        }

    made = shardinit.export_plan(fn) if portable else fn
    for seed in range(5):
        alone = shardinit.init(fn, seed)
        spread = shardinit.init(made, seed, out_shardings=placed("x"))
        assert differing(spread, alone) == []
    weights = shardinit.open(made, 4)
    for i in range(8):
        window = weights["column"][i : i + 1, :1]
        assert differing(window, np.asarray(alone["column"])[i : i + 1]) == []
