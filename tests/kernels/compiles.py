"""All kernels compiled in a process of its own, as without an interpreter and a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache"


def compiled(*before: Path) -> dict[str, Any]:
    """What `kvstore_kernels.compiling` found, with these folders before the installed packages."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "kvstore_kernels.compiling"],
        env={
            **environment,
            "PYTHONPATH": os.pathsep.join(map(str, (*before, ROOT / "kernels"))),
            "TRITON_CACHE_DIR": str(CACHE / "triton-cache"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert len(found) > 30
    return found
