import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

import shardinit
from shardinit.errors import FindingsError, ServiceError, SpecError, WholeLeafError
from shardinit.models import ModelSpec, build, example_config
from shardinit.service.client import disk

pytestmark = pytest.mark.once

MESH = {"data": 2, "model": 4}


def plan_of(spec, rules=None):
    mesh = AbstractMesh(tuple(MESH.values()), tuple(MESH))
    return shardinit.plan(build(spec), mesh=mesh, rules=rules)


def entries(spec):
    return tuple((e,) if isinstance(e, str) else tuple(e or ()) for e in spec)


def test_models_come_with_their_config_schema(client):
    models = client.models()
    assert "decoder" in models
    assert models["service-test"]["properties"]["width"]["type"] == "integer"
    assert models["service-test"]["required"] == ["width"]


@pytest.mark.parametrize(
    "rules",
    [
        None,
        shardinit.AxisRules([("out", ("data", "model")), ("in", None)]),
        shardinit.AxisRules([("in", "data"), ("out", "model")]),
        shardinit.PathRules([("kernel$", PartitionSpec("data", "model"))]),
        shardinit.fsdp("model", min_bytes=1),
    ],
    ids=["default", "joined", "axes", "paths", "fsdp"],
)
def test_describe_says_what_a_local_plan_says(client, spec, rules):
    plan = plan_of(spec, rules)
    described = client.describe(spec, MESH, rules)
    assert described.fingerprint == plan.fingerprint
    assert described.total_bytes == plan.total_bytes
    assert described.bytes_per_device == plan.bytes_per_device
    assert described.parameter_count == plan.parameter_count
    assert described.programs == len(plan.programs)
    assert [
        (x.path, x.shape, x.dtype, x.spec, x.bytes_per_device, x.program, x.whole)
        for x in described.leaves
    ] == [
        (
            x.path,
            x.shape,
            str(x.dtype),
            entries(x.sharding.spec),
            x.bytes_per_device,
            x.program,
            x.whole,
        )
        for x in plan.leaves
    ]


def test_describe_tells_the_findings_of_a_local_plan(client, spec):
    rules = shardinit.AxisRules([("in", "data"), ("nothing", "model")])
    found = plan_of(spec, rules).findings
    assert {f.kind for f in found} >= {"unmatched-rule"}
    described = client.describe(spec, MESH, rules)
    assert [f.as_data() for f in described.findings] == [f.as_data() for f in found]
    assert [str(f) for f in described.findings] == [str(f) for f in found]


@pytest.mark.parametrize("via", ["program", "stream"])
def test_a_client_refuses_what_strict_refuses(client, spec, mesh, via):
    rules = shardinit.AxisRules([("in", "data"), ("nothing", "model")])
    with pytest.raises(FindingsError, match="nothing"):
        client.init(spec, 0, mesh=mesh, rules=rules, strict={"unmatched-rule"}, via=via)


def test_a_client_plans_as_it_is_told(client, spec, mesh):
    with pytest.raises(WholeLeafError, match="memory_limit=1 "):
        client.init(spec, 0, mesh=mesh, memory_limit=1)
    with pytest.raises(ValueError, match=r"memory_limit, prng.*via='program'"):
        client.init(spec, 0, mesh=mesh, memory_limit=1, prng="threefry", via="stream")


@pytest.mark.parametrize(
    "rules",
    [
        shardinit.AxisRules(
            [("in", shardinit.Placement("data", "pinned_host")), ("out", "model")]
        ),
        shardinit.PathRules(
            [("kernel$", shardinit.Placement(PartitionSpec("data"), "pinned_host"))]
        ),
    ],
    ids=["axes", "paths"],
)
def test_the_memory_that_rules_name_reaches_the_service(client, spec, mesh, rules):
    plan = plan_of(spec, rules)
    described = client.describe(spec, MESH, rules)
    kinds = [leaf.memory_kind for leaf in plan.leaves]
    assert [leaf.memory_kind for leaf in described.leaves] == kinds
    assert set(kinds) == {"", "pinned_host"}
    assert described.bytes_per_device == plan.bytes_per_device
    assert described.host_bytes_per_device == plan.host_bytes_per_device > 0
    made = client.init(spec, 0, mesh=mesh, rules=rules, via="stream")
    found = [x.sharding.memory_kind for x in jax.tree.leaves(made)]
    assert [kind.replace("device", "") for kind in found] == kinds


