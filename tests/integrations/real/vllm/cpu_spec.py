"""A stand-in for vLLM's copies between its KV memory and its host memory, which need a GPU.

Everything else of the offloading connector, and all of the tier, is the real thing. One block a
chunk, one rank.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class CpuTieringSpec(TieringOffloadingSpec):
    """`TieringOffloadingSpec` for an engine whose KV memory is the host's."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        assert self.blocks_per_chunk == 1
        assert len(kv_caches.group_data_refs) == 1
        region = SharedOffloadRegion(
            engine_id=self._engine_id,
            num_chunks=self.num_chunks,
            rank=0,
            kv_bytes_per_chunk=self.kv_bytes_per_chunk,
            cpu_page_size=self.cpu_page_size_per_worker,
        )
        return CopyWorker(kv_caches, region)


class CopyWorker(OffloadingWorker):
    """Copies at once, in the caller's thread."""

    def __init__(self, kv_caches: CanonicalKVCaches, region: SharedOffloadRegion) -> None:
        self._region = region
        self._pairs = []
        for cache in kv_caches.tensors:
            host = region.create_next_worker_view(cache.page_size_bytes)
            self._pairs.append((cache.tensor[:, : cache.page_size_bytes], host))
        self._done: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, src_spec.block_ids, dst_spec.block_ids, to_host=True)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, dst_spec.block_ids, src_spec.block_ids, to_host=False)

    def get_finished(self) -> list[TransferResult]:
        done, self._done = self._done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        """Nothing is ever under way."""

    def shutdown(self) -> None:
        self._pairs = []
        self._region.cleanup()

    def _copy(self, job_id: int, blocks: Any, chunks: Any, *, to_host: bool) -> bool:
        begin = time.monotonic()
        blocks, chunks = torch.from_numpy(blocks).long(), torch.from_numpy(chunks).long()
        for cache, host in self._pairs:
            if to_host:
                host[chunks] = cache[blocks]
            else:
                cache[blocks] = host[chunks]
        nbytes = len(blocks) * sum(cache.shape[1] for cache, _ in self._pairs)
        self._done.append(TransferResult(job_id, True, nbytes, time.monotonic() - begin))
        return True
