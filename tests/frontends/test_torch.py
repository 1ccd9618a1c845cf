"""PyTorch modules: their own initialisation, from a key, on any mesh."""

import copy
import math
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.once

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch import nn
from torch.nn.utils import parametrizations

import shardinit
from shardinit.errors import (
    InitFnError,
    UninitializedParameterError,
    UnsupportedConfigError,
)
from shardinit.frontends import torch as frontend
from tests.frontends.torch_like import faults

FSDP = shardinit.fsdp("model", min_bytes=64)


class Fused(nn.Module):
    """What people write by hand: thirds, rows, columns, diagonals, loops."""

    def __init__(self, d=32):
        super().__init__()
        self.qkv = nn.Parameter(torch.empty(3 * d, d))
        self.gate = nn.Parameter(torch.empty(d, 2 * d))
        self.mix = nn.Parameter(torch.zeros(d, d))
        self.scale = nn.Parameter(torch.ones(d) / math.sqrt(d))
        self.log = nn.Parameter(torch.log(torch.rand(d) * 15 + 1))
        self.turned = nn.Parameter(torch.empty(d, 2 * d).t())
        self.noisy = nn.Parameter(torch.eye(d) + 0.01 * torch.randn(d, d))
        with torch.no_grad():
            for third in range(3):
                nn.init.xavier_uniform_(self.qkv[third * d : (third + 1) * d])
            self.gate[:, :d].normal_(0, 0.02)
            self.gate[:, d:] = self.gate[:, :d] * 2
            self.mix.diagonal().fill_(3)
            self.mix[[1, 5]] = 7
            self.turned.uniform_(-1, 3)
            self.turned[4].zero_()
        self.qkv.data.view(3, d, d)[1].mul_(0.5)


class Tables(nn.Module):
    """Tables of positions, literals and masks; buffers that are saved and not."""

    def __init__(self, d=16, length=24):
        super().__init__()
        steps = torch.arange(length).unsqueeze(1)
        rates = torch.exp(torch.arange(0, d, 2) * (-math.log(1e4) / d))
        table = torch.zeros(length, d)
        table[:, 0::2] = torch.sin(steps * rates)
        table[:, 1::2] = torch.cos(steps * rates)
        self.register_buffer("table", table)
        self.register_buffer("mask", torch.ones(length, length).tril(), False)
        self.register_buffer("numbers", torch.tensor([[1, 2], [3, 4]]))
        self.register_buffer("array", torch.from_numpy(np.linspace(0, 1, 7)).float())
        self.register_buffer("turns", torch.polar(torch.ones(5), torch.arange(5.0)))
        self.register_buffer("none", None)
        self.drop = [x.item() for x in torch.linspace(0, 0.1, 4)]
        self.weight = nn.Parameter(
            torch.tensor(np.sin(np.arange(6.0)), dtype=torch.half)
        )
        self.ramp = nn.Parameter(torch.full((4,), self.drop[1]))
        if torch.arange(3).sum() == 3:
            nn.init.constant_(self.ramp, float(torch.arange(5).max()))


class Inits(nn.Module):
    """Every function of ``torch.nn.init``."""

    def __init__(self):
        super().__init__()
        init = nn.init

        def new(name, shape, fill, *args, **kwargs):
            weight = nn.Parameter(torch.empty(*shape))
            self.register_parameter(name, weight)
            fill(weight, *args, **kwargs)

        new("uniform", (64, 32), init.uniform_, -2, 5)
        new("normal", (64, 32), init.normal_, 1, 0.5)
        new("trunc", (64, 64), init.trunc_normal_, 0.5, 1, -0.5, 2)
        new("far", (64, 64), init.trunc_normal_, std=0.02)
        new("tail", (64, 64), init.trunc_normal_, 0, 1, 1.5, 3)
        new("constant", (8,), init.constant_, 3)
        new("xavier_uniform", (64, 32), init.xavier_uniform_, 2)
        new("xavier_normal", (64, 32), init.xavier_normal_)
        new("kaiming_uniform", (64, 32, 3), init.kaiming_uniform_, mode="fan_out")
        new("kaiming_normal", (64, 32), init.kaiming_normal_, nonlinearity="relu")
        new("tall", (64, 16), init.orthogonal_)
        new("wide", (16, 4, 16), init.orthogonal_, 3)
        new("sparse", (40, 64), init.sparse_, 0.3)
        new("dirac", (8, 4, 3), init.dirac_, 2)
        new("eye", (8, 12), init.eye_)


def encoder():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def mixed():
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.Embedding(64, 32, padding_idx=3),
        nn.Bilinear(8, 8, 8),
        nn.ConvTranspose1d(8, 16, 5, bias=False),
        nn.GroupNorm(4, 16),
        nn.EmbeddingBag(32, 16),
        nn.PReLU(8),
    )
    net.apply(lambda m: nn.init.normal_(m.weight) if type(m) is nn.PReLU else None)
    return net


