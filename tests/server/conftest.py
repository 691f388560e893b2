"""What several of the daemon's tests start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from gateway_rig import Served, serving


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """A gateway in this process."""
    with serving(tmp_path) as running:
        yield running
