"""Draws: what torch draws from a generator, drawn from a key by ``jax.random``.

The distributions are torch's. Floats of 16 bits and fewer are drawn in float32 and
rounded, as numbers of 8 significant bits are too few to draw in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from shardinit.errors import UnsupportedConfigError


class Site(NamedTuple):
    """Where numbers are drawn.

    Attributes:
      key: for the draw alone.
      shape: of the result.
      dtype: in which it is drawn.
    """

    key: jax.Array
    shape: tuple[int, ...]
    dtype: Any


Draw = Callable[..., Any]
DRAWS: dict[str, Draw] = {}
_FAR = 5.4  # standard deviations: as far as a float32 draw of a normal goes
_LEAST = 1e-3  # part of the normal in float32 that a truncated one may be drawn from


def draw(*names: str) -> Callable[[Draw], Draw]:
    """Registers a function for operations of ``torch.ops.aten`` that draw.

    Example:
      >>> @draw("fair_")
      ... def fair(site, like):
      ...     return jax.random.bernoulli(site.key, 0.5, site.shape)
      >>> DRAWS.pop("fair_") is fair
      True
    """

    def register(function: Draw) -> Draw:
        DRAWS.update(dict.fromkeys(names, function))
        return function

    return register


def _scaled(drawn: Any, mean: Any, std: Any) -> Any:
    if not isinstance(std, int | float) or std != 1:
        drawn = drawn * std
    if not isinstance(mean, int | float) or mean != 0:
        drawn = drawn + mean
    return drawn


@draw("normal_", "normal_functional")
def _normal_(site: Site, like: Any, mean: Any = 0, std: Any = 1, **kwargs: Any) -> Any:
    return _scaled(jax.random.normal(site.key, site.shape, site.dtype), mean, std)


@draw("normal")
def _normal(
    site: Site, mean: Any = 0, std: Any = 1, size: Any = None, **kwargs: Any
) -> Any:
    return _scaled(jax.random.normal(site.key, site.shape, site.dtype), mean, std)


@draw("randn", "randn_like")
def _randn(site: Site, *args: Any, **kwargs: Any) -> Any:
    return jax.random.normal(site.key, site.shape, site.dtype)


@draw("uniform_", "uniform")
def _uniform(site: Site, like: Any, low: Any = 0, high: Any = 1, **kwargs: Any) -> Any:
    return jax.random.uniform(site.key, site.shape, site.dtype, low, high)


@draw("rand", "rand_like")
def _rand(site: Site, *args: Any, **kwargs: Any) -> Any:
    return jax.random.uniform(site.key, site.shape, site.dtype)


@draw("trunc_normal_")
def _trunc_normal(
    site: Site, like: Any, mean: float, std: float, least: float, most: float
) -> Any:
    if not std:
        return jnp.full(site.shape, min(max(mean, least), most), site.dtype)
    low, high = (least - mean) / std, (most - mean) / std
    if low <= -_FAR and high >= _FAR:
        drawn = jax.random.normal(site.key, site.shape, site.dtype)
    else:
        low, high = max(low, -_FAR), min(high, _FAR)
        part = (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2))) / 2
        if part < _LEAST:
            raise UnsupportedConfigError(
                "trunc_normal_",
                f"mean {mean}, std {std} within [{least}, {most}]: {part:.1g} of the "
                f"normal",
                f"bounds that hold {_LEAST} of it",
            )
        drawn = jax.random.truncated_normal(site.key, low, high, site.shape, site.dtype)
    return jnp.clip(_scaled(drawn, mean, std), least, most)


@draw("exponential_", "exponential")
def _exponential(site: Site, like: Any, lambd: float = 1, **kwargs: Any) -> Any:
    return jax.random.exponential(site.key, site.shape, site.dtype) / lambd


@draw("log_normal_")
def _log_normal(
    site: Site, like: Any, mean: float = 1, std: float = 2, **kwargs: Any
) -> Any:
    return jnp.exp(_normal_(site, like, mean, std))


@draw("cauchy_")
def _cauchy(
    site: Site, like: Any, median: float = 0, sigma: float = 1, **kwargs: Any
) -> Any:
    return median + sigma * jax.random.cauchy(site.key, site.shape, site.dtype)


@draw("geometric_")
def _geometric(site: Site, like: Any, p: float, **kwargs: Any) -> Any:
    return jax.random.geometric(site.key, p, site.shape)


@draw("bernoulli_")
def _bernoulli_(site: Site, like: Any, p: Any = 0.5, **kwargs: Any) -> Any:
    return jax.random.bernoulli(site.key, p, site.shape)


@draw("bernoulli")
def _bernoulli(site: Site, probabilities: Any, p: Any = None, **kwargs: Any) -> Any:
    chosen = probabilities if p is None else p
    return jax.random.bernoulli(site.key, chosen, site.shape)


@draw("random_")
def _random_(site: Site, like: Any, *bounds: int, **kwargs: Any) -> Any:
    low, high = (0, *bounds)[-2:] if bounds else (0, 0)
    if high is None or not bounds:
        high = low + _whole(like.dtype) + (like.dtype.is_floating_point)
    return _integers(site, low, high)


def _whole(dtype: Any) -> int:
    """The largest whole number that torch draws for a dtype without bounds."""
    import torch

    if dtype.is_floating_point:
        return 2 ** round(1 - math.log2(torch.finfo(dtype).eps))
    return 1 if dtype is torch.bool else torch.iinfo(dtype).max


def _integers(site: Site, low: int, high: int) -> Any:
    if high - 1 > jnp.iinfo(jnp.int32).max and not jax.config.jax_enable_x64:
        high = jnp.iinfo(jnp.int32).max
    dtype = jnp.int64 if jax.config.jax_enable_x64 else jnp.int32
    return jax.random.randint(site.key, site.shape, low, high, dtype)


@draw("randint")
def _randint(site: Site, *bounds: Any, **kwargs: Any) -> Any:
    low, high = (0, *(bound for bound in bounds if isinstance(bound, int)))[-2:]
    return _integers(site, low, high)


@draw("randint_like")
def _randint_like(site: Site, like: Any, *bounds: int, **kwargs: Any) -> Any:
    return _integers(site, *(0, *bounds)[-2:])


@draw("randperm")
def _randperm(site: Site, size: int, **kwargs: Any) -> Any:
    return jax.random.permutation(site.key, size)


@draw("multinomial")
def _multinomial(
    site: Site, weights: Any, count: int, replacement: bool = False, **kwargs: Any
) -> Any:
    logits = jnp.log(weights)
    if not replacement:
        noise = jax.random.gumbel(site.key, logits.shape, logits.dtype)
        return jax.lax.top_k(logits + noise, count)[1]
    shape = (count, *logits.shape[:-1])
    return jnp.moveaxis(jax.random.categorical(site.key, logits, shape=shape), 0, -1)


@draw("sparse_")
def _sparse(site: Site, like: Any, sparsity: float, std: float) -> Any:
    rows, _ = site.shape
    one, two = jax.random.split(site.key)
    values = jax.random.normal(one, site.shape, site.dtype) * std
    order = jnp.argsort(jax.random.uniform(two, site.shape), axis=0)
    ranks = jnp.argsort(order, axis=0)  # a permutation of each column's rows
    return jnp.where(ranks < math.ceil(sparsity * rows), 0, values)
