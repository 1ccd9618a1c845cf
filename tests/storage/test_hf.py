"""Hugging Face's names: what transformers loads, and what it wrote."""

import json

import jax
import numpy as np
import optax
import pytest

import shardinit
from shardinit.core.paths import path_str
from shardinit.core.run.parts import by_leaf, read_leaf
from shardinit.core.run.renames import renames
from shardinit.core.run.tensors import tensors
from shardinit.errors import (
    CheckpointError,
    SelectError,
    ShardinitError,
    StructureMismatchError,
)
from shardinit.frontends.optax import with_optimizer
from shardinit.models import ModelSpec, build
from shardinit.storage import safetensors

pytestmark = pytest.mark.once  # names and shapes: JAX's version changes neither

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 160,
}
MODELS = {
    "llama": SIZES | {"attention_bias": True, "mlp_bias": True},
    "mistral": SIZES,
    "qwen2": SIZES | {"tie_word_embeddings": True},
    "qwen3": SIZES | {"head_dim": 32, "dtype": "bfloat16"},
    "mixtral": SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 32,
        "vocab_size": 160,
    },
    "deepseek_v3": SIZES
    | {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "n_group": 2,
        "topk_group": 1,
    },
}


def config_of(family, **more):
    return {"model_type": family, **MODELS[family], **more}


@pytest.mark.parametrize("step", [97, pytest.param(3, marks=pytest.mark.slow)])
def test_any_byte_of_a_config_may_be_changed(tmp_path, step):
    config = config_of("mistral")
    plan = shardinit.plan(build(ModelSpec("decoder", config)))
    params = shardinit.compile_plan(plan)(0)
    safetensors.write(tmp_path / "out", params, names="hf", config=config)
    path = tmp_path / "out" / "config.json"
    data = path.read_bytes()
    for place in range(0, len(data), step):
        damaged = bytearray(data)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        try:
            got = safetensors.restore(tmp_path / "out", plan, names="hf")
        except ShardinitError:
            continue
        assert shardinit.digest(got).root == shardinit.digest(params).root


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch", reason="it is torch that transformers loads into")
    package = pytest.importorskip("transformers", reason="the oracle of its own names")
    package.logging.set_verbosity_error()
    package.logging.disable_progress_bar()
    return package


def arrays_of(config):
    """A tree of the decoder's leaves, all elements different: nothing is compiled."""
    fn = build(ModelSpec("decoder", config))
    plan = shardinit.plan(shardinit.InitFn(fn.fn, axes=fn.axes))
    rng = np.random.default_rng(5)
    return plan, jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape, scale=0.1).astype(leaf.dtype),
        plan.abstract(),
    )


def load(transformers, folder):
    model, account = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert {kind: names for kind, names in account.items() if names} == {}
    return model


# ---- by hand: the arrays of our decoder in a model of transformers -------------------


def swapped(array, inputs=1):
    inner = np.prod(array.shape[:inputs])
    return array.reshape(inner, -1).T


def attention(leaf, family):
    if family == "gpt2":
        parts = [leaf[name]["kernel"].reshape(64, -1) for name in "qkv"]
        biases = [leaf[name]["bias"].reshape(-1) for name in "qkv"]
        yield "attn.c_attn.weight", np.concatenate(parts, 1)
        yield "attn.c_attn.bias", np.concatenate(biases)
        yield "attn.c_proj.weight", leaf["o"]["kernel"].reshape(-1, 64)
        yield "attn.c_proj.bias", leaf["o"]["bias"]
        return
    names = {"kv_a": "kv_a_proj_with_mqa"}
    for name, inner in leaf.items():
        if "scale" in inner:
            kind = "_a_layernorm" if family == "deepseek_v3" else "_norm"
            called = name.removesuffix("_norm") + kind
            yield f"self_attn.{called}.weight", inner["scale"]
            continue
        called = names.get(name, f"{name}_proj")
        inputs = 2 if name == "o" else 1
        yield f"self_attn.{called}.weight", swapped(inner["kernel"], inputs)
        if "bias" in inner:
            yield f"self_attn.{called}.bias", inner["bias"].reshape(-1)


