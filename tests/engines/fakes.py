"""Stand-ins for the engine's tests: a block store that is a dict, and attention that notes."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from kvstore_engines.attention import Batch, TorchAttention
from kvstore_engines.store_port import GetResult


class FakeBlockStore:
    """This is a fake: it keeps blocks in a dict and calls that the tier "fake"."""

    def __init__(self, block_tokens: int, *, broken: bool = False) -> None:
        self.block_tokens = block_tokens
        self.broken = broken
        self.blocks: dict[bytes, NDArray[np.uint8]] = {}
        self.hashed_tokens = 0
        self.puts: list[tuple[bytes, bytes, int]] = []  # (put id, parent, position)
        self.ended: list[bytes] = []

    def chain(self, token_ids: Sequence[int], parent: bytes = b"") -> NDArray[np.uint8]:
        size, out = self.block_tokens, []
        self.hashed_tokens += len(token_ids)
        for start in range(0, len(token_ids) // size * size, size):
            block = np.asarray(token_ids[start : start + size], dtype=np.int64).tobytes()
            parent = hashlib.sha256(parent + block).digest()
            out.append(np.frombuffer(parent, dtype=np.uint8))
        return np.array(out, dtype=np.uint8).reshape(-1, 32)

    def get_into(
        self, hashes: NDArray[np.uint8], destinations: Sequence[NDArray[np.uint8]]
    ) -> GetResult:
        self._fail_if_broken(destinations)
        hits = 0
        for key, destination in zip(hashes, destinations, strict=True):
            block = self.blocks.get(key.tobytes())
            if block is None:
                break
            destination[:] = block
            hits += 1
        return GetResult(hits, "fake" if hits else None)

    def put(
        self,
        hashes: NDArray[np.uint8],
        sources: Sequence[NDArray[np.uint8]],
        *,
        put_id: bytes,
        parent: bytes = b"",
        position: int = 0,
    ) -> int:
        self._fail_if_broken([])
        self.puts.append((put_id, parent, position))
        before = len(self.blocks)
        for key, source in zip(hashes, sources, strict=True):
            self.blocks.setdefault(key.tobytes(), source.copy())
        return len(self.blocks) - before

    def hint_session_ends(self, hashes: NDArray[np.uint8]) -> None:
        self._fail_if_broken([])
        self.ended.extend(key.tobytes() for key in hashes)

    def zero(self) -> None:
        """Spoil every block."""
        for block in self.blocks.values():
            block[:] = 0

    def _fail_if_broken(self, destinations: Sequence[NDArray[np.uint8]]) -> None:
        if self.broken:
            for destination in destinations:
                destination[:] = 0xFF  # float NaNs: they must not survive the failed get
            raise ConnectionError("the fake store is broken")


class NotingAttention(TorchAttention):
    """Attention that notes each forward pass: (new tokens, tokens in all) of its sequences."""

    def __init__(self) -> None:
        self.passes: list[list[tuple[int, int]]] = []
        self._last: Batch | None = None

    def grouped(
        self, q: torch.Tensor, layer_pages: torch.Tensor, batch: Batch, scale: float
    ) -> torch.Tensor:
        self._note(batch)
        return super().grouped(q, layer_pages, batch, scale)

    def latent(
        self, q: torch.Tensor, layer_pages: torch.Tensor, batch: Batch, scale: float, rank: int
    ) -> torch.Tensor:
        self._note(batch)
        return super().latent(q, layer_pages, batch, scale, rank)

    def _note(self, batch: Batch) -> None:
        if batch is not self._last:  # one note a pass, not one a layer
            self.passes.append([(span.tokens, span.context_len) for span in batch.spans])
        self._last = batch
