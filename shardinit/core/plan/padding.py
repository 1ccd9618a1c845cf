"""Padding: leaves whose axes are rounded up, so that a mesh divides them.

A vocabulary of 50,257 does not shard over 8 devices; one of 50,264 does. The init
function itself is wrapped, so that all that follows (plans, programs, windows, digests,
checkpoints) sees the padded shape and needs to know nothing of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp

from shardinit.core.init_fn import InitFn, as_init_fn
from shardinit.core.paths import chosen, path_str
from shardinit.core.types import Array, Tree
from shardinit.errors import InitFnError, ShardingError

Pad = Mapping[str, int | tuple[int | None, ...]]
"""Globs to the multiple of the first axis, or to those of the first axes."""


def padded(fn: object, pad: Pad) -> InitFn:
    """An init function whose leaves are padded to multiples, with zeros.

    The values of what ``fn`` draws stay as they are. Whoever runs the model with padded
    leaves leaves the padding out, as the rows of a vocabulary that no token has.

    Args:
      fn: ``key -> pytree of arrays``, or an ``InitFn``.
      pad: globs over leaf paths to the multiple of their first axis; or to a tuple, a
        multiple for each of the first axes, None for one that stays.

    Raises:
      InitFnError: a program or a plan, whose shapes are settled.
      ShardingError: what is no multiple.
      SelectError: a glob that matches no leaf, when the function is traced.

    Example:
      >>> import jax, shardinit
      >>> init = lambda key: {"embed": jax.random.normal(key, (50_257, 64))}
      >>> fn = shardinit.padded(init, {"embed": 8})
      >>> shardinit.plan(fn).leaves[0].shape
      (50264, 64)
    """
    if hasattr(fn, "as_cut"):
        raise InitFnError(
            f"pad of {type(fn).__name__}",
            "its shapes are settled",
            "an init function",
            "Pad the function that it is of: shardinit.padded(fn, pad)",
        )
    _check(pad)
    inner = as_init_fn(fn)

    def draw(key: Array) -> Tree:
        named, structure = jax.tree_util.tree_flatten_with_path(inner.fn(key))
        asked = multiples_of(pad, [path_str(path) for path, _ in named])
        leaves = [
            _longer(leaf, asked.get(path_str(path), ()), path_str(path))
            for path, leaf in named
        ]
        return jax.tree.unflatten(structure, leaves)

    again, streams = inner.again, inner.of_streams
    return replace(
        inner,
        fn=draw,
        again=None if again is None else lambda: padded(again(), pad),
        of_streams=(
            None if streams is None else lambda names: padded(streams(names), pad)
        ),
    )


def _check(pad: Pad) -> None:
    """Refuses what is no multiple.

    Raises:
      ShardingError: with the glob that has it.
    """
    if not isinstance(pad, Mapping) or not all(isinstance(x, str) for x in pad):
        raise ShardingError("pad", repr(pad), "globs to multiples: {'**/embed': 128}")
    for pattern, multiples in pad.items():
        for multiple in _all(multiples):
            # Not `isinstance`, for which True is an integer.
            if multiple is not None and (type(multiple) is not int or multiple < 1):
                raise ShardingError(
                    f"pad={{{pattern!r}: {multiples!r}}}",
                    repr(multiple),
                    "a positive integer, or a tuple of such and None",
                )


def multiples_of(pad: Pad, paths: Sequence[str]) -> dict[str, tuple[int | None, ...]]:
    """The multiples of each leaf that is padded; the first glob that matches counts."""
    found: dict[str, tuple[int | None, ...]] = {}
    for pattern, multiples in pad.items():
        for path, ok in zip(paths, chosen(pattern, paths, "pad"), strict=True):
            if ok:
                found.setdefault(path, _all(multiples))
    return found


def padded_paths(pad: Pad, paths: Sequence[str]) -> list[str]:
    """The leaves that are padded."""
    return list(multiples_of(pad, paths))


def _all(multiples: int | tuple[int | None, ...]) -> tuple[int | None, ...]:
    return multiples if isinstance(multiples, tuple) else (multiples,)


def _longer(leaf: Array, multiples: tuple[int | None, ...], path: str) -> Array:
    if len(multiples) > jnp.ndim(leaf):
        raise ShardingError(
            f"leaf {path!r}",
            f"{len(multiples)} multiples to pad to",
            f"at most its {jnp.ndim(leaf)} axes",
        )
    wanted = zip(jnp.shape(leaf), multiples, strict=False)
    more = [(0, -size % (multiple or 1)) for size, multiple in wanted]
    more += [(0, 0)] * (jnp.ndim(leaf) - len(more))
    # `jnp.pad` by nothing is traced all the same, and the function would have another
    # fingerprint than without it.
    return jnp.pad(leaf, more) if any(map(any, more)) else leaf
