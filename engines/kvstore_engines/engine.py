"""Continuous batching with greedy decoding, and prefixes taken from a block store."""

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from kvstore_engines.attention import AttentionBackend, TorchAttention, make_batch
from kvstore_engines.checkpoint import load_checkpoint
from kvstore_engines.models import build_model
from kvstore_engines.store_port import BlockStore, GetResult

log = logging.getLogger(__name__)
MISS = GetResult(0, None)


@dataclass(frozen=True)
class Result:
    """A finished request: the generated tokens and where its prefix came from."""

    request_id: int
    token_ids: tuple[int, ...]
    prompt_tokens: int
    matched_tokens: int
    tier: str | None
    time_to_first_token_s: float
    stored_blocks: int


@dataclass
class _Sequence:
    """A request in flight; `computed` leading tokens have their KV in the pages."""

    request_id: int
    token_ids: list[int]
    prompt_tokens: int
    max_new_tokens: int
    submitted: float
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    match: GetResult = MISS
    offered_blocks: int = 0
    stored_blocks: int = 0
    first_token_s: float = 0.0


class Engine:
    """Runs a checkpoint on the CPU; used from one thread.

    Each step prefills at most one waiting request and then decodes one token for every running
    one. A request's pages are reserved when it is admitted, so that a running one never stalls.
    """

    def __init__(
        self,
        model_folder: Path,
        *,
        store: BlockStore | None,
        num_pages: int,
        block_tokens: int = 16,
        dtype: torch.dtype = torch.float32,
        attention: AttentionBackend | None = None,
    ) -> None:
        checkpoint = load_checkpoint(model_folder, dtype)
        self.config = checkpoint.config
        self.block_tokens = block_tokens
        self._model = build_model(checkpoint, attention or TorchAttention())
        self.pool = self._model.make_pool(num_pages, block_tokens, dtype)
        self._store = store
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._next_id = 0

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._waiting or self._running)

    def submit(self, prompt_ids: Sequence[int], max_new_tokens: int) -> int:
        """Queue a request and give its id; ValueError if it could never run."""
        if not prompt_ids or max_new_tokens < 1:
            raise ValueError("a request needs a prompt token and at least one new token")
        if not all(0 <= token < self.config.vocab_size for token in prompt_ids):
            raise ValueError(f"prompt tokens must be in [0, {self.config.vocab_size})")
        total = len(prompt_ids) + max_new_tokens
        if total > self.config.max_positions:
            raise ValueError(f"{total} tokens exceed the model's {self.config.max_positions}")
        sequence = _Sequence(
            self._next_id, list(prompt_ids), len(prompt_ids), max_new_tokens, time.perf_counter()
        )
        if self._pages_needed(sequence) > self.pool.num_pages:
            raise ValueError(f"{total} tokens exceed the pool of {self.pool.num_pages} pages")
        self._next_id += 1
        self._waiting.append(sequence)
        return sequence.request_id

    @torch.inference_mode()
    def step(self) -> list[Result]:
        """Prefill one request if there is room, decode the others; give what finished."""
        decoding = list(self._running)
        if self._waiting and self._pages_needed(self._waiting[0]) <= self.pool.free_pages:
            self._prefill(self._waiting.popleft())
        if decoding:
            self._forward(decoding)
        return self._retire()

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int = 16) -> list[Result]:
        """Run the prompts to the end; results come in the order of the prompts."""
        ids = [self.submit(prompt, max_new_tokens) for prompt in prompts]
        done: dict[int, Result] = {}
        while self.busy:
            done.update((result.request_id, result) for result in self.step())
        return [done[request_id] for request_id in ids]

    def _pages_needed(self, sequence: _Sequence) -> int:
        # The last token generated is never fed back, so its KV needs no room.
        return -(-(sequence.prompt_tokens + sequence.max_new_tokens - 1) // self.block_tokens)

    def _prefill(self, sequence: _Sequence) -> None:
        sequence.pages = self.pool.allocate(self._pages_needed(sequence))
        self._running.append(sequence)
        sequence.match = self._fetch(sequence)
        sequence.computed = sequence.match.n_hit * self.block_tokens
        sequence.offered_blocks = sequence.match.n_hit
        self._forward([sequence])
        sequence.first_token_s = time.perf_counter() - sequence.submitted

    def _forward(self, sequences: list[_Sequence]) -> None:
        """Compute what each sequence has not computed, append its next token, offer its blocks."""
        batch = make_batch(
            [(s.pages, s.computed, len(s.token_ids)) for s in sequences], self.block_tokens
        )
        fed = [token for s in sequences for token in s.token_ids[s.computed :]]
        logits = self._model.forward(torch.tensor(fed), batch, self.pool)
        for sequence, token in zip(sequences, logits.argmax(-1).tolist(), strict=True):
            sequence.computed = len(sequence.token_ids)
            sequence.token_ids.append(token)
            self._offer(sequence)

    def _fetch(self, sequence: _Sequence) -> GetResult:
        """Take the prompt's leading blocks from the store; any failure is a miss.

        One prompt token always stays uncomputed: its forward pass yields the first new token.
        """
        blocks = (sequence.prompt_tokens - 1) // self.block_tokens
        if self._store is None or blocks == 0:
            return MISS
        try:
            hashes = self._store.chain(sequence.token_ids)[:blocks]
            pages = [self.pool.page_bytes(page) for page in sequence.pages[:blocks]]
            found = self._store.get_into(hashes, pages)
        except Exception:
            log.warning("get failed, prefix is computed instead", exc_info=True)
            return MISS
        if not 0 < found.n_hit <= blocks:
            return MISS
        return found

    def _offer(self, sequence: _Sequence) -> None:
        """Put the blocks completed since the last offer; a failure leaves them not stored."""
        first, last = sequence.offered_blocks, sequence.computed // self.block_tokens
        if self._store is None or first == last:
            return
        sequence.offered_blocks = last
        try:
            hashes = self._store.chain(sequence.token_ids[: last * self.block_tokens])[first:last]
            pages = [self.pool.page_bytes(page) for page in sequence.pages[first:last]]
            sequence.stored_blocks += self._store.put(hashes, pages)
        except Exception:
            log.warning("put failed, blocks are not stored", exc_info=True)

    def _retire(self) -> list[Result]:
        finished = [s for s in self._running if self._finished(s)]
        self._running = [s for s in self._running if not self._finished(s)]
        for sequence in finished:
            self.pool.release(sequence.pages)
        return [self._result(s) for s in finished]

    def _finished(self, sequence: _Sequence) -> bool:
        new = len(sequence.token_ids) - sequence.prompt_tokens
        return new >= sequence.max_new_tokens or sequence.token_ids[-1] in self.config.eos_ids

    def _result(self, sequence: _Sequence) -> Result:
        return Result(
            request_id=sequence.request_id,
            token_ids=tuple(sequence.token_ids[sequence.prompt_tokens :]),
            prompt_tokens=sequence.prompt_tokens,
            matched_tokens=sequence.match.n_hit * self.block_tokens,
            tier=sequence.match.tier,
            time_to_first_token_s=sequence.first_token_s,
            stored_blocks=sequence.stored_blocks,
        )
