"""Prompts whose tokens are known, and engines asked for them."""

from __future__ import annotations

import numpy as np
from integrations.real.sglang.engine import PAGE, Engine

LENGTHS = (18 * PAGE + 7, 10 * PAGE + 1, 3 * PAGE)
SEEDS = range(20)
Prompts = list[list[int]]


def prompts(seed: int) -> Prompts:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 512, length).tolist() for length in LENGTHS]


def full_pages(asked: Prompts) -> int:
    """Tokens that a cache can hold: whole pages, less each prompt's last token."""
    return sum((len(prompt) - 1) // PAGE * PAGE for prompt in asked)


def tokens(engine: Engine, asked: Prompts) -> list[list[int]]:
    return [answer.tokens for answer in engine.run(*asked)]


def from_store(engine: Engine, asked: Prompts, right: list[list[int]]) -> int:
    """How many tokens came from the store, in an engine that knew nothing; the answers are
    `right`."""
    engine.forget()
    answers = engine.run(*asked)
    assert [answer.tokens for answer in answers] == right
    return sum(answer.stored for answer in answers)
