"""The room of plans: names, rules, mirrors, findings and limits, each alone."""

import functools
import inspect
import sys

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import DictKey, GetAttrKey

from shardinit.core.cut.cutter import cut
from shardinit.core.plan.carried import carried_axes
from shardinit.core.plan.leaf_info import WHOLE, Choice, LeafInfo, Obstacle, Placed
from shardinit.core.plan.leaves import names_of, plan_leaves
from shardinit.core.plan.memory import check_memory
from shardinit.core.plan.mirrors import kept_axes, mirrors
from shardinit.core.plan.placing import placing
from shardinit.core.plan.rules import AxisRules, PathRules
from shardinit.core.plan.tables import largest, rows
from shardinit.errors import WholeLeafError

F32 = np.dtype(np.float32)

KEY = jax.eval_shape(jax.random.key, 0)
MESH = AbstractMesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize(
    ("names", "rules"),
    [
        (("embed", "mlp"), [("embed", "data"), ("mlp", "model")]),
        (("embed", "mlp"), [("mlp", "data"), ("embed", "data")]),  # rules in order
        (("embed", "mlp"), [("embed", None), ("embed", "data"), ("mlp", "model")]),
        (("a", "b"), [("b", ("data", "model")), ("a", "model"), ("a", "data")]),
        (("a", None, "b"), [("b", "data"), ("b", "model"), ("a", "data")]),
        (("a", "b"), [("a", ()), ("b", "model")]),
    ],
)
def test_axis_rules_mean_what_flax_means_by_them(names, rules):
    leaf = LeafInfo("w", (8,) * len(names), F32, axes=names)
    ours = AxisRules(rules).choose(leaf, MESH, "error").spec
    flax = nn.logical_to_mesh_axes(names, rules)
    where = [NamedSharding(MESH, P(*spec)) for spec in (ours, flax)]
    assert where[0].is_equivalent_to(where[1], len(names))


def test_a_name_that_is_a_mesh_axis_counts_where_it_may():
    leaf = LeafInfo("w", (8, 8), F32, axes=("model", "mlp"))
    passing = LeafInfo("w", (8, 8), F32, axes=("model", "mlp"), passes=True)
    rules = AxisRules([("mlp", "data")])
    assert rules.choose(leaf, MESH, "error").spec == P(None, "data")
    assert rules.choose(passing, MESH, "error").spec == P("model", "data")


def test_the_next_rule_counts_where_an_axis_does_not_divide():
    leaf = LeafInfo("w", (6, 8), F32, axes=("embed", "mlp"))
    rules = AxisRules([("embed", "model"), ("embed", "data")])
    assert rules.choose(leaf, MESH, "next").spec == P("data", None)
    odd = LeafInfo("w", (5, 8), F32, axes=("embed", "mlp"))
    found = rules.choose(odd, MESH, "next").reasons
    assert found[0].cause.obstacle is Obstacle.AXIS_UNDIVIDED
    assert found[1].cause.obstacle is Obstacle.NO_RULE


def test_path_rules_take_the_first_that_divides_else_drop_what_does_not():
    rules = PathRules([("w", P("model", "data")), ("w", P("data"))])
    assert rules.choose(LeafInfo("w", (6, 8), F32), MESH, "next").spec == P("data")
    dropped = rules.choose(LeafInfo("w", (5, 8), F32), MESH, "next")
    assert dropped.spec == P(None, "data")
    assert (
        str(dropped.reasons[0].cause) == "axis 0 of size 5 does not divide by model=4"
    )


def placed(*leaves, spec=WHOLE, choice=None):
    rules = AxisRules([("embed", None)])
    chosen = [choice or rules.choose(leaf, MESH, "error") for leaf in leaves]
    pairs = zip(leaves, chosen, strict=True)
    return [Placed(leaf, NamedSharding(MESH, spec), choice) for leaf, choice in pairs]


def test_leaves_of_one_cause_are_one_finding():
    leaves = [LeafInfo(path, (512, 512), F32, axes=("embed", "mlp")) for path in "ab"]
    found = list(placing(placed(*leaves), MESH, AxisRules([("embed", None)]), False))
    replicated = [x for x in found if x.kind == "replicated"]
    assert [(x.leaves, x.severity) for x in replicated] == [(("a", "b"), "warning")]
    assert replicated[0].reason == (
        "no rule for the axis name 'mlp': whole on every device"
    )


def test_a_leaf_that_lies_otherwise_than_it_states_is_overruled():
    stated = NamedSharding(MESH, P("data"))
    leaf = LeafInfo("w", (8, 8), F32, stated=stated)
    other = placed(leaf, spec=P("model"), choice=Choice())
    [found] = [x for x in placing(other, MESH, None, True) if x.kind == "overruled"]
    assert found.leaves == ("w",)
    assert f"the function states {P('data')}" in found.reason
    same = placed(leaf, spec=P("data"), choice=Choice())
    assert not list(placing(same, MESH, None, True))


