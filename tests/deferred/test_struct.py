"""Struct: the pytree dataclass, its decorator, and what they refuse."""

import abc
import copy
import dataclasses
import subprocess
import sys
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import treescope
from jax.tree_util import GetAttrKey

from shardinit import deferred
from shardinit.deferred import PyTreeDataclassSafetyError, Struct, pytree_dataclass
from tests.deferred.models import STATIC, Dense, stack

pytestmark = pytest.mark.once


@pytree_dataclass
class Point(Struct):
    y: float
    label: str = dataclasses.field(metadata=STATIC)
    x: float


def test_children_are_the_fields_in_order_and_static_ones_are_none():
    point = Point(2.0, "p", 1.0)
    assert jax.tree.leaves(point) == [2.0, 1.0]
    doubled = jax.tree.map(lambda v: 2 * v, point)
    assert doubled == Point(4.0, "p", 2.0)
    assert jax.tree.structure(point) != jax.tree.structure(Point(2.0, "q", 1.0))


def test_it_is_frozen():
    point = Point(2.0, "p", 1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        point.x = 3.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        del point.x
    assert dataclasses.replace(point, x=3.0) == Point(2.0, "p", 3.0)
    assert copy.deepcopy(point) == point


def test_key_paths_are_the_attributes_unless_a_subclass_says_otherwise():
    @pytree_dataclass
    class Columns(Struct):
        a: int
        b: int

        def key_for_field(self, field_name):
            return jax.tree_util.DictKey(f"column {field_name}")

    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(Point(2, "p", 1))]
    assert paths == [(jax.tree_util.GetAttrKey(n),) for n in ("y", "x")]
    paths = [p for p, _ in jax.tree_util.tree_leaves_with_path(Columns(1, 2))]
    assert paths == [(jax.tree_util.DictKey(f"column {n}"),) for n in "ab"]


def test_attributes_dict_and_from_attributes_are_inverse_and_run_no_init():
    ran = []

    @pytree_dataclass
    class Checked(Struct):
        value: int

        def __init__(self, value):
            ran.append(value)
            self.value = value

    made = Checked(3)
    assert made.attributes_dict() == {"value": 3}
    assert Checked.from_attributes(**made.attributes_dict()) == made
    assert jax.tree.map(lambda v: v, made) == made
    assert ran == [3]
    point = Point(2.0, "p", 1.0)
    assert list(point.attributes_dict()) == ["y", "label", "x"]
    assert Point.from_attributes(**point.attributes_dict()) == point


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"y": 1.0, "x": 2.0}, r"missing fields \['label'\]"),
        ({"y": 1.0, "x": 2.0, "label": "", "z": 3.0}, r"unknown fields \['z'\]"),
    ],
)
def test_from_attributes_names_the_missing_and_the_extra_field(fields, named):
    with pytest.raises(ValueError, match=named):
        Point.from_attributes(**fields)


def test_flattening_is_public_and_has_an_inverse():
    point = Point(2.0, "p", 1.0)
    children, aux = point.tree_flatten()
    keyed, same_aux = point.tree_flatten_with_keys()
    assert list(children) == [2.0, 1.0]
    assert [child for _, child in keyed] == [2.0, 1.0]
    assert aux == same_aux
    assert Point.tree_unflatten(aux, children) == point


def test_a_hand_written_init_assigns_fields_on_a_stand_in():
    seen = []

    @pytree_dataclass
    class Base(Struct):
        size: int = dataclasses.field(metadata=STATIC)

        def __init__(self, size):
            seen.append(type(self))
            self.scratch = size
            self.size = self.scratch
            self.size += self.more()

        def more(self):
            return 1

    @pytree_dataclass
    class Derived(Base):
        size: int = dataclasses.field(metadata=STATIC)
        extra: float

        def __init__(self, size):
            super().__init__(size)
            self.extra = 2.0

        def more(self):
            return 10

    @pytree_dataclass(init=False)
    class Inheriting(Base):
        size: int = dataclasses.field(metadata=STATIC)

        def more(self):
            return 100

    assert Base(1).size == 2
    derived = Derived(1)
    assert (derived.size, derived.extra) == (11, 2.0)
    assert type(derived) is Derived
    assert Inheriting(1).size == 101
    assert not hasattr(derived, "scratch")
    assert Derived not in seen
    with pytest.raises(dataclasses.FrozenInstanceError):
        derived.size = 3


