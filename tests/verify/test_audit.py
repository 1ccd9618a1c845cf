"""Audits by the real compilers, and that what they are for is caught and named."""

import importlib.util
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

import shardinit
from shardinit.core.paths import path_str
from shardinit.errors import AuditError, ShardingError, TopologyError
from shardinit.models import ModelSpec, build, example_config
from shardinit.verify.audit import topology as topologies

# Plans that are to fail: every device computes a leaf in full, and is to.
FAILS = pytest.mark.filterwarnings("ignore::shardinit.errors.FindingsWarning")

MIB = 1 << 20
# One of the 1,137 leaves, and one that is sharded along the axis that a sum runs over.
PLANTED = "layers/57/mlp/gate/kernel"
ACROSS = "layers/57/mlp/down/kernel"


def installed(module):
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


LLAMA_ON = [
    pytest.param(
        "tpu:v5p:16x16x16",
        (64, 64),
        marks=pytest.mark.skipif(
            not installed("libtpu"),
            reason="NO TPU AUDIT: libtpu is missing; pip install 'shardinit[tpu]'",
        ),
    ),
    pytest.param(
        "gpu:h100:64x8",
        (64, 8),
        marks=pytest.mark.skipif(
            not installed("jax_plugins.xla_cuda12"),
            reason="NO GPU AUDIT: no CUDA wheels; pip install 'shardinit[cuda12]'",
        ),
    ),
]
on_chips = pytest.mark.parametrize(("name", "sizes"), LLAMA_ON)


def abstract(sizes):
    return AbstractMesh(sizes, ("data", "model")[: len(sizes)])


def llama():
    return build(ModelSpec("decoder", example_config("llama-3.1-405b")))


def planted(path, change):
    """The 405B model with one leaf changed."""
    init = llama()

    def fn(key):
        return jax.tree_util.tree_map_with_path(
            lambda at, x: change(x) if path_str(at) == path else x, init.fn(key)
        )

    return shardinit.InitFn(fn, axes=init.axes, name=init.name)


def rows_with_faults(report):
    return {row.paths: row.faults for row in report.rows if not row.ok}