def recurrent():
    return nn.ModuleList([nn.LSTM(16, 32, 2, proj_size=8), nn.GRU(16, 32)])


def attention():
    return nn.MultiheadAttention(32, 4, kdim=16, vdim=8, add_bias_kv=True)


def wrapped():
    normed = parametrizations.weight_norm(nn.Linear(32, 16))
    old = nn.utils.weight_norm(nn.Linear(32, 16)) if hasattr(nn.utils, "rnn") else None
    return nn.ModuleList([normed, parametrizations.spectral_norm(nn.Linear(8, 8)), old])


def copied():
    first = nn.Linear(16, 16)
    net = nn.ModuleList([first, copy.deepcopy(first), nn.Linear(16, 16, bias=False)])
    net[2].weight = first.weight
    return net.to(torch.bfloat16)


@pytest.mark.parametrize(
    "build",
    [Fused, Tables, Inits, encoder, mixed, recurrent, attention, wrapped, copied],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.few(3)
def test_values_are_such_as_the_module_draws_itself(build):
    fn = frontend.init_fn(build)
    assert faults(fn, fn.fn(jax.random.key(7)), build) == []


@pytest.mark.slow
def test_truncation_orthogonality_and_sparsity_are_exact():
    drawn = frontend.init_fn(Inits).fn(jax.random.key(1))
    made = {name: np.asarray(array) for name, array in drawn.items()}
    assert made["trunc"].min() >= -0.5
    assert made["trunc"].max() <= 2
    assert made["tail"].min() >= 1.5
    assert made["tail"].max() <= 3
    assert abs(made["far"]).max() < 0.02 * 5.5  # none at the bounds of 100 deviations
    assert np.allclose(made["tall"].T @ made["tall"], np.eye(16), atol=1e-5)
    wide = made["wide"].reshape(16, 64) / 3
    assert np.allclose(wide @ wide.T, np.eye(16), atol=1e-5)
    assert ((made["sparse"] == 0).sum(0) == 12).all()


@pytest.mark.slow
def test_one_set_of_bits_on_every_mesh(mesh):
    fn = frontend.init_fn(Fused)
    alone = shardinit.digest(shardinit.init(fn, 3))
    line = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    for other in (line, mesh):
        made = shardinit.init(fn, 3, mesh=other, rules=FSDP)
        assert shardinit.digest(made) == alone
    assert not made["qkv"].sharding.is_fully_replicated


def test_every_device_computes_its_own_shard_and_no_more(mesh):
    for build in (Fused, mixed, encoder):
        plan = shardinit.plan(frontend.init_fn(build), mesh=mesh, rules=FSDP)
        assert plan.whole_leaves == ()


@pytest.mark.slow
def test_windows_are_those_of_the_whole():
    fn = frontend.init_fn(Fused)
    program = shardinit.export_plan(shardinit.plan(fn))
    made = shardinit.init(fn, 5)
    for name in ("qkv", "gate", "turned"):
        window = shardinit.read(program, 5, name, np.s_[3:17, 5:9])
        assert np.array_equal(window, np.asarray(made[name])[3:17, 5:9])


def test_equal_layers_are_one_program():
    def stack(depth):
        return nn.ModuleList([nn.Linear(64, 64) for _ in range(depth)])

    plans = [shardinit.plan(frontend.init_fn(stack, depth)) for depth in (2, 12)]
    assert len(plans[0].programs) == len(plans[1].programs) == 2


def test_a_copy_of_a_module_has_its_values_as_in_torch():
    made = shardinit.init(frontend.init_fn(copied), 0)
    assert np.array_equal(made["0.weight"], made["1.weight"])


def test_a_key_derives_from_the_name_or_from_the_order():
    one = nn.Sequential
    small = shardinit.init(frontend.init_fn(lambda: one(nn.Linear(8, 8))), 0)
    more = shardinit.init(
        frontend.init_fn(lambda: one(nn.Linear(8, 8), nn.Linear(8, 8))), 0
    )
    assert np.array_equal(small["0.weight"], more["0.weight"])
    assert not np.array_equal(more["0.weight"], more["1.weight"])

    class Renamed(nn.Module):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(8, 8)

    inner = lambda: one(nn.Linear(8, 8))  # noqa: E731
    ordered = [
        shardinit.init(frontend.init_fn(f, keys="order"), 0) for f in (inner, Renamed)
    ]
    assert np.array_equal(ordered[0]["0.weight"], ordered[1]["other.weight"])


def test_ties_buffers_and_dtypes_are_known():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(32, 8)
            self.norm = nn.BatchNorm1d(8)
            self.head = nn.Linear(8, 32, bias=False)
            self.head.weight = self.embed.weight
            self.register_buffer("seen", torch.zeros(3, dtype=torch.int64), False)

    fn = frontend.init_fn(Tied, dtype="bfloat16")
    assert dict(fn.ties) == {"head.weight": "embed.weight"}
    assert "head.weight" in fn.persistent
    assert "seen" not in fn.persistent
    assert "norm.running_mean" in fn.buffers
    assert fn.dtypes["embed.weight"] == "bfloat16"
    assert fn.dtypes["seen"] == "int64"
    made = shardinit.init(fn, 0)
    assert "head.weight" not in made
    assert made["embed.weight"].dtype == jnp.bfloat16
    assert made["seen"].dtype == jax.dtypes.canonicalize_dtype(jnp.int64)
    assert torch.get_default_dtype() == torch.float32


def test_a_module_on_the_meta_device_is_asked_again():
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    asked = shardinit.init(frontend.init_fn(module), 0)
    built = shardinit.init(
        frontend.init_fn(lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))), 0
    )
    assert shardinit.digest(asked) == shardinit.digest(built)
    assert all(tensor.is_meta for tensor in module.state_dict().values())


