"""Models of Hugging Face by their configurations, each against transformers itself."""

import json
import logging

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="no transformers here")

import shardinit
from shardinit.errors import InitFnError
from shardinit.frontends import torch as frontend
from shardinit.models import example_config
from tests.frontends import torch_every
from tests.frontends.torch_like import faults
from tests.frontends.torch_small import small

logging.getLogger("transformers").setLevel(logging.ERROR)
pytestmark = [pytest.mark.once, pytest.mark.filterwarnings("ignore")]

LLAMA = small(example_config("llama-3.1-8b"), 64)
KINDS = {
    "decoder": "llama gpt2 qwen3 gemma2 falcon bloom",
    "encoder": "bert deberta-v2 albert modernbert",
    "encoder and decoder": "t5 bart pegasus",
    "vision": "vit swin convnext deit resnet",
    "speech": "whisper wav2vec2 hubert",
    "experts": "mixtral deepseek_v3 qwen2_moe",
    "state space": "mamba mamba2 rwkv jamba",
    "several modalities": "clip llava blip-2 siglip",
}
FIRST = [kinds.split()[0] for kinds in KINDS.values()]
REST = [kind for kinds in KINDS.values() for kind in kinds.split()[1:]]


@pytest.mark.once
@pytest.mark.parametrize("kind", FIRST)
@pytest.mark.few(2)
def test_a_model_is_such_as_transformers_draws_it(kind):
    config, build, why = torch_every.smaller(kind, "AutoModel")
    assert config is not None, why
    fn = frontend.from_config(config, auto="AutoModel")
    assert faults(fn, fn.fn(jax.random.key(1)), build) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", FIRST + REST)
def test_bits_do_not_depend_on_the_mesh(kind, mesh):
    config, build, why = torch_every.smaller(kind, "AutoModel")
    assert config is not None, why
    fn = frontend.from_config(config, auto="AutoModel")
    alone = shardinit.init(fn, 1)
    line = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    rules = shardinit.fsdp("model", min_bytes=1024)
    for other in (line, mesh):
        made = shardinit.init(fn, 1, mesh=other, rules=rules)
        assert shardinit.digest(made) == shardinit.digest(alone)
    assert faults(fn, alone, build) == []
    jax.clear_caches()


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.timeout(7200)
def test_nine_of_ten_causal_language_models_record_replay_and_match():
    stages = torch_every.main()
    built = [stage for stage in stages.values() if stage != "not built"]
    assert len(built) > 150
    for failing in (
        ("not recorded", "failed"),
        ("not recorded", "failed", "not replayed"),
        ("not recorded", "failed", "not replayed", "differs"),
    ):
        assert sum(stage not in failing for stage in built) >= 0.9 * len(built)


@pytest.mark.slow
def test_a_configuration_is_a_folder_a_file_its_content_or_an_object(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    known = transformers.AutoConfig.for_model(**LLAMA)
    digests = {
        shardinit.plan(frontend.from_config(given)).fingerprint
        for given in (tmp_path, tmp_path / "config.json", LLAMA, known)
    }
    assert len(digests) == 1


def test_the_architecture_that_a_configuration_names_is_built():
    named = LLAMA | {"architectures": ["LlamaForSequenceClassification"]}
    assert "score.weight" in frontend.from_config(named).dtypes
    assert "lm_head.weight" not in frontend.from_config(LLAMA, auto="AutoModel").dtypes


@pytest.mark.slow
def test_a_deep_model_has_the_programs_of_a_shallow_one():
    plans = [
        shardinit.plan(frontend.from_config(LLAMA | {"num_hidden_layers": depth}))
        for depth in (2, 24)
    ]
    assert len(plans[0].programs) == len(plans[1].programs)
    assert plans[1].whole_leaves == ()


def test_the_dtype_is_the_configurations_or_the_callers():
    half = frontend.from_config(LLAMA | {"dtype": "float16"})
    assert half.dtypes["lm_head.weight"] == "float16"
    assert half.dtypes["model.rotary_emb.inv_freq"] == "float32"
    brain = frontend.from_config(LLAMA, dtype="bfloat16")
    assert brain.dtypes["lm_head.weight"] == "bfloat16"
    assert brain.buffers == {
        "model.rotary_emb.inv_freq",
        "model.rotary_emb.original_inv_freq",
    }


@pytest.mark.slow
def test_a_model_that_was_built_on_the_meta_device_is_initialised_as_it_should_be():
    config = transformers.AutoConfig.for_model(**LLAMA)

    def build():
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config)

    asked = frontend.init_fn(build()), frontend.init_fn(build)
    made = [fn.fn(jax.random.key(0)) for fn in asked]
    direct = frontend.from_config(LLAMA).fn(jax.random.key(0))
    for name, array in direct.items():
        for other in made:
            assert np.array_equal(array, other[name]), name
    assert abs(float(np.std(direct["model.layers.0.mlp.up_proj.weight"])) - 0.02) < 1e-3


@pytest.mark.parametrize(
    ("config", "options", "match"),
    [
        (LLAMA, {"trust_remote_code": True}, "trust_remote_code"),
        ({"model_type": "mine", "auto_map": {}}, {}, "Code of a hub is not run"),
        ({}, {}, "model_type is None"),
        (3, {}, "a config.json"),
        (LLAMA, {"auto": "os"}, "an Auto class"),
        (LLAMA, {"auto": "AutoModelForCTC"}, "knows no model of a LlamaConfig"),
        (LLAMA, {"dtype": "float"[::-1]}, "a dtype of torch"),
        (LLAMA | {"vocab_size": "many"}, {}, "transformers refuses"),
    ],
)
def test_what_is_no_configuration_is_refused(config, options, match):
    with pytest.raises(InitFnError, match=match):
        frontend.from_config(config, **options)
