"""The code generator for the wire, which only the oldest supported set-up brings."""

from importlib import metadata

import pytest


def require_grpc_tools():
    """Skips, and says so, where the version that made the committed code is absent."""
    try:
        found = metadata.version("grpcio-tools")
    except metadata.PackageNotFoundError:
        found = "none"
    if not found.startswith("1.80."):
        pytest.skip(f"grpcio-tools 1.80 generates the code; {found} is here")
