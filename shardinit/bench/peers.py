"""Peers: the same stack of layers, initialised by each library in its own way.

From the model's code to the last byte, as a user of each would write it: plain
``jax.jit``, ``nnx.jit``, Penzai and Equinox for JAX, and torch, which builds on the
meta device and then fills. A peer that is not installed has no row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from shardinit.bench import subjects
from shardinit.bench.case import Bench, Figures, Job, Row, median, register, timed

if TYPE_CHECKING:
    import jax

_PEERS = {
    "jit": "jax",
    "nnx": "flax",
    "penzai": "penzai",
    "equinox": "equinox",
    "torch": "torch",
}


def _sharded() -> jax.sharding.NamedSharding:
    """The sharding of every weight, over all devices."""
    import jax
    import numpy as np

    devices = np.asarray(jax.devices())
    # Axes that the compiler places: not every peer can take explicit ones.
    mesh = jax.sharding.Mesh(
        devices.reshape(subjects.axis_sizes(devices.size)), ("data", "model")
    )
    return jax.sharding.NamedSharding(mesh, jax.P("data", "model"))


def _time(init: Callable[[], Any]) -> Figures:
    import jax

    jax.block_until_ready(jax.device_put(1.0))  # the backend is up
    seconds, arrays = timed(lambda: jax.tree.leaves(init()))
    return {"seconds": seconds, "bytes": sum(a.nbytes for a in arrays)}


def _normal() -> Callable[..., jax.Array]:
    import jax

    return jax.nn.initializers.normal(0.02)


def _init(layers: int, width: int) -> Callable[[jax.Array], Any]:
    import jax

    normal = _normal()

    def init(key: jax.Array) -> Any:
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
    from shardinit.core.run.init import init as init_sharded

    place, fn = _sharded(), _init(layers, width)
    return _time(lambda: init_sharded(fn, 0, out_shardings=place))


def by_jit(layers: int, width: int) -> Figures:
    """``jax.jit(init, out_shardings)``."""
    import jax

    place, fn = _sharded(), _init(layers, width)
    return _time(lambda: jax.jit(fn, out_shardings=place)(jax.random.key(0)))


def by_nnx(layers: int, width: int) -> Figures:
    """``nnx.jit`` of the constructor, sharded by a constraint on its state."""
    import jax
    from flax import nnx

    place, plain = _sharded(), {"use_bias": False, "kernel_init": _normal()}

    class Layer(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.up = nnx.Linear(width, 4 * width, rngs=rngs, **plain)
            self.down = nnx.Linear(4 * width, width, rngs=rngs, **plain)

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

    pz: Any = import_module("penzai.deprecated.v1.pz")
    normal, place = _normal(), _sharded()

    def weight(name: str, *shape: int) -> Any:
        return pz.nn.UninitializedParameter(lambda key: normal(key, shape), name)

    model = [
        {
            "up": weight(f"{i}.up", width, 4 * width),
            "down": weight(f"{i}.down", 4 * width, width),
        }
        for i in range(layers)
    ]

    def create() -> Any:
        made = pz.nn.initialize_parameters(model, jax.random.key(0))
        return jax.device_put(made, place)

    return _time(create)


def by_equinox(layers: int, width: int) -> Figures:
    """``eqx.filter_jit`` of the constructor, sharded by ``eqx.filter_shard``."""
    import jax

    eqx: Any = import_module("equinox")
    normal, place = _normal(), _sharded()

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
    torch: Any = import_module("torch")
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
    layers, width = (2, 64) if options.quick else (48, 512)
    sizes = {"layers": layers, "width": width}
    there = [name for name, package in _PEERS.items() if find_spec(package)]
    if options.platform != "cpu" and "torch" in there:
        there.remove("torch")
    jobs = [Job(name, sizes) for name in ("shardinit", *there)]
    mine, *theirs = bench.measure(CASE, *jobs)
    for name, runs in zip(there, theirs, strict=True):
        assert runs[0]["bytes"] == mine[0]["bytes"], name
        peaks = [median(side, "peak_bytes", 1e-9) for side in (runs, mine)]
        note = f"peak RSS {peaks[0]:.2f} GB against {peaks[1]:.2f}"
        yield CASE.compare(bench, f"{layers} layers, cold", mine, runs, name, note=note)


CASE = register(
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
