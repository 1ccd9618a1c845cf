"""Random init functions of any depth, one for each seed, held against plain `jax.jit`.

A function draws from one or two keys, under loops and maps, and passes what it drew
through up to eight operations. `compare` says what `shardinit.init` makes of it:

    python -m tests.core.random_functions 0 10000 --processes 2
"""

import argparse
import collections
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import shardinit
from shardinit.errors import ShardinitError

FLOATS = ("float32", "float32", "float32", "bfloat16", "float16")
INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32")
SIZES = (1, 2, 3, 4, 5, 8, 12, 16, 32, 33, 40, 64, 96)
LARGEST = 1 << 15  # elements of any value, so that a function compiles quickly

Make = Callable[[jax.Array], jax.Array]


# --- what is drawn ------------------------------------------------------------------


def draw_of(rng, shape, dtype) -> tuple[str, Make]:
    """A distribution or an initializer of `shape`."""
    init, random = jax.nn.initializers, jax.random
    table: dict[str, Make] = {
        "normal": lambda k: random.normal(k, shape, dtype),
        "uniform": lambda k: random.uniform(k, shape, dtype, -1.0, 3.0),
        "truncated": lambda k: random.truncated_normal(k, -2, 2, shape, dtype),
        "exponential": lambda k: random.exponential(k, shape, dtype),
        "gumbel": lambda k: random.gumbel(k, shape, dtype),
        "laplace": lambda k: random.laplace(k, shape, dtype),
        "logistic": lambda k: random.logistic(k, shape, dtype),
        "bernoulli": lambda k: random.bernoulli(k, 0.3, shape),
        "rademacher": lambda k: random.rademacher(k, shape, dtype),
        "randint": lambda k: random.randint(k, shape, -9, 1000),
        "bits": lambda k: random.bits(k, shape, "uint16"),
        "cauchy": lambda k: random.cauchy(k, shape, dtype),
        "init_normal": lambda k: init.normal(0.02)(k, shape, dtype),
        "init_constant": lambda k: init.constant(0.3)(k, shape, dtype),
    }
    if len(shape) >= 2:
        for name in ("lecun_normal", "he_uniform", "glorot_normal"):
            fn = getattr(init, name)()
            table[name] = lambda k, fn=fn: fn(k, shape, dtype)
    name = str(rng.choice(sorted(table)))
    return f"{name}{shape}{np.dtype(dtype).name}", table[name]


def scanned(make: Make, key, length: int):
    def step(carry, _):
        carry, sub = jax.random.split(carry)
        return carry, make(sub)

    return jax.lax.scan(step, key, None, length=length)[1]


def counted(make: Make, key, length: int):
    return jax.lax.map(
        lambda i: make(jax.random.fold_in(key, i)), jnp.arange(length, dtype=jnp.int32)
    )


def filled(make: Make, key, length: int):
    one = jax.eval_shape(make, key)
    empty = jnp.zeros((length, *one.shape), one.dtype)

    def body(i, held):
        return held.at[i].set(make(jax.random.fold_in(key, i)))

    return jax.lax.fori_loop(0, length, body, empty)


LOOPS = {
    "vmap": lambda make, key, n: jax.vmap(make)(jax.random.split(key, n)),
    "vmap_last": lambda make, key, n: jax.vmap(make, out_axes=-1)(
        jax.random.split(key, n)
    ),
    "map": lambda make, key, n: jax.lax.map(make, jax.random.split(key, n)),
    "scan": scanned,
    "counted": counted,
    "fori": filled,
    "stack": lambda make, key, n: jnp.stack(
        [make(jax.random.fold_in(key, i)) for i in range(min(n, 4))]
    ),
}


def scaled(make: Make, scale: float, key):
    value = make(key)
    return value * jnp.asarray(scale, value.dtype)


def looped(loop: Callable, make: Make, length: int, key):
    return loop(make, key, length)


def source(rng) -> tuple[str, Make]:
    rank = int(rng.integers(0, 4))
    shape = tuple(int(s) for s in rng.choice(SIZES, rank))
    while np.prod(shape, initial=1) > LARGEST // 8:
        shape = shape[1:]
    if shape and rng.random() < 0.7:  # promise (a) is bit for bit from 32 on
        shape = (*shape[:-1], int(rng.choice((32, 40, 64, 96))))
    name, make = draw_of(rng, shape, jnp.dtype(str(rng.choice(FLOATS))))
    if rng.random() < 0.3:
        kind, n = str(rng.choice(sorted(LOOPS))), int(rng.choice((2, 3, 8)))
        if rng.random() < 0.3:  # arithmetic of the step's own
            scale = float(rng.choice((0.1, 0.5, 3.0)))
            make, name = partial(scaled, make, scale), f"{name}*{scale}"
        name, make = f"{kind}{n}({name})", partial(looped, LOOPS[kind], make, n)
    return name, make


