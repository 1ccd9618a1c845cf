"""A receipt says what weights are, how they were made, and which differ from it."""

import dataclasses
import json
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import shardinit
from shardinit.errors import DigestError, ReceiptFormatError, ReceiptMismatchError
from shardinit.frontends import linen as from_linen
from shardinit.frontends import nnx as from_nnx
from shardinit.verify.receipt import Receipt

pytestmark = pytest.mark.once

FIXTURES = Path(__file__).parent / "fixtures"


def model(key):
    a, b = jax.random.split(key)
    return {
        "layers": [{"kernel": jax.random.normal(k, (16, 64))} for k in (a, b)],
        "embed": jax.random.normal(key, (32, 64), jnp.bfloat16),
        "key": b,
    }


@pytest.fixture(scope="module")
def made(mesh):
    plan = shardinit.plan(model, mesh=mesh)
    params = shardinit.compile_plan(plan)(7)
    return plan, params, shardinit.receipt(plan, 7, params)


def test_it_names_what_made_the_weights(made):
    plan, params, receipt = made
    assert receipt.fingerprint == plan.fingerprint
    assert receipt.seed == 7
    assert receipt.key == tuple(jax.random.key_data(jax.random.key(7)).tolist())
    assert receipt.key_impl == "threefry2x32"
    assert receipt.platform == "cpu"
    assert receipt.versions["jax"] == jax.__version__
    assert receipt.x64 is False
    assert receipt.not_mesh_free == {}
    assert [leaf.path for leaf in receipt.leaves] == [x.path for x in plan.leaves]
    assert receipt.root == shardinit.digest(params).root


def test_a_receipt_is_read_without_jax():
    code = (
        "import sys\n"
        "from shardinit.verify.receipt_record import Receipt\n"
        "print(Receipt.load(sys.argv[1]).seed, 'jax' in sys.modules)"
    )
    file = str(FIXTURES / "format-1.receipt.json")
    done = subprocess.run(
        [sys.executable, "-c", code, file], capture_output=True, text=True, check=True
    )
    seed = json.loads(Path(file).read_text())["seed"]
    assert done.stdout.split() == [str(seed), "False"]


def test_a_key_has_no_seed(made):
    plan, params, receipt = made
    other = shardinit.receipt(plan, jax.random.key(7), params)
    assert other == dataclasses.replace(receipt, seed=None)


def test_it_survives_json(made, tmp_path):
    receipt = made[2]
    assert Receipt.from_json(receipt.to_json()) == receipt
    path = tmp_path / "receipt.json"
    receipt.save(path)
    assert Receipt.load(path) == receipt
    assert [p.name for p in tmp_path.iterdir()] == ["receipt.json"]
    assert json.loads(path.read_text())["leaves"][0]["path"] == "embed"


def test_the_same_weights_pass_on_any_mesh(made):
    receipt = made[2]
    single = shardinit.init(model, 7)
    assert shardinit.verify_receipt(receipt, single).root == receipt.root
    host = jax.tree.map(
        lambda x: np.asarray(jax.random.key_data(x) if x.ndim == 0 else x), single
    )
    shardinit.verify_receipt(receipt, host)
    shardinit.verify_receipt(receipt, shardinit.digest(single))


def test_every_difference_is_named(made):
    receipt = made[2]
    params = shardinit.init(model, 7)
    params["layers"][1]["kernel"] = -params["layers"][1]["kernel"]
    params["layers"][0]["kernel"] = params["layers"][0]["kernel"].T
    params["embed"] = params["embed"].astype(jnp.float32)
    params["more"] = params.pop("key")
    with pytest.raises(ReceiptMismatchError) as caught:
        shardinit.verify_receipt(receipt, params)
    assert caught.value.differences == (
        "'embed' has dtype float32, not bfloat16",
        "'key' is missing",
        "'layers/0/kernel' has shape (64, 16), not (16, 64)",
        "'layers/1/kernel' has other values",
        "'more' is extra",
    )
    assert "5 of 5 leaves differ" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_seed_differs_in_every_random_leaf(made):
    with pytest.raises(ReceiptMismatchError) as caught:
        shardinit.verify_receipt(made[2], shardinit.init(model, 8))
    assert len(caught.value.differences) == 4


