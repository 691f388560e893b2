"""Tests that need a GPU; `make test-gpu` runs them, where one is."""

import pytest
import torch


@pytest.fixture(scope="session")
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.fail("these tests need a GPU that torch can use")
    return torch.device("cuda")
