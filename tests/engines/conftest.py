"""Processes that the tests of the engines share: starting one costs seconds."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from daemon import daemon
from kvstore_engines.launch import Workers, workers

if TYPE_CHECKING:
    from engines.smollm2 import Reference

TIMEOUT_S = 60.0

# Before torch is imported, here or in a worker: where something else runs too, threads that spin
# while they wait for each other make these tiny models six times as slow.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real daemon's target."""
    with daemon(tmp_path_factory.mktemp("store"), "--dram", "256MiB") as running:
        yield running.target


@pytest.fixture(scope="session")
def prefill() -> Iterator[Workers]:
    """An engine process."""
    with workers(timeout_s=TIMEOUT_S) as started:
        yield started


@pytest.fixture(scope="session")
def decode() -> Iterator[Workers]:
    """Another engine process."""
    with workers(timeout_s=TIMEOUT_S) as started:
        yield started


@pytest.fixture(scope="session")
def ranks() -> Iterator[Workers]:
    """Two processes that are the ranks of one engine."""
    with workers(2, timeout_s=TIMEOUT_S) as started:
        yield started


@pytest.fixture(scope="session")
def smollm2() -> "Reference":
    """SmolLM2, and what transformers says."""
    from engines.smollm2 import load_reference

    return load_reference()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Gives (folder, transformers' model) of a tiny model by name; each is made once."""
    from engines.tiny import save_tiny

    made: dict[str, tuple[Path, Any]] = {}

    def get(name: str) -> tuple[Path, Any]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = (folder, save_tiny(name, folder))
        return made[name]

    return get
