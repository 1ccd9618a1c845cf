"""Plans of transformers and placements of DTensor, as rules."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

import shardinit
from shardinit.errors import ShardingError

torch = pytest.importorskip("torch", reason="its placements become rules")

from shardinit.frontends import torch as from_torch

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def device_mesh():
    """A mesh of 2 x 4 ranks, of which only this one is there."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    fake = pytest.importorskip(
        "torch.testing._internal.distributed.fake_pg", reason="ranks without processes"
    )
    dist.init_process_group("fake", store=fake.FakeStore(), rank=5, world_size=8)
    yield init_device_mesh("cpu", (2, 4), mesh_dim_names=("dp", "tp"))
    dist.destroy_process_group()


SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 128,
}

MLA = {
    "n_routed_experts": 4,
    "moe_intermediate_size": 32,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", {"mlp_bias": True, "attention_bias": True}),
        ("qwen3", {"head_dim": 16}),
        ("mixtral", {"num_local_experts": 4}),
        ("deepseek_v3", MLA),
        ("gpt_oss", {"num_local_experts": 4, "head_dim": 16}),
    ],
)
@pytest.mark.few(2)
def test_a_plan_of_transformers_shards_as_transformers_does(family, more, device_mesh):
    transformers = pytest.importorskip("transformers", reason="its plans become rules")
    from torch.distributed.tensor import DTensor
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES

    config = transformers.AutoConfig.for_model(family, **SMALL, **more)
    rules = from_torch.rules_from_plan(config, tp="tp", ep="tp")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    plan = shardinit.plan(
        lambda key: {name: jax.numpy.zeros(shape) for name, shape in shapes.items()},
        mesh=jax.sharding.AbstractMesh((2, 4), ("dp", "tp")),
        rules=rules,
    )
    tp, ep = (model._expand_parallel_plan(p) for p in (model.tp_plan, model.ep_plan))
    tp = {name: style for name, style in tp.items() if name not in ep}
    modules = dict(model.named_modules())
    for name, style in (tp | ep).items():
        if name in shapes:
            at, _, last = name.rpartition(".")
            ALL_PARALLEL_STYLES[style].shard_param(modules[at], last, device_mesh["tp"])
    cut = 0
    for leaf in plan.leaves:
        tensor = model.get_parameter(leaf.path)
        placements = tensor.placements if isinstance(tensor, DTensor) else []
        expected = P()
        if placements:
            expected = from_torch.spec_from_placements(placements, ["tp"], tensor.ndim)
        spec = P(*leaf.sharding.spec)
        assert _trimmed(spec) == _trimmed(expected), leaf.path
        cut += _trimmed(spec) != P()
    assert cut >= 14 if family == "llama" else cut >= 6


def _trimmed(spec):
    """Without the axes at the end that are whole."""
    entries = [e[0] if isinstance(e, tuple) and len(e) == 1 else e for e in spec]
    while entries and entries[-1] is None:
        entries.pop()
    return P(*entries)


def test_a_plan_of_one_s_own_and_its_faults():
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Linear(32, 8))
    for style in ("colwise_rep", "local_colwise", "packed_colwise"):
        rules = from_torch.rules_from_plan(model, tp="m", plan={"0": style}).rules
        assert rules == ((r"^0\.weight$", P("m")), (r"^0\.bias$", P("m")))
    rules = from_torch.rules_from_plan(
        model, tp=("a", "b"), plan={"*": "rowwise"}
    ).rules
    assert rules == ((r"^\d+\.weight$", P(None, ("a", "b"))),)
    with pytest.raises(ShardingError, match=r"'0\.weight'.*style 'diagonal'"):
        from_torch.rules_from_plan(model, plan={"0": "diagonal"})
    with pytest.raises(ShardingError, match="no tp_plan"):
        from_torch.rules_from_plan(model)


def test_placements_are_specs_and_back(device_mesh):
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    names = ("dp", "tp")
    for placements, spec in [
        ((Replicate(), Replicate()), P()),
        ((Shard(0), Replicate()), P("dp")),
        ((Replicate(), Shard(1)), P(None, "tp")),
        ((Shard(1), Shard(0)), P("tp", "dp")),
        ((Shard(0), Shard(0)), P(("dp", "tp"))),
    ]:
        assert from_torch.spec_from_placements(placements, names) == spec
        assert from_torch.placements_from_spec(spec, names) == placements
    last = from_torch.spec_from_placements([Shard(-1), Replicate()], names, 3)
    assert last == P(None, None, "dp")
    strided = _StridedShard(0, split_factor=4)
    with pytest.raises(ShardingError, match="_StridedShard has no PartitionSpec"):
        from_torch.spec_from_placements([strided, Shard(0)], names)
    with pytest.raises(ShardingError, match="Partial has no PartitionSpec"):
        from_torch.spec_from_placements([Partial(), Shard(0)], names)
    with pytest.raises(ShardingError, match="in the order of the device mesh"):
        from_torch.placements_from_spec(P(("tp", "dp")), names)
    with pytest.raises(ShardingError, match="no axis 'fsdp'"):
        from_torch.placements_from_spec(P("fsdp"), names)


def test_fully_shard_s_placements_become_rules(device_mesh):
    from torch.distributed.fsdp import fully_shard

    with torch.device("meta"):
        layers = [torch.nn.Linear(64, 64) for _ in range(3)]
        model = torch.nn.Sequential(*layers)
    for layer in layers:
        fully_shard(layer, mesh=device_mesh["dp"])
    fully_shard(model, mesh=device_mesh["dp"])
    rules = from_torch.rules_from_module(model)
    assert rules.rules == ((r"^\d+\.weight$", P("dp")), (r"^\d+\.bias$", P("dp")))


@pytest.mark.parametrize(
    "pattern", ["*.up_proj.weight", r"up_proj\.weight$", "**weight"]
)
def test_globs_and_expressions_find_dotted_names_and_layers_fold(pattern):
    names = [
        f"model.layers.{i}.mlp.{which}_proj.weight"
        for i in range(26)
        for which in ("up", "down")
    ]
    plan = shardinit.plan(
        lambda key: dict.fromkeys(names, jax.numpy.zeros((8, 32))),
        mesh=jax.sharding.AbstractMesh((4,), ("model",)),
        rules=shardinit.PathRules([(pattern, P("model")), ("down", P(None, "model"))]),
    )
    rows = [" ".join(row[1:6]) for row in plan.rows()]
    assert "26 model.layers.{0..25}.mlp.up_proj.weight 8x32 float32 P('model',)" in (
        " ".join(rows).replace("P('model', None)", "P('model',)")
    )
    everything = pattern == "**weight"
    assert len(rows) == 2
    down = next(row for row in rows if "down" in row)
    assert ("P(None" in down) != everything
