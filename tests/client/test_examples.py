"""Each example runs as its first line says, beside a real daemon."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from daemon import daemon

EXAMPLES = Path(__file__).parents[2] / "examples"
RUN_S = 60.0


def run(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_embedded_store() -> None:
    said = run("embedded.py").splitlines()
    assert said == [
        "stored: 4",
        "known of the longer prompt: 4 of 7 blocks",
        "got: 4 all hits: True same bytes: True",
    ]


def test_those_that_need_a_daemon(tmp_path: Path) -> None:
    with daemon(tmp_path, "--dram", "64MiB") as running:
        said = run("two_engines.py", running.target).splitlines()
        assert said == [
            "prefill: stored 32 blocks, there already: 0",
            "decode: found 32 of 32 blocks, right: True",
        ]
        said = run("hints.py", running.target).splitlines()
        assert said == [
            "pinned: 8 expected again: 8 over: 8",
            "pinned blocks in the store: 8",
        ]


def test_all_are_named_in_their_table() -> None:
    table = (EXAMPLES / "README.md").read_text()
    assert all(f"[{path.name}]" in table for path in EXAMPLES.glob("*.py"))
