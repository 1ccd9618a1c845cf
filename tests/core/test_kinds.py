"""Leaves of one kind are placed once: never otherwise than each would be alone."""

from dataclasses import replace

import jax
import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import shardinit
from shardinit.core.plan.leaf_info import LeafInfo
from shardinit.core.plan.sharding import choose
from shardinit.errors import ShardingError

F32 = np.dtype(np.float32)

MESH = jax.sharding.AbstractMesh((2, 4), ("data", "model"))
NAMES = st.sampled_from([None, "embed", "mlp", "data", "model", ("data", "model")])
AXES = st.sampled_from([None, "data", "model", ("data", "model")])
RULES = st.lists(st.tuples(st.sampled_from(["embed", "mlp"]), AXES), max_size=4)
STATED = [None, NamedSharding(MESH, P("model")), NamedSharding(MESH, P(None, "data"))]


def names(axes):
    """Two names, the second one only if it is another."""
    return axes and (axes[0], None if axes[0] == axes[1] else axes[1])


FIELDS = {
    "path": st.text("ab/", min_size=1, max_size=4),
    "shape": st.sampled_from([(8, 16), (16, 8), (1, 1), (512, 512)]),
    "dtype": st.sampled_from([np.dtype(np.int8), F32]),
    "axes": (st.none() | st.tuples(NAMES, NAMES)).map(names),
    "passes": st.booleans(),
    "own_rules": st.just(()) | RULES.map(tuple),
    "stated": st.sampled_from(STATED),
    "optimizer": st.booleans(),
}


@st.composite
def leaves(draw):
    """A leaf, and others that differ from it in one field each."""
    first = LeafInfo(**{name: draw(field) for name, field in FIELDS.items()})
    others = draw(st.lists(st.sampled_from(sorted(FIELDS)), min_size=1, max_size=6))
    return [first, *(replace(first, **{x: draw(FIELDS[x])}) for x in others)]


OWN = (("embed", ["data"]),)  # as a model may write them
RULED = shardinit.AxisRules([("mlp", "data")])
PLACING = st.one_of(
    st.none(),
    st.builds(shardinit.AxisRules, RULES),
    st.just(shardinit.fsdp(min_bytes=256)),
    st.builds(
        shardinit.PathRules,
        st.lists(st.tuples(st.sampled_from("ab/"), st.builds(P, AXES)), max_size=2),
    ),
)


def apart(field, one, other, **known):
    """Two leaves that differ in one field."""
    return [LeafInfo("a", (8, 16), F32, **known, **{field: x}) for x in (one, other)]


@settings(max_examples=120)
@given(leaves(), PLACING, PLACING)
@example(apart("passes", True, False, axes=("data", None)), RULED, None)
@example(apart("own_rules", OWN, (), axes=("embed", None)), RULED, None)
def test_leaves_lie_as_each_would_alone(found, rules, opt_rules):
    def placed(some):
        """The leaves' places, or None where one of them is refused."""
        try:
            chosen = choose(some, MESH, rules, "next", opt_rules)
        except ShardingError:
            return None
        return [(sharding, choice.spec, choice.rules) for sharding, choice in chosen]

    alone = [placed([leaf]) for leaf in found]
    wanted = None if None in alone else [one for (one,) in alone]
    assert placed(found) == wanted


def test_mesh_axes_among_names_may_be_written_as_a_list():
    def placed(names, rules):
        fn = shardinit.InitFn(lambda key: {"w": jax.numpy.ones((16, 16))}, axes=names)
        (leaf,) = shardinit.plan(fn, mesh=MESH, rules=rules).leaves
        return leaf.sharding.spec

    for rules in (shardinit.AxisRules([("embed", "data")]), shardinit.fsdp()):
        as_list, as_tuple = [
            placed({"w": ("embed", both)}, rules)
            for both in (["data", "model"], ("data", "model"))
        ]
        assert as_list == as_tuple
