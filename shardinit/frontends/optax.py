"""optax: the parameters of any front end with the state of their optimizer.

``tx.init(params)`` is a pure function of the parameters, so parameters and optimizer
state are one init function and every moment is made where it will lie. Which parameter
a moment belongs to is not guessed from shapes: ``optax.tree_map_params`` knows the
trees in a state that repeat the tree of the parameters. Where it cannot tell (it asks
the transformation to initialise a stand-in, which L-BFGS refuses), paths do: a leaf
belongs to the parameter at the end of whose path its own ends.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import optax

from shardinit.core.init_fn import AxisNames, InitFn, Mirror, as_init_fn
from shardinit.core.ir.jaxpr import collector_paused, without_mesh
from shardinit.core.paths import path_str
from shardinit.core.plan.mirrors import Dims, Keys, kept_axes, mirrors
from shardinit.core.prng.root_key import KeyLike, RootKey, abstract, as_key
from shardinit.errors import InitFnError


def with_optimizer(
    init_fn: Any,
    tx: Any,
    *,
    trainable: Callable[[Any], Any] | None = None,
    key: KeyLike | None = None,
) -> InitFn:
    """Makes an `InitFn` of parameters and the state of their optimizer.

    Its result is ``{"params": ..., "opt_state": ...}``: what ``init_fn`` gives, and
    ``tx.init`` of its trainable part, with the values of plain jit. Leaves of the
    optimizer's state that mirror a parameter take its names and lie where it lies;
    factored moments take the names of the axes that they keep; scalars, and what
    belongs to no parameter, have no names. ``opt_rules=`` of ``shardinit.plan`` places
    the state otherwise.

    Args:
      init_fn: ``key -> pytree of arrays`` or an `InitFn` of any front end.
      tx: an ``optax.GradientTransformation``, or what else has an ``init`` that takes
        the parameters (``optax.MultiSteps``).
      trainable: of what ``init_fn`` gives (the user's own object) the part that ``tx``
        trains. Default: what the front end says (the ``params`` of Linen variables, the
        ``nnx.Param`` of an NNX model, the inexact arrays of an Equinox module, Haiku's
        parameters without its state, Keras's trainable variables, Penzai's parameters),
        else all of it.
      key: a key whose type counts; default ``jax.random.key(0)``. Keys by name for a
        function that takes nothing else.

    Raises:
      InitFnError: ``tx.init`` cannot take the trainable part.

    Example:
      >>> import jax, optax, shardinit
      >>> from shardinit.frontends.optax import with_optimizer
      >>> init = lambda key: {"w": jax.random.normal(key, (64, 32))}
      >>> state = shardinit.init(with_optimizer(init, optax.adam(1e-3)), 0)
      >>> state["opt_state"][0].mu["w"].shape
      (64, 32)
    """
    root = as_key(0 if key is None else key)
    base = as_init_fn(init_fn).for_key(root)
    part = base.trainable if trainable is None else trainable

    # jits of the same functions: JAX keeps the trace that was made of them before
    arrays = jax.jit(base.fn)

    params: dict[Keys, tuple[str | None, Any]] = {}

    @jax.jit
    def optimizer_of(tree: Any) -> Any:
        trained = part(base.rebuild(tree))
        params.update(_places(tree, trained))
        return tx.init(trained)

    with collector_paused():
        shapes = without_mesh(lambda: jax.eval_shape(arrays, abstract(root)))
    state = _state_of(optimizer_of, shapes, base.name)
    numbers = jax.tree.unflatten(jax.tree.structure(state), _marks(state))
    plain = _plain(base, numbers)
    order = [mark.number for mark in jax.tree.leaves(plain)]
    back = [place for _, place in sorted((n, i) for i, n in enumerate(order))]
    structure, plain_structure = jax.tree.structure(state), jax.tree.structure(plain)

    def fn(key: Any) -> Any:
        tree = arrays(key)
        leaves = jax.tree.leaves(optimizer_of(tree))
        opt_state = jax.tree.unflatten(plain_structure, [leaves[n] for n in order])
        return {"params": tree, "opt_state": opt_state}

    def rebuild(tree: Any) -> Any:
        leaves = jax.tree.leaves(tree["opt_state"])
        opt_state = jax.tree.unflatten(structure, [leaves[i] for i in back])
        return {"params": base.rebuild(tree["params"]), "opt_state": opt_state}

    def state_of(made: Any) -> Any:
        if not isinstance(made, dict):
            return made
        given = {"params": base.state_of, "opt_state": lambda x: _plain(base, x)}
        return {k: given.get(k, lambda x: x)(x) for k, x in made.items()}

    names = _state_names(tx, state, params)
    flat = jax.tree.unflatten(plain_structure, [names[n] for n in order])
    return InitFn(
        fn,
        axes={"params": _names(base, shapes), "opt_state": flat},
        rebuild=rebuild,
        state_of=state_of,
        trainable=lambda made: part(made["params"]),
        name=base.name,
        context_rules=base.context_rules,
        draws_on_host=base.draws_on_host,
        again=None if base.again is None else _again(base, tx, trainable, root),
        of_streams=lambda names: with_optimizer(
            base, tx, trainable=trainable, key=dict.fromkeys(names, 0)
        ),
    )


def _state_of(optimizer_of: Callable[[Any], Any], shapes: Any, name: str) -> Any:
    """The shapes of an optimizer's state.

    Raises:
      InitFnError: its init does not take the parameters.
    """
    try:
        with collector_paused():
            return without_mesh(lambda: jax.eval_shape(optimizer_of, shapes))
    except (TypeError, ValueError, AttributeError) as error:
        raise InitFnError(
            f"optimizer of {name}",
            f"its init refuses the parameters ({error})"[:300],
            "a part of the model that it can train",
            "Pass trainable=, a function from what init_fn gives to that part",
        ) from error


class _Mark(jax.ShapeDtypeStruct):
    """The shape of a leaf, with its number; front ends drop what is no array."""

    def __init__(self, number: int, leaf: jax.ShapeDtypeStruct):
        super().__init__(leaf.shape, leaf.dtype)
        self.number = number


def _marks(tree: Any) -> Iterator[_Mark]:
    return itertools.starmap(_Mark, enumerate(jax.tree.leaves(tree)))


def _again(base: InitFn, tx: Any, trainable: Any, key: RootKey) -> Callable[[], InitFn]:
    return lambda: with_optimizer(base.again(), tx, trainable=trainable, key=key)  # pyright: ignore[reportOptionalCall]


def _names(base: InitFn, shapes: Any) -> Any:
    """The axis names of the parameters; None for each where the model has none."""
    return jax.tree.map(lambda _: None, shapes) if base.axes is None else base.axes


def _plain(base: InitFn, opt_state: Any) -> Any:
    """The state without the framework's own objects, as ``base.fn`` gives them."""

    def own(node: Any) -> bool:
        return base.state_of(node) is not node

    return jax.tree.map(base.state_of, opt_state, is_leaf=own)


def _places(tree: Any, trained: Any) -> dict[Keys, tuple[str | None, Any]]:
    """Path in the result and shape of what is trained, by its keys there.

    While it is traced: a filter for arrays, as Equinox has it, takes no shapes.
    """
    paths = {id(leaf): path_str(keys) for keys, leaf in _with_keys({"params": tree})}
    return {
        keys: (paths.get(id(leaf)), leaf.shape) for keys, leaf in _with_keys(trained)
    }


def _with_keys(tree: Any) -> list[tuple[Keys, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree)


def _state_names(
    tx: Any, state: Any, params: Mapping[Keys, tuple[str | None, Any]]
) -> list[AxisNames]:
    """For each leaf of the state its mirror, if it belongs to a parameter.

    Args:
      tx: the optimizer.
      state: shapes of its state.
      params: path in the result and shape of each parameter, by its keys in what the
        optimizer gets.
    """
    leaves = _with_keys(state)
    found = _by_optax(tx, state, params)
    if found is None:
        found = mirrors(
            {keys: leaf.shape for keys, leaf in leaves},
            {keys: shape for keys, (_, shape) in params.items()},
        )
    names = []
    for keys, leaf in leaves:
        param, dims = found.get(keys, ((), None))
        path = params[param][0] if dims is not None else None
        mirror = None if path is None or dims is None else Mirror(path, dims)
        rank = len(leaf.shape)
        names.append(AxisNames((), rank, mirrors=mirror, optimizer=True))
    return names


def _by_optax(
    tx: Any, state: Any, params: Mapping[Keys, tuple[str | None, Any]]
) -> dict[Keys, tuple[Keys, Dims | None]] | None:
    """What ``optax.tree_map_params`` knows; None where it cannot say."""
    leaves = _with_keys(state)
    found: dict[Keys, tuple[Keys, Dims | None]] = {}

    def repeats(tree: Any) -> Any:
        """A tree that repeats the parameters', in whole or (masked) in part."""
        for inner, mark in _with_keys(tree):
            keys, leaf = leaves[mark.number]
            for stop in range(len(inner), -1, -1):
                param, rest = inner[:stop], inner[stop:]
                if param in params:
                    field = keys[: len(keys) - len(inner)]
                    shape = params[param][1]
                    found[keys] = (param, kept_axes(leaf.shape, shape, field, rest))
                    break
        return tree

    marked = jax.tree.unflatten(jax.tree.structure(state), _marks(state))
    try:
        # is_leaf: each such tree whole. Leaf by leaf it stumbles over what `masked`
        # leaves out and over the lists that SM3 keeps for a parameter.
        optax.tree_map_params(tx, repeats, marked, is_leaf=lambda _: True)
    # L-BFGS of optax 0.2.8 raises an IndexError.
    except Exception:  # whatever a transformation makes of a stand-in
        return None
    return found
