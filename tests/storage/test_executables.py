"""Executables: a second process compiles nothing, and believes nothing unchecked."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import shardinit
from shardinit.errors import ExecutablesError, ExecutablesWarning
from shardinit.storage import executables
from tests.core.bits import differing

SETTINGS = (
    *executables._SETTINGS,
    "jax_compilation_cache_dir",
    "jax_raise_persistent_cache_errors",
)


def model(key):
    a, b, c = jax.random.split(key, 3)
    return {
        "up": jax.random.normal(a, (16, 64)),
        "down": jax.random.truncated_normal(b, -2.0, 2.0, (64, 32)),
        "bias": jax.random.uniform(c, (64,)),
    }


def wider(key):
    return {"up": jax.random.normal(key, (16, 128))}


RULES = shardinit.fsdp(min_bytes=0)


def planned(mesh, fn=model, **kwargs):
    return shardinit.plan(fn, mesh=mesh, rules=RULES, **kwargs)


def settings():
    return {name: getattr(jax.config, name) for name in SETTINGS}


@pytest.fixture(autouse=True)
def nothing_is_left_behind(monkeypatch, tmp_path_factory):
    """Every test: JAX's settings as they were, and no folder of ours."""
    home = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(home))
    before = settings()
    yield
    assert settings() == before
    assert list(home.iterdir()) == []


@pytest.fixture(scope="module")
def saved(mesh, tmp_path_factory):
    path = tmp_path_factory.mktemp("executables") / "model.executables"
    return path, shardinit.save_executables(planned(mesh), path)


def forged(saved, tmp_path, body=b"", **changes):
    """The file with another manifest, and the digest that belongs to that."""
    head, _, rest = saved[0].read_bytes().partition(b"\n")
    manifest = {**json.loads(head), **changes}
    data = json.dumps(manifest).encode() + b"\n" + rest + body
    path = tmp_path / "forged"
    path.write_bytes(data)
    return path, hashlib.sha256(data).hexdigest()


def refused(file, plan, expected, mesh=None):
    path, digest = file
    compiled = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executables, "compile_plan", compiled.append)
        with pytest.raises(ExecutablesError, match=expected) as caught:
            shardinit.load_executables(path, plan, sha256=digest, mesh=mesh)
    assert compiled == []
    return caught.value


SECOND = """
import json, pickle, _pickle, sys
import jax, numpy as np
from jax import monitoring
import shardinit
from shardinit.storage import executables
from tests.storage.test_executables import model, planned, settings

path, digest = sys.argv[1:]
plan = planned(jax.make_mesh((2, 4), ("data", "model")))
jax.jit(lambda x: x + 1)(0.0)  # JAX has compiled, and has seen that it has no cache

def unpickles(*args, **kwargs):
    raise AssertionError("something is unpickled")

def watch(event, args):
    if event.startswith("pickle."):
        unpickles()

for home in (pickle, _pickle):
    home.loads = home.load = home.Unpickler = unpickles
sys.addaudithook(watch)
events, before = [], settings()
monitoring.register_event_listener(lambda event, **_: events.append(event))
loaded = shardinit.load_executables(path, plan, sha256=digest)
count = {name: events.count(f"/jax/compilation_cache/{name}")
         for name in ("compile_requests_use_cache", "cache_hits", "cache_misses")}
assert settings() == before
plain = shardinit.compile_plan(plan)
assert events.count("/jax/compilation_cache/cache_hits") == count["cache_hits"]
same = [np.asarray(a).tobytes() == np.asarray(b).tobytes() and a.sharding == b.sharding
        for a, b in zip(loaded.leaves(3), plain.leaves(3), strict=True)]
print(json.dumps({"programs": len(plan.programs), "same": same, **count}))
"""


def second(path, digest, **environment):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SECOND, str(path), digest],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[2],
        timeout=120,
    )
    return done


def test_a_second_process_compiles_nothing_and_unpickles_nothing(saved):
    done = second(*saved)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["programs"] == 3
    assert found["cache_hits"] == found["compile_requests_use_cache"] == 3
    assert found["cache_misses"] == 0
    assert found["same"] == [True] * 3


def test_executables_for_other_cpu_features_are_refused(saved):
    done = second(*saved, XLA_FLAGS=os.environ["XLA_FLAGS"] + " --xla_cpu_max_isa=AVX")
    assert done.returncode != 0
    error = done.stderr.splitlines()[-1]
    assert "ExecutablesError" in error
    assert "made for the XLA flags with nothing more" in error
    assert "with --xla_cpu_max_isa=AVX." in error