def mlp(leaf, family, at="mlp"):
    gpt2 = {"up": "c_fc", "down": "c_proj"}
    for name, inner in leaf.items():
        kernel = inner["kernel"]
        called = gpt2[name] if family == "gpt2" else f"{name}_proj"
        yield f"{at}.{called}.weight", kernel if family == "gpt2" else kernel.T
        if "bias" in inner:
            yield f"{at}.{called}.bias", inner["bias"]


def experts(leaf):
    yield "mlp.gate.weight", leaf["router"]["kernel"].T
    gate, up, down = (
        np.swapaxes(leaf["experts"][name], 1, 2) for name in ("gate", "up", "down")
    )
    yield "mlp.experts.gate_up_proj", np.concatenate([gate, up], 1)
    yield "mlp.experts.down_proj", down
    if "router_bias" in leaf:
        yield "mlp.gate.e_score_correction_bias", leaf["router_bias"]
    if "shared" in leaf:
        yield from mlp(leaf["shared"], "", "mlp.shared_experts")


def by_hand(params, family):
    """A state dict of transformers, written down without our table."""
    gpt2 = family == "gpt2"
    root, at = ("transformer", "transformer.h") if gpt2 else ("model", "model.layers")
    table, last = ("wte", "ln_f") if gpt2 else ("embed_tokens", "norm")
    norms = (
        ("ln_1", "ln_2") if gpt2 else ("input_layernorm", "post_attention_layernorm")
    )
    yield f"{root}.{table}.weight", params["embed"]["embedding"]
    if gpt2:
        yield f"{root}.wpe.weight", params["positions"]["embedding"]
    for which, norm in {f"{root}.{last}": params["norm"]}.items():
        yield f"{which}.weight", norm["scale"]
        if "bias" in norm:
            yield f"{which}.bias", norm["bias"]
    head = params.get("lm_head", {}).get("kernel")
    tied = params["embed"]["embedding"] if head is None else head.T
    yield "lm_head.weight", tied
    for number, layer in params["layers"].items():
        inner = [*attention(layer["attention"], family)]
        for which, name in zip(("attention_norm", "mlp_norm"), norms, strict=True):
            inner.append((f"{name}.weight", layer[which]["scale"]))
            if "bias" in layer[which]:
                inner.append((f"{name}.bias", layer[which]["bias"]))
        inner += experts(layer["moe"]) if "moe" in layer else mlp(layer["mlp"], family)
        for name, array in inner:
            yield f"{at}.{number}.{name}", array


def as_torch(array):
    import torch

    array = np.ascontiguousarray(array)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.few(2)
def test_transformers_loads_what_we_write(family, transformers, tmp_path):
    import torch

    config = config_of(family)
    _, params = arrays_of(config)
    safetensors.write(tmp_path / "made", params, names="hf", config=config)
    model = load(transformers, tmp_path / "made")
    assert type(model).__name__ == model.config.architectures[0]
    other = transformers.AutoModelForCausalLM.from_config(
        model.config, dtype=model.dtype
    )
    hand = {name: as_torch(array) for name, array in by_hand(params, family)}
    assert other.load_state_dict(hand, strict=False).unexpected_keys == []
    there = model.state_dict()
    assert set(there) == set(hand)
    for name, tensor in there.items():
        assert torch.equal(tensor, hand[name].to(tensor.dtype)), name
    tokens = torch.arange(24).reshape(2, 12) * 5
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens).logits, other.eval()(tokens).logits)


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "deepseek_v3"])
@pytest.mark.few(1)
def test_a_plan_is_restored_from_what_transformers_wrote(
    family, transformers, tmp_path, mesh
):
    import torch

    config = config_of(family)
    plain = {k: v for k, v in config.items() if k != "layer_layout"}
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**plain)
    )
    model.save_pretrained(tmp_path / "theirs")
    rules = shardinit.AxisRules(
        [("embed", "data"), ("heads", "model"), ("kv_heads", "model"), ("mlp", "model")]
    )
    fn = build(ModelSpec("decoder", config))
    plan = shardinit.plan(
        shardinit.InitFn(fn.fn, axes=fn.axes),
        mesh=mesh,
        rules=rules,
        indivisible="next",
    )
    params = safetensors.restore(tmp_path / "theirs", plan, names="hf")
    for leaf, array in zip(plan.leaves, jax.tree.leaves(params), strict=True):
        assert array.sharding == leaf.sharding
    arrays = jax.tree.map(np.asarray, params)
    there = model.state_dict()
    for name, array in by_hand(arrays, family):
        assert torch.equal(as_torch(array), there[name]), name