@pytest.mark.slow
def test_leaves_that_depend_on_the_mesh_are_marked(mesh):
    def fn(key):
        return {
            "q": jax.nn.initializers.orthogonal()(key, (8, 8)),
            "w": jax.random.normal(key, (8, 8)),
        }

    plan = shardinit.plan(fn, mesh=mesh, whole="gspmd")
    receipt = shardinit.receipt(plan, 0, shardinit.compile_plan(plan)(0))
    assert list(receipt.not_mesh_free) == ["q"]
    assert "gspmd" in receipt.not_mesh_free["q"]
    key = jax.random.key(0, impl="rbg")
    plan = shardinit.plan(fn, key=key, mesh=mesh)
    receipt = shardinit.receipt(plan, key, shardinit.compile_plan(plan)(key))
    assert list(receipt.not_mesh_free) == ["q", "w"]
    assert receipt.key_impl == "rbg"


class Boxed(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), ("a", "b"))
        return nn.Dense(8, kernel_init=init)(x)


class Module(nnx.Module):
    def __init__(self, *, rngs):
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(11)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


@pytest.mark.parametrize(
    "fn",
    [from_linen.init_fn(Boxed(), jnp.ones((1, 4))), from_nnx.init_fn(Module)],
    ids=["linen", "nnx"],
)
@pytest.mark.few(1)
def test_a_model_object_has_the_digest_of_its_arrays(fn):
    plan = shardinit.plan(fn)
    receipt = shardinit.receipt(plan, 3, shardinit.init(fn, 3))
    assert [leaf.path for leaf in receipt.leaves] == [x.path for x in plan.leaves]
    shardinit.verify_receipt(receipt, shardinit.init(fn.fn, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-20], "cannot be read"),
        (lambda text: "[]", "cannot be read"),
        (lambda text: "[" * 100_000, "cannot be read"),
        (lambda text: text.replace('"format": 2', '"format": 3'), "format 3"),
        (lambda text: text.replace('"fingerprint"', '"other"'), "no field 'finger"),
        (lambda text: text.replace("{", '{"more": 1,', 1), "a field 'more'"),
        (lambda text: text.replace('"seed": 7', '"seed": "7"'), "seed is '7'"),
        (lambda text: text.replace('"seed": 7', '"seed": 8'), "its seal"),
        (lambda text: text.replace('"cpu"', '"tpu"'), "its seal"),
        (lambda text: text.replace('"embed"', '"embod"'), "its root"),
    ],
)
def test_what_is_no_receipt_is_refused(made, change, message):
    with pytest.raises(ReceiptFormatError, match=message):
        Receipt.from_json(change(made[2].to_json()))


def test_any_byte_of_a_receipt_may_be_changed():
    plan = shardinit.plan(lambda key: {"w": jax.random.normal(key, (2, 3))})
    receipt = shardinit.receipt(plan, 7, shardinit.compile_plan(plan)(7))
    text = receipt.to_json().encode()
    unnoticed = []
    for place in range(len(text)):
        for bit in range(8):
            damaged = bytearray(text)
            damaged[place] ^= 1 << bit
            try:
                if Receipt.from_json(bytes(damaged)) != receipt:
                    unnoticed.append((place, bit, chr(damaged[place])))
            except ReceiptFormatError:
                pass
    assert not unnoticed


def test_a_receipt_of_format_1_is_read_and_is_unsealed():
    path = FIXTURES / "format-1.receipt.json"
    receipt = Receipt.load(path)
    assert receipt.seal is None
    assert receipt.to_json() == path.read_text()

    def fn(key):
        a, b = jax.random.split(key)
        return {"w": jax.random.bits(a, (16, 64)), "key": b}

    shardinit.verify_receipt(receipt, shardinit.init(fn, receipt.seed))


