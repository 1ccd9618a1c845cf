"""What a layer computes for each token alone: a dense MLP or a mixture of experts.

Experts are many small MLPs of which a token uses a few. Their weights lie along a
leading axis that a mesh can split, or, unrolled, in a subtree for each. The forward
pass here applies every expert to every token and weighs the results, with zero for
those not chosen: simple, exact and differentiable, though no way to serve a large
model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from shardinit.models.config import DecoderConfig, Experts
from shardinit.models.layers import Dims, Linear, named, normal

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


class RouterBias(nnx.Variable):
    """Moved by a rule that balances the experts, never by a gradient: no parameter."""


class Mlp(nnx.Module):
    """A dense MLP: ``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))``."""

    gate: Linear | None = None

    def __init__(self, size: int, config: DecoderConfig, rngs: nnx.Rngs):
        embed, inner = (("embed", config.hidden_size),), (("mlp", size),)
        bias, std = config.mlp_bias, config.residual_std
        if config.gated:
            self.gate = Linear(embed, inner, config, rngs, bias=bias)
        self.up = Linear(embed, inner, config, rngs, bias=bias)
        self.down = Linear(inner, embed, config, rngs, bias=bias, std=std)
        self.activation = config.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (..., embed) to the same shape."""
        act = ACTIVATIONS[self.activation]
        if self.gate is None:
            return self.down(act(self.up(x)))
        return self.down(act(self.gate(x)) * self.up(x))


class Expert(nnx.Module):
    """The weights of one expert, or of all experts along a leading axis."""

    def __init__(self, leading: Dims, size: int, config: DecoderConfig, rngs: nnx.Rngs):
        embed, inner = ("embed", config.hidden_size), ("mlp", size)
        self.gate = normal((*leading, embed, inner), config, rngs)
        self.up = normal((*leading, embed, inner), config, rngs)
        std = config.residual_std
        self.down = normal((*leading, inner, embed), config, rngs, std)

    def mix(self, x: jax.Array, weights: jax.Array, activation: str) -> jax.Array:
        """Maps (..., embed) with weights (..., experts) to (..., embed)."""
        kernels = (self.gate[...], self.up[...], self.down[...])
        if kernels[0].ndim == 2:
            kernels = tuple(kernel[None] for kernel in kernels)
        gate, up, down = kernels
        inner = ACTIVATIONS[activation](jnp.einsum("...d,edf->...ef", x, gate))
        inner = inner * jnp.einsum("...d,edf->...ef", x, up) * weights[..., None]
        return jnp.einsum("...ef,efd->...d", inner, down)


class Moe(nnx.Module):
    """A router, its experts, and experts that every token uses."""

    def __init__(self, experts: Experts, config: DecoderConfig, rngs: nnx.Rngs):
        expert = (("expert", experts.num),)
        self.router = Linear((("embed", config.hidden_size),), expert, config, rngs)
        if experts.sigmoid:
            zeros = jnp.zeros([experts.num], jnp.float32)
            self.router_bias = named(zeros, expert, RouterBias)
        if experts.stacked:
            self.experts = Expert(expert, experts.size, config, rngs)
        else:
            self.experts = nnx.List(
                [Expert((), experts.size, config, rngs) for _ in range(experts.num)]
            )
        size = experts.shared_size
        self.shared = Mlp(size, config, rngs) if size else None
        self.choice = experts
        self.activation = config.activation

    def weights(self, x: jax.Array) -> jax.Array:
        """Each expert's weight for each token of (..., embed), mostly zero."""
        how = self.choice
        scores = self.router(x.astype(jnp.float32) if how.sigmoid else x)
        scores = scores.astype(jnp.float32)
        if how.sigmoid:
            scores = jax.nn.sigmoid(scores)
            ranks = scores + self.router_bias[...]
        else:
            scores = ranks = jax.nn.softmax(scores)
        if how.groups > 1:
            grouped = ranks.reshape(*ranks.shape[:-1], how.groups, -1)
            best = jax.lax.top_k(grouped, 2)[0].sum(-1)
            open_groups = _chosen(best, how.top_groups)[..., None]
            ranks = jnp.where(open_groups, grouped, -jnp.inf).reshape(ranks.shape)
        scores = jnp.where(_chosen(ranks, how.top_k), scores, 0)
        if how.normalise:
            scores = scores / (scores.sum(-1, keepdims=True) + 1e-20)
        return scores * how.scale

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (..., embed) to the same shape."""
        weights = self.weights(x).astype(x.dtype)
        if isinstance(self.experts, Expert):
            y = self.experts.mix(x, weights, self.activation)
        else:
            y = jnp.zeros_like(x)
            for i, expert in enumerate(self.experts):
                y = y + expert.mix(x, weights[..., i : i + 1], self.activation)
        return y if self.shared is None else y + self.shared(x)


def _chosen(ranks: jax.Array, k: int) -> jax.Array:
    """Whether each entry is among the ``k`` largest of the last dimension."""
    _, best = jax.lax.top_k(ranks, k)
    return jax.nn.one_hot(best, ranks.shape[-1], dtype=jnp.bool_).any(-2)
