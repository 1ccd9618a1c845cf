"""Random init functions for the property tests: one strategy a part of the contract."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

MESHES = {
    "1x8": ((1, 8), ("a", "b")),
    "2x4": ((2, 4), ("a", "b")),
    "8x1": ((8, 1), ("a", "b")),
    "2x2x2": ((2, 2, 2), ("a", "b", "c")),
}

FLOATS = ("float32", "bfloat16", "float16")

init = jax.nn.initializers
# Every initializer but the orthogonal ones, with the least rank it takes.
INITIALIZERS = {
    "normal": (init.normal(0.02), 0),
    "uniform": (init.uniform(0.1), 0),
    "truncated_normal": (init.truncated_normal(0.5), 0),
    "zeros": (init.zeros, 0),
    "ones": (init.ones, 0),
    "constant": (init.constant(0.3), 0),
    "lecun_normal": (init.lecun_normal(), 2),
    "lecun_uniform": (init.lecun_uniform(), 2),
    "glorot_normal": (init.glorot_normal(), 2),
    "glorot_uniform": (init.glorot_uniform(), 2),
    "he_normal": (init.he_normal(), 2),
    "he_uniform": (init.he_uniform(), 2),
    "variance_scaling": (init.variance_scaling(2.0, "fan_out", "normal"), 2),
}
# Distributions of jax.random: (key, shape, dtype) to an array.
DISTRIBUTIONS = {
    "normal": jax.random.normal,
    "uniform": lambda k, s, d: jax.random.uniform(k, s, d, -1.0, 3.0),
    "truncated_normal": lambda k, s, d: jax.random.truncated_normal(k, -2, 2, s, d),
    "bernoulli": lambda k, s, d: jax.random.bernoulli(k, 0.3, s),
    "randint": lambda k, s, d: jax.random.randint(k, s, -5, 1000),
    "exponential": jax.random.exponential,
    "gumbel": jax.random.gumbel,
    "laplace": jax.random.laplace,
    "logistic": jax.random.logistic,
}


@dataclass(frozen=True)
class Leaf:
    """One drawn leaf: how its key derives, what is made of it, how it is placed."""

    derive: str
    kind: str
    name: str
    shape: tuple
    dtype: str
    wrap: str

    def make(self, key):
        shape, dtype = self.shape, jnp.dtype(self.dtype)
        if self.kind == "initializer":
            fn = INITIALIZERS[self.name][0]
        else:
            fn = DISTRIBUTIONS[self.name]
        if self.wrap == "jit":
            value = jax.jit(lambda k: fn(k, shape, dtype))(key)
        elif self.wrap == "vmap":
            value = jax.vmap(lambda k: fn(k, shape, dtype))(jax.random.split(key, 4))
        elif self.wrap == "vmap_inner":
            value = jax.vmap(lambda k: fn(k, shape, dtype), out_axes=-1)(
                jax.random.split(key, 8)
            )
        elif self.wrap == "map":
            value = jax.lax.map(lambda k: fn(k, shape, dtype), jax.random.split(key, 4))
        elif self.wrap == "scan":

            def step(carry, _):
                carry, sub = jax.random.split(carry)
                return carry, fn(sub, shape, dtype)

            value = jax.lax.scan(step, key, None, length=4)[1]
        elif self.wrap == "reshaped":
            value = fn(key, shape, dtype)
            value = value.reshape(-1) if value.ndim != 1 else value[None].T
        elif self.wrap == "cast":
            value = fn(key, shape, jnp.dtype("float32")).astype(dtype)
        else:
            value = fn(key, shape, dtype)
        return value


WIDE = (32, 40, 64, 96, 129)  # there promise (a) is bit for bit
NARROW = (2, 4, 8, 16, 24)  # shards down to one element wide


@st.composite
def leaves(draw, widths=WIDE):
    kind = draw(st.sampled_from(("initializer", "distribution")))
    table = INITIALIZERS if kind == "initializer" else DISTRIBUTIONS
    name = draw(st.sampled_from(sorted(table)))
    least = INITIALIZERS[name][1] if kind == "initializer" else 0
    rank = draw(st.integers(least, max(least, 3)))
    sizes = [draw(st.sampled_from((1, 2, 3, 8, 16))) for _ in range(rank - 1)]
    last = [draw(st.sampled_from(widths))] if rank else []
    wraps = ["none", "jit", "vmap", "map", "scan", "cast"]
    if rank == 2:
        wraps += ["reshaped"]
    return Leaf(
        draw(st.sampled_from(("fold_in", "split", "sequential", "chain", "raw"))),
        kind,
        name,
        (*sizes, *last),
        draw(st.sampled_from(FLOATS)),
        draw(st.sampled_from(wraps)),
    )


@dataclass(frozen=True)
class Model:
    """A drawn init function: leaves in nested containers, keys derived in five ways."""

    leaves: tuple
    nest: str

    def __call__(self, key):
        parts = jax.random.split(key, len(self.leaves) + 1)
        running = parts[-1]
        values = []
        for number, leaf in enumerate(self.leaves):
            if leaf.derive == "fold_in":
                mine = jax.random.fold_in(key, number + 1000)
            elif leaf.derive == "split":
                mine = parts[number]
            elif leaf.derive == "sequential":
                running, mine = jax.random.split(running)
            elif leaf.derive == "chain":
                mine = jax.random.fold_in(jax.random.fold_in(key, number), 7)
            else:
                data = jax.random.key_data(jax.random.fold_in(key, number + 500))
                mine = jax.random.wrap_key_data(data)
            values.append(leaf.make(mine))
        if self.nest == "dict":
            return {f"p{i}": v for i, v in enumerate(values)}
        if self.nest == "tuple":
            return (values[0], {"rest": values[1:]})
        return [{"x/y": v, "none": None} for v in values]


@st.composite
def models(draw, widths=WIDE):
    count = draw(st.integers(1, 3))
    drawn = tuple(draw(leaves(widths)) for _ in range(count))
    return Model(drawn, draw(st.sampled_from(("dict", "tuple", "list"))))


def draw_shardings(draw, tree, mesh):
    """A random spec for each leaf: sharded, partly sharded or replicated.

    Axes are cut down to shards of width one where they divide.
    """

    def one(leaf):
        free = list(mesh.axis_names)
        spec = []
        for size in leaf.shape:
            fitting = [a for a in free if size % mesh.shape[a] == 0]
            choice = draw(st.sampled_from([None, *fitting])) if fitting else None
            both = [
                (a, b)
                for a in fitting
                for b in fitting
                if a != b and size % (mesh.shape[a] * mesh.shape[b]) == 0
            ]
            if both and draw(st.booleans()):
                choice = draw(st.sampled_from(both))
            for axis in choice if isinstance(choice, tuple) else [choice]:
                if axis in free:
                    free.remove(axis)
            spec.append(choice)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(one, tree)
