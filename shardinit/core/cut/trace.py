"""Tracing, and what of a traced function is refused: each with its leaf's name."""

from __future__ import annotations

import inspect

import jax
import numpy as np

from shardinit.core.ir import jaxpr as jx
from shardinit.core.ir.graph import Node, Value, topological
from shardinit.core.paths import path_str
from shardinit.core.prng.root_key import RootKey, keys_of, streams_of
from shardinit.core.systems import refuse_failed_model
from shardinit.core.types import Init, Tree, TreeDef
from shardinit.errors import InitFnError, InvalidKeyError

MAX_AXIS = 1 << 32  # elements


def trace(fn: Init, key_aval: Tree) -> tuple[jx.ClosedJaxpr, Tree]:
    """Traces without a mesh, or under the caller's if the function asks for one."""
    try:
        return jx.without_mesh(lambda: _trace(fn, key_aval))
    except Exception as error:  # whatever the model's own code raises
        refuse_failed_model(fn, error)
        raise


def _trace(fn: Init, key_aval: Tree) -> tuple[jx.ClosedJaxpr, Tree]:
    try:
        return _traced(fn, key_aval)
    except (
        jax.errors.TracerArrayConversionError,
        jax.errors.ConcretizationTypeError,
    ) as error:
        raise InitFnError(
            "the init function",
            f"it reads a traced value while being traced ({_first_line(error)})",
            "a function that jax.jit accepts",
            "Move decisions that depend on the key out of Python control flow",
        ) from error
    except jax.errors.UnexpectedTracerError as error:
        raise InitFnError(
            "the init function",
            f"it uses a value of another trace ({_first_line(error)})",
            "a function of its key and of concrete arrays",
            "Pass what it needs as concrete arrays",
        ) from error
    except TypeError as error:
        first = keys_of(key_aval)[0]
        if "PRNG key data" in str(error) and not jx.is_key(first.dtype):
            raise InvalidKeyError(
                "key",
                f"got raw key data of shape {first.shape}",
                f"that of {jx.setting('jax_default_prng_impl')} keys, JAX's default",
                "Pass jax.random.key(0), which says what it is",
            ) from error
        _refuse_non_arrays(fn, key_aval)
        raise


def _traced(fn: Init, key_aval: Tree) -> tuple[jx.ClosedJaxpr, Tree]:
    # The function itself is traced, not a wrapper of it: JAX keeps the trace that a
    # front end made when it described the model.
    try:
        return jx.trace(fn, key_aval)
    except (ValueError, jax.errors.ConcretizationTypeError):
        # JAX compares the structure of the result with itself, and arrays in static
        # fields have no truth value: the leaves alone can be traced.
        structure: list[TreeDef] = []

        def leaves(key: RootKey) -> list[Tree]:
            flat, tree = jax.tree.flatten(fn(key))
            structure.append(tree)
            return flat

        closed, shapes = jx.trace(leaves, key_aval)
        return closed, structure[0].unflatten(shapes)


def _refuse_non_arrays(fn: Init, key_aval: Tree) -> None:
    """Names the first leaf of the result that is no array, if there is one."""
    leaves: list[tuple[jax.tree_util.KeyPath, Tree]] = []

    def look(key: RootKey) -> None:
        leaves.extend(jax.tree_util.tree_leaves_with_path(fn(key)))

    try:
        jax.eval_shape(look, key_aval)
    except TypeError as error:
        if streams := ", ".join(streams_of(key_aval)):
            raise InvalidKeyError(
                "key",
                f"got keys by the names {streams}, and the function does not take them "
                f"({_first_line(error)})",
                "what the function takes: one key such as jax.random.key(0), or a dict "
                "of them by its names",
            ) from error
        try:
            inspect.signature(fn).bind(key_aval)
        except ValueError:  # of a builtin
            pass
        except TypeError as wrong:
            raise InitFnError(
                "the init function",
                f"it does not take a key alone ({wrong})",
                "a function of one key",
                "Give the rest beforehand: lambda key: fn(key, config)",
            ) from error
        raise
    for path, leaf in leaves:
        is_array = hasattr(leaf, "dtype") and hasattr(leaf, "shape")
        what = type(leaf).__name__
        if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "OSUMm":
            is_array, what = False, f"numpy array of dtype {leaf.dtype}"
        if not is_array and not isinstance(leaf, (bool, int, float, complex)):
            raise InitFnError(
                f"leaf {path_str(path)!r}",
                f"the init function returned a {what}",
                "an array",
                "Return arrays only; keep settings out of the result, or put them "
                "back with InitFn(rebuild=...)",
            )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def refuse_effects(effects: list[Node], outs: list[Value], paths: list[str]) -> None:
    """Refuses prints and callbacks, by the leaf that depends on them."""
    if not effects:
        return
    bad = {id(node) for node in effects}
    for out, path in zip(outs, paths, strict=True):
        for node in topological([out]):
            if id(node) in bad:
                raise InitFnError(
                    f"leaf {path!r}",
                    f"its value depends on {node.name}",
                    "a pure function of the key",
                    "Remove the callback; load such values after the initialisation",
                )
    raise InitFnError(
        "the init function",
        f"it has a side effect ({effects[0].name}) that no leaf depends on",
        "a pure function of the key",
        "Remove the print or callback",
    )


def refuse_no_values(outs: list[Value], paths: list[str]) -> None:
    """Refuses leaves of float0, which have no values."""
    for out, path in zip(outs, paths, strict=True):
        if out.dtype == jax.dtypes.float0:
            raise InitFnError(
                f"leaf {path!r}",
                "its dtype is float0, which no device can hold",
                "an array of numbers or keys",
                "Leave tangents of integers out of the result",
            )


def refuse_long_axes(out: Value, path: str) -> None:
    """Places along an axis are words of 32 bits: behind them they would wrap."""
    for node in topological([out]):
        for value in node.outputs:
            if max(value.shape, default=0) > MAX_AXIS:
                raise InitFnError(
                    f"leaf {path!r}",
                    f"an array of shape {list(value.shape)} ({node.name})",
                    f"axes of at most {MAX_AXIS:,} elements",
                    "Make it of two axes and reshape it where it is used",
                )


def tracer_error(path: str) -> InitFnError:
    """A leaf closes over what another trace is computing."""
    return InitFnError(
        f"leaf {path!r}",
        "the init function closes over a value that another trace is computing",
        "a function of its key and of concrete arrays",
        "Call shardinit outside jax.jit, or return the value from the init function",
    )