@pytest.mark.parametrize("family", ["deepseek_v3"])
@pytest.mark.slow
def test_stacked_layers_write_the_same_files_and_are_restored_of_them(family, tmp_path):
    stacked = config_of(family, layer_layout="stacked")
    apart = config_of(family, expert_layout="unrolled")
    apart = {k: v for k, v in apart.items() if family != "llama" or k[:6] != "expert"}
    plan, params = arrays_of(stacked)
    safetensors.write(tmp_path / "made", params, names="hf", config=stacked)
    unrolled, _ = arrays_of(apart)
    layers = safetensors.restore(tmp_path / "made", unrolled, names="hf")
    safetensors.write(tmp_path / "again", layers, names="hf", config=apart)
    first, second = (
        (tmp_path / name / "model.safetensors").read_bytes()
        for name in ("made", "again")
    )
    assert first == second
    again = safetensors.restore(tmp_path / "again", plan, names="hf")
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
        assert np.array_equal(one, other)


def test_a_write_is_continued_compared_and_refused(tmp_path):
    config = config_of("mistral", num_hidden_layers=1)
    lazy = shardinit.open(build(ModelSpec("decoder", config)), 0)

    def fail():
        raise KeyboardInterrupt

    asked = {"names": "hf", "config": config, "max_shard_size": "100KB"}
    with pytest.raises(KeyboardInterrupt):
        safetensors.write(tmp_path / "made", lazy, before_publish=fail, **asked)
    assert not (tmp_path / "made").exists()
    safetensors.write(tmp_path / "made", lazy, **asked)
    index = json.loads((tmp_path / "made/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert json.loads((tmp_path / "made/config.json").read_text())["architectures"] == [
        "MistralForCausalLM"
    ]
    safetensors.write(tmp_path / "made", lazy, **asked)  # compares
    asked["config"] = config | {"rope_theta": 7.0}
    with pytest.raises(CheckpointError, match=r"another config\.json"):
        safetensors.write(tmp_path / "made", lazy, **asked)


@pytest.mark.slow
def test_parameters_alone_restore_into_a_plan_with_optimizer_state(tmp_path):
    config = config_of("mistral", num_hidden_layers=1)
    fn = build(ModelSpec("decoder", config))
    plain = shardinit.InitFn(fn.fn, axes=fn.axes)
    _, params = arrays_of(config)
    safetensors.write(tmp_path / "made", params, names="hf", config=config)
    plan = shardinit.plan(with_optimizer(plain, optax.sgd(0.1, momentum=0.9)))
    state = safetensors.restore(tmp_path / "made", plan, names="hf")
    for one, other in zip(
        jax.tree.leaves(state["params"]), jax.tree.leaves(params), strict=True
    ):
        assert np.array_equal(one, other)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(state["opt_state"]))


@pytest.mark.slow
def test_what_does_not_fit_is_named(tmp_path):
    config = config_of("gpt2", n_layer=1, tie_word_embeddings=False)
    _, params = arrays_of(config)
    safetensors.write(tmp_path / "made", params, names="hf", config=config)
    larger = shardinit.InitFn(
        build(ModelSpec("decoder", config | {"vocab_size": 168})).fn
    )
    plan = shardinit.plan(larger)
    with pytest.raises(StructureMismatchError, match=r"grow='(embed|lm_head)/"):
        safetensors.restore(tmp_path / "made", plan, key=0, names="hf")
    grown = safetensors.restore(
        tmp_path / "made", plan, key=0, names="hf", grow=["embed/*", "lm_head/*"]
    )
    assert np.array_equal(
        grown["embed"]["embedding"][:160], params["embed"]["embedding"]
    )
    head = grown["lm_head"]["kernel"]  # whose tensor has the vocabulary first
    assert np.array_equal(head[:, :160], params["lm_head"]["kernel"])
    wider = build(ModelSpec("decoder", config | {"n_embd": 128}))
    with pytest.raises(CheckpointError, match=r"c_attn.*has shape \(192,\)"):
        safetensors.restore(tmp_path / "made", shardinit.plan(wider), names="hf")
    tied = build(ModelSpec("decoder", config | {"tie_word_embeddings": True}))
    with pytest.raises(StructureMismatchError, match=r"leaf 'lm_head\.weight'"):
        safetensors.restore(tmp_path / "made", shardinit.plan(tied), names="hf")
    with pytest.raises(CheckpointError, match="model_type 'bert'"):
        safetensors.write(
            tmp_path / "other", params, names="hf", config={"model_type": "bert"}
        )
    with pytest.raises(CheckpointError, match="no config"):
        safetensors.write(tmp_path / "other", params, names="hf")


