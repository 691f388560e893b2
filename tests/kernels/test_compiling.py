"""Every kernel compiles for an H100 or H200 without one, within its bounds."""

from __future__ import annotations

import pytest
from kernels.compiles import compiled


@pytest.mark.timeout(600)
def test_all_kernels_compile_within_their_bounds() -> None:
    """Under the version of Triton that the project pins."""
    assert compiled()["triton"]