def test_the_processor_of_the_manifest_is_held_against_this_one(saved, mesh, tmp_path):
    here = json.loads(saved[0].read_bytes().partition(b"\n")[0])["processor"]
    file = forged(saved, tmp_path, processor=[*here, "avx9000"])
    error = refused(file, planned(mesh), "made for the processor with avx9000")
    assert "with nothing more" in error.expected
    assert error.remedy


def test_a_process_that_has_a_cache_keeps_it_as_it_is(saved, mesh, tmp_path):
    theirs = tmp_path / "theirs"
    names = (
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
        "jax_compilation_cache_dir",
    )
    before = [getattr(jax.config, name) for name in names]

    def entries():
        return {p.name.partition("-")[0] for p in theirs.iterdir()}

    try:
        for name, value in zip(names, (0.0, -1, str(theirs)), strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        jax.jit(lambda x: x * 2, device=None).lower(1.0).compile()
        held, used = entries(), settings()
        assert held
        loaded = shardinit.load_executables(saved[0], planned(mesh), sha256=saved[1])
        assert (entries(), settings()) == (held, used)

        def afterwards(x):
            return x * 3

        jax.jit(afterwards).lower(1.0).compile()
        assert entries() == held | {"jit_afterwards"}
    finally:
        for name, value in zip(names, before, strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()
    expected = shardinit.compile_plan(planned(mesh))(7)
    assert all(not differing(a, b) for a, b in _pairs(loaded(7), expected))


def _pairs(a, b):
    return zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)


def test_an_abstract_plan_is_given_its_mesh(mesh, tmp_path):
    plan = planned(mesh.abstract_mesh)
    path = tmp_path / "abstract"
    digest = shardinit.save_executables(plan, path, mesh=mesh)
    loaded = shardinit.load_executables(path, plan, sha256=digest, mesh=mesh)
    plain = shardinit.compile_plan(plan, mesh=mesh)
    assert all(not differing(a, b) for a, b in _pairs(loaded(1), plain(1)))


def test_executables_of_a_program_are_loaded_by_that_program(mesh, tmp_path, saved):
    program = shardinit.export_plan(model)
    path = tmp_path / "program"
    digest = shardinit.save_executables(planned(mesh, program), path)
    loaded = shardinit.load_executables(path, planned(mesh, program), sha256=digest)
    expected = shardinit.compile_plan(planned(mesh))(5)
    assert all(not differing(a, b) for a, b in _pairs(loaded(5), expected))
    refused(saved, planned(mesh, program), "planned from 'a function'")


@pytest.mark.parametrize(
    "where", ["first", "manifest", "middle", "last", "cut", "more"]
)
def test_a_changed_file_is_not_even_parsed(saved, mesh, tmp_path, monkeypatch, where):
    data = bytearray(saved[0].read_bytes())
    end = data.index(b"\n")
    places = {"first": 0, "manifest": end // 2, "middle": len(data) // 2, "last": -1}
    if where == "cut":
        del data[-1:]
    elif where == "more":
        data += b"\0"
    else:
        data[places[where]] ^= 1
    path = tmp_path / "changed"
    path.write_bytes(data)

    def parse(*_):
        raise AssertionError("it is parsed")

    monkeypatch.setattr(executables, "_parse", parse)
    error = refused((path, saved[1]), planned(mesh), "its SHA-256 is")
    assert saved[1] in error.expected


@pytest.mark.parametrize("digest", ["0" * 64, "", "sha256", "0" * 63 + "g"])
def test_the_digest_must_be_the_files(saved, mesh, digest):
    refused((saved[0], digest), planned(mesh), "SHA-256|64 hex digits")


def test_a_file_beyond_the_bound_is_not_held_in_memory(saved, mesh, monkeypatch):
    monkeypatch.setattr(executables, "MAX_BYTES", 1000)
    refused(saved, planned(mesh), "more than 1,000 bytes")


@pytest.mark.parametrize(
    "fact",
    ["jax", "jaxlib", "platform", "platform version", "device kind"],
)
def test_other_versions_and_devices_are_named(saved, mesh, tmp_path, fact):
    error = refused(
        forged(saved, tmp_path, **{fact: "0.0.1"}),
        planned(mesh),
        f"made for the {fact} '0.0.1'; expected what is here, ",
    )
    assert error.remedy


def test_another_mesh_model_or_sharding_is_named(saved, mesh):
    other = jax.make_mesh((4, 2), ("data", "model"))
    refused(saved, planned(other), "mesh 'data=2,model=4'.* 'data=4,model=2'")
    refused(saved, planned(mesh, wider), "made for the fingerprint")
    whole = shardinit.plan(model, mesh=mesh, rules=shardinit.PathRules([]))
    refused(saved, whole, "made for the shardings")
    refused(saved, planned(mesh, select="up"), "made for the shardings")


@pytest.mark.parametrize(
    "change",
    [
        {"shardinit executables": 2},
        {"entries": None},
        {"entries": []},
        {"entries": [1, 2]},
        {"entries": [["jit_leaf_program-" + "0" * 64 + "-cache", 1 << 60]]},
        {"entries": [["jit_leaf_program-" + "0" * 64 + "-cache", -1]]},
        {"entries": [["jit_leaf_program-" + "0" * 64 + "-cache", True]]},
        {"entries": [["jit_leaf_program-" + "0" * 64 + "-cache", "9"]]},
        {"entries": [["jit_leaf_program-" + "0" * 64 + "-cache", 1]] * 2},
        {"entries": [["../jit_leaf_program-" + "0" * 64 + "-cache", 1]]},
        {"entries": [["/tmp/x", 1]]},
        {"entries": [["jit_leaf_program-" + "0" * 64 + "-cache\n", 1]]},
    ],
    ids=str,
)
@pytest.mark.few(4)
def test_a_manifest_that_lies_is_one_error(saved, mesh, tmp_path, change):
    refused(forged(saved, tmp_path, **change), planned(mesh), "it cannot be read")


@pytest.mark.parametrize(
    "data", [b"", b"{}\n", b"[]\n", b"\x80\x04.", b"[" * 100_000, b'{"a": 1'], ids=len
)
@pytest.mark.few(2)
def test_what_is_no_such_file_is_one_error(mesh, tmp_path, data):
    path = tmp_path / "other"
    path.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    refused((path, digest), planned(mesh), "it cannot be read")


def test_bytes_that_no_entry_announces_are_refused(saved, mesh, tmp_path):
    refused(forged(saved, tmp_path, body=b"x"), planned(mesh), "no entry announces")


def test_nothing_is_overwritten_and_nothing_half_written(mesh, tmp_path, monkeypatch):
    path = tmp_path / "there"
    path.write_text("mine")
    with pytest.raises(ExecutablesError, match="something of that name"):
        shardinit.save_executables(planned(mesh), path)
    late = tmp_path / "late"
    link = os.link

    def meanwhile(source, target):
        Path(target).write_text("theirs")
        link(source, target)

    monkeypatch.setattr(os, "link", meanwhile)
    with pytest.raises(ExecutablesError, match="something of that name"):
        shardinit.save_executables(planned(mesh, wider), late)
    found = {p.name: p.read_text() for p in tmp_path.iterdir()}
    assert found == {"there": "mine", "late": "theirs"}


def test_a_failed_compilation_leaves_nothing(saved, mesh, tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("the compiler fails")

    monkeypatch.setattr(executables, "compile_plan", fails)
    with pytest.raises(RuntimeError, match="the compiler fails"):
        shardinit.save_executables(planned(mesh), tmp_path / "new")
    with pytest.raises(RuntimeError, match="the compiler fails"):
        shardinit.load_executables(saved[0], planned(mesh), sha256=saved[1])
    assert list(tmp_path.iterdir()) == []


def test_programs_that_are_not_found_are_compiled_and_counted(mesh, tmp_path, saved):
    turned = jax.sharding.Mesh(np.flip(mesh.devices), mesh.axis_names)
    plan = planned(turned)
    with pytest.warns(ExecutablesWarning, match="3 of 3 were not in it"):
        loaded = shardinit.load_executables(saved[0], plan, sha256=saved[1])
    expected = shardinit.compile_plan(plan)(2)
    assert all(not differing(a, b) for a, b in _pairs(loaded(2), expected))


def test_a_job_of_several_processes_is_refused(saved, mesh, tmp_path, monkeypatch):
    plan = planned(mesh)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ExecutablesError, match="of process 0 only"):
        shardinit.save_executables(plan, tmp_path / "new")
    refused(saved, plan, "a job of 2 processes; expected one process")


def test_a_plan_without_programs_has_no_executables(mesh, tmp_path):
    plan = planned(mesh, lambda key: {"scale": np.ones(8, np.float32)})
    with pytest.raises(ExecutablesError, match="no program to compile"):
        shardinit.save_executables(plan, tmp_path / "none")
