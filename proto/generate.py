"""Generates the Python code of the .proto files: `python proto/generate.py [FOLDER]`.

The result lies beside the sources unless another folder is named, and is checked in, so that an
install needs no compiler.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

SOURCES = Path(__file__).parent
PROTOS = ("kvstore_proto/v1/kvstore.proto",)


def generate(target: Path) -> int:
    """Writes the modules and their types below `target`; the compiler's exit code."""
    # The environment's own plugin, also where its folder is not on the PATH.
    scripts = Path(sysconfig.get_path("scripts"))
    # In a process of its own: the compiler's libraries clash with those of NIXL.
    done = subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc"),
            f"--proto_path={SOURCES}",
            f"--plugin=protoc-gen-mypy={scripts / 'protoc-gen-mypy'}",
            f"--plugin=protoc-gen-mypy_grpc={scripts / 'protoc-gen-mypy_grpc'}",
            f"--python_out={target}",
            f"--grpc_python_out={target}",
            f"--mypy_out={target}",
            f"--mypy_grpc_out=only_sync:{target}",
            *PROTOS,
        ],
        check=False,
    )
    return done.returncode


if __name__ == "__main__":
    sys.exit(generate(Path(sys.argv[1]) if len(sys.argv) > 1 else SOURCES))
