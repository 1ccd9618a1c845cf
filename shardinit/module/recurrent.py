"""Recurrent layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers

from shardinit.module.base import Module
from shardinit.module.context import next_key
from shardinit.module.fields import Cache, Parameter, Rng
from shardinit.module.layers import Init, default_kernel_init, held_key, parameter_key

Activation = Callable[[jax.Array], jax.Array]

default_recurrent_kernel_init = initializers.orthogonal()


class GRU(Module):
    """A gated recurrent unit, applied along the time axis of (batch, time, features).

    Example:
      >>> import jax.numpy as jnp
      >>> from shardinit.module import GRU
      >>> gru = GRU(8, return_sequences=True).init(42, jnp.ones((1, 5, 3)))
      >>> gru.params["ir"]["kernel"].shape, gru.params["hr"]["kernel"].shape
      ((3, 8), (8, 8))
      >>> gru(jnp.ones((2, 7, 3)), gru.initialize_state(2)).shape
      (2, 7, 8)
    """

    params: dict[str, dict[str, jax.Array]] = Parameter.node()
    rng: Any = Rng.node()
    last_state: jax.Array | None = Cache.node(None)

    def __init__(
        self,
        units: int,
        *,
        gate_fn: Activation = jax.nn.sigmoid,
        activation_fn: Activation = jnp.tanh,
        kernel_init: Init = default_kernel_init,
        recurrent_kernel_init: Init = default_recurrent_kernel_init,
        bias_init: Init = initializers.zeros,
        initial_state_init: Init = initializers.zeros,
        return_sequences: bool = False,
        return_state: bool = False,
        go_backwards: bool = False,
        stateful: bool = False,
        time_axis: int = -2,
        unroll: int = 1,
        name: str | None = None,
    ):
        """Sets the options of the layer; computes no values.

        Args:
          units: size of the state.
          gate_fn: activation of the gates.
          activation_fn: activation of the new state.
          kernel_init: makes the kernels that the input meets.
          recurrent_kernel_init: makes the kernels that the state meets.
          bias_init: makes the biases.
          initial_state_init: makes the state that a sequence begins with.
          return_sequences: whether a call returns the states of all times.
          return_state: whether it returns the last state beside those.
          go_backwards: whether the sequence is read from its end.
          stateful: whether a call begins with the last state of the one before.
          time_axis: the axis of the input that is the time.
          unroll: ``unroll`` of ``jax.lax.scan``.
          name: name of the field that a compact method makes for the layer.
        """
        super().__init__(name)
        self.units = units
        self.gate_fn, self.activation_fn = gate_fn, activation_fn
        self.kernel_init = kernel_init
        self.recurrent_kernel_init = recurrent_kernel_init
        self.bias_init = bias_init
        self.initial_state_init = initial_state_init
        self.return_sequences, self.return_state = return_sequences, return_state
        self.go_backwards, self.stateful = go_backwards, stateful
        self.time_axis, self.unroll = time_axis, unroll
        self.params = {}
        self.rng = held_key()

    def initialize_state(self, batch_dims: int | tuple[int, ...]) -> jax.Array:
        """Returns a state to begin with, of shape ``(*batch_dims, units)``."""
        batch = (batch_dims,) if isinstance(batch_dims, int) else tuple(batch_dims)
        key, self.rng = jax.random.split(self.rng)
        return self.initial_state_init(key, (*batch, self.units), jnp.float32)

    def __call__(self, x: jax.Array, initial_state: jax.Array | None = None) -> Any:
        """Reads sequences.

        Args:
          x: an array (batch, time, features); ``time_axis`` may be another.
          initial_state: the state to begin with, shape (batch, units).

        Returns:
          The last state (batch, units); the states of all times (batch, time, units)
          with ``return_sequences``; a pair of those and the last with ``return_state``
          too.
        """
        initializing = self.initializing()
        x = jnp.swapaxes(x, self.time_axis, 0)
        if self.go_backwards:
            x = x[::-1]
        if initial_state is None:
            initial_state = self.initialize_state(x.shape[1:-1])
            if self.stateful and self.last_state is not None:
                initial_state = self.last_state
        if initializing:
            self._make(x.shape[-1])
        last, states = jax.lax.scan(self._step, initial_state, x, unroll=self.unroll)
        if self.stateful and not initializing:
            self.last_state = last
        if not self.return_sequences:
            return last
        states = jnp.swapaxes(states, self.time_axis, 0)
        return (states, last) if self.return_state else states

    def _make(self, features_in: int) -> None:
        key, units = next_key(), self.units
        self.params = {}
        for part in ("ir", "hr", "iz", "hz", "in", "hn"):
            shape, init = (features_in, units), self.kernel_init
            if part.startswith("h"):
                shape, init = (units, units), self.recurrent_kernel_init
            made = {"kernel": init(parameter_key(key, 1, part), shape, jnp.float32)}
            if part not in ("hr", "hz"):  # summed with what has a bias
                bias_key = parameter_key(key, 2, part)
                made["bias"] = self.bias_init(bias_key, (units,), jnp.float32)
            self.params[part] = made

    def _step(self, state: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        def dense(part: str, value: jax.Array) -> jax.Array:
            own = self.params[part]
            y = jnp.matmul(value, own["kernel"])
            return y + own["bias"] if "bias" in own else y

        reset = self.gate_fn(dense("ir", x) + dense("hr", state))
        update = self.gate_fn(dense("iz", x) + dense("hz", state))
        new = self.activation_fn(dense("in", x) + reset * dense("hn", state))
        state = (1.0 - update) * new + update * state
        return state, state
