"""Scanned layers: a stack under ``nn.scan`` and one under ``nnx.vmap``, cold and warm.

The compiler sees one layer, however many there are, so that plain jit gains here what
unrolled layers cost it; what is left is where each shard is drawn. 64 layers of two
matrices, from the trace to the last byte, and the second run of what was compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from shardinit.bench import subjects
from shardinit.bench.case import Bench, Figures, Job, Row, Target, register, timed

if TYPE_CHECKING:
    from shardinit.core.init_fn import InitFn

_LAYERS, _WIDTH = 64, 512


def _linen(layers: int, width: int) -> InitFn:
    import jax
    from flax import linen as nn

    from shardinit.frontends import linen

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x: Any, _: None) -> tuple[Any, None]:
            x = nn.Dense(4 * width, use_bias=False)(x)
            return nn.Dense(width, use_bias=False)(x), None

    scanned = nn.scan(
        Layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=layers,
    )
    x = jax.ShapeDtypeStruct((1, width), "float32")
    return linen.init_fn(scanned(), x, None)


def _nnx(layers: int, width: int) -> InitFn:
    from flax import nnx

    from shardinit.frontends import nnx as door

    class Layer(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.up = nnx.Linear(width, 4 * width, use_bias=False, rngs=rngs)
            self.down = nnx.Linear(4 * width, width, use_bias=False, rngs=rngs)

    def make(rngs: nnx.Rngs) -> Any:
        @nnx.split_rngs(splits=layers)
        @nnx.vmap
        def stacked(rngs: nnx.Rngs) -> Layer:
            return Layer(rngs)

        return stacked(rngs)

    return door.init_fn(make)


_MODELS = {"linen": _linen, "nnx": _nnx}


def _time(
    framework: str,
    layers: int,
    width: int,
    devices: int,
    compiled: Callable[[Callable[[Any], Any], Any], Callable[[Any], Any]],
) -> Figures:
    """The first run with all before it, and the second run alone."""
    import jax

    from shardinit.core.plan.fsdp import fsdp
    from shardinit.core.plan.planning import plan

    fn = _MODELS[framework](layers, width).fn
    mesh = subjects.mesh(devices)
    abstract = plan(fn, mesh=mesh, rules=fsdp("data", "model")).abstract()
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    jax.clear_caches()
    held: dict[str, Any] = {}

    def cold(key: Any) -> Any:
        # A function that JAX has not traced yet: it keeps traces by function.
        held["run"] = compiled(lambda key: fn(key), places)
        return held["run"](key)

    seconds, result = timed(cold, jax.random.key(1))
    del result
    return {"seconds": seconds, "warm": timed(held["run"], jax.random.key(2))[0]}


def ours(framework: str, layers: int, width: int, devices: int) -> Figures:
    """A plan with those shardings, compiled."""
    from shardinit.core.plan.planning import plan
    from shardinit.core.run.compile import compile_plan

    def compiled(fn: Callable[[Any], Any], places: Any) -> Any:
        return compile_plan(plan(fn, out_shardings=places))

    return _time(framework, layers, width, devices, compiled)


def jit(framework: str, layers: int, width: int, devices: int) -> Figures:
    """``jax.jit(init, out_shardings)`` of the same function."""
    import jax

    def compiled(fn: Callable[[Any], Any], places: Any) -> Any:
        return jax.jit(fn, out_shardings=places)

    return _time(framework, layers, width, devices, compiled)


def rows(bench: Bench) -> Iterator[Row]:
    """Cold and warm, for either framework."""
    quick, devices = bench.options.quick, bench.options.devices
    layers, width = (4, 64) if quick else (_LAYERS, _WIDTH)
    for framework in _MODELS:
        sizes = {"framework": framework, "layers": layers, "width": width}
        jobs = (Job(side, sizes | {"devices": devices}) for side in CASE.sides)
        mine, theirs = bench.measure(CASE, *jobs)
        name = f"{framework}, {layers} scanned layers"
        yield CASE.compare(bench, f"{name}, cold", mine, theirs, "jit", target="cold")
        yield CASE.compare(
            bench, f"{name}, warm", mine, theirs, "jit", "warm", target="warm"
        )


CASE = register(
    name="scanned",
    measures="layers under nn.scan and nnx.vmap, cold and warm",
    baseline="jax.jit(init, out_shardings) of the same function",
    sides={"shardinit": ours, "jit": jit},
    rows=rows,
    targets={"cold": Target(1.3, 2), "warm": Target(2, 2)},
)
