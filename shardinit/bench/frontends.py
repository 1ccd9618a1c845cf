"""Front ends: a model in each framework, through its door and in its own way, cold.

The model is a stack of unrolled layers of two matrices without biases; from its code to
the last byte of the sharded model. Either side writes it as a user of the framework
would. A framework that is not installed has no row.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from shardinit.bench import subjects
from shardinit.bench.case import Bench, Figures, Job, Row, Target, register, timed

if TYPE_CHECKING:
    from jax.sharding import NamedSharding

Ways = tuple[Callable[[], Any], Callable[[], Any]]  # ours, and the framework's own

_PACKAGES = {
    "linen": "flax",
    "nnx": "flax",
    "equinox": "equinox",
    "haiku": "haiku",
    "keras": "keras",
    "penzai": "penzai",
}


def _place(devices: int) -> NamedSharding:
    """Every matrix over both axes of a mesh that the compiler places on.

    Not every framework takes explicit axes.
    """
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    grid = np.asarray(jax.devices()).reshape(subjects.axis_sizes(devices))
    mesh = Mesh(grid, ("data", "model"))
    return NamedSharding(mesh, PartitionSpec("data", "model"))


def _by_us(make: Callable[[], Any], place: NamedSharding) -> Any:
    from shardinit.core.plan.rules import PathRules
    from shardinit.core.run.init import init

    return init(make(), 0, mesh=place.mesh, rules=PathRules([("**", place.spec)]))


def _by_jit(fn: Callable[..., Any], place: NamedSharding, *args: Any) -> Any:
    import jax

    shapes = jax.eval_shape(fn, *args)
    places = jax.tree.map(lambda _: place, shapes)
    return jax.jit(fn, out_shardings=places)(*args)


def _linen(layers: int, width: int, place: NamedSharding) -> Ways:
    import jax
    from flax import linen as nn

    from shardinit.frontends import linen

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            for _ in range(layers):
                x = nn.Dense(4 * width, use_bias=False)(x)
                x = nn.Dense(width, use_bias=False)(x)
            return x

    x = jax.ShapeDtypeStruct((1, width), "float32")
    own = partial(
        _by_jit, Stack().init, place, jax.random.key(0), jax.numpy.ones(x.shape)
    )
    return partial(_by_us, lambda: linen.init_fn(Stack(), x), place), own


def _nnx(layers: int, width: int, place: NamedSharding) -> Ways:
    import jax
    from flax import nnx

    from shardinit.frontends import nnx as door

    class Stack(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            sizes = [(width, 4 * width), (4 * width, width)] * layers
            self.layers = nnx.List(
                [nnx.Linear(a, b, use_bias=False, rngs=rngs) for a, b in sizes]
            )

    @nnx.jit
    def create() -> Any:
        state = nnx.state(Stack(nnx.Rngs(0)), nnx.Param)
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, place), state)

    ours = partial(_by_us, lambda: door.init_fn(Stack), place)
    return lambda: nnx.state(ours(), nnx.Param), create


def _equinox(layers: int, width: int, place: NamedSharding) -> Ways:
    import jax

    from shardinit.frontends import equinox

    eqx: Any = import_module("equinox")

    class Stack(eqx.Module):
        layers: list[Any]

        def __init__(self, key: Any):
            sizes = [(width, 4 * width), (4 * width, width)] * layers
            keys = jax.random.split(key, len(sizes))
            self.layers = [
                eqx.nn.Linear(a, b, use_bias=False, key=k)
                for (a, b), k in zip(sizes, keys, strict=True)
            ]

    @eqx.filter_jit
    def create(key: Any) -> Any:
        return eqx.filter_shard(Stack(key), place)

    ours = partial(_by_us, lambda: equinox.init_fn(Stack), place)
    return ours, lambda: create(jax.random.key(0))


def _haiku(layers: int, width: int, place: NamedSharding) -> Ways:
    import jax

    from shardinit.frontends import haiku

    hk: Any = import_module("haiku")

    def stack(x: Any) -> Any:
        for _ in range(layers):
            x = hk.Linear(4 * width, with_bias=False)(x)
            x = hk.Linear(width, with_bias=False)(x)
        return x

    made = hk.transform(stack)
    x = jax.ShapeDtypeStruct((1, width), "float32")
    own = partial(_by_jit, made.init, place, jax.random.key(0), jax.numpy.ones(x.shape))
    return partial(_by_us, lambda: haiku.init_fn(made, x), place), own


def _keras(layers: int, width: int, place: NamedSharding) -> Ways:
    import jax

    from shardinit.frontends import keras as door

    keras: Any = import_module("keras")

    def stack() -> Any:
        sizes = [4 * width, width] * layers
        dense = [keras.layers.Dense(size, use_bias=False) for size in sizes]
        return keras.Sequential([keras.Input((width,)), *dense])

    def own() -> Any:
        distribution = keras.distribution
        mesh = distribution.DeviceMesh(
            tuple(place.mesh.shape.values()),
            place.mesh.axis_names,
            [f"cpu:{device.id}" for device in jax.devices()],
        )
        layout = distribution.LayoutMap(mesh)
        layout[".*kernel"] = tuple(place.spec)
        with distribution.ModelParallel(layout_map=layout).scope():
            return [variable.value for variable in stack().variables]

    return partial(_by_us, lambda: door.init_fn(stack), place), own


def _penzai(layers: int, width: int, place: NamedSharding) -> Ways:
    import jax

    from shardinit.frontends import penzai

    pz: Any = import_module("penzai.pz")

    def stack(init_base_rng: Any) -> Any:
        def linear(number: int, size: int, wide: int) -> Any:
            return pz.nn.Linear.from_config(
                f"{number}", init_base_rng, {"in": size}, {"in": wide}
            )

        sizes = [(width, 4 * width), (4 * width, width)] * layers
        return pz.nn.Sequential([linear(i, *s) for i, s in enumerate(sizes)])

    def values(model: Any) -> Any:
        _, variables = pz.unbind_params(model, freeze=True)
        return [v.value.untag(*v.value.named_axes).unwrap() for v in variables]

    ours = partial(_by_us, lambda: penzai.init_fn(stack), place)
    own = partial(_by_jit, lambda key: values(stack(key)), place, jax.random.key(0))
    return lambda: values(ours()), own


_FRAMEWORKS = {
    "linen": _linen,
    "nnx": _nnx,
    "equinox": _equinox,
    "haiku": _haiku,
    "keras": _keras,
    "penzai": _penzai,
}


def _time(
    framework: str, number: int, layers: int, width: int, devices: int
) -> Figures:
    if framework == "keras":
        os.environ["KERAS_BACKEND"] = "jax"  # it looks when it is imported
    import jax

    ways = _FRAMEWORKS[framework](layers, width, _place(devices))
    jax.block_until_ready(jax.device_put(1.0))  # the backend is up
    seconds, arrays = timed(lambda: jax.tree.leaves(ways[number]()))
    return {"seconds": seconds, "bytes": sum(array.nbytes for array in arrays)}


def ours(framework: str, layers: int, width: int, devices: int) -> Figures:
    """``shardinit.init`` of the front end's function."""
    return _time(framework, 0, layers, width, devices)


def own(framework: str, layers: int, width: int, devices: int) -> Figures:
    """The framework's own way to a sharded model."""
    return _time(framework, 1, layers, width, devices)


def rows(bench: Bench) -> Iterator[Row]:
    """One row for each framework that is installed."""
    options = bench.options
    layers, width = (1, 64) if options.quick else (48, 256)
    for framework in [name for name, lib in _PACKAGES.items() if find_spec(lib)]:
        sizes = {"layers": layers, "width": width, "devices": options.devices}
        jobs = [Job(side, {"framework": framework, **sizes}) for side in CASE.sides]
        mine, theirs = bench.measure(CASE, *jobs)
        assert mine[0]["bytes"] == theirs[0]["bytes"], framework
        name = f"{framework}, {layers} layers, cold"
        yield CASE.compare(bench, name, mine, theirs, "its own way", target="cold")


CASE = register(
    name="frontends",
    measures="a model of each framework through its front end, cold",
    baseline="the framework's own way to a sharded model",
    sides={"shardinit": ours, "own": own},
    rows=rows,
    targets={"cold": Target(10, 20)},
)
