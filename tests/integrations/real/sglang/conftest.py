"""What all these tests share: a model, and the tokens that SGLang makes of it without us."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from integrations.models import save_llama
from integrations.real.sglang.engine import engine
from integrations.real.sglang.prompts import SEEDS, prompts, tokens

from daemon import Daemon, daemon


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def right(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[list[int]]]:
    """The tokens of SGLang without us, by the seed of the prompts."""
    log = tmp_path_factory.mktemp("plain") / "log"
    with engine(log, model_path=str(model), disable_radix_cache=True) as plain:
        return {seed: tokens(plain, prompts(seed)) for seed in SEEDS}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Daemon]:
    with daemon(tmp_path, "--dram", "256MiB") as running:
        yield running
