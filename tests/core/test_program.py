"""Programs without code and mesh: same bits, same bytes, and refusals."""

import hashlib
import importlib.util
import json
import pathlib
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import shardinit
from shardinit.core.init_fn import AxisNames
from shardinit.core.platform import processor
from shardinit.core.program import trial
from shardinit.errors import ProgramFormatError
from shardinit.v1 import program_pb2 as pb

from .bits import differing, ulps

FIXTURES = pathlib.Path(__file__).parent / "fixtures"


class Pair(NamedTuple):
    left: jax.Array
    right: jax.Array


def fn(key):
    keys = jax.random.split(key, 6)
    return {
        "normal": jax.random.normal(keys[0], (40, 64)),
        "same": jax.random.normal(keys[1], (40, 64)),
        "half": jax.nn.initializers.he_uniform()(keys[2], (32, 40), jnp.bfloat16),
        "stacked": jax.vmap(lambda k: jax.random.normal(k, (8, 48)))(
            jax.random.split(keys[3], 4)
        ),
        "list": [jnp.ones((16,)), (jax.random.normal(keys[4]), None)],
        "orthogonal": jax.nn.initializers.orthogonal()(keys[5], (32, 16)),
        "table": np.arange(12.0, dtype=np.float32).reshape(3, 4),
        "key": jax.random.fold_in(key, 5),
        "step": jnp.int32(0),
        "empty": {},
    }


@pytest.fixture(scope="module")
def program():
    return shardinit.export_plan(fn)


@pytest.mark.slow
def test_same_bits_on_every_mesh(program, tmp_path):
    key = jax.random.key(12)
    want = jax.jit(fn)(key)
    program.save(tmp_path / "model.shardinit")
    loaded = shardinit.load_program(tmp_path / "model.shardinit")
    assert [p.name for p in tmp_path.iterdir()] == ["model.shardinit"]
    for shape in ((1,), (2,), (2, 2), (2, 4), (8,)):
        devices = np.asarray(jax.devices()[: np.prod(shape)]).reshape(shape)
        mesh = jax.sharding.Mesh(devices, ("a", "b")[: len(shape)])
        rules = shardinit.fsdp(min_bytes=0)
        got = shardinit.init(loaded, key, mesh=mesh, rules=rules)
        assert differing(got, want) == []
    assert differing(loaded.as_init_fn()(key), want) == []


def test_plan_of_a_program_is_the_plan_of_its_function(program, mesh):
    ours, theirs = shardinit.plan(program, mesh=mesh), shardinit.plan(fn, mesh=mesh)
    assert ours.fingerprint == theirs.fingerprint == program.fingerprint
    facts = [
        [(x.path, x.shape, x.dtype, x.sharding, x.whole) for x in plan.leaves]
        for plan in (ours, theirs)
    ]
    assert facts[0] == facts[1]
    assert len(ours.programs) == len(theirs.programs)


def test_same_plan_same_bytes(program):
    assert shardinit.export_plan(shardinit.plan(fn)).to_bytes() == program.to_bytes()


def test_no_source_path_inside(program):
    assert b".py" not in program.content


def test_the_same_bytes_from_any_checkout(tmp_path):
    """Where the model's code lies, and on which line, does not enter the program."""
    code = (
        "import sys, jax, shardinit\n"
        "def init(key):\n"
        "    half = jax.numpy.bfloat16\n"
        "    normal = jax.nn.initializers.normal(0.02)\n"
        "    return {'w': normal(key, (64, 32)), 'h': normal(key, (64, 32), half)}\n"
        "shardinit.export_plan(init).save(sys.argv[1])\n"
    )
    digests = set()
    for number, name in enumerate(("one", "another/deeper")):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / f"model{number}.py").write_text("\n" * 7 * number + code)
        command = [sys.executable, f"model{number}.py", "out.program"]
        subprocess.run(command, cwd=folder, check=True)
        digests.add((folder / "out.program").read_bytes())
    assert len(digests) == 1


