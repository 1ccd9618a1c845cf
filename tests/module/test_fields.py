"""Fields and kinds: what is part of the pytree, and taking it apart."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardinit import module as tx
from shardinit.errors import ModuleFieldError
from tests.core.bits import differing

pytestmark = pytest.mark.once


class Kinds(tx.Module):
    parameter: Any = tx.Parameter.node()
    batch_stat: Any = tx.BatchStat.node()
    state: Any = tx.State.node()
    rng: Any = tx.Rng.node()
    cache: Any = tx.Cache.node()
    model_state: Any = tx.ModelState.node()
    opt_state: Any = tx.OptState.node()
    log: Any = tx.Log.node()
    plain: Any = tx.node()
    setting: Any = tx.Parameter.static()
    also: Any = tx.static("x")

    def __init__(self):
        for number, name in enumerate(NAMES):
            setattr(self, name, jnp.full(2, float(number)))
        self.setting = "y"


NAMES = "parameter batch_stat state rng cache model_state opt_state log plain".split()


def paths(tree):
    found = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in found]


def test_nodes_are_leaves_in_alphabetical_order_and_statics_are_not():
    assert paths(Kinds()) == sorted(NAMES)
    assert Kinds().setting == "y"
    assert Kinds().also == "x"


@pytest.mark.parametrize(
    ("kind", "kept"),
    [
        (tx.Parameter, {"parameter"}),
        (tx.BatchStat, {"batch_stat"}),
        (tx.Rng, {"rng"}),
        (tx.Cache, {"cache"}),
        (tx.OptState, {"opt_state"}),
        (tx.Log, {"log"}),
        (tx.ModelState, {"model_state", "batch_stat", "cache"}),
        (tx.State, {"state", "rng", "opt_state", "model_state", "batch_stat", "cache"}),
        (tx.Kind, {*NAMES} - {"plain"}),
    ],
)
def test_filter_keeps_a_kind_and_those_below_it(kind, kept):
    module = Kinds()
    part = module.filter(kind)
    assert set(paths(part)) == kept
    assert isinstance(part.plain, tx.Nothing)
    assert isinstance(module.plain, jax.Array)
    doubled = jax.tree.map(lambda x: 2 * x, part)
    whole = module.merge(doubled)
    for name in NAMES:
        factor = 2 if name in kept else 1
        assert np.array_equal(getattr(whole, name), factor * getattr(module, name))


def test_filter_by_predicate_sees_name_kind_module_and_path():
    net = tx.Sequential(tx.Linear(3), tx.Linear(2)).init(1, jnp.ones((1, 4)))
    assert paths(net.filter(lambda f: f.path == "layers/1/kernel")) == [
        "layers.1.kernel"
    ]
    assert paths(net.filter(tx.Parameter, lambda f: f.name == "bias")) == [
        "layers.0.bias",
        "layers.1.bias",
    ]
    assert paths(net.filter(lambda f: f.module.features_out == 2)) == [
        "layers.1.bias",
        "layers.1.kernel",
    ]


def test_fields_that_hold_modules_are_nodes_by_themselves():
    class Holder(tx.Module):
        secret: tx.Linear = tx.static()

        def __init__(self):
            made = tx.Linear(2).init(1, jnp.ones((1, 2)))
            self.one = made
            self.many = [made, {"x": made}]
            self.secret = made
            self.number = 3

    assert len(jax.tree.leaves(Holder())) == 6
    assert paths(Holder())[0] == "many.0.bias"
    back = jax.tree.map(lambda x: x, Holder())
    assert back.number == 3
    assert isinstance(back.secret, tx.Linear)


def test_a_node_stays_one_whatever_is_assigned_to_it():
    net = tx.Sequential(tx.Linear(2)).init(1, jnp.ones((1, 2)))

    class Outer(tx.Module):
        def __init__(self):
            self.net = net

    summed = jax.tree.map(
        lambda m: m.kernel.sum(), Outer(), is_leaf=lambda x: isinstance(x, tx.Linear)
    )
    assert len(jax.tree.leaves(summed)) == 1
    summed.net = jnp.ones(2)
    assert jax.tree.leaves(summed)[0].shape == (2,)


def test_a_module_may_be_a_dataclass():
    @dataclass
    class Net(tx.Module):
        size: int
        w: Any = tx.Parameter.node(None)  # noqa: RUF009
        linear: Any = tx.node(  # noqa: RUF009
            default_factory=lambda: tx.Linear(3)
        )

        def __call__(self, x):
            if self.initializing():
                self.w = jax.random.uniform(tx.next_key(), (self.size,))
            return self.linear(x)

    net = Net(5).init(1, jnp.ones((1, 2)))
    assert net.w.shape == (5,)
    assert net.linear.kernel.shape == (2, 3)
    assert Net(5).linear is not Net(5).linear


def test_fields_are_inherited():
    class Wider(Kinds):
        extra: Any = tx.Parameter.node(None)

    assert "parameter" in paths(Wider())
    assert set(paths(Wider().filter(tx.Parameter))) == {"parameter"}


def test_settings_count_for_the_structure_by_their_contents():
    class Table(tx.Module):
        def __init__(self, table, sizes):
            self.table = np.asarray(table)
            self.sizes = sizes
            self.sub = tx.Linear(2)

    one = jax.tree.structure(Table([1, 2], [1, {"a": 2}]))
    assert one == jax.tree.structure(Table([1, 2], [1, {"a": 2}]))
    assert one != jax.tree.structure(Table([1, 3], [1, {"a": 2}]))
    assert one != jax.tree.structure(Table([1, 2], [1, {"a": 3}]))
    assert one == jax.tree.structure(Table([1, 2], [1, {"a": 2}]).copy())


@pytest.mark.parametrize("order", ["late", "early"])
def test_merging_an_initialised_with_an_uninitialised_module(order):
    x = jnp.ones((2, 3))
    net = tx.Sequential(tx.MLP([4, 2]), tx.Dropout(0.5), tx.BatchNorm(use_bias=False))
    made = net.init(1, x)
    whole = net.merge(made) if order == "late" else made.merge(net)
    assert differing(whole, made) == []
    assert jax.tree.structure(whole) == jax.tree.structure(made)
    assert net.layers[2].mean is None
    again = whole.init(2, x)
    assert differing(again, made) == []


def test_a_part_does_not_make_the_rest_initialised():
    x = jnp.ones((2, 3))
    net = tx.Sequential(tx.Linear(4), tx.BatchNorm())
    whole = net.merge(net.init(1, x).filter(tx.BatchStat))
    assert not whole.layers[0].initialized
    assert not whole.layers[1].initialized
    assert whole.layers[1].mean is not None


def test_update_inplace():
    x = jnp.ones((2, 3))
    net = tx.Sequential(tx.Linear(4)).init(1, x)
    other = tx.Sequential(tx.Linear(4)).init(2, x)
    linear = net.layers[0]
    assert net.update(other, inplace=True) is net
    assert net.layers[0] is linear
    assert np.array_equal(linear.kernel, other.layers[0].kernel)
    assert net.update(other) is not net


def test_modules_that_do_not_match_are_named_by_path():
    one = tx.Sequential(tx.Linear(4), tx.Linear(4))
    with pytest.raises(ModuleFieldError, match="at 'layers/1'"):
        one.merge(tx.Sequential(tx.Linear(4), tx.LayerNorm()))
    with pytest.raises(ModuleFieldError, match=r"at 'layers'.*3 items"):
        one.merge(tx.Sequential(*one.layers, tx.Linear(4)))
    for other in (tx.Linear(4), one.layers, None):
        with pytest.raises(ModuleFieldError, match=r"merge: .*expected Sequential"):
            one.merge(other)


def test_modes():
    net = tx.Sequential(tx.Linear(4), tx.Dropout(0.5), tx.MLP([2]))
    net = net.init(1, jnp.ones((1, 2)))
    assert all(m.training for m in [net, *net.layers])
    assert not any(m.training for m in [net.eval(), *net.eval().layers])
    assert net.eval().train().training
    assert net.training
    frozen = net.freeze()
    assert frozen.layers[2].linear.frozen
    assert not frozen.unfreeze().layers[2].linear.frozen
    assert net.eval(inplace=True) is net
    assert not net.layers[0].training


def test_trainable_parameters_leave_frozen_modules_out():
    net = tx.Sequential(tx.Linear(4), tx.BatchNorm(), tx.Linear(2))
    net = net.init(1, jnp.ones((3, 2)))
    net.layers[0] = net.layers[0].freeze()
    part = net.trainable_parameters()
    assert paths(part)[0] == "layers.1.bias"
    assert len(paths(part)) == 4
    assert len(paths(net.parameters())) == 6

    def loss(part, net, x):
        return net.merge(part)(x).sum()

    gradients = jax.grad(loss)(part, net, jnp.ones((3, 2)))
    assert paths(gradients) == paths(part)
    whole = net.merge(jax.tree.map(lambda p, g: p - g, part, gradients))
    assert np.array_equal(whole.layers[0].kernel, net.layers[0].kernel)
    assert not np.array_equal(whole.layers[2].bias, net.layers[2].bias)


@pytest.mark.parametrize(
    "name", ["_nodes", "_fields", "_initialized", "_subtrees", "init", "training"]
)
def test_names_of_methods_and_of_a_modules_state_are_refused_for_fields(name):
    with pytest.raises(ModuleFieldError, match=f"field '{name}' of Odd"):
        type("Odd", (tx.Module,), {name: tx.Parameter.node(None)})

    class Odd(tx.Module):
        def __init__(self):
            setattr(self, name, 1)

    with pytest.raises(ModuleFieldError, match=f"field '{name}' of Odd"):
        Odd()


@pytest.mark.parametrize("name", ["_kernel", "keys", "value", "self_", "fields"])
def test_other_names_are_fields(name):
    def __init__(self):
        setattr(self, name, tx.Initializer(lambda key: jnp.ones(3)))

    body = {"__init__": __init__, name: tx.Parameter.node(None)}
    made = type("Odd", (tx.Module,), body)().init(0)
    assert getattr(made, name).shape == (3,)


def test_filter_takes_any_tree():
    seen = []

    def look(field):
        seen.append((field.path, field.name, field.kind, field.module))
        return True

    tree = {
        "model": [tx.Linear(2).init(0, jnp.ones(3))],
        "step": jnp.int32(3),
        "none": None,
    }
    kept = tx.filter(tree, tx.Parameter)
    assert differing(kept["model"], tree["model"]) == []
    assert kept["step"] == kept["none"] == tx.NOTHING
    assert jax.tree.leaves(tx.filter(tree, tx.State)) == []
    assert differing(tx.filter(tree, look), tree) == []
    assert [entry[:3] for entry in seen] == [
        ("model/0/bias", "bias", tx.Parameter),
        ("model/0/kernel", "kernel", tx.Parameter),
        ("none", "", None),
        ("step", "", None),
    ]
    assert seen[-1][3] is None
    layer = tree["model"][0]
    assert differing(tx.filter(layer, tx.Parameter), layer.filter(tx.Parameter)) == []
