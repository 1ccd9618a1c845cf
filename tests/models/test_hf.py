"""The spec ``hf``: whatever transformers builds, asked for as data."""

import json

import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from typer.testing import CliRunner

import shardinit
from shardinit.cli import app
from shardinit.errors import SpecError
from shardinit.models import ModelSpec, build, example_config, model_names

CONFIG = {
    "model_type": "gpt2",
    "n_layer": 2,
    "n_embd": 64,
    "n_head": 2,
    "vocab_size": 99,
}
pytestmark = [pytest.mark.once, pytest.mark.filterwarnings("ignore")]


@pytest.mark.slow
def test_a_published_configuration_has_as_many_parameters_as_published():
    assert "hf" in model_names()
    plan = shardinit.plan(build(ModelSpec("hf", example_config("gpt2"))))
    assert plan.parameter_count == 124439808


def test_options_stand_beside_the_configuration():
    plain = build(ModelSpec("hf", CONFIG))
    chosen = build(ModelSpec("hf", {"config": CONFIG, "dtype": "bfloat16"}))
    assert set(plain.dtypes.values()) == {"float32"}
    assert set(chosen.dtypes.values()) == {"bfloat16"}


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        ({"config": "/etc"}, ["config"]),
        ({"config": CONFIG, "trust_remote_code": True}, ["trust_remote_code"]),
        ({"depth": 3}, ["depth", "config"]),
        ({"model_type": "no-such"}, ["config"]),
        (CONFIG | {"n_layer": "two"}, ["config"]),
    ],
)
def test_faults_name_their_field(config, fields):
    with pytest.raises(SpecError) as caught:
        build(ModelSpec("hf", config))
    assert [field for field, _ in caught.value.faults] == fields


def test_the_command_line_plans_it():
    done = CliRunner().invoke(
        app, ["plan", json.dumps(CONFIG), "--model", "hf", "--json"]
    )
    assert done.exit_code == 0, done.output
    paths = [leaf["path"] for leaf in json.loads(done.stdout)["leaves"]]
    assert "transformer.h.1.mlp.c_fc.weight" in paths