def test_axes_travel(mesh):
    axes = {"w": ("vocab", None), "b": None}
    named = shardinit.InitFn(
        lambda k: {"w": jax.random.normal(k, (64, 8)), "b": jnp.zeros((8,))}, axes=axes
    )
    program = shardinit.InitProgram.from_bytes(shardinit.export_plan(named).to_bytes())
    rules = shardinit.AxisRules([("vocab", "model")])
    plan = shardinit.plan(program, mesh=mesh, rules=rules)
    spec = {leaf.path: leaf.sharding.spec for leaf in plan.leaves}
    assert spec["w"] == jax.sharding.PartitionSpec("model", None)


def test_custom_nodes_become_dicts():
    def model(key):
        left, right = jax.random.split(key)
        return Pair(
            jax.random.normal(left, (4, 32)), {"z": jax.random.normal(right, (4, 32))}
        )

    program = shardinit.InitProgram.from_bytes(shardinit.export_plan(model).to_bytes())
    got = shardinit.init(program, 3)
    want = model(jax.random.key(3))
    assert differing(got, {"left": want.left, "right": want.right}) == []


def test_runs_without_the_models_code(program, tmp_path):
    """A process that never imports Flax or this module."""
    program.save(tmp_path / "p")
    script = (
        "import sys\n"
        "sys.modules['flax'] = None  # as if it were not installed\n"
        "import jax, numpy as np, shardinit\n"
        f"p = shardinit.load_program({str(tmp_path / 'p')!r})\n"
        "mesh = jax.make_mesh((2, 4), ('a', 'b'))\n"
        "got = shardinit.init(p, 12, mesh=mesh)\n"
        "assert 'grpc' not in sys.modules\n"
        "print(np.asarray(got['normal']).tobytes().hex()[:64])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    want = np.asarray(jax.jit(fn)(jax.random.key(12))["normal"]).tobytes().hex()[:64]
    assert done.stdout.strip() == want


def envelope(program):
    return pb.InitProgram.FromString(program.to_bytes())


@pytest.mark.parametrize("mask", [1, 0x80, 0xFF])
@pytest.mark.slow
def test_damage_to_any_byte_is_refused_or_harmless(program, mask):
    data = bytearray(program.to_bytes())
    harmless = 0
    for place in range(len(data)):
        data[place] ^= mask
        try:
            loaded = shardinit.InitProgram.from_bytes(bytes(data))
        except ProgramFormatError:
            pass
        else:  # another way to compress the very same content
            assert loaded.sha256 == program.sha256
            harmless += 1
        data[place] ^= mask
    assert harmless < len(data) / 100


def twice(key):
    tied = jax.random.normal(jax.random.fold_in(key, 1), (8, 64))
    z, a = (jax.random.normal(key, (8, 64)) for _ in range(2))
    return {"z": z, "tied": [tied, tied], "a": a}


def test_leaves_of_one_key_are_still_said_of_a_file():
    loaded = shardinit.InitProgram.from_bytes(
        shardinit.export_plan(shardinit.plan(twice)).to_bytes()
    )
    for source in (twice, loaded):
        found = shardinit.plan(source).findings
        said = [x.leaves for x in found if x.kind == "same-key"]
        assert said == [("a", "z")]
    assert loaded.fingerprint == shardinit.plan(twice).fingerprint


@pytest.mark.parametrize("leaves", [[0], [1, 0], [0, 0], [0, 9999]])
def test_leaves_of_one_key_that_cannot_be_are_refused(program, leaves):
    def change(content):
        content.same_key.add(leaves=leaves)

    with pytest.raises(ProgramFormatError, match="one key"):
        shardinit.InitProgram.from_bytes(rewritten(program, change)).as_cut()


def test_a_part_of_a_program_is_refused(program):
    data = program.to_bytes()
    for length in (0, 1, len(data) // 2, len(data) - 1):
        with pytest.raises(ProgramFormatError):
            shardinit.InitProgram.from_bytes(data[:length])


def test_other_formats_and_versions_are_refused(program):
    message = envelope(program)
    message.format = 3
    with pytest.raises(ProgramFormatError, match="format version 3"):
        shardinit.InitProgram.from_bytes(message.SerializeToString())
    message = envelope(program)
    message.content_size = 1 << 40
    with pytest.raises(ProgramFormatError, match="at most"):
        shardinit.InitProgram.from_bytes(message.SerializeToString())


@pytest.mark.parametrize("version", ["0.10.2", "0.12.0.1"])
def test_files_of_format_1_load_with_the_values_they_had(version, mesh):
    if tuple(map(int, version.split("."))) > jax.version.__version_info__:
        pytest.skip(f"a program of JAX {version} does not run on {jax.__version__}")
    program = shardinit.load_program(FIXTURES / f"format-1-jax-{version}.program")
    kept = json.loads((FIXTURES / f"format-1-jax-{version}.json").read_text())
    assert program.fingerprint == kept["fingerprint"]
    assert [f.kind.value for f in program.as_cut().programs] == [
        *["windowed"] * 5,
        "replicated",
    ]
    digest = shardinit.digest(shardinit.init(program, 0, mesh=mesh))
    exact = {"key", "norm", "scale", "tokens"}  # the same on every platform
    # One platform is one JAX and one set of CPU features: LAPACK and the compiler
    # choose their code by those.
    same = version == jax.__version__ and kept["processor"] == [*processor("cpu")]
    if same:
        exact = set(kept["leaves"])
    assert {path: digest.leaves[path] for path in exact} == {
        path: kept["leaves"][path] for path in exact
    }
    assert not same or digest.root == kept["root"]
    again = shardinit.InitProgram.from_bytes(program.to_bytes())
    assert (again.format, again.sha256) == (1, program.sha256)


def test_a_module_that_is_not_of_its_record_is_refused(program):
    def swap(content):
        first, second = content.functions[:2]
        first.module, second.module = second.module, first.module

    with pytest.raises(ProgramFormatError, match="not that of its record"):
        shardinit.InitProgram.from_bytes(rewritten(program, swap))


def test_an_honest_program_of_a_stranger_loads(program, tmp_path):
    program.save(tmp_path / "p")
    loaded = shardinit.load_program(tmp_path / "p", untrusted=True)
    assert loaded.sha256 == program.sha256


def test_a_stranger_s_program_has_no_other_s_fingerprint_whatever_it_says(program):
    content = pb.InitProgramContent.FromString(program.content)
    first, second = content.functions[:2]
    first.module, first.module_sha256 = second.module, second.module_sha256
    forged = content.SerializeToString()
    assert shardinit.InitProgram(forged).as_cut().fingerprint == program.fingerprint
    honest, other = (
        shardinit.InitProgram(content, untrusted=True)
        for content in (program.content, forged)
    )
    again = shardinit.InitProgram(program.content, untrusted=True)
    assert len({x.fingerprint for x in (program, honest, other)}) == 3
    assert shardinit.plan(honest).fingerprint == again.fingerprint


def test_a_damaged_module_that_was_sealed_anew_is_refused_by_its_trial(program):
    def damage(content):
        function = content.functions[0]
        function.module = function.module[: len(function.module) // 2]
        function.module_sha256 = hashlib.sha256(function.module).digest()

    with pytest.raises(ProgramFormatError, match="cannot be read"):
        trial.try_in_process(rewritten(program, damage))


@pytest.mark.parametrize(
    ("ending", "told"),
    [
        ("kill -SEGV $$", "ended by SIGSEGV"),
        ("echo why >&2; exit 3", "ended with status 3: why"),
        ("exec sleep 20", "more than 0.5 s"),
    ],
)
def test_a_program_that_ends_its_trial_is_refused(
    program, tmp_path, monkeypatch, ending, told
):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{ending}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ProgramFormatError, match=told):
        trial.try_in_process(program.to_bytes(), 0.5 if "sleep" in ending else 60)
    if told.startswith("ended"):
        with pytest.raises(ProgramFormatError, match=told):
            shardinit.InitProgram.from_bytes(program.to_bytes(), untrusted=True)


def rewritten(program, change):
    """The program with its content changed and its digest made right again."""
    content = pb.InitProgramContent.FromString(program.content)
    change(content)
    return shardinit.InitProgram(content.SerializeToString()).to_bytes()


def newer(content):
    content.jax_version = "99.1.0"


def other_function(content):
    content.leaves[0].function = 99


def other_shape(content):
    del content.leaves[0].shape[:]
    content.leaves[0].shape.extend([-4, 2])


def loop(content):
    content.key_nodes[1].take.parents.append(1)


def fewer_leaves(content):
    del content.leaves[-1]


def other_path(content):
    content.leaves[0].path = "renamed"


def wrong_x64(content):
    content.x64 = True


@pytest.mark.parametrize(
    "change",
    [newer, other_function, other_shape, loop, fewer_leaves, other_path, wrong_x64],
)
def test_contradictions_are_refused(program, change):
    with pytest.raises(ProgramFormatError):
        shardinit.InitProgram.from_bytes(rewritten(program, change))


def expired(content):
    content.calling_convention = 3


def future(content):
    content.calling_convention = 1000


def other_dtype(content):
    leaf = next(x for x in content.leaves if x.path == "half")
    leaf.dtype = "float32"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (expired, "calling convention 3"),
        (future, "calling convention 1000"),
        (other_dtype, r"\(w0, w1\)|contradicts"),
    ],
)
def test_functions_that_do_not_fit_are_refused(program, change, says):
    with pytest.raises(ProgramFormatError, match=says):
        shardinit.InitProgram.from_bytes(rewritten(program, change))


