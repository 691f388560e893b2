"""Continuous batching with greedy decoding, and prefixes taken from a block store."""

import time
from collections import deque
from collections.abc import Sequence as Series
from pathlib import Path

import numpy as np
import torch

from kvstore.errors import InvalidArgument
from kvstore_engines.attention import AttentionBackend, attention_for, make_batch
from kvstore_engines.checkpoint import load_checkpoint
from kvstore_engines.jobs import Result
from kvstore_engines.models import Model, build_model
from kvstore_engines.parallel import Parallel, SingleRank
from kvstore_engines.prefixes import Prefixes
from kvstore_engines.sequence import Sequence, check_request
from kvstore_engines.store_port import BlockStore
from kvstore_kernels.ranges import DECODE, PREFILL, span


class Engine:
    """Runs a checkpoint, or one rank's part of it, on a CPU or a GPU; used from one thread.

    Each step prefills at most one waiting request and then decodes one token for every running
    one. A request's pages are reserved when it is admitted, so that a running one never stalls.
    With `parallel`, every rank is an engine that is given the same requests in the same order,
    and a store of its own heads; of latent attention every rank has the whole cache, and rank 0
    puts it. Without `graphs`, a GPU gets the kernels of a decode step one by one instead of all at
    once. Raises CheckpointError for a checkpoint that cannot be run, and InvalidArgument.
    """

    def __init__(
        self,
        model_folder: Path,
        *,
        store: BlockStore | None,
        num_pages: int,
        block_tokens: int = 16,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        attention: AttentionBackend | None = None,
        parallel: Parallel | None = None,
        graphs: bool = True,
    ) -> None:
        for name, value in (("num_pages", num_pages), ("block_tokens", block_tokens)):
            if value < 1:
                raise InvalidArgument(name, f"must be at least 1, not {value}")
        self._device = torch.device(device)
        checkpoint = load_checkpoint(model_folder, dtype, self._device)
        self.config = checkpoint.config
        self.block_tokens = block_tokens
        self._parallel = parallel or SingleRank()
        backend = attention or attention_for(self._device)
        model = build_model(checkpoint, backend, self._parallel)
        self._model = self._graphed(model, backend) if graphs else model
        self.pool = self._model.make_pool(num_pages, block_tokens, dtype)
        writes = self.config.mla is None or self._parallel.rank == 0
        self._prefixes = Prefixes(store, self.pool, block_tokens, self._parallel, writes=writes)
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._next_id = 0

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._waiting or self._running)

    def submit(
        self, prompt_ids: Series[int], max_new_tokens: int, session_ends: bool = False
    ) -> int:
        """Queue a request and give its id; InvalidArgument if it could never run.

        session_ends: nobody will come back to this conversation; the store is told at its end.
        """
        pages_needed = self._check(prompt_ids, max_new_tokens)
        sequence = Sequence(
            request_id=self._next_id,
            token_ids=list(prompt_ids),
            prompt_tokens=len(prompt_ids),
            max_new_tokens=max_new_tokens,
            pages_needed=pages_needed,
            submitted_s=time.perf_counter(),
            session_ends=session_ends,
        )
        self._next_id += 1
        self._waiting.append(sequence)
        return sequence.request_id

    @torch.inference_mode()
    def step(self) -> list[Result]:
        """Prefill one request if there is room, decode the others; give what finished."""
        decoding = list(self._running)
        if self._waiting and self._waiting[0].pages_needed <= self.pool.free_pages:
            self._prefill(self._waiting.popleft())
        if decoding:
            with span(DECODE):
                self._forward(decoding)
        return self._retire()

    def generate(
        self, prompts: Series[Series[int]], max_new_tokens: int = 16, session_ends: bool = False
    ) -> list[Result]:
        """Run the prompts to the end; results come in the order of the prompts.

        InvalidArgument, before any of them is queued, if one could never run.
        """
        for prompt in prompts:
            self._check(prompt, max_new_tokens)
        ids = [self.submit(prompt, max_new_tokens, session_ends) for prompt in prompts]
        done: dict[int, Result] = {}
        while self.busy:
            done.update((result.request_id, result) for result in self.step())
        return [done[request_id] for request_id in ids]

    def _graphed(self, model: Model, attention: AttentionBackend) -> Model:
        """The model with its decode steps in CUDA graphs, where they can be."""
        if self._device.type != "cuda":
            return model
        from kvstore_engines.kernel_graphs import graphed

        return graphed(model, attention, self._parallel, self._device)

    def _check(self, prompt_ids: Series[int], max_new_tokens: int) -> int:
        """The pages that the request will fill; InvalidArgument if it could never run."""
        check_request(prompt_ids, max_new_tokens, self.config)
        # The last token is never fed back.
        needed = -(-(len(prompt_ids) + max_new_tokens - 1) // self.block_tokens)
        if needed > self.pool.num_pages:
            raise InvalidArgument(
                "num_pages", f"the request needs {needed} pages, of {self.pool.num_pages} in all"
            )
        return needed

    @span(PREFILL)
    def _prefill(self, sequence: Sequence) -> None:
        sequence.pages = self.pool.allocate(sequence.pages_needed)
        sequence.page_table = np.array(sequence.pages, np.int64)
        self._running.append(sequence)
        sequence.match = self._prefixes.fetch(sequence)
        sequence.computed = sequence.match.n_hit * self.block_tokens
        sequence.offered_blocks = sequence.match.n_hit
        self._forward([sequence])
        sequence.time_to_first_token_s = time.perf_counter() - sequence.submitted_s

    def _forward(self, sequences: list[Sequence]) -> None:
        """Compute what each sequence has not computed, append its next token, offer its blocks."""
        batch = make_batch(
            [(s.page_table, s.computed, len(s.token_ids)) for s in sequences],
            self.block_tokens,
            self._device,
        )
        fed = [token for s in sequences for token in s.token_ids[s.computed :]]
        logits = self._model.forward(torch.tensor(fed, device=self._device), batch, self.pool)
        for sequence, token in zip(sequences, self._choose(logits), strict=True):
            sequence.computed = len(sequence.token_ids)
            sequence.token_ids.append(token)
            self._prefixes.offer(sequence)

    def _choose(self, logits: torch.Tensor) -> list[int]:
        """The likeliest token of each row, as rank 0 sees it: a last bit that differs between
        ranks must not send them different ways."""
        chosen = logits.argmax(-1).cpu().numpy().astype(np.int64)
        agreed = self._parallel.broadcast_bytes(chosen.tobytes())
        tokens: list[int] = np.frombuffer(agreed, np.int64).tolist()
        return tokens

    def _retire(self) -> list[Result]:
        eos_ids = self.config.eos_ids
        finished = [s for s in self._running if s.finished(eos_ids)]
        self._running = [s for s in self._running if not s.finished(eos_ids)]
        for sequence in finished:
            if sequence.session_ends:
                self._prefixes.end(sequence)
            self.pool.release(sequence.pages)
        return [s.result(self.block_tokens) for s in finished]
