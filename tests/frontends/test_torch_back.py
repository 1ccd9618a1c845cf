"""From arrays to torch: the same memory, shards of FSDP2, folders of transformers."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import shardinit
from shardinit.errors import ShardingError, StructureMismatchError
from shardinit.storage import safetensors

torch = pytest.importorskip("torch", reason="arrays are given to torch")

from shardinit.frontends import torch as from_torch

pytestmark = pytest.mark.once

DTYPES = """bool int8 uint8 int16 uint16 int32 uint32 float16 bfloat16 float32 complex64
float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu""".split()


def bits(array):
    return np.asarray(array).reshape(-1).view(np.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.few(6)
def test_a_tensor_is_the_array_s_memory(dtype):
    array = (jnp.arange(96).reshape(3, 32) % 5 + 1).astype(dtype)
    before = bits(array).copy()
    tensor = from_torch.to_torch({"w": array})["w"]
    assert str(tensor.dtype) == f"torch.{dtype}"
    assert tensor.shape == array.shape
    assert tensor.data_ptr() == array.unsafe_buffer_pointer()
    del array
    gc.collect()
    assert np.array_equal(tensor.view(torch.uint8).numpy().reshape(-1), before)
    held = np.arange(8).astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))
    copied = from_torch.to_torch(held)
    assert np.array_equal(copied.view(torch.uint8).numpy(), held.view(np.uint8))


def test_ties_are_one_tensor_and_keys_their_words():
    tree = {"embed": jnp.ones((4, 32)), "key": jax.random.key(7)}
    made = from_torch.to_torch(tree, ties={"head": "embed"})
    assert made["head"] is made["embed"]
    assert made["key"].tolist() == [0, 7]
    with pytest.raises(TypeError, match="int4: torch has none"):
        from_torch.to_torch(jnp.ones((4,), "int4"))


def test_an_array_on_several_devices_is_refused_and_a_copy_is_not(mesh):
    cut = jax.device_put(jnp.ones((8, 32)), NamedSharding(mesh, P("data")))
    with pytest.raises(ShardingError, match="8 devices"):
        from_torch.to_torch(cut)
    whole = jax.device_put(jnp.ones((8, 32)), NamedSharding(mesh, P()))
    assert from_torch.to_torch(whole).shape == (8, 32)


def test_windows_of_what_is_not_there_are_tensors_when_touched():
    fn = from_torch.init_fn(torch.nn.Linear, 64, 4096)
    lazy = shardinit.open(fn, 0)
    assert sorted(lazy) == ["bias", "weight"]
    assert (lazy["weight"].shape, lazy["weight"].dtype.name) == ((4096, 64), "float32")
    window = from_torch.to_torch(lazy["weight"][128:256])
    whole = from_torch.to_torch(shardinit.init(fn, 0))["weight"]
    assert torch.equal(window, whole[128:256])
    assert torch.equal(from_torch.to_torch(lazy)["weight"], whole)


# ---- load_into -----------------------------------------------------------------------


class Net(torch.nn.Module):
    """Ties, buffers of both kinds, and an integer."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(48, 32)
        self.up = torch.nn.Linear(32, 64)
        self.head = torch.nn.Linear(32, 48, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.full((32,), 3.0))
        self.register_buffer("steps", torch.arange(5), persistent=False)


@pytest.fixture(scope="module")
def net():
    return from_torch.init_fn(Net)


def on_meta(make=Net):
    with torch.device("meta"):
        return make()


def test_a_module_on_meta_is_filled(net):
    model = on_meta()
    optimised = from_torch.load_into(model, net, 3)
    assert optimised is model
    assert model.head.weight is model.embed.weight
    assert isinstance(model.up.weight, torch.nn.Parameter)
    expected = from_torch.to_torch(shardinit.init(net, 3))
    for name, tensor in {**model.state_dict(), "steps": model.steps}.items():
        assert torch.equal(tensor, expected[net.ties.get(name, name)]), name
    assert model.steps.dtype == torch.int64
    model.up(model.embed(torch.arange(4))).sum().backward()
    assert model.embed.weight.grad is not None


def test_what_holds_memory_is_overwritten_in_place(net):
    model = Net()
    held = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    from_torch.load_into(model, shardinit.export_plan(shardinit.plan(net)), 3)
    assert held == {name: t.data_ptr() for name, t in model.state_dict().items()}
    expected = shardinit.read(net, 3, "up.weight")
    assert np.array_equal(model.up.weight.detach().numpy(), expected)


