"""Generates the Python code of the protobuf messages and of the gRPC stub.

The messages become ``shardinit/v1/*_pb2.py`` with their ``.pyi``; the stub becomes
``shardinit/service/wire/service_pb2_grpc.py``, since only the service knows gRPC. The
code is committed, so that installing shardinit needs no compiler. It is made by one
pinned minor version of grpcio-tools, because a newer protobuf runtime accepts older
generated code and never the other way round.

    python protos/generate.py           # writes the code
    python protos/generate.py --check   # exit 1 if the committed code is not current
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
TOOLS = "1.80."


def generate(out: Path) -> dict[Path, str]:
    """Runs the compiler on every proto, with ``out`` as its output folder.

    Returns:
      the content of each generated file by its path relative to the checkout.

    Raises:
      SystemExit: the compiler is missing, of another version, or refused a file.
    """
    try:
        found = version("grpcio-tools")
    except PackageNotFoundError:
        raise SystemExit(
            "grpcio-tools is missing: pip install 'shardinit[dev]'"
        ) from None
    if not found.startswith(TOOLS):
        raise SystemExit(f"grpcio-tools {found} found; {TOOLS}* makes this code")
    from grpc_tools import protoc  # only here: the messages above need no compiler

    names = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))
    folder = f"--proto_path={PROTOS}"
    well_known = f"--proto_path={files('grpc_tools') / '_proto'}"
    messages = [f"--python_out={out}", f"--pyi_out={out}"]
    if protoc.main(["protoc", folder, well_known, *messages, *names]):
        raise SystemExit("protoc refused the messages")
    services = [name for name in names if name.endswith("service.proto")]
    stub = [f"--grpc_python_out={out}"]
    if services and protoc.main(["protoc", folder, well_known, *stub, *services]):
        raise SystemExit("protoc refused the service")
    result = {}
    for path in sorted(p for p in out.rglob("*") if p.suffix in (".py", ".pyi")):
        target = path.relative_to(out)
        if path.name.endswith("_pb2_grpc.py"):
            target = Path("shardinit/service/wire") / path.name
        result[target] = path.read_text()
    return result


def stale(generated: dict[Path, str]) -> list[Path]:
    """Returns the files whose committed content differs, and those to be removed."""
    differing = [
        path
        for path, text in generated.items()
        if not (ROOT / path).is_file() or (ROOT / path).read_text() != text
    ]
    committed = {
        path.relative_to(ROOT)
        for pattern in ("v1/*_pb2.py*", "service/wire/*_pb2_grpc.py")
        for path in (ROOT / "shardinit").glob(pattern)
    }
    return sorted({*differing, *(committed - generated.keys())})


def main() -> int:
    """Writes the generated code, or with ``--check`` compares it; the exit code."""
    parser = argparse.ArgumentParser(description="Generate the protobuf code.")
    parser.add_argument(
        "--check", action="store_true", help="fail if the committed code is not current"
    )
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as folder:
        generated = generate(Path(folder))
    changed = stale(generated)
    for path in changed:
        if check:
            print(f"not current: {path}", file=sys.stderr)
        elif path in generated:
            (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
            (ROOT / path).write_text(generated[path])
            print(f"wrote {path}")
        else:
            (ROOT / path).unlink()
            print(f"removed {path}")
    if check and changed:
        print("run: python protos/generate.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
