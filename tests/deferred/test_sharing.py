"""Shared parameters: marked, attached, looked up, owned once."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import shardinit
from shardinit import deferred
from shardinit.deferred import (
    DuplicateNamesError,
    MissingSharedParameterError,
    SharedParameterError,
    SharedParameterLookup,
    StructureMismatchError,
    UninitializedParameter,
    WithSharedParameters,
    attach_shared_parameters,
    mark_shareable,
    select,
)
from tests.core.bits import differing
from tests.deferred.models import STATIC, jitted, weight

pytestmark = pytest.mark.once


@deferred.pytree_dataclass
class Tied(deferred.Struct):
    """Embeds and unembeds with one table; ``middle`` may be anything callable."""

    embed: Any
    middle: Any
    unembed: Any
    scale: float = dataclasses.field(default=1.0, metadata=STATIC)

    def __call__(self, tokens):
        x = self.middle(self.embed.value[tokens]) * self.scale
        return x @ self.unembed.value.T


@deferred.pytree_dataclass
class Scale(deferred.Struct):
    gain: Any

    def __call__(self, x):
        return x * self.gain.value


def tied():
    table = mark_shareable(weight("table", (8, 32)))
    return Tied(table, Scale(weight("gain", (32,))), table)


def test_marking_replaces_every_uninitialised_parameter_and_nothing_else():
    frozen = deferred.FrozenParameter(jnp.ones(2), "f")
    marked = mark_shareable({"a": [weight("a")], "f": frozen, "n": 3})
    assert type(marked["a"][0]) is deferred.ShareableUninitializedParameter
    assert isinstance(marked["a"][0], UninitializedParameter)
    assert marked["f"].value is frozen.value
    assert mark_shareable(marked)["a"][0].attributes_dict() == (
        marked["a"][0].attributes_dict()
    )
    renamed = deferred.add_parameter_prefix("x", marked)["a"][0]
    assert type(renamed) is deferred.ShareableUninitializedParameter


def test_the_wrapper_owns_one_parameter_a_name_and_puts_a_lookup_at_every_use():
    wrapper = attach_shared_parameters(tied())
    assert type(wrapper) is WithSharedParameters
    assert list(wrapper.parameters) == ["table"]
    assert type(wrapper.parameters["table"]) is UninitializedParameter
    lookups = select(wrapper.body).at_instances_of(SharedParameterLookup)
    assert [lookup.name for lookup in lookups.get_sequence()] == ["table"] * 2
    structure = lookups.get_sequence()[0].value_structure
    assert structure == jax.ShapeDtypeStruct((8, 32), jnp.float32)
    assert type(wrapper.body.middle.gain) is UninitializedParameter


def test_gradients_of_both_uses_add_up_in_the_owned_value():
    model = deferred.initialize_parameters(
        attach_shared_parameters(tied()), jax.random.key(0)
    )
    resolved = model.resolved()
    assert resolved.embed is resolved.unembed is model.parameters["table"]
    tokens = jnp.arange(4)

    def loss(model):
        return jnp.sum(jnp.tanh(model.resolved()(tokens)))

    def untied(embed, unembed):
        parts = Tied(embed, model.body.middle, unembed)
        return jnp.sum(jnp.tanh(parts(tokens)))

    grads = jax.grad(loss)(model)
    table = model.parameters["table"]
    left, right = jax.grad(untied, argnums=(0, 1))(table, table)
    total = left.value + right.value
    assert jnp.allclose(grads.parameters["table"].value, total, rtol=1e-5, atol=1e-6)
    assert len(jax.tree.leaves(grads)) == 2
    assert differing(model(tokens), resolved(tokens)) == []


def test_a_lookup_outside_its_wrapper_is_an_error_with_its_name():
    wrapper = attach_shared_parameters(tied())
    with pytest.raises(MissingSharedParameterError, match="'table'"):
        _ = wrapper.body.embed.value
    model = deferred.initialize_parameters(wrapper, jax.random.key(0))
    with pytest.raises(MissingSharedParameterError, match="resolved"):
        model.body(jnp.arange(2))


def test_structures_must_match_always_and_initializers_when_strict():
    def draw(key):
        return jnp.zeros((2, 32))

    def other(key):
        return jnp.ones((2, 32))

    first, second, third = (
        mark_shareable(UninitializedParameter(f, "w")) for f in (draw, other, draw)
    )
    assert attach_shared_parameters([first, third]).parameters["w"].initializer is draw
    with pytest.raises(SharedParameterError, match=r"'w' at '1'.*different init"):
        attach_shared_parameters([first, second])
    loose = attach_shared_parameters([first, second], strict=False)
    assert loose.parameters["w"].initializer is draw
    wide = mark_shareable(weight("w", (2, 64)))
    for strict in (True, False):
        with pytest.raises(SharedParameterError, match=r"'w'.*64"):
            attach_shared_parameters([first, wide], strict=strict)


def test_unattached_and_used_twice_is_the_duplicate_error(mesh):
    with pytest.raises(DuplicateNamesError, match=r"Repeated names: \['table'\]"):
        deferred.initialize_parameters(tied(), jax.random.key(0))
    with pytest.raises(DuplicateNamesError, match=r"'embed', 'unembed'"):
        shardinit.init(deferred.init_fn(tied()), 0, mesh=mesh)
    once = deferred.initialize_parameters(tied().embed, jax.random.key(0))
    assert type(once) is deferred.Parameter


def test_an_outer_prefix_renames_the_owned_parameter_and_the_uses_find_it():
    wrapper = attach_shared_parameters(tied())
    outer = deferred.add_parameter_prefix("decoder", wrapper)
    assert outer.parameters["table"].name == "decoder.table"
    assert outer.body.middle.gain.name == "decoder.gain"
    key = jax.random.key(4)
    model = deferred.initialize_parameters(outer, key)
    value = deferred.initialize_parameters(weight("decoder.table", (8, 32)), key)
    assert differing(model.resolved().embed.value, value.value) == []


def test_two_wrapped_models_stand_side_by_side():
    pair = [
        deferred.add_parameter_prefix(name, attach_shared_parameters(tied()))
        for name in ("encoder", "decoder")
    ]
    left, right = deferred.initialize_parameters(pair, jax.random.key(0))
    assert differing(left.resolved().embed, left.parameters["table"]) == []
    a, b = left.resolved().embed.value, right.resolved().embed.value
    assert not jnp.array_equal(a, b)


def test_the_innermost_wrapper_that_owns_the_name_answers():
    inner = attach_shared_parameters(tied())
    outer_table = mark_shareable(weight("table", (16, 32)))
    gain = mark_shareable(weight("gain", (32,)))
    middle = [inner, SharedParameterLookup("gain", gain.value_structure)]
    whole = attach_shared_parameters([outer_table, middle, outer_table, gain])
    model = deferred.initialize_parameters(
        deferred.WithSharedParameters(
            whole.body,
            deferred.add_parameter_prefix("outer", whole.parameters),
        ),
        jax.random.key(0),
    )
    table, (tied_part, found), again, same = model.resolved()
    assert table is again is model.parameters["table"]
    assert tied_part.embed.value.shape == (8, 32)
    assert found is same is model.parameters["gain"]


def test_an_owned_parameter_may_be_given_and_checks_what_it_gets():
    wrapper = attach_shared_parameters(tied())
    table = wrapper.select().at(lambda w: w.parameters["table"])
    with pytest.raises(StructureMismatchError, match=r"'table'.*\(3, 3\)"):
        table.apply(lambda p: p.initialize_with_value(jnp.zeros((3, 3))))
    given = table.apply(lambda p: p.initialize_with_value(jnp.zeros((8, 32))))
    assert given.resolved().unembed.value.shape == (8, 32)


def test_shared_parameters_end_sharded(mesh):
    wrapper = attach_shared_parameters(tied())
    rules = shardinit.PathRules([("table", jax.P("data", "model"))])
    model = shardinit.init(deferred.init_fn(wrapper), 0, mesh=mesh, rules=rules)
    value = model.resolved().unembed.value
    assert value.sharding.spec == jax.P("data", "model")
    assert differing(model, jitted(wrapper, jax.random.key(0))) == []