def test_foreign_calls_are_refused(program):
    """A tamperer can make the digest right; the module still may not call out."""

    def evil(words):
        out = jax.ShapeDtypeStruct((32, 16), jnp.float32)
        return (jax.ffi.ffi_call("run_shell", out)(words),)

    unchecked = [jax.export.DisabledSafetyCheck.custom_call("run_shell")]
    words = jax.ShapeDtypeStruct((2,), jnp.uint32)
    module = jax.export.export(jax.jit(evil), disabled_checks=unchecked)(words)

    def tamper(content):
        number = next(x.function for x in content.leaves if x.path == "orthogonal")
        function = content.functions[number]
        function.module = bytes(module.serialize())
        function.module_sha256 = hashlib.sha256(function.module).digest()

    with pytest.raises(ProgramFormatError, match="calls 'run_shell' outside"):
        shardinit.InitProgram.from_bytes(rewritten(program, tamper))


def test_a_program_of_the_oldest_jax_still_runs(mesh):
    spec = importlib.util.spec_from_file_location("make", FIXTURES / "make.py")
    assert spec is not None
    assert spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    program = shardinit.load_program(FIXTURES / make.NAME)
    assert program.jax_version == "0.10.2"
    key = jax.random.key(2)
    want = jax.jit(make.model)(key)
    for where in (None, mesh):
        got = shardinit.init(program, key, mesh=where)
        assert differing(got["tokens"], want["tokens"]) == []
        for name in want:
            assert ulps(got[name], want[name]) <= 4, name
    lazy = shardinit.open(program, key)
    assert differing(lazy["embed"][5:9, 60:], np.asarray(got["embed"])[5:9, 60:]) == []


