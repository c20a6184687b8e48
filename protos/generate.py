"""Regenerates the committed protobuf code beside the .proto files; `make check` fails if that changes anything."""

import sys
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).parent
WELL_KNOWN = Path(protoc.__file__).parent / "_proto"


def main() -> int:
    """Runs protoc on every .proto under jest_proto and returns its exit status."""
    sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("jest_proto/**/*.proto"))
    outputs = (f"--{kind}_out={ROOT}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc"))
    return int(protoc.main(["protoc", f"-I{ROOT}", f"-I{WELL_KNOWN}", *outputs, *sources]))


if __name__ == "__main__":
    sys.exit(main())
