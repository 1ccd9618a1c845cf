"""The named systems over the wire, registered by a package's entry points."""

import sys
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest

import shardinit
from shardinit.core.paths import path_str
from shardinit.errors import SpecError
from shardinit.models import ModelSpec, build
from shardinit.service.server.server import Server

pytestmark = pytest.mark.once

ZOO = Path(__file__).parents[2] / "examples" / "zoo"


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory):
    """What ``pip install ./examples/zoo`` leaves: the module and its metadata."""
    project = tomllib.loads((ZOO / "pyproject.toml").read_text())["project"]
    points = project["entry-points"]["shardinit.models"].items()
    folder = tmp_path_factory.mktemp("site")
    about = folder / "shardinit_zoo-0.1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Name: shardinit-zoo\nVersion: 0.1.0\n")
    lines = [f"{name} = {module}" for name, module in points]
    (about / "entry_points.txt").write_text("\n".join(["[shardinit.models]", *lines]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(folder), str(ZOO)])
        yield


@pytest.fixture(scope="module")
def server(installed):
    """One that is started when the package is there: its workers look for it."""
    with Server() as running:
        yield running


def by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_str(path): leaf for path, leaf in leaves}


RULES = shardinit.AxisRules([("embed", "data"), ("mlp", "model")])


@pytest.mark.parametrize("via", ["program", "stream"])
@pytest.mark.parametrize(
    ("model", "config", "leaves"),
    [
        ("zoo-mlp", {"size": 32, "layers": 3}, 6),
        ("zoo-net", {"size": 64, "layers": 2}, 4),
        (
            "decoder",
            {
                "model_type": "llama",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "vocab_size": 64,
            },
            12,
        ),
    ],
)
@pytest.mark.few(2)
def test_a_model_asked_for_by_spec_arrives_sharded_with_its_values(
    client, mesh, model, config, leaves, via
):
    spec = ModelSpec(model, config)
    assert model in client.models()
    ours = by_path(client.init(spec, 5, mesh=mesh, rules=RULES, via=via))
    made = build(spec)
    plain = by_path(jax.jit(made.fn)(jax.random.key(5)))
    plan = shardinit.plan(made, mesh=mesh, rules=RULES)
    assert ours.keys() == plain.keys()
    assert len(ours) == leaves
    for leaf in plan.leaves:
        a, b = ours[leaf.path], plain[leaf.path]
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), leaf.path
        assert a.sharding.is_equivalent_to(leaf.sharding, a.ndim)
    if model != "zoo-net":
        assert any(not a.sharding.is_fully_replicated for a in ours.values())
    described = client.describe(spec, mesh, RULES)
    assert [leaf.path for leaf in described.leaves] == [x.path for x in plan.leaves]


@pytest.mark.parametrize("model", ["zoo-mlp", "zoo-net"])
@pytest.mark.few(1)
def test_a_faulty_config_says_all_its_faults(client, model):
    with pytest.raises(SpecError) as caught:
        client.describe(ModelSpec(model, {"size": 0, "layers": "many", "depth": 1}))
    assert [field for field, _ in caught.value.faults] == ["depth", "size", "layers"]
