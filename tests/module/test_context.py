"""Threads, exceptions, and every misuse with the path of the module or field."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardinit import module as tx
from shardinit.errors import (
    InvalidKeyError,
    ModuleFieldError,
    ModuleStateError,
    NameClashError,
)
from shardinit.module import context
from tests.module.oracle import sequence, uniform

pytestmark = pytest.mark.once


class Draws(tx.Module):
    w: jax.Array | None = tx.Parameter.node()

    def __init__(self, size, meet=None):
        self.size = size
        self.meet = meet
        self.w = None

    def __call__(self, x):
        if self.initializing():
            if self.meet is not None:
                self.meet()
            self.w = jax.random.uniform(tx.next_key(), (self.size,))
        return x


class Pair(tx.Module):
    def __init__(self, first, second):
        self.first = first
        self.second = [second]

    def __call__(self, x):
        return self.second[0](self.first(x))


class Fails(tx.Module):
    where = "call"

    def __init__(self, where):
        self.where = where

    def rng_init(self):
        if self.where == "rng_init":
            raise ZeroDivisionError("mine")

    def __call__(self, x):
        if self.where == "call":
            raise ZeroDivisionError("mine")
        return x


@pytest.mark.slow
def test_32_threads_initialise_32_modules():
    count = 32
    barrier = threading.Barrier(count, timeout=60)
    first = threading.local()

    def meet():  # all are inside their forward call at the same time
        if not hasattr(first, "done"):
            first.done = True
            barrier.wait()

    made = [None] * count
    failed = []

    def module_of(number):  # no two are alike
        rest = [Draws(4) for _ in range(number)]
        return tx.Sequential(Draws(4, meet), *rest)

    def run(number):
        try:
            made[number] = module_of(number).init(number, jnp.ones(3))
        except Exception as error:
            failed.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    for number, module in enumerate(made):
        assert len(module.layers) == number + 1
        for key, layer in zip(sequence(number), module.layers, strict=False):
            assert np.array_equal(layer.w, uniform(key, 4))


@pytest.mark.parametrize("where", ["rng_init", "call"])
def test_an_exception_leaves_no_context_and_says_where(where):
    with pytest.raises(ZeroDivisionError, match="mine") as caught:
        Pair(Draws(2), Fails(where)).init(1, jnp.ones(3))
    notes = [n for n in caught.value.__notes__ if "being initialised" in n]
    assert notes == ["in module 'second/0' (Fails), while it was being initialised"]
    assert context.current_scope() == context.Scope()
    with pytest.raises(RuntimeError):
        tx.next_key()
    assert Draws(2).init(1, jnp.ones(3)).initialized


def test_an_exception_in_an_initializer_says_where():
    class Bad(tx.Module):
        a: jax.Array | tx.Initializer = tx.Parameter.node()

        def __init__(self):
            self.a = tx.Initializer(lambda key: 1 // 0)

    with pytest.raises(ZeroDivisionError) as caught:
        Pair(Draws(1), Bad()).init(1)
    assert any("'second/0/a'" in note for note in caught.value.__notes__)
    assert context.current_scope() == context.Scope()


def test_an_exception_leaves_the_module_as_it_was():
    module = Pair(Draws(2), Fails("call"))
    with pytest.raises(ZeroDivisionError):
        module.init(1, jnp.ones(3), inplace=True)
    assert module.first.w is None
    assert not module.initialized


def test_a_call_before_init_says_which_module():
    with pytest.raises(ModuleStateError, match=r"'second/0' \(Draws\)"):
        Pair(tx.Lambda(jnp.sin), Draws(2))(jnp.ones(3))
    with pytest.raises(ModuleStateError, match="module Draws: it was called before"):
        Draws(2).initializing()
    with pytest.raises(RuntimeError):  # what the original raises
        Draws(2)(jnp.ones(3))


def test_next_key_in_a_constructor():
    class Eager(tx.Module):
        w: jax.Array | None = tx.Parameter.node()

        def __init__(self):
            self.w = jax.random.uniform(tx.next_key(), (2,))

    with pytest.raises(ModuleStateError, match="An __init__ draws nothing"):
        Eager()
    with tx.rng_key(1), pytest.raises(ModuleStateError):
        Eager()

    class Outer(tx.Module):
        @tx.compact
        def __call__(self, x):
            return Eager()(x)

    with pytest.raises(ModuleStateError, match="asked for outside of init"):
        Outer().init(1, jnp.ones(2))


def test_next_key_of_an_initialised_module_says_which():
    class Always(tx.Module):
        def __call__(self, x):
            return x + jax.random.uniform(tx.next_key(), x.shape)

    made = Pair(tx.Lambda(jnp.sin), Always()).init(1, jnp.ones(2))
    with pytest.raises(ModuleStateError, match=r"'second/0' \(Always\)"):
        made(jnp.ones(2))
    with tx.rng_key(3):
        made(jnp.ones(2))


def test_a_field_left_without_a_value():
    class Empty(tx.Module):
        w: jax.Array | None = tx.Parameter.node()

    with pytest.raises(ModuleFieldError, match=r"field 'w' of Empty.*self\.w = None"):
        Empty()


def test_an_array_assigned_to_a_field_that_is_no_node():
    class Undeclared(tx.Module):
        def __call__(self, x):
            if self.initializing():
                self.w = jax.random.uniform(tx.next_key(), x.shape)
            return x

    with pytest.raises(ModuleFieldError, match=r"'second/0/w' of Undeclared"):
        Pair(Draws(2), Undeclared()).init(1, jnp.ones(2))


def test_a_module_that_is_no_part_of_the_tree():
    outside = Draws(2)

    class Strays(tx.Module):
        def __call__(self, x):
            return outside(x)

    class Static(tx.Module):
        sub: Draws = tx.static()

        def __init__(self):
            self.sub = outside

        def __call__(self, x):
            return self.sub(x)

    for module in (Strays(), Static()):
        with pytest.raises(ModuleStateError, match="Draws: it is not initialised and"):
            module.init(1, jnp.ones(2))
    assert outside.w is None


def test_a_module_that_contains_itself():
    class Loop(tx.Module):
        def __init__(self):
            self.sub = Draws(2)
            self.sub.back = self

    with pytest.raises(ModuleFieldError, match="it contains itself"):
        Loop().init(1)


def test_names_with_one_hash_are_refused(monkeypatch):
    monkeypatch.setattr(context, "words_of", lambda name: (1,))
    with pytest.raises(NameClashError, match="same 32 bits"):
        Pair(Draws(2), Draws(2)).init(1, jnp.ones(2), key_policy="name")


def test_a_mesh_inside_of_jit(mesh):
    with pytest.raises(ModuleStateError, match=r"a mesh inside jax\.jit"):
        jax.jit(lambda: Draws(2).init(1, jnp.ones(2), mesh=mesh))()


def test_a_module_takes_one_key_not_streams_by_name():
    streams = {"params": 0, "dropout": 1}
    with pytest.raises(InvalidKeyError, match=r"^key: got dict; expected one key"):
        Draws(3).init(streams, jnp.ones(3))
    with pytest.raises(InvalidKeyError), tx.rng_key(streams):
        pass