def test_a_factory_may_use_the_meta_device_and_others():
    def build():
        with torch.device("meta"):
            one = nn.Linear(8, 8)
            nn.init.trunc_normal_(one.weight)
        return nn.Sequential(one, nn.Linear(8, 8, device="cuda").to("cuda:1").cpu())

    made = shardinit.init(frontend.init_fn(build), 0)
    assert np.std(made["0.weight"]) > 0.5
    assert np.std(made["1.weight"]) > 0.1


def test_a_module_with_memory_is_refused_with_what_to_write():
    with pytest.raises(InitFnError, match=r"torch\.init_fn\(Linear, \.\.\.\)"):
        frontend.init_fn(nn.Linear(2, 3))
    with pytest.raises(InitFnError, match=r"frontends\.torch\.init_fn"):
        shardinit.init(nn.Linear(2, 3), 0)


@pytest.mark.parametrize(
    ("given", "args", "match"),
    [
        (3, (), "a torch.nn.Module class"),
        (dict, (), "returned dict"),
        (nn.Linear, (2,), "missing a required argument"),
    ],
)
def test_what_makes_no_module_is_refused(given, args, match):
    with pytest.raises(InitFnError, match=match):
        frontend.init_fn(given, *args)


def test_what_nothing_initialised_is_an_error_unless_zeros_are_meant():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(8, 8))
            nn.init.normal_(self.weight[:3])

    with pytest.raises(UninitializedParameterError, match=r"'weight'.*test_torch\.py:"):
        frontend.init_fn(Half)
    made = np.asarray(
        shardinit.init(frontend.init_fn(Half, assume="zeros"), 0)["weight"]
    )
    assert made[:3].all()
    assert not made[3:].any()
    with pytest.raises(UninitializedParameterError, match="its shape is not known"):
        frontend.init_fn(nn.LazyLinear, 3)


def test_what_cannot_be_replayed_names_parameter_operation_and_line():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.special.bessel_j0(torch.rand(4)))

    with pytest.raises(UnsupportedConfigError) as caught:
        frontend.init_fn(Odd)
    line = Odd.__init__.__code__.co_firstlineno + 2
    text = str(caught.value)
    assert text.startswith("weight: special_bessel_j0 at ")
    assert f"test_torch.py:{line} " in text

    def asks():
        layer = nn.Linear(4, 4)
        while layer.weight.max() > 0.4:
            layer.reset_parameters()
        return layer

    with pytest.raises(UnsupportedConfigError, match="the value of a random one"):
        frontend.init_fn(asks)


def test_whole_numbers_that_do_not_fit_are_refused():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("number", torch.tensor([1, 2**40]))

    with pytest.raises(
        UnsupportedConfigError, match=r"number: 1 to \d+ do not fit int32"
    ):
        frontend.init_fn(Wide)


def test_torch_is_as_it_was_afterwards_and_meanwhile_in_other_threads():
    before = {name: getattr(nn.init, name) for name in dir(nn.init)}
    drawn = []

    def elsewhere():
        weight = torch.empty(64, 64)
        nn.init.sparse_(nn.init.trunc_normal_(weight), 0.5)
        drawn.append(weight)

    def build():
        other = threading.Thread(target=elsewhere)
        other.start()
        other.join()
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        frontend.init_fn(build)
    assert {name: getattr(nn.init, name) for name in dir(nn.init)} == before
    assert (drawn[0] == 0).sum() == 32 * 64
    assert nn.Linear(2, 3).weight.device.type == "cpu"
