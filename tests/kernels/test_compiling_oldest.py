"""The same under the oldest Triton that the project supports; a file of its own, because files are
what test processes share out."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest
from kernels.compiles import CACHE, compiled

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
def test_all_kernels_compile_within_their_bounds_under_the_oldest_triton() -> None:
    assert compiled(oldest())["triton"] == OLDEST
