"""Selections: which part of a tree, then what becomes of it."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import DictKey, GetAttrKey, SequenceKey

from shardinit import deferred
from shardinit.core.paths import path_str
from shardinit.deferred import SelectionError, select
from tests.core.bits import differing
from tests.deferred.models import Dense, stack

pytestmark = pytest.mark.once


def tree():
    return {"a": [1, 2, {"b": 5}], "c": (), "d": None}


def test_at_picks_one_node_and_the_rest_stays():
    picked = select(tree()).at(lambda t: t["a"][2])
    assert picked.get() == {"b": 5}
    assert picked.get_by_path() == {(DictKey("a"), SequenceKey(2)): {"b": 5}}
    assert picked.set(7) == {"a": [1, 2, 7], "c": (), "d": None}
    assert picked.at(lambda node: node["b"]).apply(lambda v: v + 1)["a"][2] == {"b": 6}
    assert select(tree()).at(lambda t: t["d"]).set(3)["d"] == 3
    assert select(tree()).at(lambda t: t["c"]).get() == ()


def test_at_tells_equal_leaves_apart_and_takes_several():
    both = select([1, 1, 1]).at(lambda t: [t[0], t[2]], multiple=True)
    assert both.set_sequence([5, 6]) == [5, 1, 6]
    assert select([1, 1]).at(lambda t: t[1]).set(9) == [1, 9]


def test_at_refuses_what_is_no_node():
    with pytest.raises(SelectionError, match="what is static"):
        stack(1)[0].select().at(lambda layer: layer.activation)
    with pytest.raises(SelectionError, match="multiple=True"):
        select([1, 2]).at(lambda t: [t[0], t[1]])


def test_a_struct_selects_itself():
    layer = Dense.build(4, 8)
    assert layer.select().get() is layer
    frozen = (
        layer.select()
        .at(lambda m: m.bias)
        .set(deferred.FrozenParameter(jnp.zeros(8), "bias"))
    )
    assert isinstance(frozen.bias, deferred.FrozenParameter)
    assert isinstance(layer.bias, deferred.UninitializedParameter)
    path = layer.select().at(lambda m: m.bias).get_keypaths()
    assert path == ((GetAttrKey("bias"),),)


def test_instances_are_the_outermost_and_a_union_takes_all_of_its_classes():
    model = {"layers": stack(2), "n": 3}
    assert select(model).at_instances_of(Dense).count() == 2
    parameters = select(model).at_instances_of(deferred.UninitializedParameter)
    assert [p.name for p in parameters.get_sequence()] == [
        "layer_0.kernel",
        "layer_0.bias",
        "layer_1.kernel",
        "layer_1.bias",
    ]
    assert select(model).at_instances_of(Dense | int).count() == 3
    assert select(model).at_instances_of((dict, int)).get() is not None
    nested = [[1, [2]], 3]
    assert select(nested).at_children().at_instances_of(list).get() == [1, [2]]


def test_subtrees_by_a_test_on_nodes_or_on_paths():
    found = select(tree()).at_subtrees_where(lambda n: isinstance(n, int) and n > 1)
    assert found.get_sequence() == (2, 5)
    by_path = select(tree()).at_subtrees_where(
        lambda path, _: path[-1:] == (SequenceKey(1),), with_keypath=True
    )
    assert by_path.get() == 2


def test_where_keeps_a_part_of_what_is_selected():
    leaves = select(tree()).at_pytree_leaves()
    assert leaves.get_sequence() == (1, 2, 5)
    assert leaves.where(lambda v: v != 2).get_sequence() == (1, 5)
    first = leaves.where(lambda p, _: p[1] == SequenceKey(0), with_keypath=True)
    assert first.get() == 1
    assert leaves.where(lambda v: v > 9).is_empty()


def test_paths_select_and_replace():
    paths = [(DictKey("a"), SequenceKey(0)), (DictKey("a"), SequenceKey(2))]
    found = select(tree()).at_keypaths(paths)
    assert found.get_sequence() == (1, {"b": 5})
    changed = found.set_by_path({paths[0]: 10, paths[1]: 20})
    assert changed["a"] == [10, 2, 20]
    assert found.set_by_path(lambda path: path[-1].idx)["a"] == [0, 2, 2]
    with pytest.raises(SelectionError, match="'a/2'"):
        found.set_by_path({paths[0]: 10})
    inside = select(tree()).at(lambda t: t["a"]).at_keypaths([(SequenceKey(1),)])
    assert inside.get() == 2


def test_equal_nodes_are_found_and_arrays_never_are():
    assert select([1, (2, 3), (2, 3)]).at_equal_to((2, 3)).count() == 2
    assert select([np.ones(2), 1, True]).at_equal_to(1).count() == 1
    with pytest.raises(SelectionError, match="array"):
        select([1]).at_equal_to(np.ones(2))


def test_invert_selects_the_largest_nodes_without_anything_selected():
    found = select(tree()).at(lambda t: t["a"][2]["b"])
    assert found.invert().get_sequence() == (1, 2, (), None)
    assert found.invert().invert().get() == {"b": 5}
    assert select(tree()).at_instances_of(str).invert().get() == tree()
    assert select(tree()).invert().is_empty()


def test_apply_replaces_with_or_without_the_path():
    leaves = select(tree()).at_pytree_leaves()
    assert leaves.apply(lambda v: v * 2) == {"a": [2, 4, {"b": 10}], "c": (), "d": None}
    shown = leaves.apply(lambda p, v: (len(p), v), with_keypath=True)
    assert shown["a"] == [(2, 1), (2, 2), {"b": (3, 5)}]
    assert leaves.deselect() == tree()


def test_sequences_must_fit():
    leaves = select([1, 2]).at_pytree_leaves()
    assert leaves.set_sequence(iter("xy")) == ["x", "y"]
    for wrong in (["x"], ["x", "y", "z"]):
        with pytest.raises(SelectionError, match=f"{len(wrong)} replacements for 2"):
            leaves.set_sequence(wrong)


def test_counts_are_held():
    leaves = select([1, 2]).at_pytree_leaves()
    assert leaves.assert_count_is(2) is leaves
    assert len(leaves) == leaves.count() == 2
    with pytest.raises(AssertionError, match="2 nodes"):
        leaves.assert_count_is(3)
    with pytest.raises(SelectionError, match="2 nodes"):
        leaves.get()


def test_the_nth_of_the_selected():
    leaves = select([1, 2, 3]).at_pytree_leaves()
    assert leaves.pick_nth_selected(1).set("x") == [1, "x", 3]
    assert leaves.pick_nth_selected(-1).get() == 3
    assert leaves.pick_nth_selected([0, 2]).get_sequence() == (1, 3)
    with pytest.raises(SelectionError, match="number 3 of 3"):
        leaves.pick_nth_selected(3)


def test_a_partition_differentiates_a_part_and_combines_again():
    key = jax.random.key(0)
    model = deferred.initialize_parameters(stack(2, 8, 8), key)
    learn = select(model).at_instances_of(deferred.Parameter)
    learn = learn.where(lambda p: p.name.endswith("kernel"))
    kernels, rest = learn.partition()
    assert len(jax.tree.leaves(kernels)) == 2
    assert len(jax.tree.leaves(rest)) == 2
    assert differing(deferred.combine(kernels, rest), model) == []

    def loss(kernels, rest, x):
        for layer in deferred.combine(kernels, rest):
            x = layer(x)
        return jnp.sum(x)

    grads = jax.jit(jax.grad(loss))(kernels, rest, jnp.ones(8))
    assert jax.tree.structure(grads) == jax.tree.structure(kernels)
    assert float(jnp.abs(grads[1].kernel.value).sum()) > 0
    with pytest.raises(SelectionError, match="combine at '0/kernel/value'"):
        deferred.combine(kernels, kernels)
    hole = deferred.NotInThisPartition()
    assert deferred.combine([1, hole, hole], [hole, 2, hole]) == [1, 2, hole]


def test_a_selection_is_a_pytree_itself():
    found = select([1.0, 2.0]).at(lambda t: t[0])
    doubled = jax.tree.map(lambda v: 2 * v, found)
    assert doubled.get() == 2.0
    assert doubled.deselect() == [2.0, 4.0]
    inner = select({"s": found}).at(lambda t: t["s"]).apply(lambda s: s.deselect())
    assert inner == {"s": [1.0, 2.0]}


trees = st.recursive(
    st.integers(0, 9) | st.none(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
        | st.tuples(inner, inner)
        | st.builds(lambda x: deferred.Parameter(x, "p"), inner)
    ),
    max_leaves=12,
)


@hypothesis.given(trees, st.integers(0, 9), st.booleans())
def test_partitions_combine_to_the_tree_and_inversion_takes_the_rest(tree, n, dicts):
    found = select(tree).at_subtrees_where(
        lambda node: node == n or (dicts and isinstance(node, dict))
    )
    left, right = found.partition()
    assert deferred.combine(left, right) == tree
    both = len(jax.tree.leaves(left)) + len(jax.tree.leaves(right))
    assert both == len(jax.tree.leaves(tree))
    assert found.deselect() == found.invert().deselect() == tree
    assert jax.tree.leaves(left) == jax.tree.leaves(found.get_sequence())
    rest = found.invert().get_sequence()
    assert jax.tree.leaves(right) == jax.tree.leaves(rest)
    assert found.set_by_path(found.get_by_path()) == tree


def nested():
    return {"layers": [1, [2, 3], {"deep": [4, []]}], "other": (5, None, [6])}


def test_items_of_sequences_are_inlined_removed_and_given_neighbours():
    pair = select(nested()).at(lambda t: t["layers"][1])
    assert pair.apply_and_inline(reversed)["layers"] == [1, 3, 2, {"deep": [4, []]}]
    assert pair.remove_from_parent()["layers"] == [1, {"deep": [4, []]}]
    assert pair.insert_before(0)["layers"][:3] == [1, 0, [2, 3]]
    assert pair.insert_after([])["layers"][1:3] == [[2, 3], []]
    added = pair.insert_after(0, and_select=True)
    assert [path_str(path) for path in added.get_keypaths()] == ["layers/2"]
    assert added.set(9)["layers"][2] == 9
    first = select(nested()).at(lambda t: t["other"][0])
    assert first.remove_from_parent()["other"] == (None, [6])
    paths = select(nested()).at_instances_of(int).where(lambda n: n > 3)
    shown = paths.apply_and_inline(lambda path, _: (path_str(path),), with_keypath=True)
    assert shown["layers"][2] == {"deep": ["layers/2/deep/0", []]}
    layers = select(stack(2, 2, 2))
    assert len(layers.at(lambda t: t[0]).remove_from_parent()) == 1


@pytest.mark.parametrize("pick", [lambda t: t, lambda t: t["layers"]])
def test_what_is_no_item_of_a_sequence_has_no_neighbours(pick):
    with pytest.raises(SelectionError, match="no item of a list or tuple"):
        select(nested()).at(pick).insert_after(0)


def test_refine_selects_by_a_function_of_each_node():
    lists = select(nested()).at_instances_of(list)
    first = lists.refine(lambda node: select(node).at(lambda x: x[0]))
    assert first.get_sequence() == (1, 6)
    assert first.set(0)["layers"][0] == 0
    twice = lists.refine(lambda node: select([node, 8]).at(lambda both: both[1]))
    assert twice.set(9)["other"] == (5, None, [[6], 9])
    with pytest.raises(SelectionError, match="expected a selection"):
        lists.refine(lambda node: node[0])


def test_what_was_applied_stays_selected_if_asked():
    lists = select(nested()).at_instances_of(list)
    kept = lists.apply(len, keep_selected=True)
    assert kept.get_sequence() == (3, 1)
    assert kept.apply(lambda n: -n) == {"layers": -3, "other": (5, None, -1)}


def test_innermost_and_childless_nodes():
    lists = select(nested()).at_instances_of(list, innermost=True)
    assert lists.get_sequence() == ([2, 3], [], [6])
    everything = select(nested()).at_subtrees_where(lambda _: True, innermost=True)
    childless = select(nested()).at_childless()
    assert everything.get_by_path() == childless.get_by_path()
    assert childless.get_sequence() == (1, 2, 3, 4, [], 5, None, 6)


def test_key_paths_start_at_the_selected_node_or_at_the_root():
    seen = {True: [], False: []}
    for absolute, paths in seen.items():
        select(nested()).at(lambda t: t["other"]).at_subtrees_where(
            lambda path, _: bool(paths.append(path_str(path))),  # noqa: B023
            with_keypath=True,
            absolute_keypath=absolute,
        )
    assert seen[False] == ["", "0", "1", "2", "2/0"]
    assert seen[True] == ["other", "other/0", "other/1", "other/2", "other/2/0"]


def test_paths_from_selected_nodes_are_set():
    layers = select({"a": [1, 2], "b": [3]}).at_instances_of(list)
    assert layers.select_and_set_by_path({(SequenceKey(0),): 0}) == {
        "a": [0, 2],
        "b": [0],
    }


@hypothesis.given(trees, st.integers(0, 9))
def test_partitions_at_leaves_have_the_leaves_of_the_tree(tree, n):
    left, right = select(tree).at_subtrees_where(lambda x: x == n).partition(True)
    hole = deferred.NotInThisPartition()

    def shape(part):
        return jax.tree.structure(part, is_leaf=lambda x: x == hole)

    assert shape(left) == shape(right) == jax.tree.structure(tree)
    assert deferred.combine(left, right) == tree


@hypothesis.given(trees, st.sampled_from([list, dict, tuple, deferred.Parameter]))
def test_selections_are_those_of_penzai(tree, cls):
    pz = pytest.importorskip("penzai.pz")
    for innermost in (False, True):
        ours, theirs = (
            s(tree).at_instances_of(cls, innermost=innermost)
            for s in (select, pz.select)
        )
        assert ours.get_by_path() == theirs.get_by_path()
        assert ours.set(0) == theirs.set(0)
