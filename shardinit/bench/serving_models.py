"""Models that the bench has a server stream: one leaf, constant or random.

Named to the server with ``--models shardinit.bench.serving_models``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardinit.core.init_fn import InitFn
from shardinit.errors import SpecError
from shardinit.models import register

WIDTH = 4096


@register("bench-constant")
def build_constant(config: Mapping[str, Any]) -> InitFn:
    """Ones, as many rows as the config says."""
    import jax.numpy as jnp

    shape = _shape("bench-constant", config)
    return InitFn(lambda key: {"w": jnp.ones(shape)}, name="bench-constant")


@register("bench-random")
def build_random(config: Mapping[str, Any]) -> InitFn:
    """Normals, as many rows as the config says."""
    import jax

    shape = _shape("bench-random", config)
    return InitFn(lambda key: {"w": jax.random.normal(key, shape)}, name="bench-random")


def _shape(model: str, config: Mapping[str, Any]) -> tuple[int, int]:
    """Of the leaf that a config asks for.

    Raises:
      SpecError: it asks for something else.
    """
    rows = config.get("rows")
    faults = [(key, "unknown key") for key in config if key != "rows"]
    if not isinstance(rows, int) or not 1 <= rows < 1 << 32:
        faults.append(("rows", f"{rows!r}; 1 to 2^32 - 1 are expected"))
    if faults:
        raise SpecError(model, faults)
    assert isinstance(rows, int)
    return rows, WIDTH
