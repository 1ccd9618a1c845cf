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

from shardinit.core import compiled
from shardinit.core.init_fn import InitFn
from shardinit.core.inputs import dependent_leaves
from shardinit.core.jaxpr import is_tracer
from shardinit.core.plan import as_key
from shardinit.errors import InitFnError, ModuleStateError
from shardinit.module import context, steps, walk
from shardinit.module.fields import MISSING, Inputs, is_array
from shardinit.module.walk import Hole, Path


class Initialisation:
    """One module, one set of inputs: what ``init`` and ``init_fn`` have in common.

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
        self.name = type(module).__name__
        self._template, self._copies = walk.copy(module)
        self._given = inputs is not MISSING
        self._call_method, self._policy = call_method, key_policy
        asked = Inputs.from_value(inputs) if self._given else Inputs()
        self._kept, self._structure = jax.tree.flatten((asked.args, asked.kwargs))
        self._places = [i for i, x in enumerate(self._kept) if _has_values(x)]
        arrays = [self._kept[i] for i in self._places]
        key = jax.eval_shape(jax.random.key, 0)
        if traced:
            self._values: list[Any] | None = arrays
            jax.eval_shape(lambda k: self._describe(k, arrays), key)
            return
        self._shapes = jax.eval_shape(lambda xs: xs, arrays)
        depends = dependent_leaves(lambda a: self._describe(*a), key, self._shapes)
        if depends and any(isinstance(x, jax.ShapeDtypeStruct) for x in arrays):
            raise InitFnError(
                f"leaf {depends[0]!r}",
                f"its value depends on the values of the inputs of {self.name}, of "
                f"which only shapes were given ({len(depends)} such leaves)",
                "arrays, or leaves that depend on the shapes alone",
                "Pass arrays instead of jax.ShapeDtypeStruct",
            )
        self._values = arrays if depends else None

    def fn(self, key: jax.Array) -> Any:
        """The leaves that ``init`` makes, as nested dicts; traceable."""
        values = self._values
        if values is None:  # no leaf reads them: they are never computed
            values = [jnp.zeros(x.shape, x.dtype) for x in self._shapes]
        made = self._made(self._run(key, values)[0])
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

    def _describe(self, key: jax.Array, values: Sequence[Any]) -> Any:
        """The first trace: ``fn``, and it keeps the skeleton and the paths."""
        root, self._skeletons = self._run(key, values)
        made = self._made(root)
        self._skeleton = root
        self._paths = [path for path, _, _ in made]
        self.axes = _nest(self._paths, [axes for _, _, axes in made])
        numbers = _nest(self._paths, range(len(made)))
        self._order, self._result = jax.tree.flatten(numbers)
        return _nest(self._paths, [leaf for _, leaf, _ in made])

    def _run(self, key: Any, values: Sequence[Any]) -> tuple[Any, dict[int, Any]]:
        """Initialises a copy; also returns its modules by the template's ids."""
        root, copies = walk.copy(self._template)
        now = context.Scope(
            keys=context.key_source(key, self._policy),
            initializing=True,
            tree=context.Tree(root),
            module=root,
            calls=context.scope().calls,
        )
        with context.entered(now):
            steps.initialise(root)
            if self._given:
                filled = list(self._kept)
                for place, value in zip(self._places, values, strict=True):
                    filled[place] = value
                args, kwargs = jax.tree.unflatten(self._structure, filled)
                steps.forward(root, self._call_method, Inputs(*args, **kwargs))
        for _, module in walk.modules(root):
            if self._given or steps.complete(module):
                module.__dict__["_initialized"] = True
        steps.refuse_static_tracers(root)
        return root, copies

    def _made(self, root: Any) -> list[tuple[Path, Any, Any]]:
        """Takes out the arrays that were made, leaving holes.

        Those of modules that were initialised before are not made, unless they are
        others than before.

        Returns:
          path, array and axis names (or None) of each, in the order of the pytree.
        """
        held: set[int] = set()
        for _, module in walk.modules(self._template):
            if module._initialized:
                for name in walk.node_names(module):
                    held.update(map(id, jax.tree.leaves(getattr(module, name))))
        made: list[tuple[Path, Any, Any]] = []

        def punch(path: Path, owner: Any, name: str, leaf: Any) -> Any:
            if not is_array(leaf) or id(leaf) in held:
                return leaf
            whole = getattr(owner, name) is leaf
            made.append((path, leaf, owner.field_axes().get(name) if whole else None))
            return Hole(len(made) - 1)

        walk.map_leaves(root, punch)
        return made


def _has_values(x: Any) -> bool:
    """Whether zeros may stand for an input; scalars and keys are passed as they are."""
    return is_array(x) and not jnp.issubdtype(x.dtype, jax.dtypes.extended)


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
    traced = is_tracer(jnp.zeros(()))  # inside jax.jit of the user's
    traced = traced or any(map(is_tracer, jax.tree.leaves((key, module, inputs))))
    made = Initialisation(module, inputs, call_method, key_policy, traced=traced)
    if not traced:
        arrays = compiled.init(InitFn(made.fn, made.axes), key, mesh=mesh, rules=rules)
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