def test_a_last_resort_may_be_left_over_and_other_rules_may_not():
    leaf = LeafInfo("a/kernel", (8, 8), F32)
    rules = PathRules([("kernel", P("data")), ("a/kern", P()), (".*", P())])
    found = placing(
        placed(leaf, choice=rules.choose(leaf, MESH, "error")), MESH, rules, False
    )
    unmatched = [x for x in found if x.kind == "unmatched-rule"]
    assert [x.rules for x in unmatched] == [(("a/kern", P()),)]


def test_state_of_an_optimizer_mirrors_the_parameter_at_the_end_of_its_path():
    moment, param = (GetAttrKey("mu"), DictKey("w")), (DictKey("p"), DictKey("w"))
    states = {moment: (8, 16), (GetAttrKey("mu"), DictKey("x")): (8, 16)}
    params = {param: (8, 16), (DictKey("p"), DictKey("b")): (16,)}
    assert mirrors(states, params) == {moment: (param, (0, 1))}


@pytest.mark.parametrize(
    ("shape", "param", "dims"),
    [
        ((8, 16), (8, 16), (0, 1)),
        ((16,), (8, 16), (1,)),
        ((1,), (8, 16), (None,)),
        ((5, 8, 16), (8, 16), (None, 0, 1)),
        ((8,), (8, 8), None),  # either axis
        ((7,), (8, 16), None),
    ],
)
def test_which_axes_of_a_parameter_its_state_keeps(shape, param, dims):
    assert kept_axes(shape, param) == dims


def test_boxes_and_optimizers_are_seen_in_any_result():
    def fn(key):
        w = nn.Partitioned(jax.random.normal(key, (8, 16)), ("embed", "mlp"))
        return w, optax.adam(1e-3).init({"w": jax.random.normal(key, (8, 16))})

    made = cut(fn, KEY)
    names = names_of(made, carried_axes(made, None, None))
    assert names[0] == ("embed", "mlp")
    assert [name.optimizer for name in names] == [False, *[True] * (len(names) - 1)]


def test_names_reach_the_leaves_of_a_tree_deeper_than_the_stack():
    def deep(leaf):
        return functools.reduce(lambda inner, _: [inner], range(400), leaf)

    made = cut(lambda key: {"a": deep(jax.numpy.ones(8)), "b": key}, KEY)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 100)
    try:
        found = names_of(made, {"a": deep(("embed",)), "b": None})
    finally:
        sys.setrecursionlimit(limit)
    assert found == [("embed",), None]


def plan_of(fn, *where):
    made = cut(fn, KEY)
    count = len(made.leaves)
    places = list(where) if len(where) > 1 else [*where, None][:1] * count
    leaves, _ = plan_leaves(made, places, [True] * count)
    return made, leaves


def test_a_leaf_says_what_makes_it():
    _, leaves = plan_of(
        lambda key: {
            "drawn": jax.random.normal(key, (8, 32)),
            "full": jax.random.permutation(key, 64),
            "held": np.arange(8),
            "key": key,
        }
    )
    said = {leaf.path: (leaf.is_hosted, leaf.is_replicated) for leaf in leaves}
    assert said == {
        "drawn": (False, False),
        "full": (False, True),
        "held": (True, False),
        "key": (True, False),
    }
    assert [leaf.program >= 0 for leaf in leaves] == [not x.is_hosted for x in leaves]


def test_a_limit_counts_what_is_computed_in_full():
    cut_in_8 = NamedSharding(MESH, P(("data", "model")))
    made, leaves = plan_of(lambda key: jax.random.permutation(key, 1024), cut_in_8)
    assert leaves[0].bytes_per_device == 512
    check_memory(made, leaves, 4096)
    with pytest.raises(WholeLeafError, match=r"4,096 bytes, most of them.*in full"):
        check_memory(made, leaves, 4095)


def test_a_limit_counts_a_shard_on_its_way_to_the_host_and_no_longer():
    host = NamedSharding(MESH, P("data"), memory_kind="pinned_host")
    here = NamedSharding(MESH, P("data"))

    def fn(key):
        zeros = jax.numpy.zeros(1024)
        return [jax.random.normal(key, (1024,)), zeros, zeros, zeros]

    made, leaves = plan_of(fn, here, host, host, host)
    held = leaves[0].bytes_per_device
    check_memory(made, leaves, 2 * held)
    with pytest.raises(WholeLeafError, match=r"'1' is made here .* in pinned_host"):
        check_memory(made, leaves, 2 * held - 1)
    _, leaves = plan_of(fn, host)
    assert [row[5] for row in rows(leaves)] == ["P('data',) in pinned_host"] * 2


def test_the_largest_rows_are_those_of_the_most_bytes():
    _, leaves = plan_of(lambda key: [jax.numpy.ones(n) for n in (9, 1000, 20)])
    shown, left = largest(leaves, 1)
    assert shown == [rows(leaves)[1]]
    assert left == 2
