"""Models that the bench has a server stream: one leaf, constant or random.

Named to the server with ``--models shardinit.bench.serving_models``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardinit.core.init_fn import InitFn
from shardinit.models import register

WIDTH = 4096


@register("bench-constant")
def build_constant(config: Mapping[str, Any]) -> InitFn:
    """Ones, as many rows as the config says."""
    import jax.numpy as jnp

    shape = (config["rows"], WIDTH)
    return InitFn(lambda key: {"w": jnp.ones(shape)}, name="bench-constant")


@register("bench-random")
def build_random(config: Mapping[str, Any]) -> InitFn:
    """Normals, as many rows as the config says."""
    import jax

    shape = (config["rows"], WIDTH)
    return InitFn(lambda key: {"w": jax.random.normal(key, shape)}, name="bench-random")
