"""Peers: the same stack of layers, initialised by each library in its own way.

From the model's code to the last byte, as a user of each would write it: plain
``jax.jit``, ``nnx.jit``, Penzai and Equinox for JAX, and torch, which builds on the
meta device and then fills. A peer that is not installed has no row.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from shardinit.bench.case import Bench, Case, Figures, Job, Row, register, sample

_LAYERS, _QUICK_LAYERS = 48, 2
_WIDTH, _QUICK_WIDTH = 512, 64
_PEERS = {"jit": "jax", "nnx": "flax", "penzai": "penzai", "equinox": "equinox"}


def _sharded() -> Any:
    """The sharding of every weight, over all devices."""
    import jax
    import numpy as np

    from shardinit.bench import subjects

    devices = np.asarray(jax.devices())
    # Axes that the compiler places: not every peer can take explicit ones.
    mesh = jax.sharding.Mesh(
        devices.reshape(subjects.axis_sizes(devices.size)), ("data", "model")
    )
    return jax.sharding.NamedSharding(mesh, jax.P("data", "model"))


def _time(init: Any) -> Figures:
    import jax

    jax.block_until_ready(jax.device_put(1.0))  # the backend is up
    begin = time.perf_counter()
    arrays = jax.tree.leaves(jax.block_until_ready(init()))
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "bytes": sum(a.nbytes for a in arrays)}


def _init(layers: int, width: int) -> Any:
    import jax

    normal = jax.nn.initializers.normal(0.02)

    def init(key: Any) -> Any:
        keys = jax.random.split(key, 2 * layers)
        return [
            {
                "up": normal(keys[2 * i], (width, 4 * width)),
                "down": normal(keys[2 * i + 1], (4 * width, width)),
            }
            for i in range(layers)
        ]

    return init


def ours(layers: int, width: int) -> Figures:
    """``shardinit.init``."""
    from shardinit.core.run.compile import init

    place = _sharded()
    fn = _init(layers, width)
    return _time(lambda: init(fn, 0, out_shardings=place))


def by_jit(layers: int, width: int) -> Figures:
    """``jax.jit(init, out_shardings)``."""
    import jax

    place = _sharded()
    fn = _init(layers, width)
    return _time(lambda: jax.jit(fn, out_shardings=place)(jax.random.key(0)))


def by_nnx(layers: int, width: int) -> Figures:
    """``nnx.jit`` of the constructor, sharded by a constraint on its state."""
    import jax
    from flax import nnx

    place = _sharded()

    class Layer(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            normal = nnx.initializers.normal(0.02)
            self.up = nnx.Linear(
                width, 4 * width, use_bias=False, kernel_init=normal, rngs=rngs
            )
            self.down = nnx.Linear(
                4 * width, width, use_bias=False, kernel_init=normal, rngs=rngs
            )

    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.layers = nnx.List([Layer(rngs) for _ in range(layers)])

    @nnx.jit
    def create() -> Any:
        state = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, place), state)

    return _time(create)


def by_penzai(layers: int, width: int) -> Figures:
    """Penzai's ``initialize_parameters``, then its values onto their devices."""
    import jax

    pz: Any = __import__("importlib").import_module("penzai.deprecated.v1.pz")
    normal = jax.nn.initializers.normal(0.02)
    place = _sharded()

    def weight(name: str, shape: tuple[int, int]) -> Any:
        return pz.nn.UninitializedParameter(lambda key: normal(key, shape), name)

    model = [
        {
            "up": weight(f"{i}.up", (width, 4 * width)),
            "down": weight(f"{i}.down", (4 * width, width)),
        }
        for i in range(layers)
    ]
    return _time(
        lambda: jax.device_put(
            pz.nn.initialize_parameters(model, jax.random.key(0)), place
        )
    )


def by_equinox(layers: int, width: int) -> Figures:
    """``eqx.filter_jit`` of the constructor, sharded by ``eqx.filter_shard``."""
    import jax

    eqx: Any = __import__("equinox")
    normal = jax.nn.initializers.normal(0.02)
    place = _sharded()

    class Layer(eqx.Module):
        up: Any
        down: Any

        def __init__(self, key: Any):
            up, down = jax.random.split(key)
            self.up = normal(up, (width, 4 * width))
            self.down = normal(down, (4 * width, width))

    @eqx.filter_jit
    def create(key: Any) -> Any:
        model = [Layer(k) for k in jax.random.split(key, layers)]
        return eqx.filter_shard(model, place)

    return _time(lambda: create(jax.random.key(0)))


def by_torch(layers: int, width: int) -> Figures:
    """Built on the meta device, given memory, filled with ``normal_``; not sharded."""
    torch: Any = __import__("torch")
    begin = time.perf_counter()
    with torch.device("meta"):
        model = torch.nn.ModuleList()
        for _ in range(layers):
            model.append(torch.nn.Linear(width, 4 * width, bias=False))
            model.append(torch.nn.Linear(4 * width, width, bias=False))
    model.to_empty(device="cpu")
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"seconds": time.perf_counter() - begin, "bytes": size}


def rows(bench: Bench) -> Iterator[Row]:
    """One row for each peer that is installed."""
    options = bench.options
    parameters = {
        "layers": _QUICK_LAYERS if options.quick else _LAYERS,
        "width": _QUICK_WIDTH if options.quick else _WIDTH,
    }
    there = [name for name, package in _PEERS.items() if find_spec(package)]
    if options.platform == "cpu" and find_spec("torch"):
        there.append("torch")
    names = ["shardinit", *there]
    runs = bench.measure(
        CASE, *(Job(name, parameters, options.repeats) for name in names)
    )
    mine = sample(runs[0], "seconds")
    for name, done in zip(there, runs[1:], strict=True):
        other = sample(done, "seconds")
        assert done[0]["bytes"] == runs[0][0]["bytes"], name
        yield Row(
            CASE.name,
            f"{parameters['layers']} layers, cold",
            other.median / mine.median,
            "x",
            mine,
            other,
            name,
            note=f"peak RSS {sample(done, 'peak_bytes', 1e-9).median:.2f} GB against "
            f"{sample(runs[0], 'peak_bytes', 1e-9).median:.2f}",
        )


CASE = register(
    Case(
        name="peers",
        measures="the same stack of layers by other libraries, cold",
        baseline="each of them",
        sides={
            "shardinit": ours,
            "jit": by_jit,
            "nnx": by_nnx,
            "penzai": by_penzai,
            "equinox": by_equinox,
            "torch": by_torch,
        },
        rows=rows,
    )
)
