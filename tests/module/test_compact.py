"""Submodules constructed where they are used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardinit import module as tx
from shardinit.errors import ModuleFieldError, ModuleStateError
from tests.core.bits import differing
from tests.module.oracle import sequence, uniform

pytestmark = pytest.mark.once

X = jnp.ones((2, 3))


class Draws(tx.Module):
    u: jax.Array | tx.Initializer = tx.Parameter.node()
    v: jax.Array | None = tx.Parameter.node()
    w: jax.Array | None = tx.Parameter.node()

    def __init__(self):
        self.u = tx.Initializer(lambda key: jax.random.uniform(key, (4,)))
        self.v = None
        self.w = None

    def rng_init(self):
        self.v = jax.random.uniform(tx.next_key(), (4,))

    def __call__(self, x):
        if self.initializing():
            self.w = jax.random.uniform(tx.next_key(), (4,))
        return x


class Two(tx.Module):
    @tx.compact
    def __call__(self, x):
        x = Draws()(x)
        return Draws()(x)


def test_one_key_begins_a_sequence_of_the_submodules_own():
    made = Two().init(42, X)
    keys = sequence(42)
    for sub in (made.draws, made.draws2):
        own = sequence(next(keys))
        assert np.array_equal(sub.u, uniform(next(own), 4))
        assert np.array_equal(sub.v, uniform(next(own), 4))
        assert np.array_equal(sub.w, uniform(next(keys), 4))  # in the forward call


def test_names_are_those_of_the_classes_with_numbers():
    class Net(tx.Module):
        @tx.compact
        def __call__(self, x):
            x = tx.Linear(4)(x)
            x = tx.Linear(4, name="head")(x)
            x = tx.BatchNorm()(x)
            x = tx.Linear(4)(x)
            x = tx.MLP([4])(x)
            return tx.Linear(4, name="head")(x)

    made = Net().init(1, X)
    names = {k for k, v in vars(made).items() if isinstance(v, tx.Module)}
    assert names == {"linear", "head", "batch_norm", "linear2", "mlp", "head2"}
    assert all(getattr(made, name).initialized for name in names)


def test_later_runs_use_the_same_modules():
    class Net(tx.Module):
        runs = 0

        @tx.compact
        def __call__(self, x):
            assert self.first_run == (not self.initialized)
            return tx.Linear(4)(x)

    made = Net().init(1, X)
    expected = X @ made.linear.kernel
    assert np.allclose(made(X), expected)
    assert np.allclose(jax.jit(lambda m, x: m(x))(made, X), expected)
    made.linear.bias = jnp.ones(4)
    assert np.allclose(made(X), expected + 1)
    assert differing(made.init(2, X), made) == []
    with pytest.raises(ModuleStateError, match="outside of a compact method"):
        _ = made.first_run


def test_a_module_called_twice_in_a_forward_pass_is_one():
    class Net(tx.Module):
        def __init__(self):
            self.two = tx.MLP([3])

        def __call__(self, x):
            return self.two(self.two(x))

    made = Net().init(1, X)
    assert {k for k, v in vars(made.two).items() if isinstance(v, tx.Module)} == {
        "linear"
    }


def test_several_compact_methods():
    class Net(tx.Module):
        @tx.compact
        def encode(self, x):
            return tx.Linear(5)(x)

        @tx.compact
        def decode(self, x):
            return tx.Linear(3)(x)

        def __call__(self, x):
            return self.decode(self.encode(x))

    made = Net().init(1, X)
    assert made.linear.kernel.shape == (3, 5)
    assert made.linear2.kernel.shape == (5, 3)
    assert np.allclose(made.decode(made.encode(X)), made(X))


def test_without_inputs_a_compact_module_waits():
    part = tx.Sequential(tx.MLP([4]), tx.Dropout(0.5)).init(1)
    assert not part.layers[0].initialized
    assert part.layers[1].initialized
    assert part.init(2, X).layers[0].linear.kernel.shape == (3, 4)


def test_what_rng_init_drew_stays_when_the_inputs_come():
    class Waits(tx.Module):
        drawn: jax.Array | None = tx.Parameter.node(None)
        sized: jax.Array | None = tx.Parameter.node(None)

        def rng_init(self):
            self.drawn = jax.random.uniform(tx.next_key(), (2,))

        def __call__(self, x):
            if self.initializing():
                self.sized = jnp.zeros(x.shape)
            return x

    waits = Waits().init(1)
    assert not waits.initialized
    assert np.array_equal(waits.init(2, X).drawn, waits.drawn)


def test_key_policy_name_reaches_into_compact_methods():
    class Net(tx.Module):
        def __init__(self, **fields):
            for name, value in fields.items():
                setattr(self, name, value)

        def __call__(self, x):
            for name in sorted(k for k, v in vars(self).items() if k in "abz"):
                x = getattr(self, name)(x)
            return x

    one = Net(a=Two(), b=Two()).init(1, X, key_policy="name")
    two = Net(z=Two(), b=Two()).init(1, X, key_policy="name")
    assert differing(one.b, two.b) == []
    leaves = [np.asarray(x).tobytes() for x in jax.tree.leaves(one)]
    assert len(set(leaves)) == len(leaves) == 12


def test_a_plain_method_makes_no_fields_of_the_compact_one_around_it():
    class Inner(tx.Module):
        def __call__(self, x):
            return tx.Linear(3)(x)

    class Outer(tx.Module):
        @tx.compact
        def __call__(self, x):
            return Inner()(x)

    with pytest.raises(ModuleStateError, match="module Linear"):
        Outer().init(42, X)


def test_a_compact_module_that_has_run_is_initialised_without_inputs():
    @tx.compact_module
    def Block(x):
        return tx.Linear(8)(x)

    class Parent(tx.Module):
        def __init__(self):
            self.block = Block()

        def rng_init(self):
            self.block(X)

    assert Parent().init(42).block.initialized


def test_compact_module():
    @tx.compact_module
    def Block(x, features):
        """A block."""
        return jax.nn.relu(tx.Linear(features)(x))

    assert issubclass(Block, tx.Module)
    assert Block.__name__ == "Block"
    made = Block().init(42, tx.Inputs(X, features=8))
    assert made.linear.kernel.shape == (3, 8)
    plain = jax.nn.relu(X @ made.linear.kernel)
    assert np.allclose(made(X, 8), plain)

    class Net(tx.Module):
        @tx.compact
        def __call__(self, x):
            x = Block()(x, 8)
            return Block()(x, 4)

    net = Net().init(42, X)
    assert net.block2.linear.kernel.shape == (8, 4)


def test_misuse_of_compact_methods():
    with pytest.raises(ModuleStateError, match=r"'layers/0' .*constructs a Linear"):
        tx.Sequential(tx.MLP([2]))(X)

    class Changing(tx.Module):
        @tx.compact
        def __call__(self, x, layers=(tx.Linear,)):
            for layer in layers:
                x = layer(3)(x)
            return x

    made = tx.Sequential(Changing()).init(1, X)
    with pytest.raises(ModuleStateError, match="after all 1 modules of its first run"):
        made.layers[0](X, (tx.Linear, tx.Linear))
    with pytest.raises(ModuleStateError, match="where its first run made 'linear'"):
        made.layers[0](X, (tx.Dropout,))

    class Taken(tx.Module):
        linear: int = tx.static(3)

        @tx.compact
        def __call__(self, x):
            return tx.Linear(3)(x)

    assert Taken().init(1, X).linear2.kernel.shape == (3, 3)

    class Same(tx.Module):
        linear: tx.Linear = tx.static()

        def __init__(self):
            self.linear = tx.Linear(3)
            del self.linear

        @tx.compact
        def __call__(self, x):
            return tx.Linear(3)(x)

    with pytest.raises(ModuleFieldError, match="without a value"):
        Same()


class Recursive(tx.Module):
    @tx.compact
    def __call__(self, x):
        return self(tx.Linear(3)(x))


class Mutual(tx.Module):
    @tx.compact
    def encode(self, x):
        return self(tx.Linear(3)(x))

    def __call__(self, x):
        return self.encode(x)


class ThroughAnother(tx.Module):
    other: tx.Module | None = tx.static(None)

    @tx.compact
    def __call__(self, x):
        return self.other(tx.Linear(3)(x))


class CallsBack(tx.Module):
    target: tx.Module | None = tx.static(None)

    def __call__(self, x):
        return self.target(x)


def _through_another():
    outer = ThroughAnother()
    outer.other = CallsBack()
    outer.other.target = outer
    return outer


@pytest.mark.parametrize(
    ("make", "method"),
    [(Recursive, "__call__"), (Mutual, "encode"), (_through_another, "__call__")],
)
def test_a_compact_method_that_recurses_is_refused(make, method):
    module = make()
    with pytest.raises(ModuleStateError) as caught:
        module.init(1, X)
    assert caught.value.where == f"module {type(module).__name__}"
    assert caught.value.got == f"its compact method {method!r} was called while it runs"
    assert caught.value.expected == (
        "a compact method that does not call itself, directly or through another module"
    )
    assert caught.value.remedy == (
        "Repeat layers with a loop in the method, or construct another module for the "
        "inner call"
    )


def test_a_recursion_that_would_end_is_refused_too():
    class Countdown(tx.Module):
        @tx.compact
        def __call__(self, x, count=0):
            x = tx.Linear(3)(x)
            return self(x, count - 1) if count else x

    made = Countdown().init(1, X)
    with pytest.raises(ModuleStateError, match="was called while it runs"):
        made(X, 2)
    assert made(X).shape == (2, 3)
    with pytest.raises(ModuleStateError, match="was called while it runs"):
        Countdown().init(1, tx.Inputs(X, 1))


def test_modules_of_one_class_may_nest_in_compact_methods():
    class Nested(tx.Module):
        def __init__(self, depth):
            self.depth = depth

        @tx.compact
        def __call__(self, x):
            x = tx.Linear(3)(x)
            return Nested(self.depth - 1)(x) if self.depth else x

    made = Nested(2).init(1, X)
    assert made.nested.nested.linear.kernel.shape == (3, 3)
    assert made(X).shape == (2, 3)


def test_a_compact_method_may_call_its_parents():
    class Parent(tx.Module):
        @tx.compact
        def __call__(self, x):
            return tx.Linear(4)(x)

    class Child(Parent):
        @tx.compact
        def __call__(self, x):
            return tx.Linear(3)(super().__call__(tx.Linear(8)(x)))

    class Grandchild(Child):
        @tx.compact
        def __call__(self, x):
            return tx.Linear(2)(super().__call__(x))

    made = Grandchild().init(1, X)
    names = ("linear3", "linear4", "linear2", "linear")  # constructed from outside
    assert [getattr(made, name).features_out for name in names] == [8, 4, 3, 2]
    assert made.initialized
    want = X
    for name in names:
        want = getattr(made, name)(want)
    np.testing.assert_array_equal(made(X), want)
    np.testing.assert_array_equal(jax.jit(lambda m, x: m(x))(made, X), want)


def test_a_parents_compact_method_that_calls_back_is_a_recursion():
    class Parent(tx.Module):
        @tx.compact
        def __call__(self, x):
            return self(x)

    class Child(Parent):
        @tx.compact
        def __call__(self, x):
            return super().__call__(x)

    with pytest.raises(ModuleStateError, match="was called while it runs"):
        Child().init(1, X)


def test_a_class_made_in_a_compact_method_is_met_again_with_this_runs_variables():
    class Outer(tx.Module):
        @tx.compact
        def __call__(self, x):
            class Inner(tx.Module):
                scale: jax.Array | None = tx.Parameter.node(None)
                calls: int = tx.State.node(0)

                def __call__(self):
                    if self.initializing():
                        self.scale = jnp.full(x.shape[-1:], 3.0)
                    self.calls += 1
                    return x * self.scale

            return Inner()()

    made = Outer().init(1, X)
    for number in (2, 3):
        np.testing.assert_array_equal(made(number * X), 3 * number * X)
    assert made.inner.calls == 3
    np.testing.assert_array_equal(jax.jit(lambda m, x: m(x))(made, X), 3 * X)


def test_a_compact_module_made_in_a_compact_method_is_met_again():
    class Outer(tx.Module):
        @tx.compact
        def __call__(self, x):
            return tx.compact_module(lambda x: tx.Linear(3)(x))()(x)

    made = Outer().init(0, X)
    assert made(X).shape == (*X.shape[:-1], 3)
