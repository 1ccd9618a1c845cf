"""Parameters of other libraries, and models where an init function is meant."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shardinit
from shardinit import deferred
from shardinit import module as tx
from shardinit.errors import InitFnError, StructureMismatchError

pytestmark = pytest.mark.once


def draw(key):
    return jax.random.normal(key, (4, 64))


@tx.compact_module
def Block(x):
    return tx.Linear(3)(x)


class Holder(tx.Module):
    inner: object = tx.node(None)

    def __init__(self, inner):
        self.inner = inner


FUNCTIONS = {
    "init_fn": deferred.init_fn,
    "initialize_parameters": lambda m: deferred.initialize_parameters(
        m, jax.random.key(0)
    ),
    "add_parameter_prefix": lambda m: deferred.add_parameter_prefix("x", m),
    "assert_no_uninitialized": deferred.assert_no_uninitialized,
    "check_no_duplicated_parameters": deferred.check_no_duplicated_parameters,
    "mark_shareable": deferred.mark_shareable,
    "attach_shared_parameters": deferred.attach_shared_parameters,
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.few(3)
def test_deferred_functions_refuse_what_waits_in_another_way(name):
    mine = deferred.UninitializedParameter(draw, "mine")
    with pytest.raises(InitFnError, match="at '1': Block is a module of shardinit"):
        FUNCTIONS[name]([mine, Block()])
    initialised = Block().init(0, jnp.ones(2))
    FUNCTIONS[name]([mine, initialised] if "assert" not in name else [initialised])
    v1 = pytest.importorskip("penzai.deprecated.v1.pz")
    for theirs in (v1.nn.UninitializedParameter(draw, "a"), v1.nn.Parameter(1.0, "a")):
        with pytest.raises(InitFnError, match="Penzai's first version") as caught:
            FUNCTIONS[name]([mine, theirs])
        assert "frontends.penzai.init_fn" in caught.value.remedy


def test_the_front_end_of_penzai_refuses_deferred_parameters():
    front = pytest.importorskip("shardinit.frontends.penzai")
    waits = [deferred.UninitializedParameter(draw, "a")]
    with pytest.raises(InitFnError, match=r"shardinit\.deferred"):
        front.init_fn(waits)


@pytest.mark.parametrize("library", ["deferred", "penzai"])
def test_slots_of_penzais_second_version_are_refused(library):
    pz = pytest.importorskip("penzai.pz")
    front = {"deferred": deferred.init_fn}
    if library == "penzai":
        from shardinit.frontends import penzai

        front["penzai"] = penzai.init_fn
    axes = {"input_axes": {"a": 4}, "output_axes": {"b": 64}}
    waits = pz.nn.Linear.from_config("lin", init_base_rng=None, **axes)
    with pytest.raises(InitFnError, match="slot of Penzai's second version"):
        front[library](waits)


def test_modules_refuse_deferred_parameters_that_wait():
    holder = Holder(deferred.UninitializedParameter(draw, "a"))
    for call in (lambda: tx.init_fn(holder), lambda: holder.init(0)):
        with pytest.raises(InitFnError, match=r"shardinit\.deferred") as caught:
            call()
        assert "'inner'" in caught.value.where
    with pytest.raises(InitFnError, match=r"shardinit\.deferred"):
        tx.init_fn([deferred.UninitializedParameter(draw, "a")])
    with pytest.raises(InitFnError, match="no module"):
        tx.init_fn(lambda key: key)


def models():
    yield "module.init_fn", tx.Linear(4)
    yield "module.init_fn", [Block()]
    yield "deferred.init_fn", {"w": deferred.UninitializedParameter(draw, "a")}
    linen, nnx = (pytest.importorskip(f"flax.{name}") for name in ("linen", "nnx"))
    yield "frontends.linen.init_fn", linen.Dense(4)
    yield "frontends.linen.init_fn", linen.Dense(4).bind({})
    yield "frontends.nnx.init_fn", nnx.Linear
    yield "frontends.nnx.init_fn", nnx.Linear(3, 4, rngs=nnx.Rngs(0))


def test_a_model_in_place_of_an_init_function_is_told_its_front_end():
    for remedy, model in models():
        for call in (shardinit.plan, lambda model: shardinit.init(model, 0)):
            with pytest.raises(InitFnError) as caught:
                call(model)
            assert remedy in caught.value.remedy


def test_callables_that_are_no_models_are_init_functions():
    class Drawn:
        def __call__(self, key):
            return draw(key)

    np.testing.assert_array_equal(
        shardinit.init(Drawn(), 0), shardinit.init(draw, 0), strict=True
    )


def test_array_specs_of_penzai_are_structures(mesh):
    specs = pytest.importorskip("penzai.core.shapecheck")
    pz = pytest.importorskip("penzai.pz")

    def make(initializer, **spec):
        structure = {"w": specs.ArraySpec(**spec)}
        return deferred.UninitializedParameter(initializer, "a", structure)

    def plain(key):
        return {"w": draw(key)}

    def named(key):
        return {"w": pz.nx.wrap(draw(key)).tag("embed", "mlp")}

    waits = make(plain, shape=(4, 64), dtype=jnp.float32)
    empty = waits.as_empty_parameter().value["w"]
    assert empty == jax.ShapeDtypeStruct((4, 64), jnp.float32)
    assert waits.initialize(jax.random.key(0)).value["w"].shape == (4, 64)
    sizes = {"embed": 4, "mlp": 64}
    waits = make(named, named_shape=sizes, dtype=jnp.float32)
    rules = shardinit.AxisRules([("mlp", "model")])
    made = shardinit.init(deferred.init_fn(waits), 0, mesh=mesh, rules=rules)
    (leaf,) = jax.tree.leaves(made)
    assert leaf.sharding.spec == jax.P(None, "model")
    with pytest.raises(StructureMismatchError, match=r"shape \(4, 64\).*\(4, 32\)"):
        make(plain, shape=(4, 32), dtype=jnp.float32).initialize(jax.random.key(0))
    with pytest.raises(StructureMismatchError, match="parameter 'a'"):
        make(plain, shape=(4, 64), dtype=np.floating)
    with pytest.raises(StructureMismatchError, match="parameter 'a'"):
        make(plain, shape=(specs.DimVar("n"), 64), dtype=jnp.float32)