def test_a_loaded_program_holds_nothing_beside_its_shard(mesh):
    """Unrolled threefry survives export: the rounds' state never reaches memory."""

    def large(key):
        return jax.random.normal(key, (1024, 2048))

    data = shardinit.export_plan(large).to_bytes()
    plan = shardinit.plan(shardinit.InitProgram.from_bytes(data), mesh=mesh)
    (executable,) = shardinit.compile_plan(plan).executables
    memory = executable.memory_analysis()
    assert memory.output_size_in_bytes == 1024 * 2048 * 4 // 8
    assert memory.temp_size_in_bytes < 64 * 1024
    (lowered,) = [p.program for p in plan.programs]
    assert "while" not in str(lowered._exported.mlir_module())


MESH = jax.sharding.AbstractMesh((2, 4), ("data", "model"))
RULES = [("embed", "data"), ("mlp", "model"), ("heads", ("data", "model"))]
NAMES = st.one_of(
    st.none(),
    st.sampled_from(["embed", "mlp", "heads", "data", "model", "other"]),
    st.just(("data", "model")),
)


@settings(max_examples=15)
@given(
    names=st.lists(NAMES, max_size=2),
    passes=st.booleans(),
    own=st.lists(st.sampled_from([*RULES, ("other", "model"), ("mlp", None)])),
    rules=st.one_of(st.none(), st.lists(st.sampled_from(RULES), unique=True)),
)
def test_a_program_lies_where_its_function_lies(names, passes, own, rules):
    def fn(key):  # of what needs no export
        return {"w": np.ones((64, 32), np.float32), "plain": np.ones(8, np.int32)}

    def lies(source):
        given = None if rules is None else shardinit.AxisRules(rules)
        try:
            plan = shardinit.plan(source, mesh=MESH, rules=given)
        except shardinit.errors.ShardinitError as error:
            return str(error)
        return [leaf.sharding for leaf in plan.leaves], plan.findings

    axes = {"w": AxisNames(names, 2, passes=passes, rules=own), "plain": None}
    model = shardinit.InitFn(fn, axes=axes, name="model")
    data = shardinit.export_plan(model).to_bytes()
    assert lies(shardinit.InitProgram.from_bytes(data)) == lies(model)


