"""What is initialised in the measurements: one function and shardings for both sides.

Both sides get the same function and the same tree of shardings. The function is
wrapped anew in each child, so that neither finds a trace that was made while the
subject was being prepared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shardinit.core import platform
from shardinit.models import ModelSpec, build, example_config

if TYPE_CHECKING:
    from jax.sharding import AbstractMesh, Mesh

    from shardinit.core.init_fn import InitFn
    from shardinit.core.plan.rules import AxisRules

_RULES = {
    "vocab": "model",
    "embed": "data",
    "mlp": "model",
    "heads": "model",
    "kv_heads": "model",
    "expert": "model",
}

# Small enough that a cold start is the compiler's work and not the run's.
NARROW = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1024,
}


@dataclass(frozen=True)
class Subject:
    """A function to initialise and where its leaves shall lie.

    Attributes:
      fn: the key to a pytree of arrays; new to JAX.
      shardings: one a leaf, a tree like the result.
      leaves: how many there are.
      total_bytes: of all leaves, each counted once.
    """

    fn: Callable[[Any], Any]
    shardings: Any
    leaves: int
    total_bytes: int


def rules() -> AxisRules:
    """Where the axes of the decoders lie on the mesh."""
    from shardinit.core.plan.rules import AxisRules

    return AxisRules(_RULES)


def axis_sizes(devices: int) -> tuple[int, int]:
    """Sizes of the axes data and model."""
    return (2, devices // 2) if devices % 2 == 0 else (1, devices)


def mesh(devices: int) -> Mesh:
    """The devices that are there as data x model."""
    import jax

    return jax.make_mesh(axis_sizes(devices), ("data", "model"))


def abstract_mesh() -> AbstractMesh:
    """A mesh of 16 x 4 devices without the devices."""
    from jax.sharding import AbstractMesh

    return AbstractMesh((16, 4), ("data", "model"))


def peak_bytes() -> int:
    """The most memory that the devices have held; on simulated ones, this process."""
    import jax

    # Devices of the CPU keep no account: their ``memory_stats()`` is None.
    held = [(d.memory_stats() or {}).get("peak_bytes_in_use") for d in jax.devices()]
    known = [count for count in held if count is not None]
    return sum(known) if len(known) == len(held) else platform.peak_bytes()


def example(name: str, **changed: Any) -> InitFn:
    """An example's decoder, with other values for some keys of its config."""
    return build(ModelSpec("decoder", {**example_config(name), **changed}))


def tinyllama(layers: int) -> InitFn:
    """TinyLlama 1.1B in float32; 22 layers are the published model."""
    changed = {"num_hidden_layers": layers, "param_dtype": "float32"}
    return example("tinyllama-1.1b", **changed)


def narrow_spec(layers: int) -> ModelSpec:
    """The spec of a decoder of 9 leaves a layer, unrolled, narrow, in float32."""
    return ModelSpec("decoder", {**NARROW, "num_hidden_layers": layers})


def narrow(layers: int) -> InitFn:
    """The model of that spec."""
    return build(narrow_spec(layers))


def subject(init_fn: InitFn, mesh: Mesh) -> Subject:
    """Prepares an init function for both sides."""
    import jax

    from shardinit.core.plan.leaf_info import LeafInfo
    from shardinit.core.plan.sharding import resolve

    shapes = jax.eval_shape(init_fn.fn, jax.random.key(0))
    leaves, tree = jax.tree.flatten(shapes)
    names = jax.tree.leaves(
        init_fn.axes, is_leaf=lambda node: node is None or isinstance(node, tuple)
    )
    infos = [
        LeafInfo(str(number), leaf.shape, leaf.dtype, axes)
        for number, (leaf, axes) in enumerate(zip(leaves, names, strict=True))
    ]
    placed = jax.tree.unflatten(tree, resolve(infos, mesh, rules()))
    size = sum(info.nbytes for info in infos)
    fn = init_fn.fn
    return Subject(lambda key: fn(key), placed, len(infos), size)
