"""The kinds of parameter: what each holds, gives, takes and refuses."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardinit import deferred
from shardinit.core.ir.jaxpr import is_tracer
from shardinit.deferred import (
    AbstractArray,
    FrozenParameter,
    Parameter,
    StructureMismatchError,
    UninitializedParameter,
    UninitializedParameterError,
)
from tests.core.bits import differing
from tests.deferred.models import weight

pytestmark = pytest.mark.once


def tree_parameter():
    def draw(key):
        a, b = jax.random.split(key)
        return {
            "w": jax.random.normal(a, (3, 4)),
            "inner": {"b": jax.random.normal(b, (4,), jnp.bfloat16)},
        }

    return UninitializedParameter(draw, "tree")


# The document, line by line.


def test_the_signatures_are_those_of_the_document():
    def of(method):
        parameters = inspect.signature(method).parameters.values()
        return [(p.name, p.default) for p in parameters if p.name != "self"]

    empty = inspect.Parameter.empty
    init = of(UninitializedParameter.__init__)
    assert init[:2] == [("initializer", empty), ("name", empty)]
    assert init[2][0] == "value_structure"
    assert type(init[2][1]) is object
    assert of(UninitializedParameter.initialize) == [("prng_key", empty)]
    assert of(UninitializedParameter.initialize_with_value) == [
        ("value", empty),
        ("check_structure", True),
        ("strict_dtype", True),
    ]
    assert of(UninitializedParameter.as_empty_parameter) == []
    renamed = of(UninitializedParameter.with_renamed_parameters)
    assert renamed == [("rename_fn", empty)]
    assert list(weight().attributes_dict()) == [
        "initializer",
        "name",
        "value_structure",
    ]


@pytest.mark.parametrize(
    "name",
    [
        "attributes_dict",
        "from_attributes",
        "key_for_field",
        "select",
        "tree_flatten",
        "tree_flatten_with_keys",
        "tree_unflatten",
        "treescope_color",
    ],
)
def test_the_inherited_methods_of_the_document_are_there(name):
    for kind in (Parameter, FrozenParameter, UninitializedParameter):
        assert callable(getattr(kind, name))


def test_the_bases_are_those_of_the_document():
    assert issubclass(UninitializedParameter, deferred.Struct)
    assert issubclass(UninitializedParameter, deferred.SupportsParameterRenaming)
    assert UninitializedParameter[jax.Array]
    assert issubclass(StructureMismatchError, ValueError)
    with pytest.raises(TypeError):
        deferred.SupportsParameterRenaming()


# Without a value.


def test_an_uninitialised_parameter_has_no_leaves():
    assert jax.tree.leaves([weight(), tree_parameter()]) == []
    left, right = weight(), weight()
    assert jax.tree.structure(left) != jax.tree.structure(right)
    assert jax.tree.structure(left) == jax.tree.structure(jax.tree.map(id, left))


def test_the_structure_is_inferred_without_running_anything():
    calls = []

    def draw(key):
        calls.append(is_tracer(key))
        return jax.random.normal(key, (4, 3), jnp.bfloat16)

    parameter = UninitializedParameter(draw, "w")
    assert calls == [True]
    assert parameter.value_structure == jax.ShapeDtypeStruct((4, 3), jnp.bfloat16)
    renamed = parameter.with_renamed_parameters(lambda name: f"a.{name}")
    assert (renamed.name, parameter.name) == ("a.w", "w")
    assert calls == [True]
    assert tree_parameter().value_structure == {
        "w": jax.ShapeDtypeStruct((3, 4), jnp.float32),
        "inner": {"b": jax.ShapeDtypeStruct((4,), jnp.bfloat16)},
    }


def test_an_initializer_that_cannot_be_traced_is_told_by_its_parameter():
    for wrong in (lambda key: "text", lambda key: 1 / 0):
        with pytest.raises((TypeError, ZeroDivisionError)) as caught:
            UninitializedParameter(wrong, "layer_0.w")
        note = "in the initializer of parameter 'layer_0.w'"
        assert note in caught.value.__notes__


def test_a_given_structure_is_taken_and_nothing_is_traced():
    def never(key):
        raise AssertionError

    given = {"a": jax.ShapeDtypeStruct((2,), jnp.int32)}
    parameter = UninitializedParameter(never, "w", given)
    assert parameter.value_structure == {"a": AbstractArray((2,), jnp.int32)}


def test_none_is_a_structure_and_not_a_default():
    parameter = UninitializedParameter(lambda key: None, "w", None)
    assert parameter.value_structure is None
    assert parameter.initialize(jax.random.key(0)) == Parameter(None, "w")
    wrong = UninitializedParameter(lambda key: jnp.zeros(3), "w", value_structure=None)
    with pytest.raises(StructureMismatchError, match=r"'w'.*None"):
        wrong.initialize(jax.random.key(0))


def test_axis_names_are_kept_where_they_are_known():
    named = UninitializedParameter(
        deferred.with_axes(lambda key: jnp.zeros((2, 3)), ("embed", None)), "w"
    )
    assert named.value_structure.axes == ("embed", None)
    assert weight().value_structure.axes is None
    with pytest.raises(StructureMismatchError, match="axis names"):
        UninitializedParameter(
            deferred.with_axes(lambda key: jnp.zeros((2, 3)), ("embed",)), "w"
        )


def test_the_value_of_an_uninitialised_parameter_is_an_error_with_its_name():
    with pytest.raises(UninitializedParameterError, match=r"'layer_3\.w'"):
        _ = weight("layer_3.w").value


def test_an_empty_parameter_has_the_tree_of_the_value_and_runs_nothing():
    calls = []

    def draw(key):
        calls.append(key)
        return {"w": jnp.zeros((3, 4)), "none": None}

    parameter = UninitializedParameter(draw, "tree")
    calls.clear()
    empty = parameter.as_empty_parameter()
    assert calls == []
    assert isinstance(empty, Parameter)
    assert empty.name == "tree"
    assert {type(x) for x in jax.tree.leaves(empty)} == {jax.ShapeDtypeStruct}
    made = parameter.initialize(jax.random.key(0))
    assert jax.tree.structure(empty) == jax.tree.structure(made)
    assert empty.value_structure == parameter.value_structure


# With a value.


def test_initialize_runs_the_initializer_once_and_returns_what_it_checked():
    calls = []

    def draw(key):
        calls.append(key)
        return jnp.full((3,), float(len(calls)))

    parameter = UninitializedParameter(draw, "w")
    calls.clear()
    key = jax.random.key(3)
    made = parameter.initialize(key)
    assert calls == [key]
    assert made.value.tolist() == [1.0] * 3
    assert (type(made), made.name) == (Parameter, "w")


def test_initialize_gives_the_initializers_own_bits():
    key = jax.random.key(7)
    made = tree_parameter().initialize(key)
    assert differing(made.value, tree_parameter().initializer(key)) == []


def test_an_initializer_that_breaks_its_word_is_refused():
    given = jax.ShapeDtypeStruct((3,), jnp.float32)
    parameter = UninitializedParameter(lambda key: jnp.zeros(4), "w", given)
    with pytest.raises(ValueError, match=r"initializer of parameter 'w'.*\(4,\)") as e:
        parameter.initialize(jax.random.key(0))
    assert "(3,)" in str(e.value)


def test_numbers_and_numpy_arrays_become_what_a_trace_makes_of_them():
    parameter = UninitializedParameter(lambda key: (0.5, np.zeros(2)), "w")
    made = parameter.initialize(jax.random.key(0))
    assert [x.dtype for x in made.value] == [jnp.float32, jnp.float32]


def test_a_value_may_be_given_instead():
    value = {"w": np.ones((3, 4), np.float32), "inner": {"b": jnp.ones(4, "bfloat16")}}
    made = tree_parameter().initialize_with_value(value)
    assert made.value is value
    assert (type(made), made.name) == (Parameter, "tree")


def good(**changes):
    value = {"w": np.ones((3, 4), np.float32), "inner": {"b": jnp.ones(4, "bfloat16")}}
    return {**value, **changes}


@pytest.mark.parametrize(
    ("value", "path", "got", "expected"),
    [
        (good(w=np.ones((3, 4))), "w", "float64", "float32"),
        (good(w=np.ones((4, 3), np.float32)), "w", r"\(4, 3\)", r"\(3, 4\)"),
        (good(w={"x": np.ones(3)}), "w", "a tree", r"an array float32\[3, 4\]"),
        (good(inner=np.ones(4)), "inner", r"an array float64\[4\]", "a tree"),
        (good(inner={"c": 1}), "inner", r"\['c'\]", r"\['b'\]"),
        (good(extra=np.ones(3)), "", "extra", "inner"),
        (good(inner={"b": None}), "inner/b", "None", "an array bfloat16"),
        (good(inner={"b": "text"}), "inner/b", "str", "an array bfloat16"),
        (good(inner=[np.ones(4)]), "inner", "list", "dict"),
    ],
)
def test_a_mismatch_names_the_path_what_came_and_what_was_expected(
    value, path, got, expected
):
    with pytest.raises(StructureMismatchError) as caught:
        tree_parameter().initialize_with_value(value)
    error = caught.value
    assert "'tree'" in error.where
    assert error.where.endswith(f" at {path!r}" if path else "'tree'")
    assert re.search(got, error.got)
    assert re.search(expected, error.expected)


def test_strict_never_lets_a_float64_pass_for_float32():
    parameter = weight(shape=(3,))
    value = np.ones(3, np.float64)
    with pytest.raises(StructureMismatchError, match=r"float64.*float32"):
        parameter.initialize_with_value(value)
    loose = parameter.initialize_with_value(value, strict_dtype=False)
    assert loose.value is value
    assert loose.value.dtype == np.float64
    whole = np.ones(3, np.int8)
    assert parameter.initialize_with_value(whole, strict_dtype=False).value is whole
    with pytest.raises(StructureMismatchError):
        parameter.initialize_with_value(np.ones(4), strict_dtype=False)


def test_unchecked_takes_anything():
    anything = object()
    made = weight().initialize_with_value(anything, check_structure=False)
    assert made.value is anything
    same = weight().initialize_with_value("x", False, True)
    assert same.value == "x"


def test_parameters_have_a_value_a_name_and_a_structure():
    for kind in (Parameter, FrozenParameter):
        parameter = kind(jnp.ones((2, 3)), "p")
        assert jax.tree.leaves(parameter)[0] is parameter.value
        assert parameter.value_structure == jax.ShapeDtypeStruct((2, 3), jnp.float32)
        renamed = parameter.with_renamed_parameters(str.upper)
        assert (type(renamed), renamed.name) == (kind, "P")
        assert renamed.value is parameter.value
        assert jax.tree.structure(renamed) != jax.tree.structure(parameter)
        assert kind("no array", "p").value_structure == "no array"
    assert not isinstance(FrozenParameter(1, "f"), Parameter)
