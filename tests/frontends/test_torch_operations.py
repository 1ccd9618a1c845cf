"""Every operation that is registered, and views of all kinds, against torch's own."""

import math

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.once

torch = pytest.importorskip("torch", reason="torch is not installed")

from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shardinit.frontends import torch as frontend
from shardinit.frontends.torch import replay
from shardinit.frontends.torch.draws import DRAWS
from shardinit.frontends.torch.operations import OPERATIONS
from tests.frontends.torch_like import unlike

POSITIVE = torch.linspace(0.1, 0.9, 24).reshape(4, 6)
SIGNED = torch.linspace(-2.5, 3.3, 24).reshape(4, 6).flip(1)
WHOLE = torch.arange(24).reshape(4, 6)
INDEX = torch.tensor([3, 0, 2])
SQUARE = torch.arange(9.0).reshape(3, 3) + 4 * torch.eye(3)


class Holds(nn.Module):
    def __init__(self, compute):
        super().__init__()
        self.register_buffer("out", compute())


CASES = {
    "add": lambda: torch.add(SIGNED.clone(), POSITIVE, alpha=2),
    "sub": lambda: SIGNED.clone().sub_(POSITIVE, alpha=3),
    "rsub": lambda: torch.rsub(SIGNED.clone(), POSITIVE, alpha=3),
    "div": lambda: torch.div(SIGNED.clone(), 0.7, rounding_mode="floor"),
    "div trunc": lambda: torch.div(SIGNED.clone(), 0.7, rounding_mode="trunc"),
    "div whole": lambda: WHOLE.clone() / 7,
    "floor_divide": lambda: WHOLE.clone() // 5,
    "addcmul": lambda: torch.addcmul(SIGNED.clone(), POSITIVE, SIGNED, value=2),
    "addcdiv": lambda: torch.addcdiv(SIGNED.clone(), SIGNED, POSITIVE, value=2),
    "lerp": lambda: torch.lerp(SIGNED.clone(), POSITIVE, 0.3),
    "clamp": lambda: SIGNED.clone().clamp_(-1, 2),
    "clamp_min": lambda: SIGNED.clone().clamp_min_(1),
    "clamp_max": lambda: SIGNED.clone().clamp_max_(1),
    "logit": lambda: torch.logit(SIGNED.clone(), eps=0.1),
    "softplus": lambda: nn.functional.softplus(SIGNED.clone(), beta=9),
    "where": lambda: torch.where(SIGNED.clone() > 0, POSITIVE, 2.0),
    "masked_fill": lambda: SIGNED.clone().masked_fill_(POSITIVE > 0.5, 4),
    "clone": lambda: SIGNED.clone(),
    "copy": lambda: torch.ops.aten.copy.default(POSITIVE, SIGNED),
    "_to_copy": lambda: SIGNED.clone().to(torch.int32),
    "contiguous": lambda: SIGNED.clone().t().contiguous(),
    "_unsafe_view": lambda: torch.ops.aten._unsafe_view(SIGNED.clone(), [6, 4]),
    "view_copy": lambda: torch.view_copy(SIGNED.clone(), [6, 4]),
    "cat": lambda: torch.cat([SIGNED.clone(), POSITIVE], 1),
    "stack": lambda: torch.stack([SIGNED.clone(), POSITIVE], 1),
    "repeat": lambda: SIGNED.clone().repeat(2, 1, 3),
    "flip": lambda: SIGNED.clone().flip(0, 1),
    "roll": lambda: SIGNED.clone().roll((1, 2), (0, 1)),
    "roll flat": lambda: SIGNED.clone().roll(5),
    "tril": lambda: SIGNED.clone().tril(1),
    "triu": lambda: SIGNED.clone().triu_(-1),
    "constant_pad_nd": lambda: nn.functional.pad(
        SIGNED.clone(), (1, -2, 3, 0), value=9
    ),
    "index_select": lambda: SIGNED.clone().index_select(0, INDEX),
    "gather": lambda: SIGNED.clone().gather(1, WHOLE % 6),
    "index": lambda: SIGNED.clone()[:, INDEX],
    "index_put": lambda: _put(SIGNED.clone()),
    "index_put add": lambda: SIGNED.clone().index_put_((INDEX,), POSITIVE[0], True),
    "index_fill": lambda: SIGNED.clone().index_fill_(1, INDEX, 4),
    "index_copy": lambda: SIGNED.clone().index_copy_(0, INDEX, POSITIVE[:3]),
    "sum": lambda: SIGNED.clone().sum(1, keepdim=True),
    "sum all": lambda: SIGNED.clone().sum(),
    "mean": lambda: SIGNED.clone().mean((0, 1)),
    "prod": lambda: POSITIVE.clone().prod(0),
    "amax": lambda: SIGNED.clone().amax(0),
    "amin": lambda: SIGNED.clone().amin(),
    "var": lambda: SIGNED.clone().var(1, correction=0),
    "std": lambda: SIGNED.clone().std(),
    "var_mean": lambda: torch.stack(torch.var_mean(SIGNED.clone(), 0)),
    "cumsum": lambda: SIGNED.clone().cumsum(1),
    "cumprod": lambda: POSITIVE.clone().cumprod(0),
    "_softmax": lambda: SIGNED.clone().softmax(1),
    "_log_softmax": lambda: SIGNED.clone().log_softmax(0),
    "sort": lambda: SIGNED.clone().sort(1, descending=True).values,
    "argsort": lambda: torch.ops.aten.argsort(SIGNED.clone(), 1),
    "linalg_vector_norm": lambda: torch.linalg.vector_norm(SIGNED.clone(), dim=1),
    "norm": lambda: torch.ops.aten.norm.Scalar(SIGNED.clone(), 3),
    "norm inf": lambda: torch.linalg.vector_norm(SIGNED.clone(), math.inf),
    "_weight_norm_interface": lambda: torch._weight_norm_interface(
        SIGNED.clone(), POSITIVE[:, :1].contiguous()
    )[0],
    "linalg_qr": lambda: torch.linalg.qr(SQUARE.clone()).R.abs(),
    "linalg_svd": lambda: torch.linalg.svd(SQUARE.clone()).S,
    "linalg_inv_ex": lambda: torch.linalg.inv(SQUARE.clone()),
    "diagonal_copy": lambda: torch.diagonal_copy(SIGNED.clone(), 1),
    "mm": lambda: SQUARE.clone() @ SQUARE,
    "addmm": lambda: torch.addmm(SQUARE, SQUARE.clone(), SQUARE, beta=2, alpha=3),
    "eye": lambda: torch.eye(3, 5),
    "arange": lambda: torch.arange(2, 20, 3),
    "log_sigmoid_forward": lambda: nn.functional.logsigmoid(SIGNED.clone()),
    "frac": lambda: SIGNED.clone().frac(),
    "special_ndtri": lambda: torch.special.ndtri(POSITIVE.clone()),
    "bitwise_not": lambda: ~WHOLE.clone(),
    "bitwise_and": lambda: WHOLE.clone() & 5,
    "bitwise_or": lambda: WHOLE.clone() | 5,
    "fmod": lambda: torch.fmod(SIGNED.clone(), 0.7),
    "remainder": lambda: torch.remainder(SIGNED.clone(), 0.7),
    "pow": lambda: POSITIVE.clone() ** 2.5,
    "pow scalar": lambda: 10000 ** -POSITIVE.clone(),
    "lift_fresh": lambda: torch.tensor([1.0, 2.0]) * SIGNED[:2, :2].clone(),
}
ALIASES = {"alias", "mv", "bmm", "dot", "_linalg_svd", "_reshape_copy"}


