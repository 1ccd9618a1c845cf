"""What is published: a wheel and an sdist, installed where nothing else of ours is."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.once, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[1]


def run(*words, **options):
    done = subprocess.run(
        list(map(str, words)), capture_output=True, text=True, timeout=250, **options
    )
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel that is built of it."""
    out = tmp_path_factory.mktemp("dist")
    build = (sys.executable, "-m", "hatchling", "build", "-d", out, "-t")
    run(*build, "sdist", cwd=ROOT)
    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as content:
        content.extractall(out, filter="data")
    source = out / sdist.name.removesuffix(".tar.gz")
    run(
        sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", out, cwd=source
    )
    (wheel,) = out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def bin_folder(built, tmp_path_factory):
    """Scripts of an environment that has the wheel, and borrows the rest of ours."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False)
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q")
    run(*pip, "--no-deps", "--no-index", built[1])
    lines = "import sysconfig; print(sysconfig.get_path('purelib'))"
    inside = Path(run(python, "-c", lines).strip())
    (inside / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    return scripts


def test_the_wheel_has_the_package_and_nothing_else(built):
    names = zipfile.ZipFile(built[1]).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"shardinit"}
    for wanted in ("py.typed", "v1/spec_pb2.py", "models/configs/gpt2.json"):
        assert f"shardinit/{wanted}" in names


def test_what_is_installed_runs(bin_folder, tmp_path):
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    options = {"cwd": tmp_path, "env": clean}
    where = "import shardinit; print(shardinit.__file__)"
    file = run(bin_folder / "python", "-c", where, **options).strip()
    assert Path(file).is_relative_to(bin_folder.parent)
    assert "shardinit" in run(bin_folder / "shardinit", "--version", **options)
    said = run(bin_folder / "shardinit", "plan", "gpt2", "--mesh", "data=8", **options)
    assert "124,439,808 elements" in said
    said = run(bin_folder / "python", "-m", "shardinit", "doctor", **options)
    assert "imported from a folder" not in said


def test_a_shell_completes_commands(bin_folder):
    asked = {"_SHARDINIT_COMPLETE": "complete_bash", "COMP_CWORD": "1"}
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment = clean | asked | {"COMP_WORDS": "shardinit ve"}
    assert run(bin_folder / "shardinit", env=environment).split() == ["verify"]