def through_bytes(program):
    return shardinit.InitProgram.from_bytes(program.to_bytes())


def test_what_a_function_states_is_kept_in_its_program():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    places = {
        "w": NamedSharding(mesh, P(None, "data")),
        "b": NamedSharding(mesh, P(("data", "model")), memory_kind="pinned_host"),
    }

    def fn(key):
        drawn = {
            "w": jax.random.normal(key, (64, 64)),
            "b": jax.random.uniform(key, (64,)),
        }
        return jax.lax.with_sharding_constraint(drawn, places)

    program = through_bytes(shardinit.export_plan(shardinit.plan(fn)))
    plan = shardinit.plan(program, mesh=mesh)
    assert {x.path: x.sharding for x in plan.leaves} == places
    params = shardinit.compile_plan(plan)(0)
    assert {path: x.sharding for path, x in params.items()} == places
    again = through_bytes(shardinit.export_plan(plan))
    assert again.to_bytes() == program.to_bytes()
    other = shardinit.plan(program, mesh=mesh, rules=shardinit.PathRules([]))
    found = [x for x in other.findings if x.kind == "overruled"]
    assert sorted(path for x in found for path in x.leaves) == ["b", "w"]
    small = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    assert shardinit.plan(program, mesh=small).leaves[1].sharding.mesh == small


def test_a_program_knows_its_optimizer_state():
    optax = pytest.importorskip("optax")

    def fn(key):
        params = {"w": jax.random.normal(key, (64, 64))}
        return {"params": params, "opt_state": optax.adam(1e-3).init(params)}

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    options = {
        "mesh": mesh,
        "rules": shardinit.PathRules([]),
        "opt_rules": shardinit.fsdp("data", min_bytes=0),
    }
    program = through_bytes(shardinit.export_plan(shardinit.plan(fn)))
    want = [x.sharding for x in shardinit.plan(fn, **options).leaves]
    assert [x.sharding for x in shardinit.plan(program, **options).leaves] == want
    assert any(place.spec == P("data", None) for place in want), want
