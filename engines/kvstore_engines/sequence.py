"""One request on its way through the engine."""

from collections.abc import Sequence as Series
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvstore import limits
from kvstore.errors import InvalidArgument
from kvstore_engines.config import ModelConfig
from kvstore_engines.jobs import Result
from kvstore_engines.store_port import MISS, GetResult


@dataclass(slots=True, kw_only=True)
class Sequence:
    """A request in flight; `computed` leading tokens have their KV in the pages.

    pages_needed: how many it will fill; they are taken when it is admitted. page_table: these pages
    once more, (pages,) int64, as a batch takes them.
    chain: (n, 32) uint8, the hashes of its leading blocks so far; it only ever grows.
    """

    request_id: int
    token_ids: list[int]
    prompt_tokens: int
    max_new_tokens: int
    pages_needed: int
    submitted_s: float
    session_ends: bool = False
    pages: list[int] = field(default_factory=list)
    page_table: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    computed: int = 0
    chain: NDArray[np.uint8] = field(
        default_factory=lambda: np.empty((0, limits.KEY_BYTES), np.uint8)
    )
    match: GetResult = MISS
    offered_blocks: int = 0
    stored_blocks: int = 0
    time_to_first_token_s: float = 0.0

    def finished(self, eos_ids: frozenset[int]) -> bool:
        """Whether it has all its tokens, or has ended itself."""
        new = len(self.token_ids) - self.prompt_tokens
        return new >= self.max_new_tokens or self.token_ids[-1] in eos_ids

    def result(self, block_tokens: int) -> Result:
        """What the caller gets of it."""
        return Result(
            request_id=self.request_id,
            token_ids=tuple(self.token_ids[self.prompt_tokens :]),
            prompt_tokens=self.prompt_tokens,
            matched_tokens=self.match.n_hit * block_tokens,
            tier=self.match.tier,
            time_to_first_token_s=self.time_to_first_token_s,
            stored_blocks=self.stored_blocks,
        )


def check_request(prompt_ids: Series[int], max_new_tokens: int, config: ModelConfig) -> None:
    """InvalidArgument names what makes the request impossible for the model."""
    if not len(prompt_ids):  # an array has no truth value
        raise InvalidArgument("prompt_ids", "at least one token, please")
    if max_new_tokens < 1:
        raise InvalidArgument("max_new_tokens", f"must be at least 1, not {max_new_tokens}")
    if not all(0 <= token < config.vocab_size for token in prompt_ids):
        raise InvalidArgument("prompt_ids", f"tokens must be in [0, {config.vocab_size})")
    total = len(prompt_ids) + max_new_tokens
    if total > config.max_positions:
        raise InvalidArgument(
            "prompt_ids", f"{total} tokens in all exceed the model's {config.max_positions}"
        )
