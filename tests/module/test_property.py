"""Random trees of modules against the documented order, spelled out."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardinit import module as tx
from tests.module.oracle import sequence, uniform

pytestmark = pytest.mark.once


class Node(tx.Module):
    """Each mechanism or not; children in fields, lists and dicts of any names."""

    def __init__(self, spec):
        self.rng_inits, fields = spec
        self.made = None
        for name, value in fields.items():
            setattr(self, name, build(value))

    made: jax.Array | None = tx.Parameter.node()

    def rng_init(self):
        if self.rng_inits:
            self.made = jax.random.uniform(tx.next_key(), (4,))


def build(spec):
    if spec is None:
        return tx.Initializer(lambda key: jax.random.uniform(key, (4,)))
    if isinstance(spec, tuple):
        return Node(spec)
    if isinstance(spec, dict):
        return {k: build(v) for k, v in spec.items()}
    return [build(v) for v in spec]


NAMES = st.sampled_from("z b aa y C _x m1".split())
MODULES = st.recursive(
    st.tuples(st.booleans(), st.dictionaries(NAMES, st.none(), max_size=2)),
    lambda child: st.tuples(
        st.booleans(),
        st.dictionaries(
            NAMES,
            st.none()
            | child
            | st.lists(child, max_size=2)
            | st.dictionaries(NAMES, child, max_size=2),
            max_size=3,
        ),
    ),
    max_leaves=6,
)


def children(spec):
    """Path and value of what lies directly below a module, in the documented order."""
    for name in sorted(spec[1]):
        value = spec[1][name]
        if isinstance(value, dict):
            yield from ((f"{name}/{k}", value[k]) for k in sorted(value))
        elif isinstance(value, list):
            yield from ((f"{name}/{i}", v) for i, v in enumerate(value))
        else:
            yield name, value


def expect(spec, keys):
    """Path to value, the keys taken in the documented order."""
    found = {}

    def initializers(spec, path):
        for name, item in children(spec):
            if item is None:
                found[path + name] = uniform(next(keys), 4)
            else:
                initializers(item, f"{path}{name}/")

    def rng_inits(spec, path):
        for name, item in children(spec):
            if item is not None:
                rng_inits(item, f"{path}{name}/")
        if spec[0]:
            found[f"{path}made"] = uniform(next(keys), 4)

    initializers(spec, "")
    rng_inits(spec, "")
    return {path: np.asarray(value).tobytes() for path, value in found.items()}


@settings(max_examples=15)
@given(MODULES, st.integers(0, 2**31))
def test_random_trees_follow_the_documented_order(spec, seed):
    made = tx.init_fn(Node(spec)).fn(jax.random.key(seed))
    mine = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x).tobytes()
        for path, x in jax.tree_util.tree_leaves_with_path(made)
    }
    assert mine == expect(spec, sequence(seed))