# ---- the user's own pairs ------------------------------------------------------------

OWN = """
# an encoder of one's own
embed            -> tokens.weight
blocks/*/up      -> blocks.*.up.weight      : transpose
blocks/*/heads   -> blocks.*.heads.weight   : transpose 2
blocks/*/one     -> blocks.*.both           : fuse 1
blocks/*/two     -> blocks.*.both           : fuse 1
scanned/w        -> scan.{layer+3}.w        : unstack, transpose
experts/*/w      -> experts.w               : stack
pair             -> a, b, c                 : split 1
gate             -> gate.weight
gate             -> gate.copy               : copy, flatten
"""


def own():
    rng = np.random.default_rng(1)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    blocks = [
        {
            "up": draw(8, 32),
            "heads": draw(4, 6, 32),
            "one": draw(5, 32),
            "two": draw(5, 64),
        }
        for _ in range(2)
    ]
    return {
        "embed": draw(16, 32),
        "blocks": blocks,
        "scanned": {"w": draw(3, 8, 32)},
        "experts": [{"w": draw(4, 32)} for _ in range(3)],
        "pair": draw(8, 96),
        "gate": draw(2, 3, 32),
    }


def test_lines_name_transpose_split_fuse_stack_and_unstack(tmp_path, mesh):
    params = own()

    def zeros(key):
        return jax.tree.map(jax.numpy.zeros_like, params)

    safetensors.write(tmp_path / "a", params, names=OWN, max_memory="2KB")
    safetensors.write(tmp_path / "a", params, names=OWN.splitlines())  # compares
    made = {
        path.replace("/", "."): array
        for path, array in safetensors.open(tmp_path / "a").items()
    }
    block = params["blocks"][1]
    expected = {
        "tokens.weight": params["embed"],
        "blocks.1.up.weight": block["up"].T,
        "blocks.1.heads.weight": np.asarray(block["heads"]).reshape(24, 32).T,
        "blocks.1.both": np.concatenate([block["one"], block["two"]], 1),
        "scan.5.w": params["scanned"]["w"][2].T,
        "experts.w": np.stack([expert["w"] for expert in params["experts"]]),
        "b": params["pair"][:, 32:64],
        "gate.weight": params["gate"],
        "gate.copy": np.asarray(params["gate"]).reshape(-1),
    }
    for name, array in expected.items():
        assert np.array_equal(made[name], array), name
    assert len(made) == 1 + 2 * 3 + 3 + 1 + 3 + 2
    for spec in (jax.P("data"), jax.P(None, "model"), jax.P(None, "data", "model")):
        shardings = jax.tree.map(
            lambda x, spec=spec: jax.sharding.NamedSharding(
                mesh, fitting(x, spec, mesh)
            ),
            params,
        )
        plan = shardinit.plan(zeros, mesh=mesh, out_shardings=shardings)
        again = safetensors.restore(tmp_path / "a", plan, names=OWN)
        for one, other in zip(
            jax.tree.leaves(again), jax.tree.leaves(params), strict=True
        ):
            assert np.array_equal(one, other)


