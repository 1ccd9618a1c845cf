"""``--seed``: one for the root key, or one for each stream of a model."""

import json
import sys

import jax
import numpy as np
import pytest

import shardinit
from shardinit import cli
from shardinit.storage import safetensors

pytestmark = pytest.mark.once

MODEL = """
import jax

def init(key):
    w = jax.random.normal(key["params"], (8, 32))
    return {"w": w, "mask": jax.random.uniform(key["dropout"], (32,))}
"""


def init(key):
    w = jax.random.normal(key["params"], (8, 32))
    return {"w": w, "mask": jax.random.uniform(key["dropout"], (32,))}


@pytest.fixture
def says(monkeypatch, capsys, tmp_path):
    """Runs a command beside a model of two streams; what it says."""
    (tmp_path / "of_streams.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)

    def run(*args, code=0):
        monkeypatch.setattr(sys, "argv", ["shardinit", *args])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        said = capsys.readouterr()
        assert (caught.value.code or 0) == code, said.err
        return said.err if code else said.out

    return run


def test_a_model_of_streams_goes_through_every_command(says, tmp_path):
    source, seed = "of_streams:init", ("--seed", "params=3,dropout=-1")
    key = {"params": 3, "dropout": -1}
    planned = json.loads(says("plan", source, *seed, "--json"))
    assert planned["fingerprint"] == shardinit.plan(init, key=key).fingerprint
    found = json.loads(says("read", source, "mask", *seed, "--json"))
    want = jax.jit(init)({name: jax.random.key(n) for name, n in key.items()})
    assert np.array_equal(np.float32(found["values"]), want["mask"])
    said = says("init", source, "--out", "made", *seed)
    assert shardinit.digest(want).root in said
    assert np.array_equal(safetensors.open("made")["w"], want["w"])
    assert "is there already, and verified" in says(
        "init", source, "--out", "made", *seed
    )
    other = ("--seed", "params=3,dropout=2")
    assert "another seed" in says("init", source, "--out", "made", *other, code=1)
    says("export", source, "--out", "program", *seed)
    assert says("read", "program", "mask", *seed) == says("read", source, "mask", *seed)
    assert "mask" in says("inspect", source, *seed)


@pytest.mark.parametrize(
    ("seed", "said"),
    [
        ("x", "'x'"),
        ("params=", "'params='"),
        ("a=1,a=2", "'a=2'"),
        ("1,2", "expected"),
        ("a=1,2", "a name for each"),
        (str(1 << 63), "64 bits"),
        ("=1", "'=1'"),
    ],
)
def test_what_is_no_seed_is_shown(says, seed, said):
    assert said in says("read", "gpt2", "--seed", seed, code=2)
