"""One rank of a job of several processes: fills modules, and gives arrays to torch.

Run as ``torch_worker.py WHAT FOLDER COUNT RANK``; prints what it found as JSON.
"""

import json
import sys

import jax
import numpy as np
import torch
import torch.distributed as dist
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import shardinit
from shardinit.core.run.lazy import LazyArray
from shardinit.frontends import torch as from_torch

WHAT, FOLDER, COUNT, RANK = (*sys.argv[1:3], int(sys.argv[3]), int(sys.argv[4]))


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(33, 64)
        self.up = torch.nn.Linear(64, 128)
        self.down = torch.nn.Linear(128, 64)
        self.head = torch.nn.Linear(64, 33, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.full((64,), 0.5))
        self.register_buffer("steps", torch.arange(4), persistent=False)

    def forward(self, tokens):
        hidden = self.embed(tokens) * self.scale
        return self.head(self.down(torch.relu(self.up(hidden))))


read_bytes = 0
_read = LazyArray.read


def counted(self, start, shape):
    global read_bytes
    read_bytes += int(np.prod(shape)) * self.dtype.itemsize
    return _read(self, start, shape)


def filled(model, fn):
    """Loads a model; which of its tensors are wrong, and how much was read."""
    LazyArray.read = counted
    from_torch.load_into(model, fn, 11)
    LazyArray.read = _read
    whole = shardinit.init(fn, 11)
    wrong, held, seen = [], 0, set()
    tensors = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in (tensors | dict(model.named_buffers())).items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if id(tensor) not in seen:
            held += local.numel() * 4  # 64-bit integers are read as 32
            seen.add(id(tensor))
        expected = np.asarray(whole[fn.ties.get(name, name)])
        if not np.array_equal(full.detach().numpy(), expected):
            wrong.append(name)
    return wrong, held


def fsdp(mesh):
    fn = from_torch.init_fn(Net)
    with torch.device("meta"):
        model = Net()
    if mesh.ndim == 2:  # rows of one layer by the second axis, then by FSDP2
        for layer, axis in ((model.up, 0), (model.down, 1)):
            cut = distribute_tensor(
                layer.weight, mesh["model"], [Shard(axis)], src_data_rank=None
            )
            layer.weight = torch.nn.Parameter(cut)
        fully_shard(model.up, mesh=mesh["data"])
        fully_shard(model.down, mesh=mesh["data"])
        fully_shard(model.embed, mesh=mesh["data"])
        wrong, held = filled(model, fn)
        return {"wrong": wrong, "held_bytes": held, "read_bytes": read_bytes}
    fully_shard(model.up, mesh=mesh)
    fully_shard(model, mesh=mesh)
    rules = from_torch.rules_from_module(model).rules
    assert all(spec == P("data") for _, spec in rules), rules
    wrong, held = filled(model, fn)
    rows = model.embed.weight.to_local().shape[0]
    plain = Net()
    plain.load_state_dict(
        {
            k: v.full_tensor() if isinstance(v, DTensor) else v
            for k, v in model.state_dict().items()
        }
    )
    tokens = torch.arange(8)
    if not torch.allclose(model(tokens), plain(tokens), atol=1e-5):
        wrong.append("logits")
    return {
        "wrong": wrong,
        "tied": model.head.weight is model.embed.weight,
        "uneven": rows,
        "held_bytes": held,
        "read_bytes": read_bytes,
    }


def dtensor(mesh):
    """Arrays of ``jax.distributed``, a device a process, as DTensors of shards."""
    devices = jax.make_mesh(
        (2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    specs = {
        "rows": P("data"),
        "both": P("model", "data"),
        "one": P(("data", "model")),
        "whole": P(),
    }
    values = {name: np.random.default_rng(3).normal(size=(8, 32)) for name in specs}
    arrays = {
        name: jax.make_array_from_callback(
            (8, 32),
            NamedSharding(devices, spec),
            lambda index, name=name: values[name][index].astype(np.float32),
        )
        for name, spec in specs.items()
    }
    made = from_torch.to_torch(arrays, mesh)
    wrong = [
        name
        for name, tensor in made.items()
        if not np.array_equal(
            tensor.full_tensor().numpy(), values[name].astype(np.float32)
        )
        or from_torch.spec_from_placements(tensor.placements, ("data", "model"))
        != specs[name]
    ]
    same = all(
        made[name].to_local().data_ptr()
        == arrays[name].addressable_data(0).unsafe_buffer_pointer()
        for name in made
    )
    return {"wrong": wrong, "same_memory": same}


if WHAT == "dtensor":
    import os

    os.makedirs(FOLDER, exist_ok=True)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
dist.init_process_group(
    "gloo", init_method=f"file://{FOLDER}/store-{WHAT}", rank=RANK, world_size=COUNT
)
try:
    if WHAT == "fsdp":
        found = fsdp(init_device_mesh("cpu", (COUNT,), mesh_dim_names=("data",)))
    else:
        mesh = init_device_mesh(
            "cpu", (2, COUNT // 2), mesh_dim_names=("data", "model")
        )
        if WHAT == "dtensor":
            import socket

            box = [None]
            if RANK == 0:
                with socket.socket() as free:
                    free.bind(("127.0.0.1", 0))
                    box = [free.getsockname()[1]]
            dist.broadcast_object_list(box)
            jax.distributed.initialize(f"127.0.0.1:{box[0]}", COUNT, RANK)
        found = {"hybrid": fsdp, "dtensor": dtensor}[WHAT](mesh)
    print(json.dumps(found))
finally:
    dist.destroy_process_group()