# --- what becomes of it -------------------------------------------------------------

OPERATIONS: dict[str, Callable] = {}


def operation(fn):
    """Registers ``fn(rng, x) -> Make``; None where `x` won't do."""
    OPERATIONS[fn.__name__] = fn
    return fn


def floating(x) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def axis_of(rng, x) -> int | None:
    return int(rng.integers(x.ndim)) if x.ndim else None


@operation
def scalar(rng, x):
    number = rng.choice((0.1, 0.3, 0.5, 2.0, 3.0, 1 / 7)) if floating(x) else 3
    if floating(x):
        number = number.item() if rng.random() < 0.5 else jnp.asarray(number, x.dtype)
    fn = {
        "mul": lambda v: v * number,
        "add": lambda v: v + number,
        "rsub": lambda v: number - v,
        "div": lambda v: v / number,
        "rdiv": lambda v: number / (jnp.abs(v) + 1),
        "max": lambda v: jnp.maximum(v, number),
        "min": lambda v: jnp.minimum(v, number),
        "pow": lambda v: jnp.abs(v) ** number,
        "mod": lambda v: v % number,
    }
    if x.dtype == bool:
        return None
    name = str(rng.choice(sorted(fn)))
    return named(f"{name}({number})", fn[name])


@operation
def unary(rng, x):
    if not floating(x):
        fn = {"abs": jnp.abs, "sign": jnp.sign, "square": jnp.square}
        if x.dtype == bool:
            fn = {"not": jnp.logical_not}
    else:
        fn = {
            "exp": lambda v: jnp.exp(jnp.minimum(v, 4)),
            "tanh": jnp.tanh,
            "log1p": lambda v: jnp.log1p(jnp.abs(v)),
            "sqrt": lambda v: jnp.sqrt(jnp.abs(v)),
            "rsqrt": lambda v: jax.lax.rsqrt(jnp.abs(v) + 1),
            "sin": jnp.sin,
            "erf": jax.scipy.special.erf,
            "sigmoid": jax.nn.sigmoid,
            "square": jnp.square,
            "floor": jnp.floor,
            "abs": jnp.abs,
            "neg": jnp.negative,
            "sign": jnp.sign,
            "softplus": jax.nn.softplus,
            "relu": jax.nn.relu,
            "cbrt": jnp.cbrt,
            "atan": jnp.arctan,
        }
    name = str(rng.choice(sorted(fn)))
    return named(name, fn[name])


@operation
def cast(rng, x):
    dtype = str(rng.choice(FLOATS + INTEGERS + ("bool",)))
    if floating(x) and not dtype.startswith(("float", "bfloat")):
        # What a float beyond an integer's range becomes is the backend's choice.
        return named(f"cast({dtype})", lambda v: jnp.clip(v, 0, 100).astype(dtype))
    return named(f"cast({dtype})", lambda v: v.astype(dtype))


@operation
def reshape(rng, x):
    if not x.size:
        return None
    sizes, rest = [], x.size
    while rest > 1 and len(sizes) < 3:
        part = int(rng.choice([d for d in range(1, rest + 1) if rest % d == 0]))
        sizes.append(part)
        rest //= part
    shape = tuple(int(s) for s in rng.permutation([*sizes, rest]))
    order = str(rng.choice(("C", "C", "F")))
    return named(f"reshape({shape}{order})", lambda v: v.reshape(shape, order=order))


@operation
def transpose(rng, x):
    axes = tuple(int(a) for a in rng.permutation(x.ndim))
    return named(f"transpose{axes}", lambda v: v.transpose(axes))


@operation
def flip(rng, x):
    axis = axis_of(rng, x)
    return (
        None if axis is None else named(f"flip({axis})", partial(jnp.flip, axis=axis))
    )


@operation
def roll(rng, x):
    axis, by = axis_of(rng, x), int(rng.integers(-3, 9))
    return named(f"roll({by},{axis})", lambda v: jnp.roll(v, by, axis))


