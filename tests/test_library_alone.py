"""The library alone: what it does where no extra is installed, and what it says."""

import json
import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from shardinit import doctor

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]

# Imports of packages that the library does not require fail as if there were none.
BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
"""

INIT = """
import jax, shardinit
from jax.sharding import AxisType
assert jax.device_count() == 8
mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

def fn(key):
    return {"w": jax.random.normal(key, (512, 64)), "b": jax.numpy.zeros(64)}

plan = shardinit.plan(fn, mesh=mesh)
params = shardinit.compile_plan(plan)(0)
assert (params["w"] == jax.jit(fn)(jax.random.key(0))["w"]).all()
assert params["w"].addressable_shards[0].data.nbytes * 8 == params["w"].nbytes
program = shardinit.InitProgram.from_bytes(shardinit.export_plan(plan).to_bytes())
assert (shardinit.read(program, 0, "w") == params["w"]).all()
receipt = shardinit.receipt(plan, 0, params)
shardinit.verify_receipt(receipt, params)
assert shardinit.audit(plan, topology="cpu:8").ok
for room in ("deferred", "errors", "frontends", "initializers", "models", "module",
             "storage", "verify"):
    getattr(shardinit, room)
from shardinit import module
assert module.Linear(8).init(0, jax.numpy.ones((1, 3))).kernel.shape == (3, 8)
"""


def closure():
    """The distributions that the library alone brings, lower case."""
    found, waiting = set(), [Requirement(text) for text in PROJECT["dependencies"]]
    while waiting:
        requirement = waiting.pop()
        name = requirement.name.lower().replace("_", "-")
        if name in found:
            continue
        found.add(name)
        for text in metadata.requires(name) or ():
            inner = Requirement(text)
            if inner.marker is None or inner.marker.evaluate({"extra": ""}):
                waiting.append(inner)
    return found


@pytest.fixture(scope="module")
def blocked():
    brought = closure()
    owners = metadata.packages_distributions()
    return {
        package
        for package, names in owners.items()
        if package not in ("google", "shardinit")
        and not {name.lower().replace("_", "-") for name in names} & brought
    }


def alone(blocked, code, *arguments, devices=8, returncode=0):
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, "-c", BLOCK.format(blocked=blocked) + code, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=200,
        cwd=ROOT,
    )
    assert done.returncode == returncode, done.stderr
    return done.stdout + done.stderr


def test_the_library_alone_initialises_on_eight_devices(blocked):
    assert {"flax", "grpc", "orbax", "typer", "rich", "crc32c"} <= blocked
    alone(blocked, INIT)


WRITE = """
from shardinit.storage import safetensors
try:
    safetensors.write("never", params)
except shardinit.errors.CheckpointError as error:
    print(error)
"""


def test_a_system_without_locks_and_resource_limits_has_all_but_writing():
    """Windows has neither module, nor a folder that could be locked."""
    said = alone({"fcntl", "resource"}, INIT + WRITE)
    assert "no locks on folders" in said
    assert "Linux" in said
    assert not os.path.exists(ROOT / "never")


@pytest.mark.parametrize(
    ("line", "extra"),
    [
        ("from shardinit.frontends import linen", "flax"),
        ("from shardinit.frontends import nnx", "flax"),
        ("shardinit.models.build(shardinit.ModelSpec('decoder', {}))", "flax"),
        ("shardinit.connect('localhost:1')", "service"),
        ("shardinit.storage.orbax.save", "checkpoint"),
        ("shardinit.storage.safetensors.write", "checkpoint"),
        ("shardinit.module.Linear(8).tabulate(jax.numpy.ones((1, 3)))", "cli"),
    ],
)
def test_a_feature_says_which_extra_it_needs(blocked, line, extra):
    code = f"import jax, shardinit\ntry:\n    {line}\nexcept ImportError as error:\n"
    code += "    print(type(error).__name__, error)\nelse:\n    raise SystemExit(line)"
    said = alone(blocked, code)
    assert said.startswith("MissingFrameworkError")
    assert f"pip install 'shardinit[{extra}]'" in said


MAIN = "from shardinit.__main__ import main\nmain()"


def test_the_command_line_says_which_extra_it_needs(blocked):
    said = alone(blocked, MAIN, "plan", "gpt2", returncode=1)
    assert "pip install 'shardinit[cli]'" in said
    assert "Traceback" not in said


def test_the_version_needs_the_library_alone(blocked):
    said = alone(blocked, MAIN, "--version")
    assert said.startswith("shardinit ")
    assert f"(jax {metadata.version('jax')}, jaxlib " in said


def test_doctor_needs_the_library_alone(blocked):
    said = alone(blocked, MAIN, "doctor")
    assert "8 x cpu" in said
    data = json.loads(alone(blocked, MAIN, "doctor", "--json"))
    assert data["devices"] == {"cpu": 8}
    assert data["versions"]["jax"] == metadata.version("jax")


def test_doctor_names_what_is_wrong_and_the_line_that_mends_it(monkeypatch):
    required = {
        "": [Requirement("jax>=99"), Requirement("no-such-package")],
        "flax": [Requirement("flax>=99")],
        "tpu": [Requirement("no-such-package")],
    }
    monkeypatch.setattr(doctor, "_required", lambda: required)
    found = doctor.examine()
    assert not found.ok
    lines = str(found).splitlines()
    for line in (
        f"  jax {metadata.version('jax')} is here, and jax>=99 is needed",
        "    pip install --upgrade shardinit",
        "  no-such-package is not installed",
        "    pip install --upgrade 'shardinit[flax]'",
        "  tpu         pip install 'shardinit[tpu]'",
    ):
        assert line in lines
    assert len(found.faults) == 3


def test_doctor_names_settings_under_which_nothing_is_planned(capsys):
    import jax

    with jax.threefry_partitionable(False):
        assert doctor.report(as_json=True) == 1
    data = json.loads(capsys.readouterr().out)
    assert not data["ok"]
    assert "jax_threefry_partitionable" in data["faults"][-1]["remedy"]


def test_doctor_says_why_jax_has_no_devices():
    environment = os.environ | {"JAX_PLATFORMS": "nonsense"}
    done = subprocess.run(
        [sys.executable, "-m", "shardinit", "doctor"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=100,
    )
    assert done.returncode == 1
    assert "unset JAX_PLATFORMS, which is 'nonsense'" in done.stdout


def test_tests_are_installed_without_the_compiler_of_tpus():
    extras = PROJECT["optional-dependencies"]
    assert not any("tpu" in text for text in extras["test"] + extras["all"])
    assert any("tpu" in text for text in extras["dev"])
