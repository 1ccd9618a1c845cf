"""InitFn: the one interface between the front ends and the engine.

A model's initial state is a pure function of a key. A front end (Flax, Equinox, a
deferred tree, a model spec) says no more than that function, the logical axis names
of its leaves, and how the user's own object is made from the arrays again. All that
follows (the plan, the programs, windows, digests) knows nothing of the framework.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from shardinit.core.systems import refuse_models
from shardinit.core.types import Tree, TreeDef
from shardinit.errors import InitFnError


def identity(tree: Tree) -> Tree:
    """Returns ``tree``: the ``rebuild`` and ``state_of`` of a plain function."""
    return tree


Name = str | tuple[str, ...] | None
AxisRule = tuple[str, str | tuple[str, ...] | None]
AnyMesh = jax.sharding.Mesh | jax.sharding.AbstractMesh


@dataclass(frozen=True)
class Mirror:
    """The leaf whose placement another leaf takes, as a moment does its parameter's.

    Attributes:
      path: of that leaf, in the same result.
      dims: for each dimension of the leaf that mirrors it which of its dimensions it
        is; None for one that it does not have.
    """

    path: str
    dims: tuple[int | None, ...]


class AxisNames(tuple[Name, ...]):
    """The names of one leaf's axes, with what a framework attaches to them.

    It is the tuple of names, one for each dimension: a logical name, the mesh axes
    themselves, or None. In ``InitFn.axes`` a plain tuple attaches nothing.

    Attributes:
      named: how many dimensions the model named; the rest are None.
      passes: a name that no rule knows and that is a mesh axis means that axis, as in
        Flax NNX and ``nn.Partitioned``.
      rules: logical axis rules that the leaf brings along.
      mesh: the mesh on which the model itself places the leaf.
      mirrors: the leaf whose names and placement it takes.
      optimizer: it is state of an optimizer.
    """

    named: int
    passes: bool
    rules: tuple[AxisRule, ...]
    mesh: AnyMesh | None
    mirrors: Mirror | None
    optimizer: bool

    def __new__(
        cls,
        names: Iterable[Name],
        rank: int,
        *,
        passes: bool = False,
        rules: Iterable[AxisRule] = (),
        mesh: AnyMesh | None = None,
        mirrors: Mirror | None = None,
        optimizer: bool = False,
    ) -> AxisNames:
        """Names of the first dimensions of an array of that rank."""
        # A tuple's contents are settled in ``__new__``: an ``__init__`` comes too late.
        given = tuple(names)
        made = super().__new__(cls, (*given, *[None] * (rank - len(given))))
        made.named, made.passes = len(given), passes
        made.rules, made.mesh = tuple(rules), mesh
        made.mirrors, made.optimizer = mirrors, optimizer
        return made

    def facts(self) -> dict[str, Any]:
        """What is known beside the names, by the names of `LeafInfo`'s fields."""
        return {
            "passes": self.passes,
            "own_rules": self.rules,
            "own_mesh": self.mesh,
            "named": self.named,
            "mirrors": self.mirrors,
            "optimizer": self.optimizer,
        }

    def of_optimizer(self) -> AxisNames:
        """The same names, of a leaf that is state of an optimizer."""
        made = AxisNames(self, len(self))
        # With `named` as it was: the constructor takes all the names, the added None as
        # well, for the model's own.
        vars(made).update(vars(self), optimizer=True)
        return made


def axis_names(node: object) -> tuple[str | None, ...] | None:
    """The names of the dimensions of an array that comes in a box which has them.

    Args:
      node: any node of a pytree; Flax's boxes, Penzai's and Haliax's named arrays have
        names.

    Returns:
      A name, or None, for each dimension; None if ``node`` is no such box.
    """
    # names first: of what is no box the other attributes may compute, and raise
    names = getattr(node, "names", None)
    inner: Any = getattr(node, "value", None) if isinstance(names, tuple) else None
    if isinstance(names, tuple) and hasattr(inner, "shape"):
        return (*names, *[None] * (len(inner.shape) - len(names)))
    known: Any = getattr(node, "named_axes", None)
    data: Any = getattr(node, "data_array", None) if isinstance(known, dict) else None
    if isinstance(known, dict) and hasattr(data, "shape"):  # names of the last axes
        return (*[None] * (len(data.shape) - len(known)), *map(str, known))
    if hasattr(type(node), "resolve_axis"):
        axes: Any = getattr(node, "axes", ())
        return tuple(axis.name for axis in axes)
    return None