@operation
def pad(rng, x):
    if not x.ndim or not x.size:
        return None
    widths = [tuple(int(w) for w in rng.integers(0, 3, 2)) for _ in range(x.ndim)]
    mode = str(rng.choice(("constant", "constant", "edge", "wrap", "reflect")))
    return named(f"pad({widths},{mode})", lambda v: jnp.pad(v, widths, mode=mode))


@operation
def lax_pad(rng, x):
    if not x.ndim:
        return None
    config = [
        (int(rng.integers(-1, 2)), int(rng.integers(-1, 3)), int(rng.integers(0, 2)))
        for _ in range(x.ndim)
    ]
    return named(
        f"lax_pad({config})", lambda v: jax.lax.pad(v, jnp.zeros((), v.dtype), config)
    )


@operation
def window(rng, x):
    axis = axis_of(rng, x)
    if axis is None or x.shape[axis] < 4:
        return None
    start, step = int(rng.integers(0, 3)), int(rng.choice((1, 1, 2, 3)))
    index = (slice(None),) * axis + (slice(start, None, step),)
    return named(f"[{axis}:{start}::{step}]", lambda v: v[index])


@operation
def dynamic(rng, x):
    if not x.size:
        return None
    sizes = [int(rng.integers(1, s + 1)) for s in x.shape]
    starts = [int(rng.integers(-2, s + 2)) for s in x.shape]
    return named(
        f"dynamic_slice({starts},{sizes})",
        lambda v: jax.lax.dynamic_slice(v, [jnp.int32(s) for s in starts], sizes),
    )


@operation
def update(rng, x):
    if not x.size or not x.ndim:
        return None
    sizes = [int(rng.integers(1, s + 1)) for s in x.shape]
    starts = [int(rng.integers(-2, s + 2)) for s in x.shape]
    return named(
        f"dynamic_update({starts},{sizes})",
        lambda v: jax.lax.dynamic_update_slice(v, jnp.ones(sizes, v.dtype), starts),
    )


@operation
def take(rng, x):
    axis = axis_of(rng, x)
    if axis is None or not x.shape[axis]:
        return None
    size = x.shape[axis]
    index = rng.integers(-size - 2, size + 2, int(rng.integers(1, 40)))
    index = np.clip(index, -128, 127).astype(str(rng.choice(("int8", "int32"))))
    mode = str(rng.choice(("clip", "fill", "wrap")))
    return named(
        f"take({axis},{mode},{index.dtype})",
        lambda v: jnp.take(v, index, axis=axis, mode=mode),
    )


@operation
def scatter(rng, x):
    axis = axis_of(rng, x)
    if axis is None or not x.shape[axis] or x.dtype == bool:
        return None
    size = x.shape[axis]
    if rng.random() < 0.5:
        index = int(rng.integers(size))
    else:
        index = rng.permutation(size)[: int(rng.integers(1, 6))].astype("int32")
    where = (slice(None),) * axis + (index,)
    mode = str(rng.choice(("drop", "clip", "promise_in_bounds")))
    how = str(rng.choice(("set", "add", "multiply", "min", "max", "divide", "apply")))
    if how in ("divide", "apply") and not floating(x):
        how = "set"
    if how == "apply":
        return named(f"at[{axis}].apply", lambda v: v.at[where].apply(jnp.tanh))
    return named(
        f"at[{axis}].{how}({mode})",
        lambda v: getattr(v.at[where], how)(jnp.asarray(2, v.dtype), mode=mode),
    )


@operation
def masked(rng, x):
    axis = axis_of(rng, x)
    if axis is None:
        return None
    every = int(rng.choice((2, 3, 7)))

    def fn(v):
        place = jax.lax.broadcasted_iota(jnp.int32, v.shape, axis)
        return jnp.where(place % every == 0, v, jnp.asarray(1, v.dtype))

    return named(f"where({axis}%{every})", fn)


@operation
def triangle(rng, x):
    if x.ndim < 2:
        return None
    return named("tril", jnp.tril) if rng.random() < 0.5 else named("triu", jnp.triu)


@operation
def repeated(rng, x):
    axis = axis_of(rng, x)
    if axis is None:
        return None
    if rng.random() < 0.5:
        return named(f"repeat(3,{axis})", partial(jnp.repeat, repeats=3, axis=axis))
    reps = tuple(2 if a == axis else 1 for a in range(x.ndim))
    return named(f"tile{reps}", lambda v: jnp.tile(v, reps))