@pytest.mark.slow
@on_chips
def test_every_chip_holds_its_shard_of_405b_parameters_and_nothing_else(name, sizes):
    init = llama()
    plan = shardinit.plan(init, mesh=abstract(sizes))
    report = shardinit.audit(plan, name)
    assert report.ok, str(report)
    assert len(report.rows) == len(plan.programs)

    shapes = jax.tree_util.tree_leaves_with_path(
        jax.eval_shape(init.fn, jax.random.key(0))
    )
    real = {path_str(path): (x.shape, str(x.dtype)) for path, x in shapes}
    assert len(real) == 1137
    audited = {
        path: (row.shapes[0], row.dtypes[0])
        for row in report.rows
        for path in row.paths
    }
    assert audited == real

    devices = sizes[0] * sizes[1]
    for row in report.rows:
        assert row.collectives == row.full_size == ()
        assert row.temporary_bytes <= MIB + row.shard_bytes // 10
        assert row.output_bytes == row.padded_bytes >= row.shard_bytes
        full = jnp.dtype(row.dtypes[0]).itemsize
        for size in row.shapes[0]:
            full *= size
        assert row.shard_bytes in (full // devices, full)
        assert row.shard_bytes < full or full <= 32768, "only norm scales lie whole"
    assert report.peak_bytes < report.memory_bytes
    assert report.seconds > 0


@pytest.mark.slow
@FAILS
@on_chips
def test_a_full_size_temporary_is_caught_and_named(name, sizes):
    init = planted(PLANTED, lambda x: x - x.mean())
    report = shardinit.audit(shardinit.plan(init, mesh=abstract(sizes)), name)
    assert not report.ok
    (found,) = rows_with_faults(report).items()
    assert found[0] == (PLANTED,)
    said = " ".join(found[1])
    assert "temporaries" in said
    assert "values as large as the leaf" in said
    assert "bf16[16384,53248]" in said
    ((path, why),) = report.whole
    assert path == PLANTED
    assert "reduce_sum" in why
    assert report.faults
    assert all(fault.startswith(PLANTED) for fault in report.faults)
    assert report.largest_temporary > 16384 * 53248 * 2


@pytest.mark.slow
@FAILS
@on_chips
def test_an_all_gather_and_a_forgotten_sharding_are_each_caught_and_named(name, sizes):
    init, mesh = planted(ACROSS, lambda x: jnp.cumsum(x, axis=0)), abstract(sizes)
    planned = shardinit.plan(init, mesh=mesh)
    places = jax.tree.unflatten(
        planned.cut.tree,
        [
            NamedSharding(mesh, PartitionSpec()) if x.path == PLANTED else x.sharding
            for x in planned.leaves
        ],
    )
    plan = shardinit.plan(init, out_shardings=places, whole="gspmd")
    report = shardinit.audit(plan, name)
    assert not report.ok

    (row,) = (row for row in report.rows if row.collectives)
    assert row.paths == (ACROSS,)
    assert any(text.startswith("all-gather") for text in row.collectives)
    assert any(re.search("communicate: .*all-gather", f) for f in row.faults)
    assert set(rows_with_faults(report)) == {(ACROSS,)}

    *others, forgotten = report.faults
    assert forgotten.startswith(f"{PLANTED} lies whole on each of")
    assert "1,744,830,464 bytes" in forgotten
    assert all(fault.startswith(ACROSS) for fault in others)
    assert any("all-gather" in fault for fault in others)


@pytest.mark.skipif(not installed("libtpu"), reason="NO TPU AUDIT: libtpu is missing")
def test_a_narrow_axis_is_shown_with_its_padding():
    def fn(key):
        return {"narrow": jax.random.normal(key, (4096, 6))}

    plan = shardinit.plan(
        fn, mesh=abstract((4,)), rules=shardinit.fsdp("data", min_bytes=0)
    )
    report = shardinit.audit(plan, "tpu:v5e:2x2")
    assert report.ok, str(report)
    (row,) = report.rows
    assert row.shard_bytes == 1024 * 6 * 4
    assert row.padded_bytes == row.output_bytes == 1024 * 8 * 4
    assert f"{row.shard_bytes:,}" in str(report)
    assert f"{row.padded_bytes:,}" in str(report)


@pytest.mark.skipif(not installed("libtpu"), reason="NO TPU AUDIT: libtpu is missing")
def test_what_goes_to_the_host_is_temporary_on_the_chip():
    def fn(key):
        return {"w": jax.random.normal(key, (64, 128)), "mu": jnp.zeros((1024, 2048))}

    host = shardinit.Placement(PartitionSpec("data"), memory_kind="pinned_host")
    rules = shardinit.PathRules([("mu", host), ("", PartitionSpec("data"))])
    report = shardinit.audit(
        shardinit.plan(fn, mesh=abstract((4,)), rules=rules), "tpu:v5e:2x2"
    )
    assert report.ok, str(report)
    moved, kept = report.rows
    assert (moved.host_bytes, kept.host_bytes) == (moved.shard_bytes, 0)
    assert moved.temporary_bytes >= moved.host_bytes
    assert report.bytes_per_device == report.padded_bytes_per_device == kept.shard_bytes
    assert report.peak_bytes >= kept.shard_bytes + moved.host_bytes


# ---- on CPU: what does not depend on the chip ----------------------------------------


def small(key):
    keys = jax.random.split(key)
    return {
        "kernel": jax.random.normal(keys[0], (512, 64)),
        "bias": jnp.zeros(64),
        "rotation": jax.nn.initializers.orthogonal()(keys[1], (64, 64)),
    }


def test_an_audit_leaves_this_process_alone():
    before = jax.devices()
    report = shardinit.audit(shardinit.plan(small, mesh=abstract((16,))), "cpu:16")
    assert report.ok, str(report)
    assert jax.devices() == before
    assert len(before) == 8
    assert report.mesh == {"data": 16}
    shown = dict(zip(report.HEADER, zip(*report.screen(), strict=True), strict=True))
    assert any(shown["shard"])
    assert not any(shown["padded"])
    ((path, why),) = report.whole
    assert path == "rotation"
    assert why.startswith("qr of [64, 64]; shardinit.initializers.orthogonal")
    assert report.bytes_per_device == (512 * 64 // 16 + 64 + 64 * 64) * 4


@pytest.mark.slow
def test_a_report_reads_as_text_as_html_and_as_json():
    report = shardinit.audit(shardinit.plan(small, mesh=abstract((2, 4))), "cpu:8")
    data = json.loads(json.dumps(report.to_data()))
    assert data["ok"] is True
    assert [row["paths"] for row in data["rows"]] == [
        list(row.paths) for row in report.rows
    ]
    for text in (str(report), report._repr_html_()):
        assert "kernel" in text
        assert "verdict: ok" in text
    large = shardinit.audit(
        shardinit.plan(small, mesh=abstract((2, 4)), rules=shardinit.PathRules([])),
        "cpu:8",
        replicated_bytes=1000,
    )
    assert "verdict: FAILS, 2 fault(s)" in str(large)
    assert "kernel lies whole on each of 8 devices: 131,072 bytes" in str(large)


def test_only_what_was_selected_is_compiled():
    plan = shardinit.plan(small, mesh=abstract((8,)), select="kernel")
    report = shardinit.audit(plan, "cpu:8")
    assert [row.paths for row in report.rows] == [("kernel",)]
    assert report.leaves == 1


@pytest.mark.slow
def test_a_program_can_be_audited_as_well_as_a_function():
    program = shardinit.export_plan(shardinit.plan(small))
    mine = shardinit.audit(shardinit.plan(small, mesh=abstract((8,))), "cpu:8")
    theirs = shardinit.audit(shardinit.plan(program, mesh=abstract((8,))), "cpu:8")
    sizes = [[row.temporary_bytes for row in r.rows] for r in (mine, theirs)]
    assert sizes[0] == sizes[1]
    assert theirs.ok


def test_another_number_of_devices_is_refused():
    with pytest.raises(ShardingError, match=r"expected 16 devices.*AbstractMesh"):
        shardinit.audit(shardinit.plan(small, mesh=abstract((8,))), "cpu:16")
    with pytest.raises(ShardingError, match="none; expected 8 devices"):
        shardinit.audit(shardinit.plan(small), "cpu:8")


def test_a_missing_compiler_is_one_line_that_says_what_to_install(monkeypatch):
    monkeypatch.setattr(topologies, "_there", lambda module: False)
    plan = shardinit.plan(small, mesh=abstract((4,)))
    for name, extra in [("tpu:v5e:2x2", "tpu"), ("gpu:h100:1x4", "cuda12")]:
        with pytest.raises(TopologyError) as caught:
            shardinit.audit(plan, name)
        assert str(caught.value).count("\n") == 0
        assert f"pip install 'shardinit[{extra}]'" in str(caught.value)


@pytest.mark.skipif(not installed("libtpu"), reason="NO TPU AUDIT: libtpu is missing")
def test_an_arrangement_that_the_compiler_refuses_is_one_line():
    plan = shardinit.plan(small, mesh=abstract((27,)))
    with pytest.raises(AuditError, match=r"tpu:v5p:3x3x3: .*not divisible"):
        shardinit.audit(plan, "tpu:v5p:3x3x3")


def test_the_compiling_process_imports_no_model_code_and_no_pickle():
    code = (
        "import sys, shardinit.verify.audit.worker\n"
        "bad = ('flax', 'grpc', 'torch', 'shardinit.models', 'shardinit.frontends')\n"
        "print([m for m in sys.modules if m.startswith(bad)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "platform", "devices"),
    [
        ("tpu:v5p:16x16x16", "tpu", 4096),
        ("tpu:v4:4x4x4", "tpu", 64),
        ("tpu:v5e:16x16", "tpu", 256),
        ("TPU:v6e:4x4", "tpu", 16),
        ("tpu:tpu7x:2x2x1", "tpu", 8),
        ("gpu:h100:64x8", "gpu", 512),
        ("gpu:a100:1x1", "gpu", 1),
        ("cpu:8", "cpu", 8),
    ],
)
def test_names_of_topologies(name, platform, devices):
    found = topologies.topology(name)
    assert (found.platform, found.devices) == (platform, devices)


@pytest.mark.parametrize(
    "name",
    """tpu tpu:v5p tpu:v5p:4 tpu:v5p:0x4x4 tpu:v5p:4x4x4x4 tpu:h100:8x8 gpu:h100:8
    gpu:v5p:8x8 gpu:h100:-1x8 cpu cpu:0 cpu:2x2 cpu:8:8 npu:x:2x2 tpu:v5p:999999x999999
    tpu:v5p:2xx2 tpu:v5p:\uff12x2""".split(),
)
def test_what_is_no_topology_is_refused_with_an_example(name):
    with pytest.raises(TopologyError, match="tpu:v5p:16x16x16"):
        topologies.topology(name)
