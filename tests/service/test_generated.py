import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_committed_code_is_what_the_protos_generate():
    try:
        version = metadata.version("grpcio-tools")
    except metadata.PackageNotFoundError:
        version = "none"
    if not version.startswith("1.80."):
        pytest.skip(f"grpcio-tools 1.80 generates the code; {version} is here")
    done = subprocess.run(
        [sys.executable, "protos/generate.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
