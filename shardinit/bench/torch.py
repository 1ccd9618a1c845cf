"""Torch: a Hugging Face model from its configuration to the last byte, cold.

Against ``transformers`` itself on the CPU, and against the meta device, ``to_empty``
and its ``initialize_weights``. All take the same ``config.json`` and fill the same
tensors, in float32. Imports do not count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from shardinit.bench.case import Bench, Figures, Job, Row, Target, median, register

_NAMED = "tinyllama-1.1b"
_PEERS = {"torch": "transformers", "meta": "transformers on meta, to_empty"}


def _config(layers: int) -> dict[str, Any]:
    from shardinit.models import example_config

    changed = {"torch_dtype": "float32", "num_hidden_layers": layers}
    return example_config(_NAMED) | changed


def ours(layers: int) -> Figures:
    """Recorded, planned, compiled and run on all devices."""
    import jax

    from shardinit.core.plan.fsdp import fsdp
    from shardinit.core.run.init import init as init_sharded
    from shardinit.frontends import torch as frontend

    import_module("transformers.models.llama.modeling_llama")
    config = _config(layers)
    devices = jax.devices()
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((len(devices),), ("model",), axis_types=auto)
    jax.block_until_ready(jax.device_put(1.0))  # the backend is up
    begin = time.perf_counter()
    fn = frontend.from_config(config)
    params = init_sharded(fn, 0, mesh=mesh, rules=fsdp("model"))
    arrays = jax.block_until_ready(list(params.values()))
    size = sum(array.nbytes for array in arrays)
    return {"seconds": time.perf_counter() - begin, "bytes": size}


def _by(layers: int, make: Callable[[Any, Any], Any]) -> Figures:
    transformers: Any = import_module("transformers")
    import_module("transformers.models.llama.modeling_llama")
    config = transformers.LlamaConfig(**_config(layers))
    begin = time.perf_counter()
    model = make(transformers, config)
    tensors = [*model.parameters(), *model.buffers()]
    size = sum(t.numel() * t.element_size() for t in tensors)
    return {"seconds": time.perf_counter() - begin, "bytes": size}


def by_torch(layers: int) -> Figures:
    """``AutoModelForCausalLM.from_config``."""
    return _by(layers, lambda t, c: t.AutoModelForCausalLM.from_config(c))


def by_meta(layers: int) -> Figures:
    """Built on the meta device, given memory, initialised."""

    def make(transformers: Any, config: Any) -> Any:
        with import_module("torch").device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        model.to_empty(device="cpu")
        model.initialize_weights()
        return model

    return _by(layers, make)


def rows(bench: Bench) -> Iterator[Row]:
    """A row for each way of torch, where ``transformers`` is installed."""
    if bench.options.platform != "cpu" or not find_spec("transformers"):
        return
    sizes = {"layers": 1 if bench.options.quick else 22}
    jobs = [Job(name, sizes) for name in ("shardinit", *_PEERS)]
    mine, *theirs = bench.measure(CASE, *jobs)
    for name, runs in zip(_PEERS, theirs, strict=True):
        peaks = [median(side, "peak_bytes", 1e-9) for side in (runs, mine)]
        note = f"peak RSS {peaks[0]:.2f} GB against {peaks[1]:.2f}"
        against = _PEERS[name]
        yield CASE.compare(
            bench, f"{_NAMED}, cold", mine, runs, against, target=name, note=note
        )


CASE = register(
    name="torch",
    measures="a Hugging Face model of 1.1 billion parameters, cold",
    baseline="transformers on the CPU, and by the meta device",
    sides={"shardinit": ours, "torch": by_torch, "meta": by_meta},
    rows=rows,
    targets=dict.fromkeys(_PEERS, Target(1, 2)),
)