def test_an_init_that_leaves_a_field_unset_is_named():
    @pytree_dataclass
    class Half(Struct):
        a: int
        b: int

        def __init__(self):
            self.a = 1

    with pytest.raises(AttributeError, match=r"Half.__init__ left the field 'b'"):
        Half()


def test_without_the_stand_in_an_init_may_not_assign():
    @pytree_dataclass(use_mutable_proxy_in_init=False)
    class Raw(Struct):
        a: int

        def __init__(self):
            self.a = 1

    with pytest.raises(dataclasses.FrozenInstanceError):
        Raw()


def test_unlisted_inherited_fields_are_refused_unless_asked_for():
    with pytest.raises(PyTreeDataclassSafetyError, match=r"'y', 'label', 'x', 'z'"):

        @pytree_dataclass
        class Forgot(Point):
            z: float

    @pytree_dataclass(has_implicitly_inherited_fields=True)
    class Asked(Point):
        z: float

    assert jax.tree.leaves(Asked(2.0, "p", 1.0, 3.0)) == [2.0, 1.0, 3.0]
    with pytest.raises(PyTreeDataclassSafetyError, match="inherits no field"):

        @pytree_dataclass(has_implicitly_inherited_fields=True)
        class Needless(Struct):
            z: float


def test_fields_in_another_order_are_refused():
    with pytest.raises(PyTreeDataclassSafetyError, match="in the order"):

        @pytree_dataclass
        class Reordered(Point):
            x: float
            y: float
            label: str = dataclasses.field(metadata=STATIC)


def test_overwriting_a_hand_written_parent_init_is_refused_unless_asked_for():
    @pytree_dataclass
    class Written(Struct):
        a: int

        def __init__(self):
            self.a = 7

    with pytest.raises(PyTreeDataclassSafetyError, match=r"Written.__init__"):

        @pytree_dataclass
        class Overwrites(Written):
            a: int

    @pytree_dataclass(overwrite_parent_init=True)
    class Asked(Written):
        a: int

    @pytree_dataclass(init=False)
    class Keeps(Written):
        a: int

    assert (Asked(1).a, Keeps().a) == (1, 7)


def test_a_struct_may_say_which_protocol_it_follows():
    class Layer(Protocol):
        def __call__(self, x: float) -> float: ...

    @pytree_dataclass
    class Scale(Struct, Layer):
        factor: float

        def __call__(self, x):
            return x * self.factor

    assert jax.tree.map(lambda x: x + 1, Scale(2.0))(2.0) == 6.0


def test_an_undecorated_subclass_is_abstract_and_says_so():
    class Layer(Struct):
        pass

    class Sub(Point):
        pass

    for cls in (Struct, Layer, Sub):
        with pytest.raises(TypeError, match=f"{cls.__name__} is abstract.*decorated"):
            cls()


def test_the_decorator_takes_the_arguments_of_a_dataclass():
    @pytree_dataclass(kw_only=True, order=True, match_args=True)
    class Options(Struct):
        a: int

    assert Options(a=1) < Options(a=2)
    with pytest.raises(TypeError):
        Options(1)
    with pytest.raises(ValueError, match="already"):
        pytree_dataclass(Options)

    @pytree_dataclass(eq=False)
    class ByIdentity(Struct):
        a: int

    one = ByIdentity(1)
    assert one != ByIdentity(1)
    assert len({one, one}) == 1

    with pytest.raises(TypeError, match="tree_flatten"):

        @pytree_dataclass
        class NoPytree:
            a: int


def test_a_struct_can_be_a_static_argument_of_jit():
    traced = []

    def width(model):
        traced.append(model)
        return jnp.ones(model.kernel.value_structure.shape[1])

    static = jax.jit(width, static_argnums=0)
    layer = Dense.build(4, 8)
    assert static(layer).shape == (8,)
    assert static(jax.tree.map(lambda x: x, layer)).shape == (8,)
    assert len(traced) == 1
    model = stack(2)
    assert hash(model[0]) == hash(copy.copy(model[0]))
    tree = deferred.UninitializedParameter(
        lambda key: {"a": jnp.zeros(3), "b": [jnp.zeros(2)]}, "tree"
    )
    assert hash(tree) == hash(tree.with_renamed_parameters(lambda name: name))
    structure = jax.tree.structure(Point(1.0, "a", 2.0))
    assert copy.deepcopy(structure) == structure


def test_a_static_field_that_cannot_be_hashed_is_named():
    point = Point(1.0, np.zeros(3), 2.0)
    with pytest.raises(TypeError, match=r"Point\.label cannot be hashed"):
        hash(point)
    _, aux = point.tree_flatten()
    with pytest.raises(TypeError, match=r"Point\.label cannot be hashed"):
        hash(aux)