@operation
def broadcast(rng, x):
    size = int(rng.choice((2, 3, 8)))
    return named(f"broadcast({size})", lambda v: jnp.broadcast_to(v, (size, *v.shape)))


@operation
def concatenate(rng, x):
    axis = axis_of(rng, x)
    if axis is None:
        return None
    kind = str(rng.choice(("self", "zeros", "neg")))
    other = {"self": lambda v: v, "zeros": jnp.zeros_like, "neg": lambda v: v[::-1]}
    return named(
        f"concatenate({kind},{axis})",
        lambda v: jnp.concatenate([v, other[kind](v)], axis),
    )


@operation
def reduce(rng, x):
    axis = axis_of(rng, x)
    if axis is None or not x.size or x.dtype == bool:
        return None
    names = ("max", "min", "any") if not floating(x) else ("max", "min", "sum", "mean")
    name = str(rng.choice(names))
    keep = bool(rng.random() < 0.5)
    return named(
        f"{name}({axis},{keep})",
        lambda v: getattr(jnp, name)(v, axis=axis, keepdims=keep),
    )


@operation
def beside(rng, x):
    """A factor or a divisor that varies along one axis, or the largest along one."""
    axis = axis_of(rng, x)
    if axis is None or not floating(x) or not x.size:
        return None
    sizes = [n if a == axis else 1 for a, n in enumerate(x.shape)]
    line = rng.uniform(0.5, 2, sizes).astype(x.dtype)
    fn = {
        "times": lambda v: v * line,
        "by": lambda v: v / line,
        "by_largest": lambda v: v / (jnp.abs(v).max(axis, keepdims=True) + 1),
        "by_drawn": lambda v: v / (jnp.exp(v.min(axis, keepdims=True))),
    }
    name = str(rng.choice(sorted(fn)))
    return named(f"{name}({axis})", fn[name])


@operation
def normalised(rng, x):
    axis = axis_of(rng, x)
    if axis is None or not floating(x) or not x.size:
        return None
    fn = {
        "cumsum": lambda v: jnp.cumsum(v, axis),
        "sort": lambda v: jnp.sort(v, axis),
        "softmax": lambda v: jax.nn.softmax(v, axis),
        "centred": lambda v: v - v.mean(axis, keepdims=True),
        "unit": lambda v: v / (jnp.linalg.norm(v, axis=axis, keepdims=True) + 1),
    }
    name = str(rng.choice(sorted(fn)))
    return named(f"{name}({axis})", fn[name])


@operation
def bitcast(rng, x):
    pairs = {"float32": "uint32", "uint32": "float32", "uint16": "int16"}
    to = pairs.get(np.dtype(x.dtype).name)
    if to is None or to == "float32":
        return None
    return named(f"bitcast({to})", lambda v: jax.lax.bitcast_convert_type(v, to))


def named(name: str, fn: Make) -> tuple[str, Make]:
    return name, fn


# --- functions ----------------------------------------------------------------------


@dataclass(frozen=True)
class Function:
    """A drawn init function; `steps` says in words what it does."""

    seed: int
    steps: tuple[str, ...]
    make: Make

    def __call__(self, key: jax.Array) -> jax.Array:
        return self.make(key)

    def __str__(self) -> str:
        return f"{self.seed}: {' | '.join(self.steps)}"


def operated(rng, make: Make, shape, depth: int) -> tuple[list[str], Make, object]:
    steps = []
    while len(steps) < depth:
        drawn = OPERATIONS[str(rng.choice(sorted(OPERATIONS)))](rng, shape)
        if drawn is None:
            continue
        name, fn = drawn
        try:
            after = jax.eval_shape(fn, shape)
        except (TypeError, ValueError, OverflowError):  # JAX refuses it for this shape
            continue
        if not 0 < after.size <= LARGEST or after.ndim > 5:
            continue
        steps.append(name)
        make, shape = (lambda k, fn=fn, make=make: fn(make(k))), after
    return steps, make, shape