def test_any_window_is_read_of_windows_both_ways():
    params = {
        path_str(path): x for path, x in jax.tree_util.tree_leaves_with_path(own())
    }
    lines = OWN + "more/* -> merged.* : flatten 2, split 0".replace(
        "merged.*", "m.*, n.*"
    )
    lines += """
        deep/*/w -> deep : stack 1
        wide/w -> wide.{i}.w : unstack 1, transpose
        dense/** -> expert.**.{e+1} : repeat 2
        dense/** -> experts/** : repeat 3, stack 1, copy
    """
    params["more/0"] = np.arange(4 * 6 * 5.0).reshape(4, 6, 5)
    params |= {f"deep/{i}/w": i + np.arange(12.0).reshape(3, 4) for i in range(2)}
    params |= {"wide/w": np.arange(24.0).reshape(4, 3, 2)}
    params |= {"dense/a/b": np.arange(6.0).reshape(2, 3)}
    made = tensors(renames(lines), {path: x.shape for path, x in params.items()})
    parts = by_leaf(made.values())
    asked = []

    def reader(arrays):
        def read(name, start, shape):
            asked.append(np.prod(shape))
            return arrays[name][box(start, shape)]

        return read

    def box(start, shape):
        return tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))

    whole = {
        name: tensor.read([0] * len(tensor.shape), tensor.shape, float, reader(params))
        for name, tensor in made.items()
    }
    dense = params["dense/a/b"]
    deep = [params[f"deep/{i}/w"] for i in range(2)]
    assert np.array_equal(whole["deep"], np.stack(deep, 1))
    assert np.array_equal(whole["wide.2.w"], params["wide/w"][:, 2].T)
    assert np.array_equal(whole["expert.a/b.2"], dense)
    assert np.array_equal(whole["experts/a/b"], np.stack([dense] * 3, 1))
    rng = np.random.default_rng(2)
    for _ in range(40):
        for arrays, ask in (
            (whole, lambda n, a, s: made[n].read(a, s, float, reader(params))),
            (params, lambda n, a, s: read_leaf(parts[n], a, s, float, reader(whole))),
        ):
            for name, array in arrays.items():
                start = [int(rng.integers(n)) for n in array.shape]
                shape = [
                    int(rng.integers(1, n - a + 1))
                    for n, a in zip(array.shape, start, strict=True)
                ]
                asked.clear()
                got = ask(name, start, shape)
                assert np.array_equal(got, array[box(start, shape)]), name
                once = name not in ("gate", "dense/a/b")
                if arrays is params and once:  # exactly what was asked for
                    assert sum(asked) == np.prod(shape)


def fitting(leaf, spec, mesh):
    entries = zip(leaf.shape, spec, strict=False)
    sizes = dict(mesh.shape)
    return jax.P(*(a if a and n % sizes[a] == 0 else None for n, a in entries))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("embed tokens", "names no pair"),
        ("embed -> tokens : turn", "got 'turn'"),
        ("embed -> tokens : copy 2", "got 'copy 2'"),
        ("embed -> tokens : stack 2", "stack where there are such"),
        ("embed -> tokens : repeat", "got 'repeat'"),
        ("embed -> tokens : noise -1", "got 'noise -1'"),
        ("embed -> a, b", "split"),
        ("blocks/*/up -> up", "stack where there are such"),
        ("embed -> a.* ", "unstack where there are such"),
        ("embed -> a : transpose, flatten", "one of them"),
        ("nothing -> a", "no line renames it"),
        ("** -> a : transpose", "stack"),
    ],
)
def test_a_line_that_says_nothing_is_shown(line, said):
    with pytest.raises(SelectError, match=said):
        tensors(renames(line), {"embed": (8, 4)})


def test_a_line_that_a_leaf_does_not_allow_is_shown():
    shapes = {"a": (8, 6), "b": (8, 6), "c": ()}
    for text, said in {
        "* -> {x} : unstack": "stack",
        "a -> w\nb -> w\nc -> v": "several leaves",
        "a -> x, y, z : split 0\nb -> v\nc -> u": "3 equal parts",
        "a -> x : transpose 2\nb -> v\nc -> u": "more than 2",
        "a -> x\nb -> v\nc -> u\nd -> w": "renames no leaf",
    }.items():
        with pytest.raises(SelectError, match=said):
            tensors(renames(text), shapes)