def test_describe_without_a_mesh_places_nothing(client, spec):
    described = client.describe(spec)
    assert {leaf.spec for leaf in described.leaves} == {None}
    assert described.bytes_per_device == described.total_bytes


def test_a_published_decoder_is_described(client):
    spec = ModelSpec("decoder", example_config("gpt2"))
    assert client.describe(spec, MESH, shardinit.fsdp()).parameter_count == 124_439_808


def test_init_gives_the_bits_of_plain_jit(client, spec):
    ours = client.init(spec, 7)
    plain = jax.jit(build(spec).fn)(jax.random.key(7))
    assert jax.tree.structure(ours) == jax.tree.structure(plain)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_streams_wide_draws_and_rules_of_the_state_reach_the_service(client, mesh):
    spec, keys = ModelSpec("service-streams", {}), {"params": 1, "noise": 2}
    rules = shardinit.AxisRules([("out", "model")])
    placed = {
        "opt_rules": shardinit.fsdp("data", min_bytes=0),
        "opt_state": "mom*",
        "rules": rules,
    }
    asked = {**placed, "mesh": mesh, "draw_dtype": "float32"}
    local = shardinit.init(build(spec), keys, **asked)
    for via in ("program", "stream"):
        ours = client.init(spec, keys, **asked, via=via)
        for path, x in ours.items():
            assert x.sharding.spec == local[path].sharding.spec
            assert np.asarray(x).tobytes() == np.asarray(local[path]).tobytes()
    assert local["moment"].sharding.spec != local["w"].sharding.spec
    narrow = client.read(spec, keys, "w", np.s_[:2])
    assert np.array_equal(narrow, shardinit.read(build(spec), keys, "w", np.s_[:2]))
    with pytest.raises(SpecError, match="draw_dtype"):
        client.describe(ModelSpec("service-streams", {}, draw_dtype="int8"))
    with pytest.raises(ValueError, match="settled"):
        client.init("0" * 64, 0, draw_dtype="float32")


def test_init_selects_and_reports_progress(client, spec):
    seen = []
    part = client.init(
        spec, 0, select="layer/**", progress=lambda *done: seen.append(done)
    )
    assert isinstance(part["head"], jax.ShapeDtypeStruct)
    assert part["layer"][0]["kernel"].shape == (8, 64)
    assert seen[-1][0] == seen[-1][1] > 0


def test_a_program_is_asked_for_by_digest(client, spec, server, tmp_path):
    program = client.program(spec)
    with shardinit.connect(server.address, cache_dir=tmp_path / "other") as other:
        assert other.describe(program.sha256).fingerprint == program.fingerprint
        assert other.program(program.sha256).to_bytes() == program.to_bytes()
        with pytest.raises(ServiceError, match="is held here") as caught:
            other.program("0" * 64)
    assert caught.value.code == "NOT_FOUND"


def test_a_cached_program_by_digest_needs_no_server(client, spec, tmp_path):
    program = client.program(spec)
    with shardinit.connect("127.0.0.1:1", cache_dir=tmp_path / "cache") as offline:
        assert offline.program(program.sha256).to_bytes() == program.to_bytes()


def test_a_program_in_the_cache_is_not_sent_again(client, spec, monkeypatch):
    first = client.program(spec)
    written = []
    monkeypatch.setattr(disk.Store, "write", lambda *a: written.append(a))
    assert client.program(spec).to_bytes() == first.to_bytes()
    assert not written


def test_a_damaged_cache_file_is_fetched_again(client, spec, tmp_path):
    first = client.program(spec)
    path = tmp_path / "cache" / f"{first.sha256}.program"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert client.program(spec).to_bytes() == first.to_bytes()
    assert disk.digest_of(path.read_bytes()) == first.sha256


def test_the_client_module_imports_neither_jax_nor_flax(tmp_path):
    code = (
        "import sys, shardinit.service.client.client as c\n"
        "client = c.connect('127.0.0.1:1', cache_dir=sys.argv[1])\n"
        "client.close()\n"
        "print([m for m in ('jax', 'flax', 'jaxlib') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
