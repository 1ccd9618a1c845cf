"""Whole models: keys from names, duplicates, clashes, prefixes, the sharded form."""

import gc
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shardinit
from shardinit import deferred
from shardinit.deferred import (
    DuplicateNamesError,
    FrozenParameter,
    NameClashError,
    Parameter,
    StructureMismatchError,
    UninitializedParameter,
    UninitializedParameterError,
)
from tests.core.bits import differing
from tests.deferred.models import Dense, jitted, keys_of, stack, weight

RULES = shardinit.AxisRules([("embed", "data"), ("mlp", "model")])

# Two names of which the first 32 bits of SHA-1 are equal: see the test below.
CLASH = ("layers.119902.w", "layers.133871.w")


def parameters(model):
    found = deferred.select(model).at_instances_of(Parameter).get_sequence()
    return {parameter.name: parameter.value for parameter in found}


def test_a_key_is_the_root_key_with_the_first_four_bytes_of_sha1_folded_in():
    model = keys_of(stack(2))
    key = jax.random.key(12)
    for name, data in parameters(deferred.initialize_parameters(model, key)).items():
        number = int.from_bytes(hashlib.sha1(name.encode()).digest()[:4], "big")
        expected = jax.random.fold_in(key, number)
        assert data.tolist() == jax.random.key_data(expected).tolist()


def test_raw_keys_give_the_same_values():
    model = stack(1)
    typed = deferred.initialize_parameters(model, jax.random.key(3))
    raw = deferred.initialize_parameters(model, jax.random.PRNGKey(3))
    assert differing(typed, raw) == []
    assert differing(typed, deferred.initialize_parameters(model, 3)) == []
    with pytest.raises(TypeError, match="key: got str; expected one key"):
        deferred.initialize_parameters(model, "3")


def test_a_value_depends_on_its_name_and_on_nobody_else():
    key = jax.random.key(0)
    before = parameters(deferred.initialize_parameters(stack(2), key))
    later = [weight("new"), *reversed(stack(4))]
    after = parameters(deferred.initialize_parameters(later, key))
    assert len(after) == 9
    for name, value in before.items():
        assert differing(after[name], value) == []


def test_wide_names_fold_in_128_bits_of_another_domain():
    key = jax.random.key(0)
    narrow = parameters(deferred.initialize_parameters(keys_of(stack(2)), key))
    wide = deferred.initialize_parameters(keys_of(stack(2)), key, wide_names=True)
    for name, data in parameters(wide).items():
        digest = hashlib.sha256(b"shardinit wide name\0" + name.encode()).digest()
        expected = key
        for start in range(0, 16, 4):
            word = int.from_bytes(digest[start : start + 4], "big")
            expected = jax.random.fold_in(expected, word)
        assert data.tolist() == jax.random.key_data(expected).tolist()
        assert data.tolist() != narrow[name].tolist()


def test_two_names_with_the_same_hash_are_found_before_anything_runs(mesh):
    ran = []

    def draw(key):
        ran.append(key)
        return jax.random.key_data(key)

    model = [UninitializedParameter(draw, name) for name in CLASH]
    first, second = (hashlib.sha1(name.encode()).digest()[:4] for name in CLASH)
    assert first == second
    ran.clear()
    for start in (
        lambda: deferred.initialize_parameters(model, jax.random.key(0)),
        lambda: shardinit.init(deferred.init_fn(model), 0, mesh=mesh),
    ):
        with pytest.raises(NameClashError) as caught:
            start()
        assert all(name in str(caught.value) for name in CLASH)
        assert "at '0'" in str(caught.value)
        assert "wide_names=True" in str(caught.value)
    assert ran == []
    made = deferred.initialize_parameters(model, jax.random.key(0), wide_names=True)
    assert made[0].value.tolist() != made[1].value.tolist()


def test_repeated_names_are_all_named_across_the_three_kinds(mesh):
    model = {
        "a": weight("x"),
        "b": Parameter(jnp.ones(3), "x"),
        "c": [FrozenParameter(jnp.ones(3), "y"), weight("z")],
        "d": weight("y"),
    }
    for start in (
        lambda: deferred.initialize_parameters(model, jax.random.key(0)),
        lambda: deferred.check_no_duplicated_parameters(model),
        lambda: shardinit.init(deferred.init_fn(model), 0, mesh=mesh),
    ):
        with pytest.raises(ValueError, match=r"Repeated names: \['x', 'y'\]") as e:
            start()
        assert isinstance(e.value, DuplicateNamesError)
        assert e.value.names == ("x", "y")
        assert e.value.paths == ("a", "b", "c/0", "d")


