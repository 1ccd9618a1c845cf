"""The initialisation of a module as a function of a key.

The steps of an initialisation run on a copy of the module, under a trace. The results
are the new leaves as functions of the key. No leaf depends on the result of the forward
call, so the compiled function does not contain it. The trace also gives a skeleton: the
module with a `Hole` in place of each new leaf.

Both make an `InitFn`: a function from a key to the leaves, and a ``rebuild`` that fills
the holes of the skeleton.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from shardinit.core.host_state import watched
from shardinit.core.init_fn import InitFn, axis_names, check_structure, identity
from shardinit.core.ir.dependencies import Traced, off_devices, stand_in
from shardinit.core.ir.jaxpr import is_tracer
from shardinit.core.paths import entry_name, nested
from shardinit.core.prng.root_key import as_single_key
from shardinit.core.run.init import init as init_sharded
from shardinit.core.systems import MODULE, refuse_others
from shardinit.errors import InitFnError, ModuleStateError
from shardinit.module import context, steps, walk
from shardinit.module.fields import MISSING, Inputs, LeftOut, is_array
from shardinit.module.walk import Hole, Path


class Initialisation:
    """The initialisation of one module with one set of inputs.

    The given arrays are the inputs and the arrays that the module holds already. Those
    on whose values no leaf depends are replaced by zeros in the trace.

    Args:
      module: the module; it is copied, not changed.
      inputs: as for ``Module.init``.
      call_method: as for ``Module.init``.
      key_policy: as for ``Module.init``.
      key: a key of the type of those that ``fn`` will be given; a threefry key by
        default.
      traced: whether the caller is being traced, so that the inputs and the module may
        hold tracers.

    Raises:
      InitFnError: a leaf depends on an input that is only a shape, or a field holds
        parameters of another library that have no value.
      ModuleFieldError: an array was assigned to a static field.
    """

    def __init__(
        self,
        module: Any,
        inputs: Any = MISSING,
        call_method: str = "__call__",
        key_policy: str = "sequence",
        *,
        key: Any = None,
        traced: bool = False,
    ):
        _refuse_others(module)
        self.name = type(module).__name__
        self._asked = inputs is not MISSING
        self._call_method, self._policy = call_method, key_policy
        asked = Inputs.from_value(inputs) if self._asked else Inputs()
        self._given: list[Any] = []
        self._numbers: dict[int, Hole] = {}
        self._arguments = jax.tree.map(self._hole, (asked.args, asked.kwargs))
        self._template, self._copies = walk.copy(module, self._hole)
        abstract = jax.eval_shape(lambda xs: xs, self._given)
        self._abstract = abstract if traced else [_off_meshes(x) for x in abstract]
        self._traces: dict[Any, Traced] = {}
        self._again = partial(
            Initialisation, module, inputs, call_method, key_policy, key=key
        )
        key = jax.eval_shape(jax.random.key, 0) if key is None else key
        with watched() as self._host:
            trace = self._traced(key)
        if traced:
            self._values = {
                n: x for n, x in enumerate(self._given) if not _is_abstract(x)
            }
            return
        needed = trace.dependencies()
        for number, path in needed.items():
            if _is_abstract(self._given[number]):
                raise InitFnError(
                    f"leaf {path!r}",
                    f"its value depends on the values of an input of {self.name}, of "
                    "which only the shape was given",
                    "an array, or a leaf that depends on the shape alone",
                    "Pass an array instead of jax.ShapeDtypeStruct",
                )
        self._values = {n: off_devices(self._given[n]) for n in needed}

    def fn(self, key: jax.Array) -> Any:
        """Returns the leaves that ``init`` makes as nested dicts; may be traced."""
        values = [
            self._values[n] if n in self._values else stand_in(x)
            for n, x in enumerate(self._abstract)
        ]
        return self._traced(key)(key, values)

    def _traced(self, key: Any) -> Traced:
        """Traces the initialisation once for each type of key.

        The module's code must not run again for a plan: what it assigns to settings
        may come from a counter or a random number, and agree with no other run.
        """
        kind = (key.shape, key.dtype)
        if kind not in self._traces:
            abstract = jax.ShapeDtypeStruct(key.shape, key.dtype)
            self._traces[kind] = Traced(self._describe, abstract, self._abstract)
        return self._traces[kind]

    def rebuild(self, tree: Any, onto: Any = None) -> Any:
        """Returns the initialised module.

        Args:
          tree: the result of ``fn``. Leaves that are only shapes beside others that are
            arrays were left out by ``select``: they wait for another ``init``.
          onto: the original module, to change it in place; by default a new module is
            made.

        Raises:
          InitFnError: ``tree`` has another structure than the result of ``fn``.
        """
        check_structure(tree, self._result, self.name)
        flat = jax.tree.leaves(tree)
        leaves = dict(zip(self._order, flat, strict=True))
        if not all(map(_is_abstract, flat)):
            for place, (number, leaf) in enumerate(leaves.items()):
                if _is_abstract(leaf):
                    leaves[number] = LeftOut(self.fn, place)
        shells = {}
        if onto is not None:
            for _, module in walk.modules(onto):
                template = self._copies[id(module)]
                shells[id(self._skeletons[id(template)])] = module

        def leaf(value: Any) -> Any:
            return leaves[value.number] if isinstance(value, Hole) else value

        root = walk.copy(self._skeleton, leaf, shells)[0]
        steps.mark_waiting(root)
        return root

    def state_of(self, module: Any) -> Any:
        """The leaves of an initialised module as nested dicts; other trees as is."""
        if not isinstance(module, type(self._skeleton)):
            return module
        holes, structure = jax.tree.flatten(self._skeleton)
        parts = zip(holes, structure.flatten_up_to(module), strict=True)
        found = {hole.number: part for hole, part in parts if isinstance(hole, Hole)}
        return jax.tree.unflatten(self._result, [found[n] for n in self._order])

    def init_fn(self) -> InitFn:
        """Returns the initialisation as an `InitFn`."""
        return InitFn(
            self.fn,
            axes=self.axes,
            rebuild=self.rebuild,
            state_of=self.state_of,
            name=self.name,
            draws_on_host=self._host.moved,
            asks_process=self._host.asked,
            again=lambda: self._again().init_fn(),
        )

    def _hole(self, value: Any) -> Any:
        """Replaces a given array by a hole, which all its occurrences share."""
        if not is_array(value):
            return value
        if id(value) not in self._numbers:
            self._numbers[id(value)] = Hole(len(self._given))
            self._given.append(value)
        return self._numbers[id(value)]

    def _describe(self, key: jax.Array, values: Sequence[Any]) -> Any:
        """Runs the initialisation; stores the skeleton, paths and axes."""
        root, self._skeletons, held = self._run(key, values)
        made = self._made(root, values, held)
        self._skeleton = root
        self._paths = [path for path, _, _ in made]
        self.axes = _nest(self._paths, [axes for _, _, axes in made])
        numbers = _nest(self._paths, range(len(made)))
        self._order, self._result = jax.tree.flatten(numbers)
        return _nest(self._paths, [leaf for _, leaf, _ in made])

    def _run(
        self, key: Any, values: Sequence[Any]
    ) -> tuple[Any, dict[int, Any], set[int]]:
        """Initialises a copy of the template.

        Returns:
          The copy, its modules by the ids of their templates, and the ids of the
          modules that were initialised before.
        """

        def fill(value: Any) -> Any:
            return values[value.number] if isinstance(value, Hole) else value

        root, copies = walk.copy(self._template, fill)
        scope = context.Scope(
            keys=context.key_source(key, self._policy),
            root_key=key,
            initializing=True,
            tree=context.Tree(root),
            module=root,
            calls=context.current_scope().calls,
        )
        with context.entered(scope):
            steps.initialise(root)
            if self._asked:
                args, kwargs = jax.tree.map(fill, self._arguments)
                given = Inputs(*args, **kwargs)
                steps.forward(root, self._call_method, given, copies.values())
        held = {id(m) for _, m in walk.modules(root) if m._initialized}
        for _, module in walk.modules(root):
            if self._asked or steps.complete(module):
                module.__dict__["_initialized"] = True
        steps.refuse_static_tracers(root)
        return root, copies, held

    def _made(
        self, root: Any, values: Sequence[Any], held: set[int]
    ) -> list[tuple[Path, Any, Any]]:
        """Replaces the arrays that were made by holes, and restores the given arrays.

        An array that the module held before counts as given if its module was
        initialised or the array is placed; otherwise it is a constant of the function.

        Returns:
          Path, array and axis names (or None) of each array that was made, in the order
          of the pytree.
        """
        given = {id(value): self._given[n] for n, value in enumerate(values)}
        made: list[tuple[Path, Any, Any]] = []

        def punch(path: Path, owner: Any, name: str, leaf: Any) -> Any:
            if not is_array(leaf):
                return leaf
            axes = _axes(owner, name, leaf)
            if id(leaf) in given:
                leaf = given[id(leaf)]
                if id(owner) in held or _is_placed(leaf):
                    return leaf
            made.append((path, leaf, axes))
            return Hole(len(made) - 1)

        walk.map_leaves(root, punch)
        return made


def _refuse_others(module: Any) -> None:
    if isinstance(module, walk.ModuleNode):
        walk.modules(module)  # refuses one that contains itself, before JAX walks it
    refuse_others(module, MODULE, type(module).__name__)
    if not isinstance(module, walk.ModuleNode):
        raise InitFnError(
            type(module).__name__, "it is no module", "an instance of module.Module"
        )


def _axes(owner: Any, name: str, leaf: Any) -> Any:
    """Axis names of a leaf: those of its box, or those declared for its field."""
    value = getattr(owner, name)
    if value is leaf:
        return owner.field_axes().get(name)
    boxes = jax.tree.leaves(value, is_leaf=lambda node: axis_names(node) is not None)
    for box in boxes:
        names = axis_names(box)
        if names is not None and any(x is leaf for x in jax.tree.leaves(box)):
            return names
    return None


def _is_placed(x: Any) -> bool:
    """Whether an array has a `NamedSharding`, or is only a shape."""
    sharded = isinstance(getattr(x, "sharding", None), NamedSharding)
    return sharded or _is_abstract(x)


def _off_meshes(x: Any) -> Any:
    # else the trace would hold the mesh that a given array lies on, where its axes
    # are Explicit, and the mesh of the plan may be another
    return jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=x.weak_type)


def _is_abstract(x: Any) -> bool:
    return isinstance(x, jax.ShapeDtypeStruct)


def _nest(paths: Sequence[Path], values: Iterable[Any]) -> dict[Any, Any]:
    """Nests values in dicts by path: names of fields, indices and dict keys."""
    return nested([[entry_name(entry) for entry in path] for path in paths], values)


def init_fn(
    module: Any,
    inputs: Any = MISSING,
    call_method: str = "__call__",
    *,
    key_policy: str = "sequence",
) -> InitFn:
    """Makes an `InitFn` of a module, for plans, programs, windows and the service.

    The function returns every array that ``init`` would make, as nested dicts by field
    name (integer keys for lists); ``rebuild`` returns the initialised module. Building
    the `InitFn` traces the module and allocates no arrays.

    Args:
      module: a `Module`; it is not changed.
      inputs: as for ``Module.init``.
      call_method: the method that is called with the inputs.
      key_policy: ``"sequence"`` or ``"name"``, see ``Module.init``.

    Raises:
      InitFnError: a leaf depends on the value of an input of which only the shape was
        given.
      ModuleFieldError: an array was assigned to a static field, or ``call_method`` is
        not a method.
      ModuleStateError: a key was requested, or a module was called, where that is not
        allowed.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import shardinit
      >>> from shardinit.module import Linear, init_fn
      >>> fn = init_fn(Linear(8), jax.ShapeDtypeStruct((1, 3), jnp.float32))
      >>> shardinit.init(fn, 42).kernel.shape
      (3, 8)
    """
    return Initialisation(module, inputs, call_method, key_policy).init_fn()


def init(
    module: Any,
    key: Any,
    inputs: Any,
    call_method: str,
    key_policy: str,
    inplace: bool,
    mesh: Any,
    rules: Any,
) -> Any:
    """Implements ``Module.init``."""
    key = as_single_key(key)
    _refuse_others(module)
    with jax.transfer_guard("allow"):
        # Inside `jax.jit` a new array is a tracer as well, whatever the arguments are.
        traced = is_tracer(jnp.zeros(()))  # inside jax.jit of the user's
    traced = traced or any(map(is_tracer, jax.tree.leaves((key, module, inputs))))
    made = Initialisation(
        module, inputs, call_method, key_policy, key=key, traced=traced
    )
    if not traced:
        fn = replace(made.init_fn(), rebuild=identity)
        arrays = init_sharded(fn, key, mesh=mesh, rules=rules)
    elif mesh is None and rules is None:
        arrays = jax.jit(made.fn)(key)
    else:
        raise ModuleStateError(
            f"module {made.name}",
            "init was given a mesh inside jax.jit",
            "no mesh, as the caller's jit decides where arrays lie",
            "Call init outside of jax.jit; it compiles by itself",
        )
    return made.rebuild(arrays, module if inplace else None)