def function(seed: int) -> Function:
    """The function of `seed`: the same one wherever and whenever it is asked for."""
    rng = np.random.default_rng(seed)
    key = jax.random.key(0)
    name, make = source(rng)
    steps, make, shape = operated(
        rng, make, jax.eval_shape(make, key), int(rng.integers(0, 5))
    )
    steps = [name, *steps]
    if rng.random() < 0.25 and shape.dtype != bool:  # two draws meet
        other, second = draw_of(rng, shape.shape, jnp.dtype("float32"))
        how = str(rng.choice(("add", "mul", "where", "concatenate")))
        first = make

        def both(k):
            a, b = jax.random.split(k)
            a, b = first(a), second(b).astype(shape.dtype)
            if how == "where":
                return jnp.where(b > 0, a, b)
            if how == "concatenate":
                return jnp.concatenate([a.reshape(-1), b.reshape(-1)])
            return a + b if how == "add" else a * b

        make, steps = both, [*steps, f"{how} {other}"]
        more, make, shape = operated(
            rng, make, jax.eval_shape(make, key), int(rng.integers(0, 4))
        )
        steps += more
    return Function(seed, tuple(steps), make)


def sharding(seed: int, shape, mesh) -> NamedSharding:
    """A sharding for a leaf of `shape` that uses as many mesh axes as divide it."""
    rng = np.random.default_rng(seed)
    spec: list[str | None] = [None] * len(shape)
    for axis in mesh.axis_names:
        fitting = [
            d
            for d, size in enumerate(shape)
            if spec[d] is None and size % mesh.shape[axis] == 0
        ]
        if fitting and rng.random() < 0.8:
            spec[int(rng.choice(fitting))] = axis
    return NamedSharding(mesh, PartitionSpec(*spec))


@dataclass(frozen=True)
class Outcome:
    """What became of one function: equal, narrow, differs, refused or failed."""

    seed: int
    kind: str
    replicated: bool
    text: str


def differing(a: np.ndarray, b: np.ndarray) -> int:
    """How many elements of two arrays of one dtype have other bits."""
    words = np.dtype(f"u{a.dtype.itemsize}")
    return int((a.view(words) != b.view(words)).sum())


def compare(seed: int, mesh) -> Outcome:
    """Initialises the function of `seed` both ways and compares every bit."""
    fn = function(seed)
    key = jax.random.key(seed)
    try:
        expected = jax.jit(fn)(key)
    except Exception as error:  # what plain jit refuses has no right value
        return Outcome(seed, "invalid", False, f"{fn}\n  {error}")
    try:
        placed = sharding(seed, expected.shape, mesh)
        plan = shardinit.plan(fn, key=key, mesh=mesh, out_shardings=placed)
        got = shardinit.compile_plan(plan)(key)
    except ShardinitError as error:
        return Outcome(seed, "refused", False, f"{fn}\n  {error}")
    except Exception as error:
        return Outcome(seed, "failed", False, f"{fn}\n  {type(error).__name__} {error}")
    whole = any(leaf.whole for leaf in plan.leaves)
    a, b = (np.asarray(v) for v in (expected, got))
    if a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes():
        return Outcome(seed, "equal", whole, str(fn))
    same = a.dtype == b.dtype and a.shape == b.shape
    count = differing(a, b) if same else f"{a.dtype} {a.shape}, {b.dtype} {b.shape}:"
    narrow = not a.ndim or a.shape[-1] < 32
    text = f"{fn}\n  {count} of {a.size} elements differ, {a.dtype} {a.shape}"
    return Outcome(seed, "narrow" if narrow else "differs", whole, text)


def run(span: range) -> list[Outcome]:
    mesh = jax.make_mesh((2, 2), ("a", "b"))
    outcomes = []
    for number, seed in enumerate(span):
        outcomes.append(compare(seed, mesh))
        if number % 50 == 49:
            jax.clear_caches()  # each function is compiled once; nothing is hit again
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("start", type=int)
    parser.add_argument("stop", type=int)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", help="a file for the outcomes, one JSON a line")
    asked = parser.parse_args()
    began = time.monotonic()
    spans = [
        range(at, min(at + 100, asked.stop))
        for at in range(asked.start, asked.stop, 100)
    ]
    counts = collections.Counter()
    with multiprocessing.get_context("spawn").Pool(asked.processes) as pool:
        for outcomes in pool.imap_unordered(run, spans):
            for one in outcomes:
                counts[one.kind] += 1
                counts["computed in full"] += one.replicated
                if asked.out:
                    with open(asked.out, "a") as file:
                        file.write(json.dumps(one.__dict__) + "\n")
                if one.kind not in ("equal", "invalid", "narrow"):
                    print(one.kind, one.text, flush=True)
    print(f"jax {jax.__version__}, {time.monotonic() - began:.0f} s:", dict(counts))


if __name__ == "__main__":
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    main()