def test_a_class_keeps_the_hash_that_it_writes_itself():
    @pytree_dataclass
    class Own(Struct):
        a: list

        def __hash__(self):
            return 42

    @pytree_dataclass
    class ByLength(Struct):
        a: list

        def __eq__(self, other):
            return len(self.a) == len(other.a)

    assert hash(Own([1])) == 42
    assert ByLength([1]) == ByLength([2])
    assert hash(ByLength([1])) == hash(ByLength([1]))


def test_a_parametrised_class_makes_instances():
    made = deferred.Parameter[jax.Array](jnp.ones(3), "p")
    assert type(made) is deferred.Parameter


def test_abstract_methods_hold():
    class Layer(Struct):
        @abc.abstractmethod
        def __call__(self, x): ...

    @pytree_dataclass
    class Unfinished(Layer):
        a: int

    with pytest.raises(TypeError, match="abstract"):
        Unfinished(1)


@pytest.mark.filterwarnings("ignore:The chararray class")  # treescope, NumPy 2.5
def test_it_renders_in_treescope_in_the_colour_of_its_class():
    model = stack(1)
    text = treescope.render_to_text(model)
    assert "UninitializedParameter(" in text
    assert "name='layer_0.kernel'" in text
    assert "axes=('embed', 'mlp')" in text
    html = treescope.render_to_html(model, compressed=False)
    assert model[0].kernel.treescope_color() in html
    frozen = deferred.FrozenParameter(jnp.ones(3), "f")
    kinds = [
        frozen,
        deferred.Parameter(jnp.ones(3), "p"),
        model[0].kernel,
        deferred.mark_shareable(model[0]).kernel,
        deferred.attach_shared_parameters(deferred.mark_shareable(model[0])),
    ]
    assert len({kind.treescope_color() for kind in kinds}) == len(kinds)
    for kind in kinds:
        assert type(kind).__name__ in treescope.render_to_text(kind)


def test_it_prints_readably_without_treescope():
    shown = repr(Dense.build(4, 8))
    assert "kernel=UninitializedParameter(" in shown
    assert "value_structure=float32[4,8]['embed', 'mlp']" in shown
    big = deferred.Parameter({"w": jnp.zeros((300, 300))}, "big")
    assert repr(big) == "Parameter(value={'w': float32[300,300]}, name='big')"


def test_treescope_and_penzai_are_never_imported():
    code = (
        "import sys, jax, shardinit; d = shardinit.deferred;"
        "print(d.UninitializedParameter(jax.random.key_data, 'k'));"
        "sys.exit(any(m in sys.modules for m in ('treescope', 'penzai')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_package_is_reached_lazily():
    code = (
        "import sys, shardinit; lazy = 'jax' not in sys.modules;"
        "shardinit.deferred.Struct; sys.exit(not lazy)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_pytree_dataclass_may_flatten_itself():
    class Both:
        def tree_flatten(self):
            return (self.second, self.first), None

        @classmethod
        def tree_unflatten(cls, aux, children):
            return cls(*reversed(children))

    def with_keys(self):
        keys = (GetAttrKey("second"), GetAttrKey("first"))
        return tuple(zip(keys, (self.second, self.first), strict=True)), None

    def made(base, **methods):
        body = {"__annotations__": {"first": object, "second": object}, **methods}
        return deferred.pytree_dataclass(type("Reversed", (base,), body))

    unflatten = vars(Both)["tree_unflatten"]
    keyed = made(object, tree_flatten_with_keys=with_keys, tree_unflatten=unflatten)
    under_struct = {"tree_flatten": Both.tree_flatten, "tree_unflatten": unflatten}
    for cls in (
        keyed,
        made(Both),
        made(Both, tree_flatten_with_keys=with_keys),
        made(deferred.Struct, **under_struct),
        made(
            deferred.Struct, tree_flatten_with_keys=with_keys, tree_unflatten=unflatten
        ),
    ):
        assert jax.tree.leaves(cls(1, 2)) == [2, 1]
        doubled = jax.tree.map(lambda leaf: 2 * leaf, cls(1, 2))
        assert (doubled.first, doubled.second) == (2, 4)
        leaves = jax.tree_util.tree_leaves_with_path(cls(1, 2))
        assert [leaf for _, leaf in leaves] == [2, 1]
    (path, _), _ = jax.tree_util.tree_leaves_with_path(keyed(1, 2))
    assert path == (GetAttrKey("second"),)