def _put(x):
    x[[1, 3], 2] = 9.0
    return x


@pytest.fixture
def by_jax(monkeypatch):
    """Nothing is computed by torch but the operands, so that every rule runs."""

    def computed(self, value):
        known = isinstance(value.node, replay.Call) and value.node.name == "literal"
        return replay.array_of(value.node.known[0]) if known else None

    monkeypatch.setattr(replay.Replayer, "_computed", computed)


def check(compute):
    fn = frontend.init_fn(Holds, compute)
    ours, theirs = fn.fn(jax.random.key(0))["out"], compute().numpy()
    assert ours.shape == theirs.shape
    assert np.allclose(ours, theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("by_jax")
def test_an_operation_is_torchs(name):
    check(CASES[name])


_TWO = set("eq ge gt le lt ne mul atan2 maximum minimum".split())
_TWO |= {"logical_and", "logical_or"}


def _elementwise():
    named = {case.split()[0] for case in CASES}
    return sorted(OPERATIONS.keys() - named - ALIASES)


@pytest.mark.usefixtures("by_jax")
def test_elementwise_operations_are_torchs():
    class All(nn.Module):
        def __init__(self):
            super().__init__()
            for name in _elementwise():
                self.register_buffer(name, apply(name))

    def apply(name):
        operation = getattr(torch.ops.aten, name)
        x = POSITIVE.clone()
        return operation(x, SIGNED) if name in _TWO else operation(x)

    made = frontend.init_fn(All).fn(jax.random.key(0))
    for name in _elementwise():
        assert np.allclose(made[name], apply(name).numpy(), rtol=2e-5, atol=2e-6), name


DRAWN = {
    "normal_": lambda: torch.empty(64, 64).normal_(2, 3),
    "normal_functional": lambda: torch.ops.aten.normal_functional(
        torch.zeros(64, 64), 2
    ),
    "normal": lambda: torch.normal(torch.ones(64, 64) * 3, 2.0),
    "normal sized": lambda: torch.normal(1.0, 2.0, (64, 64)),
    "randn": lambda: torch.randn(64, 64),
    "randn_like": lambda: torch.randn_like(torch.empty(64, 64, dtype=torch.bfloat16)),
    "uniform_": lambda: torch.empty(64, 64).uniform_(-3, 1),
    "uniform": lambda: torch.ops.aten.uniform(torch.zeros(64, 64), 2, 4),
    "rand": lambda: torch.rand(64, 64),
    "rand_like": lambda: torch.rand_like(torch.zeros(64, 64)),
    "trunc_normal_": lambda: nn.init.trunc_normal_(torch.empty(64, 64), 0, 1, -1, 3),
    "exponential_": lambda: torch.empty(64, 64).exponential_(3),
    "exponential": lambda: torch.ops.aten.exponential(torch.zeros(64, 64), 2),
    "log_normal_": lambda: torch.empty(64, 64).log_normal_(0.2, 0.3),
    "cauchy_": lambda: torch.empty(64, 64).cauchy_(1, 2).atan(),
    "geometric_": lambda: torch.empty(64, 64).geometric_(0.4),
    "bernoulli_": lambda: torch.empty(64, 64).bernoulli_(0.3),
    "bernoulli": lambda: torch.bernoulli(torch.full((64, 64), 0.3)),
    "random_": lambda: torch.empty(64, 64).random_(3, 90),
    "random_ to": lambda: torch.empty(64, 64, dtype=torch.int64).random_(90),
    "random_ all": lambda: torch.empty(64, 64, dtype=torch.uint8).random_(),
    "randint": lambda: torch.randint(5, 90, (64, 64)),
    "randint to": lambda: torch.randint(90, (64, 64)),
    "randint_like": lambda: torch.randint_like(torch.zeros(64, 64), 5, 90),
    "randperm": lambda: torch.randperm(4096),
    "multinomial": lambda: torch.multinomial(torch.ones(64, 90), 64, True),
    "multinomial once": lambda: torch.multinomial(torch.ones(64, 90), 64),
    "sparse_": lambda: nn.init.sparse_(torch.empty(64, 64), 0.25),
}


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.few(8)
def test_a_draw_has_torchs_distribution(name):
    made = frontend.init_fn(Holds, DRAWN[name]).fn(jax.random.key(11))["out"]
    samples = []
    for seed in range(8):
        torch.manual_seed(seed)
        samples.append(DRAWN[name]().float().numpy())
    if "bernoulli" not in name and name != "sparse_":
        assert unlike(np.asarray(made, np.float32), np.stack(samples)) == ""
    assert abs(np.mean(made == 0) - np.mean(np.stack(samples) == 0)) < 0.05
    assert abs(np.mean(made) - np.mean(samples)) < 5 * np.std(samples) / 64 * 1.1


def test_every_registered_function_is_tested():
    assert DRAWS.keys() == {name.split()[0] for name in DRAWN}
    assert not {case.split()[0] for case in CASES} - OPERATIONS.keys()


def _some_view(draw, tensor):
    for _ in range(draw(st.integers(0, 3))):
        rank = tensor.dim()
        kind = draw(st.sampled_from("slice turn row unfold diagonal".split()))
        axis = draw(st.integers(0, max(rank - 1, 0)))
        if kind == "slice" and rank:
            size = tensor.shape[axis]
            start = draw(st.integers(0, size - 1))
            stop = draw(st.integers(start + 1, size))
            tensor = tensor.narrow(axis, start, stop - start)
            if draw(st.booleans()):
                tensor = tensor[(slice(None),) * axis + (slice(None, None, 2),)]
        elif kind == "turn" and rank > 1:
            tensor = tensor.transpose(axis, draw(st.integers(0, rank - 1)))
        elif kind == "row" and rank > 1:
            tensor = tensor.select(axis, draw(st.integers(0, tensor.shape[axis] - 1)))
        elif kind == "unfold" and rank and tensor.shape[axis] % 2 == 0:
            tensor = tensor.unflatten(axis, (2, -1))
        elif kind == "diagonal" and rank == 2:
            tensor = tensor.diagonal(draw(st.integers(-1, 1)))
    return tensor


def _program(draw):
    """Writes into views of one tensor, and a view of it."""
    tensor = torch.zeros(6, 8)
    torch.nn.init.constant_(tensor, 0.5)
    for number in range(draw(st.integers(1, 4))):
        view = _some_view(draw, tensor)
        if draw(st.booleans()):
            view.fill_(number + 1.0)
        else:
            view.copy_(torch.arange(float(view.numel())).reshape(view.shape) - 20)
    return _some_view(draw, tensor).clone()


@given(st.data())
@settings(max_examples=20)
@pytest.mark.slow
def test_writes_through_views_are_what_torch_makes_of_them(data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "_TABLE", -1)
        drawn = []

        def first(strategy):
            drawn.append(data.draw(strategy))
            return drawn[-1]

        theirs = _program(first).numpy()
        again = iter(drawn)
        fn = frontend.init_fn(Holds, lambda: _program(lambda strategy: next(again)))
        ours = jax.jit(fn.fn)(jax.random.key(0))["out"]
    assert np.array_equal(ours, theirs)
