"""The forward pass is traced and never executed; what may be traced as a whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shardinit
from shardinit import module as tx
from shardinit.errors import InitFnError
from tests.core.bits import differing
from tests.module.oracle import sequence, uniform

pytestmark = pytest.mark.once


class Late(tx.Module):
    w: jax.Array | None = tx.Parameter.node(None)

    def __call__(self, x):
        if self.initializing():
            self.w = jax.random.uniform(tx.next_key(), x.shape[-1:])
        return x * self.w


class Centred(tx.Module):
    """Its offset is made of the values that it sees."""

    offset: jax.Array | None = tx.ModelState.node(None)

    def __call__(self, x):
        if self.initializing():
            self.offset = x.mean(0)
        return x - self.offset


def test_the_forward_pass_is_never_executed():
    class Huge(tx.Module):
        def __init__(self):
            self.late = Late()

        def __call__(self, x):
            assert isinstance(x, jax.core.Tracer)
            y = self.late(x)
            square = jnp.einsum("ni,mi->nm", y, y)  # 2**60 elements
            return jax.lax.while_loop(lambda _: True, lambda y: y + 1, square)

    shape = jax.ShapeDtypeStruct((1 << 30, 8), jnp.float32)
    made = Huge().init(42, shape)
    assert np.array_equal(made.late.w, uniform(next(sequence(42)), 8))


def test_inputs_are_traced_even_if_they_are_numpy():
    class Peeks(tx.Module):
        def __call__(self, x):
            return np.linalg.norm(x)  # would run on the host

    with pytest.raises(jax.errors.TracerArrayConversionError):
        Peeks().init(1, np.ones(3))


def test_settings_among_the_inputs_stay_what_they_are():
    class Flag(tx.Module):
        w: jax.Array | None = tx.Parameter.node(None)

        def __call__(self, x, size, wide=False):
            if self.initializing():
                size = 2 * size if wide else size
                self.w = jax.random.uniform(tx.next_key(), (size,))
            return x

    made = Flag().init(1, tx.Inputs(jnp.ones(2), 3, wide=True))
    assert made.w.shape == (6,)


def test_leaves_that_depend_on_the_values_of_inputs(mesh):
    x = np.arange(64, dtype=np.float32).reshape(2, 32)
    made = Centred().init(1, x)
    assert np.array_equal(made.offset, jax.jit(lambda x: x.mean(0))(x))
    assert differing(made, Centred().init(1, x, mesh=mesh)) == []
    net = tx.Sequential(tx.Linear(4), Centred())
    with pytest.raises(InitFnError, match=r"'layers/1/offset'.*only the shape"):
        net.init(1, jax.ShapeDtypeStruct((2, 32), jnp.float32))


def test_float64_inputs_are_seen_as_jit_sees_them():
    assert Late().init(1, np.ones((2, 4))).w.dtype == np.float32


@pytest.mark.parametrize("transform", [jax.jit, jax.checkpoint])
def test_a_value_made_inside_of_a_transformation_is_refused(transform):
    class Wrapped(tx.Module):
        def __init__(self, always):
            self.sub = tx.Linear(4)
            self.always = always

        def __call__(self, x):
            if self.initializing() and not self.always:
                return self.sub(x)
            return transform(lambda x: self.sub(x))(x)

    x = jnp.ones((2, 4))
    with pytest.raises(InitFnError, match=r"'sub/bias'.*call submodules directly"):
        Wrapped(always=True).init(1, x)
    made = Wrapped(always=False).init(1, x)
    assert np.allclose(made(x), x @ made.sub.kernel, rtol=1e-5)
    assert tx.Sequential(jax.vmap(made.sub), tx.Linear(2)).init(1, x).initialized


def test_vmap_inside_of_a_forward_call():
    class Mapped(tx.Module):
        def __init__(self):
            self.sub = tx.Linear(32)

        def __call__(self, x):
            return jax.vmap(self.sub)(x)

    x = jnp.ones((2, 4))
    plain = tx.Linear(32).init(1, x)
    assert differing(Mapped().init(1, x).sub.kernel, plain.kernel) == []


def test_init_in_the_context_of_a_mesh(mesh):
    x = jnp.ones((2, 4))
    net = tx.Sequential(tx.Linear(32), tx.MLP([32, 32]))
    plain = net.init(1, x)
    with jax.set_mesh(mesh):
        assert differing(net.init(1, x), plain) == []
        assert differing(net.init(1, x, mesh=mesh), plain) == []


def test_an_initializer_passes_through_jit():
    initializer = tx.Initializer(jax.random.uniform)
    assert jax.jit(lambda i: i)(initializer) is initializer
    module = tx.Dropout(0.5)
    assert isinstance(jax.jit(lambda m: m)(module).rng, tx.Initializer)


@pytest.mark.slow
def test_init_inside_of_jit_and_vmap():
    x = jnp.ones((2, 4))
    plain = tx.MLP([32, 32], kernel_init=jax.random.uniform).init(42, x)
    module = tx.MLP([32, 32], kernel_init=jax.random.uniform)
    assert differing(jax.jit(lambda: module.init(42, x))(), plain) == []
    traced = jax.jit(lambda key, x: module.init(key, x))(jax.random.key(42), x)
    assert differing(traced, plain) == []
    keys = jax.random.split(jax.random.key(0), 3)
    many = jax.vmap(lambda key: module.init(key, x))(keys)
    one = module.init(keys[1], x)
    assert differing(jax.tree.map(lambda a: a[1], many), one) == []


def test_init_of_a_module_that_is_an_argument_of_jit():
    part = tx.Sequential(tx.Linear(4), Late()).init(1)
    part.layers[0] = tx.Linear(4).init(2, jnp.ones((2, 3)))
    made = jax.jit(lambda m, x: m.init(5, x))(part, jnp.ones((2, 3)))
    assert np.array_equal(made.layers[0].kernel, part.layers[0].kernel)
    assert np.array_equal(made.layers[1].w, uniform(next(sequence(5)), 4))


def test_nested_init():
    class Outer(tx.Module):
        def __init__(self):
            self.sub = None

        def __call__(self, x):
            if self.initializing():
                self.sub = Late().init(tx.next_key(), x)
            return self.sub(x)

    made = Outer().init(42, jnp.ones(4))
    inner = next(sequence(next(sequence(42))))
    assert np.array_equal(made.sub.w, uniform(inner, 4))


def test_a_jitted_training_step_keeps_the_structure():
    net = tx.Sequential(tx.Linear(4), tx.BatchNorm(), tx.Dropout(0.5))
    x = jnp.ones((2, 3))
    net = net.init(1, x)

    @jax.jit
    def step(net, x):
        y = net(x)
        return y, net

    _, after = step(net, x)
    assert jax.tree.structure(after) == jax.tree.structure(net)
    assert not np.array_equal(after.layers[1].mean, net.layers[1].mean)
    assert after.layers[2].rng != net.layers[2].rng
    assert step._cache_size() == 1
    step(after, x)
    assert step._cache_size() == 1


@pytest.mark.slow
def test_initialised_parts_may_lie_on_a_mesh(mesh):
    """Their arrays enter the trace as shapes, whatever mesh they are on."""
    x = jnp.ones((2, 8))
    part = tx.Sequential(tx.Linear(8), tx.Dropout(0.5)).init(1, x, mesh=mesh)
    made = tx.Sequential(part, tx.Linear(8), Centred()).init(2, x)
    assert made.layers[0].layers[0].kernel is part.layers[0].kernel
    made = tx.Sequential(part, tx.Linear(8)).init(2, x, mesh=mesh)
    assert made.layers[0].layers[0].kernel is part.layers[0].kernel


def test_what_a_module_takes_of_the_hosts_state_is_found():
    class Drawn(tx.Module):
        value: object = tx.Parameter.node(None)
        process: object = tx.Parameter.node(None)
        setting: int = 0

        def __call__(self, x):
            if self.initializing():
                self.setting = int(np.random.randint(1 << 30))
                self.value = jnp.full((8, 8), float(self.setting))
                self.process = jnp.full((4,), jax.process_index())
            return x

    fn = tx.init_fn(Drawn(), jnp.ones(2))
    kinds = {x.kind: x.leaves for x in shardinit.plan(fn).findings}
    assert kinds["host-random"] == ("value",)
    assert kinds["by-process"] == ("process",)
    made = shardinit.init(fn, 0)
    assert float(made.value[0, 0]) == float(jnp.float32(made.setting))
