"""Every kernel compiles for an H100 or H200 without one, within its bounds, under the version of
Triton that the project pins and under the oldest that it supports."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache"
OLDEST = "3.6.0"


def oldest() -> Path:
    """A folder with the oldest Triton, which is installed there once."""
    folder = CACHE / f"triton-{OLDEST}"
    CACHE.mkdir(exist_ok=True)
    with (CACHE / "triton.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "triton").is_dir():
            command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps"]
            subprocess.run([*command, "--target", folder, f"triton=={OLDEST}"], check=True)
    return folder


@pytest.mark.timeout(600)
@pytest.mark.parametrize("version", ["pinned", OLDEST])
def test_all_kernels_compile_within_their_bounds(version: str) -> None:
    paths = [str(ROOT / "kernels"), *([str(oldest())] if version == OLDEST else [])]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "kvstore_kernels.compiling"],
        env={
            **environment,
            "PYTHONPATH": os.pathsep.join(reversed(paths)),
            "TRITON_CACHE_DIR": str(CACHE / "triton-cache"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert version in ("pinned", found["triton"])
    assert len(found) > 30