@dataclass(frozen=True)
class InitFn:
    """A function from a key to a pytree of arrays, with what a front end knows of it.

    Attributes:
      fn: ``key -> pytree of arrays``; pure, traceable by ``jax.make_jaxpr``. A function
        of several streams takes a dict of keys by their names.
      axes: a pytree shaped like ``fn``'s result, each leaf a tuple with one logical
        axis name (or None) for each dimension, `AxisNames`, or None where nothing is
        known; None when no leaf has names.
      rebuild: turns the pytree of arrays into the user's own object.
      state_of: the way back, from the user's own object, or from part of it, to a
        pytree with the keys of ``fn``'s result; other pytrees it returns as they are.
      trainable: of the user's own object the part that an optimizer gets.
      name: what to call the model in tables and errors.
      context_rules: reads the logical axis rules of the framework's own context, which
        count where a plan is given none.
      draws_on_host: NumPy's or Python's random state moved while the front end traced
        the function.
      asks_process: the function asked for ``jax.process_index`` while it was traced.
      again: makes the init function anew, from the user's own code.
      of_streams: where its result depends on how many keys it is given: the init
        function of keys by these names.

    Example:
      >>> import jax, shardinit
      >>> draw = lambda key: {"w": jax.random.normal(key, (8, 32))}
      >>> fn = shardinit.InitFn(draw, axes={"w": ("embed", "mlp")}, name="mine")
      >>> shardinit.plan(fn).name
      'mine'
    """

    fn: Callable[[jax.Array], Tree]
    axes: Tree = None
    rebuild: Callable[[Tree], Tree] = identity
    state_of: Callable[[Tree], Tree] = identity
    trainable: Callable[[Tree], Tree] = identity
    name: str = "init"
    context_rules: Callable[[], Sequence[AxisRule]] | None = None
    draws_on_host: bool = False
    asks_process: bool = False
    again: Callable[[], InitFn] | None = None
    of_streams: Callable[[tuple[str, ...]], InitFn] | None = None

    def __post_init__(self) -> None:
        for name in ("fn", "rebuild", "state_of", "trainable"):
            if not callable(given := getattr(self, name)):
                raise InitFnError(
                    f"InitFn.{name}", f"got {type(given).__name__}", "a function"
                )

    def __repr__(self) -> str:
        named = "" if self.axes is None else ", with axis names"
        return f"<InitFn {self.name}{named}>"

    def __call__(self, key: Tree) -> Tree:
        """Returns ``rebuild(fn(key))``: the plain, unsharded initialisation.

        Example:
          >>> import jax, shardinit
          >>> fn = shardinit.InitFn(jax.random.normal, rebuild=lambda x: {"w": x})
          >>> list(fn(jax.random.key(0)))
          ['w']
        """
        own = self.for_key(key)
        return own.rebuild(own.fn(key))

    def for_key(self, key: object) -> InitFn:
        """The init function of such a key: itself, but for keys by names.

        Example:
          >>> import jax, shardinit
          >>> fn = shardinit.InitFn(lambda key: jax.random.normal(key, (8, 32)))
          >>> fn.for_key(jax.random.key(0)) is fn
          True
        """
        if self.of_streams is None or not isinstance(key, Mapping):
            return self
        return self.of_streams(tuple(sorted(key)))


def check_structure(arrays: Tree, structure: TreeDef, name: str) -> None:
    """Refuses to rebuild a model from the arrays of another.

    Args:
      arrays: what ``rebuild`` was given.
      structure: of the model's own arrays.
      name: of the model.

    Raises:
      InitFnError: the structures differ.
    """
    given = jax.tree.structure(arrays)
    if given != structure:
        raise InitFnError(
            name,
            f"cannot be rebuilt from {given}",
            f"the structure of its own arrays, {structure}",
        )


def as_init_fn(fn: object) -> InitFn:
    """Wraps a plain callable; returns an ``InitFn`` as it is.

    Raises:
      InitFnError: (a ``TypeError``) ``fn`` is not callable, or a model of which a front
        end makes an init function.
    """
    if isinstance(fn, InitFn):
        return fn
    refuse_models(fn)
    if not callable(fn):
        raise InitFnError(
            "the init function",
            f"got {type(fn).__name__}",
            "a callable `key -> pytree of arrays`, an InitFn or an InitProgram",
            "shardinit.load_program(path) reads one, shardinit.models.build(spec) "
            "makes one of a ModelSpec",
        )
    return InitFn(fn, name=getattr(fn, "__name__", type(fn).__name__))