def test_what_does_not_fit_is_refused_by_name(net):
    wider = on_meta()
    wider.more = torch.nn.Linear(4, 4, device="meta")
    with pytest.raises(StructureMismatchError, match=r"more\.weight.*no values"):
        from_torch.load_into(wider, net, 0)
    with pytest.raises(
        StructureMismatchError, match=r"'embed\.weight'.*no such tensor"
    ):
        from_torch.load_into(torch.nn.Module(), net, 0)
    with pytest.raises(StructureMismatchError, match=r"torch\.bfloat16.*never cast"):
        from_torch.load_into(on_meta().bfloat16(), net, 0)
    other = on_meta()
    other.up = torch.nn.Linear(32, 65, device="meta")
    with pytest.raises(StructureMismatchError, match=r"has shape \(64, 32\)"):
        from_torch.load_into(other, net, 0)
    with pytest.raises(TypeError, match="no key"):
        from_torch.load_into(on_meta(), net)


def test_a_large_tensor_is_filled_in_pieces(monkeypatch):
    from shardinit.frontends.torch import back, shards

    monkeypatch.setattr(shards, "PIECE", 4096)
    seen = []
    read = back.LazyArray.read
    monkeypatch.setattr(
        back.LazyArray,
        "read",
        lambda self, start, shape: seen.append(shape) or read(self, start, shape),
    )
    fn = from_torch.init_fn(torch.nn.Linear, 32, 250, bias=False)
    model = from_torch.load_into(
        on_meta(lambda: torch.nn.Linear(32, 250, bias=False)), fn, 0
    )
    assert max(rows for rows, _ in seen) * 32 * 4 <= 4096 + 128
    assert sum(rows for rows, _ in seen) == 250
    expected = shardinit.read(fn, 0, "weight")
    assert np.array_equal(model.weight.detach().numpy(), expected)


# ---- several processes ---------------------------------------------------------------

WORKER = Path(__file__).with_name("torch_worker.py")


def ranks(count, what, folder):
    """Runs the worker as ``count`` processes of gloo; what each of them printed."""
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(WORKER), what, str(folder), str(count)]
    running = [
        subprocess.Popen(
            [*command, str(rank)],
            env=os.environ | flags,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    said = [process.communicate(timeout=280) for process in running]
    for process, (_, error) in zip(running, said, strict=True):
        assert process.returncode == 0, error[-3000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


@pytest.mark.slow
def test_each_rank_of_fsdp2_computes_its_own_shards(tmp_path):
    for report in ranks(2, "fsdp", tmp_path):
        assert report["wrong"] == []
        assert report["tied"]
        # 33 rows over two ranks: torch cuts 17 and 16
        assert report["uneven"] in (17, 16)
        assert report["read_bytes"] <= report["held_bytes"]


@pytest.mark.slow
def test_hybrid_shards_and_arrays_of_processes_are_dtensors(tmp_path):
    for report in ranks(4, "hybrid", tmp_path):
        assert report["wrong"] == []
        assert report["read_bytes"] <= report["held_bytes"]
    for report in ranks(4, "dtensor", tmp_path / "jax"):
        assert report["wrong"] == []
        assert report["same_memory"]


# ---- folders -------------------------------------------------------------------------


def test_a_recorded_model_becomes_a_folder_that_from_pretrained_loads(tmp_path):
    transformers = pytest.importorskip("transformers", reason="it reads the folder")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = transformers.MixtralConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        vocab_size=48,
        num_local_experts=2,
        tie_word_embeddings=True,
    )
    fn = from_torch.from_config(config.to_dict())
    lazy = shardinit.open(fn, 0)
    assert set(lazy) - fn.persistent  # rotary frequencies
    safetensors.write(tmp_path / "made", lazy, names="hf", config=config)
    model, account = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "made", output_loading_info=True
    )
    assert {kind: names for kind, names in account.items() if names} == {}
    for name, tensor in model.state_dict().items():
        assert np.array_equal(tensor.numpy(), lazy[fn.ties.get(name, name)]), name
    plan = shardinit.plan(fn)
    again = safetensors.restore(tmp_path / "made", plan, names="hf")
    assert all(np.array_equal(again[name], lazy[name]) for name in lazy)
