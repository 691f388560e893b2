"""All benchmarks of the kernels, one after the other."""

from __future__ import annotations

import subprocess
import sys

PARTS = ("collation", "gqa", "fused", "flex", "mla", "launches", "hashing")


def main() -> None:
    """Each in a process of its own, so that none finds the memory another left; exits with 1 where
    one has failed."""
    failed = []
    for part in PARTS:
        command = [sys.executable, "-m", f"benchmarks.gpu.{part}"]
        if subprocess.run(command, check=False).returncode:
            failed.append(part)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
