"""From a module that waits to a function of a key, and back to a module.

The steps of an initialisation run on a copy, under a trace: what comes out are the
leaves that were made, as functions of the key. The forward pass is nothing that a leaf
needs, so that it is never executed. The same trace leaves behind a skeleton, the module
with holes where those leaves belong.

That is an `InitFn`: leaves from a key, and a ``rebuild`` that fills the holes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, SingleDeviceSharding

from shardinit.core import compiled
from shardinit.core.init_fn import InitFn
from shardinit.core.inputs import dependencies, off_devices, stand_in
from shardinit.core.jaxpr import is_tracer
from shardinit.core.plan import as_key
from shardinit.errors import InitFnError, ModuleStateError
from shardinit.module import context, steps, walk
from shardinit.module.fields import MISSING, Inputs, is_array
from shardinit.module.walk import Hole, Path


class Initialisation:
    """One module, one set of inputs: what ``init`` and ``init_fn`` have in common.

    Arrays that are given, the inputs and those which the module holds already, enter
    the trace as zeros where no leaf depends on their values.

    Args:
      module: it is copied, not changed.
      inputs: as for ``Module.init``; likewise ``call_method`` and ``key_policy``.
      traced: whether this happens inside a trace of the user's, in which inputs and
        module may hold traced values.

    Raises:
      InitFnError: a leaf depends on an input that is only a shape.
      ModuleFieldError: an array was assigned to a static field.
    """

    def __init__(
        self,
        module: Any,
        inputs: Any = MISSING,
        call_method: str = "__call__",
        key_policy: str = "sequence",
        *,
        traced: bool = False,
    ):
        walk.modules(module)  # refuses one that contains itself
        self.name = type(module).__name__
        self._asked = inputs is not MISSING
        self._call_method, self._policy = call_method, key_policy
        asked = Inputs.from_value(inputs) if self._asked else Inputs()
        self._given: list[Any] = []
        self._numbers: dict[int, Hole] = {}
        self._arguments = jax.tree.map(self._hole, (asked.args, asked.kwargs))
        self._template, self._copies = walk.copy(module, self._hole)
        self._abstract = jax.eval_shape(lambda xs: xs, self._given)
        key = jax.eval_shape(jax.random.key, 0)
        if traced:
            self._values = dict(enumerate(self._given))
            jax.eval_shape(lambda k: self._describe(k, self._given), key)
            return
        needed = dependencies(lambda a: self._describe(*a), key, self._abstract)
        for number, path in needed.items():
            if isinstance(self._given[number], jax.ShapeDtypeStruct):
                raise InitFnError(
                    f"leaf {path!r}",
                    f"its value depends on the values of an input of {self.name}, of "
                    "which only the shape was given",
                    "an array, or a leaf that depends on the shape alone",
                    "Pass an array instead of jax.ShapeDtypeStruct",
                )
        self._values = {n: off_devices(self._given[n]) for n in needed}

    def fn(self, key: jax.Array) -> Any:
        """The leaves that ``init`` makes, as nested dicts; traceable."""
        values = [
            self._values[n] if n in self._values else stand_in(x)
            for n, x in enumerate(self._abstract)
        ]
        root, _, held = self._run(key, values)
        made = self._made(root, values, held)
        return _nest(self._paths, [leaf for _, leaf, _ in made])

    def rebuild(self, tree: Any, onto: Any = None) -> Any:
        """The initialised module.

        Args:
          tree: what ``fn`` returns.
          onto: the module that this was made from, to be changed in place.

        Raises:
          InitFnError: ``tree`` is that of another module.
        """
        flat, structure = jax.tree.flatten(tree)
        if structure != self._result:
            raise InitFnError(
                self.name,
                f"cannot be rebuilt from {structure}",
                f"the structure of its own leaves, {self._result}",
            )
        leaves = dict(zip(self._order, flat, strict=True))
        shells = {}
        if onto is not None:
            for _, module in walk.modules(onto):
                template = self._copies[id(module)]
                shells[id(self._skeletons[id(template)])] = module

        def leaf(value: Any) -> Any:
            return leaves[value.number] if isinstance(value, Hole) else value

        return walk.copy(self._skeleton, leaf, shells)[0]

    def init_fn(self) -> InitFn:
        """The function for the engine."""
        return InitFn(self.fn, axes=self.axes, rebuild=self.rebuild, name=self.name)

    def _hole(self, value: Any) -> Any:
        """Takes an array out of what is given, once for all its places."""
        if not is_array(value):
            return value
        if id(value) not in self._numbers:
            self._numbers[id(value)] = Hole(len(self._given))
            self._given.append(value)
        return self._numbers[id(value)]

    def _describe(self, key: jax.Array, values: Sequence[Any]) -> Any:
        """The first trace: ``fn``, and it keeps the skeleton and the paths."""
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
        """Initialises a copy.

        Returns:
          the copy; its modules by the template's ids; the ids of those that were
          initialised before.
        """

        def fill(value: Any) -> Any:
            return values[value.number] if isinstance(value, Hole) else value

        root, copies = walk.copy(self._template, fill)
        now = context.Scope(
            keys=context.key_source(key, self._policy),
            initializing=True,
            tree=context.Tree(root),
            module=root,
            calls=context.scope().calls,
        )
        with context.entered(now):
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
        """Takes out the arrays that were made, leaving holes; puts back those given.

        An array that the module held already is given, not made, if its module was
        initialised or it has its place on devices; others are constants of the
        function.

        Returns:
          path, array and axis names (or None) of each, in the order of the pytree.
        """
        given = {id(value): self._given[n] for n, value in enumerate(values)}
        made: list[tuple[Path, Any, Any]] = []

        def punch(path: Path, owner: Any, name: str, leaf: Any) -> Any:
            if not is_array(leaf):
                return leaf
            axes = (
                owner.field_axes().get(name) if getattr(owner, name) is leaf else None
            )
            if id(leaf) in given:
                leaf = given[id(leaf)]
                if id(owner) in held or _is_placed(leaf):
                    return leaf
            made.append((path, leaf, axes))
            return Hole(len(made) - 1)

        walk.map_leaves(root, punch)
        return made


def _is_placed(x: Any) -> bool:
    """Whether an array lies where somebody wanted it, or is only a shape."""
    sharded = isinstance(getattr(x, "sharding", None), NamedSharding)
    return sharded or isinstance(x, jax.ShapeDtypeStruct)


def _nest(paths: Sequence[Path], values: Sequence[Any]) -> Any:
    """Values as nested dicts by path: names of fields, indices, keys."""
    tree: dict[Any, Any] = {}
    for path, value in zip(paths, values, strict=True):
        node = tree
        parts = [_part(entry) for entry in path]
        for part in parts[:-1]:
            node = node.setdefault(part, {})
        node[parts[-1]] = value
    return tree


def _part(entry: Any) -> Any:
    for attribute in ("name", "idx", "key"):
        if hasattr(entry, attribute):
            return getattr(entry, attribute)
    return str(entry)


def init_fn(
    module: Any,
    inputs: Any = MISSING,
    call_method: str = "__call__",
    *,
    key_policy: str = "sequence",
) -> InitFn:
    """Makes an `InitFn` of a module: for plans, programs, windows and the service.

    The function's result is every array that ``init`` would make, as nested dicts by
    field name (integer keys for lists); ``rebuild`` gives the initialised module.
    Building it traces the module and allocates nothing.

    Args:
      module: a `Module`; it is not changed.
      inputs: example inputs, or `jax.ShapeDtypeStruct` in their place; a tuple is
        ``*args``, a dict ``**kwargs``, `Inputs` both, anything else one argument.
      call_method: the method that is given the inputs.
      key_policy: ``"sequence"`` or ``"name"``, see ``Module.init``.

    Raises:
      InitFnError: a leaf depends on the value of an input of which only the shape was
        given.
      ModuleFieldError: an array was assigned to a static field, or ``call_method`` is
        no method.
      ModuleStateError: a key or a module was used where it may not be.

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
    """What ``Module.init`` does; see there."""
    key = as_key(key)
    walk.modules(module)  # refuses one that contains itself, before JAX walks it
    traced = is_tracer(jnp.zeros(()))  # inside jax.jit of the user's
    traced = traced or any(map(is_tracer, jax.tree.leaves((key, module, inputs))))
    made = Initialisation(module, inputs, call_method, key_policy, traced=traced)
    if not traced:
        arrays = compiled.init(InitFn(made.fn, made.axes), key, mesh=mesh, rules=rules)
        if mesh is None:  # plain arrays: no mesh of one device shall follow them
            first = SingleDeviceSharding(jax.local_devices()[0])
            arrays = jax.device_put(arrays, first)
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
