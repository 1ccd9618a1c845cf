"""Order of keys, and what a second ``init`` does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardinit import module as tx
from tests.core.bits import differing
from tests.module.oracle import sequence, uniform

pytestmark = pytest.mark.once


def draw(key):
    return jax.random.uniform(key, (4,))


class Leaf(tx.Module):
    value: jax.Array | tx.Initializer = tx.Parameter.node()

    def __init__(self):
        self.value = tx.Initializer(draw)

    def __call__(self, x):
        return x + self.value.sum()


class Late(tx.Module):
    w: jax.Array | None = tx.Parameter.node()

    def __init__(self):
        self.w = None

    def __call__(self, x):
        if self.initializing():
            self.w = jax.random.uniform(tx.next_key(), x.shape[-1:])
        return x * self.w


class Both(tx.Module):
    """A module with an initialiser, an ``rng_init`` and a forward call."""

    ran = 0
    a: jax.Array | tx.Initializer = tx.Parameter.node()
    b: jax.Array | None = tx.Parameter.node()
    w: jax.Array | None = tx.Parameter.node()

    def __init__(self):
        self.a = tx.Initializer(draw)
        self.b = None
        self.w = None

    def rng_init(self):
        type(self).ran += 1
        self.b = jax.random.uniform(tx.next_key(), (4,))

    def __call__(self, x):
        if self.initializing():
            self.w = jax.random.uniform(tx.next_key(), x.shape[-1:])
        return x * self.w


class Holder(tx.Module):
    def __init__(self, **fields):
        for name, value in fields.items():
            setattr(self, name, value)

    def __call__(self, x):
        for value in jax.tree.leaves(vars(self), is_leaf=callable):
            if isinstance(value, tx.Module):
                x = value(x)
        return x


def test_fields_go_in_alphabetical_order_however_they_were_assigned():
    module = Holder(z=Leaf(), b={"y": Leaf(), "x": Leaf()}, a=[Leaf(), Leaf()])
    module = module.init(42)
    keys = sequence(42)
    for leaf in (*module.a, module.b["x"], module.b["y"], module.z):
        assert np.array_equal(leaf.value, uniform(next(keys), 4))


def test_rng_init_of_children_runs_before_that_of_parents():
    order = []

    class Node(tx.Module):
        def __init__(self, tag, *children):
            self.tag = tag
            self.children = list(children)

        def rng_init(self):
            order.append(self.tag)

    Node("root", Node("b", Node("c")), Node("a")).init(0)
    assert order == ["c", "b", "a", "root"]


@pytest.mark.parametrize("seed", [7, np.int32(7), np.uint64(7), jax.random.key(7)])
def test_any_integer_or_key_is_a_key(seed):
    assert np.array_equal(Leaf().init(seed).value, uniform(next(sequence(7)), 4))


def test_raw_key_data_is_a_key():
    raw = jax.random.PRNGKey(7)
    assert np.array_equal(Leaf().init(raw).value, uniform(next(sequence(7)), 4))


def test_what_is_no_key():
    for wrong in ("7", 7.0, True, None):
        with pytest.raises(TypeError, match="expected one key"):
            Leaf().init(wrong)


@pytest.mark.parametrize("form", ["one", "tuple", "dict", "Inputs"])
def test_forms_of_inputs(form):
    class Two(tx.Module):
        w: jax.Array | None = tx.Parameter.node(None)

        def __call__(self, x, y=None):
            assert (y is None) == (form == "one")
            if self.initializing():
                self.w = jax.random.uniform(tx.next_key(), x.shape)
            return x

    x = jnp.ones(4)
    forms = {
        "one": x,
        "tuple": (x, x),
        "dict": {"x": x, "y": x},
        "Inputs": tx.Inputs(x, y=x),
    }
    made = Two().init(1, forms[form])
    assert np.array_equal(made.w, uniform(next(sequence(1)), 4))


def test_another_method_may_be_called():
    class Auto(tx.Module):
        w: jax.Array | None = tx.Parameter.node(None)

        def encode(self, x):
            if self.initializing():
                self.w = jax.random.uniform(tx.next_key(), x.shape)
            return x

    made = Auto().init(1, jnp.ones(4), "encode")
    assert np.array_equal(made.w, uniform(next(sequence(1)), 4))
    with pytest.raises(TypeError, match="no method '__call__'"):
        Auto().init(1, jnp.ones(4))


def test_init_leaves_the_module_alone_unless_inplace():
    module = Holder(late=Late(), leaf=Leaf())
    late = module.late
    made = module.init(3, jnp.ones(4))
    assert late.w is None
    assert made.late is not late
    assert module.init(3, jnp.ones(4), inplace=True) is module
    assert module.late is late
    assert late.initialized
    assert differing(module, made) == []


def test_a_second_init_changes_nothing():
    Both.ran = 0
    first = Holder(both=Both(), leaf=Leaf()).init(3, jnp.ones(4))
    ran = Both.ran
    again = first.init(4, jnp.ones(4))
    assert again is not first
    assert Both.ran == ran
    assert again.both.w is first.both.w
    assert again.leaf.value is first.leaf.value


def test_without_inputs_what_waits_for_one_is_not_marked():
    part = Holder(late=Late(), leaf=Leaf()).init(3)
    assert part.initialized
    assert part.leaf.initialized
    assert not part.late.initialized
    whole = part.init(5, jnp.ones(4))
    assert whole.late.initialized
    assert whole.leaf.value is part.leaf.value
    assert np.array_equal(whole.late.w, uniform(next(sequence(5)), 4))


def test_rng_init_runs_once_for_a_module_that_waits():
    part = Both().init(3)
    assert not part.initialized
    whole = part.init(3, jnp.ones(4))
    assert whole.initialized
    assert np.array_equal(whole.a, part.a)
    assert np.array_equal(whole.b, part.b)


def test_an_initialised_part_of_an_uninitialised_module_stays():
    norm = tx.BatchNorm().init(0, jnp.ones((2, 4)))
    kept = norm.mean
    made = Holder(a=norm, late=Late()).init(1, 2 * jnp.ones((2, 4)))
    assert made.a.mean is kept  # though the module trains and init called it
    assert made.late.initialized


def test_shared_modules_stay_shared_and_draw_once():
    leaf = Leaf()
    made = Holder(a=leaf, b=leaf, c=[leaf], d=Leaf()).init(42, jnp.ones(4))
    assert made.a is made.b
    assert made.a is made.c[0]
    keys = sequence(42)
    assert np.array_equal(made.a.value, uniform(next(keys), 4))
    assert np.array_equal(made.d.value, uniform(next(keys), 4))


def test_static_modules_stay_as_they_are():
    class Static(tx.Module):
        sub: Leaf = tx.static()

        def __init__(self):
            self.sub = Leaf()
            self.own = Leaf()

    made = Static().init(42)
    assert isinstance(made.sub.value, tx.Initializer)
    assert not made.sub.initialized
    assert len(jax.tree.leaves(made)) == 1


def test_an_initialised_static_module_may_be_called_and_stays(mesh):
    class Teacher(tx.Module):
        teacher: tx.Module = tx.static()

        def __init__(self, teacher):
            self.teacher = teacher
            self.own = Late()

        def __call__(self, x):
            return self.own(self.teacher(x))

    x = jnp.arange(8.0).reshape(2, 4)
    teacher = tx.Sequential(tx.Linear(4), tx.BatchNorm()).init(1, x)
    for made in (Teacher(teacher).init(42, x), Teacher(teacher).init(42, x, mesh=mesh)):
        assert differing(made.teacher, teacher) == []
        assert np.array_equal(made.own.w, uniform(next(sequence(42)), 4))
        assert len(jax.tree.leaves(made)) == 1
        assert jax.jit(Teacher.__call__)(made, x).shape == (2, 4)


def test_names_decide_with_key_policy_name():
    def values(**fields):
        module = Holder(**fields).init(42, jnp.ones(4), key_policy="name")
        return {k: jax.tree.leaves(getattr(module, k)) for k in fields}

    three = values(a=Both(), b=[Leaf(), Late()], m=tx.MLP([4, 4]))
    renamed = values(z=Both(), b=[Leaf(), Late()], m=tx.MLP([4, 4]))
    assert differing(three["b"], renamed["b"]) == []
    assert differing(three["m"], renamed["m"]) == []
    assert differing(three["a"], renamed["z"]) != []
    assert len({x.tobytes() for x in map(np.asarray, three["a"])}) == 3
    plain = Holder(a=Both(), b=[Leaf(), Late()]).init(42, jnp.ones(4))
    assert differing(jax.tree.leaves(plain.b), three["b"]) != []


def test_name_keys_are_a_fold_in_of_the_path():
    import hashlib

    made = Holder(a=[Leaf()]).init(42, key_policy="name")
    number = int.from_bytes(hashlib.sha1(b"a/0/value:0").digest()[:4], "big")
    key = jax.random.fold_in(jax.random.key(42), np.uint32(number))
    assert np.array_equal(made.a[0].value, uniform(key, 4))
    with pytest.raises(ValueError, match="key_policy"):
        Leaf().init(42, key_policy="path")


def test_rng_key_context():
    with tx.rng_key(42):
        keys = [tx.next_key(), tx.next_key()]
    expected = sequence(42)
    for key in keys:
        assert np.array_equal(
            jax.random.key_data(key), jax.random.key_data(next(expected))
        )
    with pytest.raises(RuntimeError):
        tx.next_key()
