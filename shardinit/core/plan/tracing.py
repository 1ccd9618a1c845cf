"""One trace of the user's function, and which leaves the host's state reaches."""

from __future__ import annotations

from dataclasses import replace
from weakref import WeakKeyDictionary

import jax

from shardinit.core.cut.cut import Cut
from shardinit.core.cut.cutter import cut
from shardinit.core.host_state import Watch, watched
from shardinit.core.init_fn import InitFn
from shardinit.core.ir.jaxpr import setting
from shardinit.core.plan.drawing import HostLeaves
from shardinit.core.prng.root_key import RootKey, abstract
from shardinit.core.types import DType, Init
from shardinit.errors import UnsupportedConfigError

# By the function itself and weakly: JAX too keeps a trace for as long as the function
# lives, and an ``id`` may be given to the next one.
_SEEN: WeakKeyDictionary[Init, Watch] = WeakKeyDictionary()


def traced(
    init_fn: InitFn, key: RootKey, prng: str | None, draw_dtype: DType
) -> tuple[Cut, HostLeaves]:
    """The function cut, and the leaves that the host's state reaches.

    Where the function took something of that state, it is traced once more, with that
    state moved, and what came out otherwise is named.

    Raises:
      InitFnError: the function cannot be cut.
      UnsupportedConfigError: ``jax_threefry_partitionable`` is off.
    """
    _check_config()
    root = abstract(key)

    def traced_once(fn: Init) -> Cut:
        if prng is None:
            return cut(fn, root, draw_dtype)
        # The function may make keys of its own from a seed, and those take the default.
        with jax.default_prng_impl("threefry2x32"):  # keys that the function makes
            return cut(fn, root, draw_dtype)

    def changed() -> list[str]:
        fn = init_fn.fn if init_fn.again is None else init_fn.again().fn
        # Another function: for the same one JAX gives the trace that it has kept.
        other = traced_once(lambda key: fn(key))
        pairs = zip(made.leaves, other.leaves, strict=True)
        return [
            one.path
            for one, two in pairs
            # One leaf at a time: the fingerprint of the whole says that something
            # changed, and not which leaf.
            if replace(made, leaves=(one,)).fingerprint
            != replace(other, leaves=(two,)).fingerprint
        ]

    with watched() as host:
        made = traced_once(init_fn.fn)
    host = _remembered(init_fn.fn, host)
    random, by_process = (), ()
    if host.moved or init_fn.draws_on_host:
        random = changed()
    if host.asked or init_fn.asks_process:
        with watched(index_offset=1):
            by_process = [path for path in changed() if path not in set(random)]
    return made, HostLeaves(tuple(random), tuple(by_process))


def _remembered(fn: Init, host: Watch) -> Watch:
    """What a function took of the host, maybe in an earlier trace that JAX has kept."""
    try:
        seen = _SEEN.setdefault(fn, Watch())
    except TypeError:  # it can be no key: JAX has kept nothing of it either
        return host
    seen.moved |= host.moved
    seen.asked |= host.asked
    return seen


def _check_config() -> None:
    if not setting("jax_threefry_partitionable"):
        raise UnsupportedConfigError(
            "jax_threefry_partitionable",
            "it is False",
            "True (JAX's default)",
            "Without it a random number depends on the size of the whole array, so "
            "no device could make its shard alone. Remove the setting",
        )