def test_prefixes_reach_every_kind_of_parameter():
    model = {
        "a": weight("w"),
        "b": [Parameter(1.0, "p"), FrozenParameter(2.0, "f")],
    }
    named = deferred.add_parameter_prefix("outer", model)
    assert named["a"].name == "outer.w"
    assert [p.name for p in named["b"]] == ["outer.p", "outer.f"]
    twice = deferred.add_parameter_prefix("top", named, delimiter="/")
    assert twice["a"].name == "top/outer.w"
    assert model["a"].name == "w"


def test_a_container_that_renames_its_own_parameters_is_asked():
    @deferred.pytree_dataclass
    class Keyed(deferred.Struct, deferred.SupportsParameterRenaming):
        values: dict

        def with_renamed_parameters(self, rename_fn):
            return Keyed({rename_fn(name): v for name, v in self.values.items()})

    named = deferred.add_parameter_prefix("a", [Keyed({"x": weight("w")})])
    assert list(named[0].values) == ["a.x"]
    assert named[0].values["a.x"].name == "w"


def test_nothing_may_be_left_uninitialised():
    model = [stack(1)[0], {"x": weight("left")}]
    with pytest.raises(UninitializedParameterError) as caught:
        deferred.assert_no_uninitialized(model)
    assert "'left' at '1/x'" in str(caught.value)
    assert "'layer_0.kernel' at '0/kernel'" in str(caught.value)
    made = deferred.initialize_parameters(model, jax.random.key(0))
    assert deferred.assert_no_uninitialized(made) is None


@pytest.fixture(scope="module")
def direct():
    """``initializer(fold_in(key, sha1(name)[:4]))`` under jit, for each parameter."""
    found = deferred.select(stack()).at_instances_of(UninitializedParameter)

    def draw(root):
        values = {}
        for parameter in found.get_sequence():
            digest = hashlib.sha1(parameter.name.encode()).digest()[:4]
            key = jax.random.fold_in(root, int.from_bytes(digest, "big"))
            values[parameter.name] = parameter.initializer(key)
        return values

    return jax.jit(draw)(jax.random.key(5))


@pytest.mark.parametrize("shape", [(2, 4), (8, 1), (1, 8), (1, 1)])
def test_the_sharded_form_has_the_same_bits_on_every_mesh(shape, direct):
    devices = jax.devices()[: np.prod(shape)]
    mesh = jax.make_mesh(shape, ("data", "model"), devices=devices)
    made = shardinit.init(deferred.init_fn(stack()), 5, mesh=mesh, rules=RULES)
    assert isinstance(made[0], Dense)
    assert made[0].kernel.value.sharding.spec == jax.P("data", "model")
    assert made[0].activation is jax.nn.relu
    assert differing(parameters(made), direct) == []


def test_equal_layers_share_their_programs(mesh):
    plan = shardinit.plan(deferred.init_fn(stack(9)), mesh=mesh, rules=RULES)
    assert [leaf.path for leaf in plan.leaves[:2]] == ["0/kernel/value", "0/bias/value"]
    assert len(plan.leaves) == 18
    assert len(plan.programs) == 2


def test_wide_names_in_the_sharded_form(mesh):
    init = deferred.init_fn(stack(2), wide_names=True)
    key = jax.random.key(1)
    made = shardinit.init(init, key, mesh=mesh)
    plain = jax.jit(
        lambda key: deferred.initialize_parameters(stack(2), key, wide_names=True)
    )(key)
    assert differing(made, plain) == []


def test_one_deferred_parameter_is_initialised_alone(mesh):
    rules = shardinit.AxisRules([("mlp", "model")])
    whole = shardinit.init(deferred.init_fn(stack()), 5, mesh=mesh, rules=rules)
    init = deferred.init_fn(stack()[1].kernel)
    alone = shardinit.init(init, 5, mesh=mesh, rules=rules)
    assert type(alone) is Parameter
    assert alone.value.sharding == whole[1].kernel.value.sharding
    assert differing(alone, whole[1].kernel) == []


def test_what_is_there_already_stays_and_is_never_traced(mesh):
    table = np.arange(6.0)
    model = {
        "rope": FrozenParameter(table, "rope"),
        "done": Parameter(jnp.ones(3), "done"),
        "layer": stack(1)[0],
        "other": [1.5, "text", None, object],
    }
    plan = shardinit.plan(deferred.init_fn(model), mesh=mesh)
    assert [x.path for x in plan.leaves] == ["layer/kernel/value", "layer/bias/value"]
    made = shardinit.compile_plan(plan)(0)
    assert made["rope"].value is table
    assert made["done"] is model["done"] or made["done"].value is model["done"].value
    assert made["other"] == model["other"]
    assert deferred.assert_no_uninitialized(made) is None


