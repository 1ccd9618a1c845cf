"""Specs are plain data with an identity; names mean what the operator installed."""

import hashlib
import json
import subprocess
import sys
import textwrap
from importlib import metadata

import pytest

from shardinit.core.init_fn import InitFn
from shardinit.errors import SpecError
from shardinit.models import (
    ModelSpec,
    build,
    builder,
    example_config,
    example_names,
    load_package,
    model_names,
    register,
    registry,
)

pytestmark = pytest.mark.once


def test_whole_floats_become_ints():
    config = {
        "vocab_size": 128256.0,
        "rms_norm_eps": 1e-5,
        "tied": True,
        "nested": {"a": [1.0, 2.5, {"b": -0.0}], "none": None},
        "huge": 1e300,
    }
    got = ModelSpec("decoder", config).config
    assert got["vocab_size"] == 128256
    assert type(got["vocab_size"]) is int
    assert got["rms_norm_eps"] == 1e-5
    assert got["tied"] is True
    assert json.dumps(got["nested"]) == '{"a": [1, 2.5, {"b": 0}], "none": null}'
    assert got["huge"] == 1e300
    assert type(got["huge"]) is float


def test_equal_specs_are_one_key():
    a = ModelSpec("decoder", {"x": 1, "y": (2, 3)})
    b = ModelSpec("decoder", {"y": [2.0, 3.0], "x": 1.0})
    assert a == b
    assert hash(a) == hash(b)
    assert a.fingerprint == b.fingerprint
    assert len(bytes.fromhex(a.fingerprint)) == 32


@pytest.mark.parametrize(
    ("model", "config"),
    [
        ("other", {"x": 1}),
        ("decoder", {"x": 2}),
        ("decoder", {"x": True}),
        ("decoder", {"x": "1"}),
        ("decoder", {"x": 1, "y": None}),
        ("decoder", {"x": [1]}),
    ],
)
def test_different_specs_are_different(model, config):
    spec = ModelSpec("decoder", {"x": 1})
    assert ModelSpec(model, config) != spec
    assert ModelSpec(model, config).fingerprint != spec.fingerprint


def test_a_spec_does_not_change():
    config = {"nested": {"a": 1}}
    spec = ModelSpec("decoder", config)
    config["nested"]["a"] = 2
    assert spec.config["nested"]["a"] == 1
    with pytest.raises(TypeError):
        spec.config["nested"] = 3
    with pytest.raises(AttributeError):
        spec.model = "other"


def test_the_fingerprint_is_stable():
    spec = ModelSpec("decoder", {"b": 1.0, "a": [0.02, "ä", None, False]})
    text = '{"config":{"a":[0.02,"\\u00e4",null,false],"b":1},"model":"decoder"}'
    assert spec.fingerprint == hashlib.sha256(text.encode()).hexdigest()


def test_what_is_no_plain_data_is_refused_by_place():
    config = {"a": object(), "b": {"c": [1, float("nan")]}, 3: 1}
    with pytest.raises(SpecError) as caught:
        ModelSpec("decoder", config)
    assert [field for field, _ in caught.value.faults] == ["a", "b.c[1]", "3"]


@pytest.mark.parametrize(("model", "config"), [("", {}), ("decoder", [1]), (None, {})])
def test_what_is_no_spec_is_refused(model, config):
    with pytest.raises(SpecError):
        ModelSpec(model, config)


def test_from_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(example_config("gpt2")))
    spec = ModelSpec.from_file(path)
    assert spec == ModelSpec("decoder", example_config("gpt2"))
    assert ModelSpec.from_file(path, model="other").model == "other"


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[1]", b'{"x": NaN}'])
def test_from_file_refuses_what_is_no_config(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(SpecError):
        ModelSpec.from_file(path)


@pytest.mark.parametrize("name", ["nothing", "../gpt2", "gpt2.json", ""])
def test_unknown_examples_are_refused(name):
    with pytest.raises(SpecError, match=r"llama-3\.1-405b"):
        example_config(name)


def test_examples_are_specs():
    assert "llama-3.1-405b" in example_names()
    for name in example_names():
        assert "model_type" in ModelSpec("decoder", example_config(name)).config


@pytest.fixture
def clean(monkeypatch):
    monkeypatch.setattr(registry, "_builders", dict(registry._builders))


def test_an_unknown_model_is_refused_with_the_known_ones():
    with pytest.raises(SpecError) as caught:
        build(ModelSpec("decodr", {}))
    ((field, text),) = caught.value.faults
    assert field == "model"
    assert "did you mean 'decoder'" in text


def test_names_are_never_imported():
    sys.modules.pop("this", None)
    with pytest.raises(SpecError):
        build(ModelSpec("this", {}))
    assert "this" not in sys.modules


def test_register_and_build(clean):
    @register("plain", schema={"type": "object"})
    def plain(config):
        return InitFn(lambda key: config["x"])

    assert "plain" in model_names()
    assert builder("plain").schema == {"type": "object"}
    assert build(ModelSpec("plain", {"x": 4.0})).fn(None) == 4
    assert register("plain")(plain) is plain  # the same function again is no conflict
    with pytest.raises(ValueError, match="registered already"):

        @register("plain")
        def other(config):
            return InitFn(lambda key: 0)


MODULE = """
    from shardinit.core.init_fn import InitFn
    from shardinit.models import register

    @register("from-{0}")
    def build(config):
        return InitFn(lambda key: "{0}")
"""


def write(folder, name, text):
    (folder / f"{name}.py").write_text(textwrap.dedent(text))


def test_load_package(clean, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    write(tmp_path, "operators_models", MODULE.format("package"))
    write(tmp_path, "no_models", "")
    assert load_package("operators_models") == ("from-package",)
    assert load_package("operators_models") == ("from-package",)
    assert build(ModelSpec("from-package", {})).fn(None) == "package"
    with pytest.raises(ValueError, match="registers no model"):
        load_package("no_models")


def test_entry_points_are_loaded_when_asked_for(clean, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    write(tmp_path, "installed_models", MODULE.format("entry"))
    write(tmp_path, "silent_models", "")
    points = [
        metadata.EntryPoint(name, module, registry.GROUP)
        for name, module in [
            ("from-entry", "installed_models"),
            ("silent", "silent_models"),
            ("broken", "no_such_module_anywhere"),
        ]
    ]
    monkeypatch.setattr(metadata, "entry_points", lambda group: points)
    assert {"from-entry", "broken", "decoder"} <= set(model_names())
    assert "installed_models" not in sys.modules
    assert build(ModelSpec("from-entry", {})).fn(None) == "entry"
    with pytest.raises(ImportError, match="registers no model named 'silent'"):
        builder("silent")
    with pytest.raises(ImportError):
        builder("broken")


def test_the_decoders_schema_names_its_keys():
    schema = builder("decoder").schema
    json.dumps(schema)
    keys = schema["properties"]
    assert "llama" in keys["model_type"]["enum"]
    assert keys["hidden_size"]["type"] == "integer"
    assert keys["expert_layout"]["default"] == "stacked"
    for entry in keys.values():
        assert entry["description"]


def test_importing_the_package_imports_no_framework():
    code = (
        "import sys, shardinit.models as m\n"
        "m.model_names(); m.ModelSpec('decoder', m.example_config('gpt2'))\n"
        "print([n for n in ('jax', 'flax', 'grpc') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
