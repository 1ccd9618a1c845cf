"""Haiku: a transformed function has an ``init``, which is an init function already.

It asks for example inputs beside the key, of which shapes will do. What it returns are
dicts of dicts, modules by the names that Haiku gives them and arrays by their own:
``mlp/~/linear_0`` and ``w``. A ``/`` inside a name is written ``~1`` in a path and a
``~`` is ``~0``: ``mlp~1~0~1linear_0/w``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from shardinit.core.host_state import watched
from shardinit.core.init_fn import InitFn
from shardinit.core.ir.examples import Examples
from shardinit.errors import InitFnError
from shardinit.extras import needs

with needs("haiku", "dm-haiku"):
    import haiku as hk


def init_fn(
    transformed: hk.Transformed | hk.TransformedWithState | hk.MultiTransformed,
    *inputs: Any,
    **kwargs: Any,
) -> InitFn:
    """Makes an `InitFn` of a transformed function of Haiku and shapes of its inputs.

    The function's result is what ``transformed.init(key, *inputs, **kwargs)`` returns,
    bit for bit: the parameters, and after ``hk.transform_with_state`` the pair of
    parameters and state.

    Building the `InitFn` traces the function and allocates nothing.

    Args:
      transformed: from ``hk.transform``, ``hk.transform_with_state``,
        ``hk.multi_transform`` and the like, or ``hk.without_apply_rng`` of one.
      *inputs: example inputs of the function, any pytrees of arrays or
        `jax.ShapeDtypeStruct`; other leaves are passed on as they are.
      **kwargs: keyword arguments of the function, arrays treated likewise.

    Raises:
      InitFnError: the function is not transformed, a shape stands in the place of an
        input, or an array depends on the value of an input of which only the shape is
        given.

    Example:
      >>> import haiku as hk
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import shardinit
      >>> from shardinit.frontends import haiku
      >>> net = hk.transform(lambda x: hk.nets.MLP([64, 8])(x))
      >>> fn = haiku.init_fn(net, jax.ShapeDtypeStruct((1, 3), jnp.float32))
      >>> shardinit.init(fn, 42)["mlp/~/linear_0"]["w"].shape
      (3, 64)
    """
    if not hasattr(transformed, "init"):
        name = getattr(transformed, "__name__", type(transformed).__name__)
        raise InitFnError(
            "haiku.init_fn",
            f"got {name}",
            "what hk.transform or a function like it returns",
            f"haiku.init_fn(hk.transform({name}), *inputs)",
        )
    name = type(transformed).__name__
    examples = Examples(inputs, kwargs)

    def init(key: jax.Array, values: Sequence[Any]) -> Any:
        args, options = examples.arguments(values)
        return transformed.init(key, *args, **options)

    with watched() as host:
        fn = examples.bound(init, name)
    return InitFn(
        fn,
        trainable=lambda made: made[0] if isinstance(made, tuple) else made,
        name=name,
        draws_on_host=host.moved,
        asks_process=host.asked,
        again=lambda: init_fn(transformed, *inputs, **kwargs),
    )