def test_values_may_be_trees_with_names_of_their_own(mesh):
    def draw(key):
        return {"a": jax.random.normal(key, (8, 64)), "b": jnp.zeros(64)}

    model = {"t": UninitializedParameter(draw, "tree"), "d": stack(1)}
    made = shardinit.init(deferred.init_fn(model), 0, mesh=mesh, rules=RULES)
    assert made["t"].value["a"].sharding.spec == jax.P()
    assert differing(made, jitted(model, jax.random.key(0))) == []


def test_a_broken_initializer_is_named_with_its_path_in_the_model(mesh):
    given = jax.ShapeDtypeStruct((3,), jnp.float32)
    wrong = UninitializedParameter(lambda key: jnp.zeros(4), "w", given)
    model = {"layers": [weight("a"), wrong]}
    for start in (
        lambda: deferred.initialize_parameters(model, jax.random.key(0)),
        lambda: shardinit.init(deferred.init_fn(model), 0, mesh=mesh),
    ):
        with pytest.raises(StructureMismatchError, match=r"layers/1: .*'w'.*\(4,\)"):
            start()


def test_a_program_carries_a_deferred_model_without_its_classes(mesh, tmp_path):
    program = shardinit.export_plan(shardinit.plan(deferred.init_fn(stack(2))))
    program.save(tmp_path / "model.init")
    loaded = shardinit.load_program(tmp_path / "model.init")
    arrays = shardinit.init(loaded, 3, mesh=mesh)
    made = jitted(stack(2), jax.random.key(3))
    assert differing(arrays[1]["kernel"]["value"], made[1].kernel.value) == []


@deferred.pytree_dataclass
class Layer(deferred.Struct):
    query: deferred.ParameterLike
    key: deferred.ParameterLike
    value: deferred.ParameterLike
    out: deferred.ParameterLike
    gate: deferred.ParameterLike
    up: deferred.ParameterLike
    down: deferred.ParameterLike
    norms: list


@deferred.pytree_dataclass
class Decoder(deferred.Struct):
    embed: deferred.ParameterLike
    layers: list
    norm: deferred.ParameterLike
    head: deferred.ParameterLike

    @classmethod
    def llama_405b(cls):
        hidden, ffn, vocab, kv = 16384, 53248, 128256, 1024

        def matrix(name, *shape):
            def draw(key):
                return jax.random.normal(key, shape, jnp.bfloat16) * 0.02

            return UninitializedParameter(draw, name)

        def layer(number):
            made = Layer(
                matrix("query", hidden, hidden),
                matrix("key", hidden, kv),
                matrix("value", hidden, kv),
                matrix("out", hidden, hidden),
                matrix("gate", hidden, ffn),
                matrix("up", hidden, ffn),
                matrix("down", ffn, hidden),
                [matrix(f"norm_{n}", hidden) for n in range(2)],
            )
            return deferred.add_parameter_prefix(f"layer_{number}", made)

        return cls(
            matrix("embed", vocab, hidden),
            [layer(number) for number in range(126)],
            matrix("norm", hidden),
            matrix("head", hidden, vocab),
        )


@pytest.mark.slow
def test_an_uninitialised_405b_decoder_holds_no_array():
    gc.collect()
    before = {id(array) for array in jax.live_arrays()}
    model = Decoder.llama_405b()
    assert jax.tree.leaves(model) == []
    assert {id(array) for array in jax.live_arrays()} <= before
    mesh = jax.sharding.AbstractMesh((64, 64), ("data", "model"))
    plan = shardinit.plan(deferred.init_fn(model), mesh=mesh)
    assert {id(array) for array in jax.live_arrays()} <= before
    assert plan.parameter_count == 405_853_388_800
    assert plan.bytes_per_device < 210e6
    assert len(plan.programs) <= 8


@pytest.mark.parametrize("select", ["0/**", "1/kernel/**"])
def test_what_select_leaves_out_waits_and_a_later_init_fills_it(mesh, select):
    model = stack(2, 8, 64)
    want = shardinit.init(deferred.init_fn(model), 3, mesh=mesh)
    some = shardinit.init(deferred.init_fn(model), 3, mesh=mesh, select=select)
    with pytest.raises(deferred.UninitializedParameterError, match="have no value"):
        deferred.assert_no_uninitialized(some)
    made = deferred.select(some).at_instances_of(deferred.Parameter)
    assert all(isinstance(p.value, jax.Array) for p in made.get_sequence())
    whole = shardinit.init(deferred.init_fn(some), 3, mesh=mesh)
    assert differing(whole, want) == []
    for path, parameter in made.get_by_path().items():
        (kept,) = deferred.select(whole).at_keypaths([path]).get_sequence()
        assert kept.value is parameter.value
