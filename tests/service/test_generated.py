import subprocess
import sys
from pathlib import Path

import pytest

from tests.grpc_tools import require_grpc_tools

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parents[2]


def test_the_committed_code_is_what_the_protos_generate():
    require_grpc_tools()
    done = subprocess.run(
        [sys.executable, "protos/generate.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