OTHERS = {
    "another seed": lambda params: shardinit.init(model, 8),
    "fewer leaves": lambda params: {"layers": params["layers"]},
    "another shape": lambda params: {**params, "embed": params["embed"][:4]},
    "another dtype": lambda params: {
        **params,
        "embed": params["embed"] + np.float32(0),
    },
    "swapped": lambda params: {**params, "layers": params["layers"][::-1]},
    "one more": lambda params: {**params, "more": np.ones(3)},
}


@pytest.mark.slow
@pytest.mark.parametrize("as_digest", [False, True])
@pytest.mark.parametrize("other", OTHERS)
def test_other_weights_get_no_receipt(made, other, as_digest):
    plan, params, _ = made
    given = OTHERS[other](params)
    with pytest.raises(ReceiptMismatchError) as refused:
        shardinit.receipt(plan, 7, shardinit.digest(given) if as_digest else given)
    assert refused.value.differences


def test_one_element_at_either_end_is_seen(made):
    plan, params, _ = made
    for place in ((0, 0), (-1, -1)):
        other = np.array(params["embed"])
        other[place] += 1
        with pytest.raises(ReceiptMismatchError, match="'embed' has other values"):
            shardinit.receipt(plan, 7, {**params, "embed": other})


def test_what_was_restored_is_receipted_as_kept(made):
    plan, params, _ = made
    restored = {**params, "embed": np.asarray(params["embed"]) * 0}
    receipt = shardinit.receipt(plan, 7, restored, kept="embed")
    assert receipt.kept == ("embed",)
    assert Receipt.from_json(receipt.to_json()).kept == ("embed",)
    shardinit.verify_receipt(receipt, restored)
    part = shardinit.plan(model, select="layers/**")
    assert shardinit.receipt(part, 7, restored).kept == ("embed", "key")


def test_leaves_that_the_compiler_partitions_are_held_by_name_alone(mesh):
    def fn(key):
        return {"w": jax.nn.initializers.orthogonal()(key, (16, 16))}

    plan = shardinit.plan(fn, mesh=mesh, rules=shardinit.fsdp("data"), whole="gspmd")
    receipt = shardinit.receipt(plan, 0, shardinit.init(fn, 1))
    assert list(receipt.not_mesh_free) == ["w"]
    with pytest.raises(ReceiptMismatchError, match="is missing"):
        shardinit.receipt(plan, 0, {})


def test_a_subset_has_no_receipt(mesh):
    plan = shardinit.plan(model, mesh=mesh, select="layers/**")
    with pytest.raises(DigestError, match="'embed'"):
        shardinit.receipt(plan, 7, shardinit.compile_plan(plan)(7))


JOB = """
import shardinit.errors
import sys
import jax, numpy as np
port, rank = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(rank))
import shardinit
from jax.sharding import PartitionSpec as P

def fn(key):
    return {name: jax.random.normal(key, (16, 32)) for name in "abc"}

mesh = jax.make_mesh((2, 4), ("x", "y"))
rules = shardinit.PathRules([("a", P("x", "y")), ("b", P("y"))])
tree = shardinit.init(fn, 3, mesh=mesh, rules=rules)
tree["host"] = np.ones(3)
tree["local"] = jax.numpy.ones(3)
print("ROOT", shardinit.digest(tree).root)
"""


@pytest.mark.timeout(200)
@pytest.mark.slow
def test_every_process_of_a_job_gets_the_digest_of_the_whole():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-c", JOB, port]
    environment = {"JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"}
    jobs = [
        subprocess.Popen(
            [*command, rank], stdout=-1, stderr=-1, text=True, env=environment
        )
        for rank in "01"
    ]
    try:
        done = [job.communicate(timeout=120) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    tree = {name: jax.random.normal(jax.random.key(3), (16, 32)) for name in "abc"}
    root = shardinit.digest({**tree, "host": np.ones(3), "local": jnp.ones(3)}).root
    for out, err in done:
        assert f"ROOT {root}" in out, err[-2000:]
