"""Lets LMCache run in a vLLM without a GPU: it has no copies between its memory and such pages.

Only these copies are ours: vLLM's connector, LMCache's engine, look-ups and storage are as they
come. A page's bytes are opaque on a CPU, so pages are copied whole.
"""

from __future__ import annotations

import threading
from typing import Any

import lmcache.v1.gpu_connector as connectors
import torch
from llvmlite.binding import ffi
from lmcache.integration.vllm.lmcache_mp_connector import LMCacheMPConnector  # noqa: F401
from lmcache.integration.vllm.utils import ENGINE_NAME
from lmcache.v1.cache_engine import LMCacheEngineBuilder
from lmcache.v1.gpu_connector.gpu_connectors import GPUConnectorInterface
from lmcache.v1.metadata import LMCacheMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.lmcache_connector import LMCacheConnectorV1


class LMCacheOnCpu(LMCacheConnectorV1):
    """vLLM's connector itself, loaded by this module so that the copies are there."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        # vLLM leaves it to the process's end, which LMCache's threads would wait for.
        threading._register_atexit(LMCacheEngineBuilder.destroy, ENGINE_NAME)


class CpuCopies(GPUConnectorInterface):
    """Copies between an object [k and v, layer, token, width] and the pages of its tokens."""

    def __init__(self, metadata: LMCacheMetadata) -> None:
        self._shape = metadata.kv_shape

    def from_gpu(self, memory_obj: Any, start: int, end: int, **kwargs: Any) -> None:
        for pages, part, blocks in self._parts(memory_obj, start, end, **kwargs):
            part.copy_(pages[blocks].view(torch.uint8).flatten())

    def to_gpu(self, memory_obj: Any, start: int, end: int, **kwargs: Any) -> None:
        for pages, part, blocks in self._parts(memory_obj, start, end, **kwargs):
            pages[blocks] = part.view(pages.dtype).view(len(blocks), *pages.shape[1:])

    def batched_from_gpu(self, memory_objs: Any, starts: Any, ends: Any, **kwargs: Any) -> None:
        for one, start, end in zip(memory_objs, starts, ends, strict=True):
            self.from_gpu(one, start, end, **kwargs)

    def batched_to_gpu(
        self, memory_objs: Any = None, starts: Any = None, ends: Any = None, **kwargs: Any
    ) -> None:
        for one, start, end in zip(memory_objs, starts, ends, strict=True):
            self.to_gpu(one, start, end, **kwargs)

    def get_shape(self, num_tokens: int) -> torch.Size:
        layers, kv, _, heads, width = self._shape
        return torch.Size([kv, layers, num_tokens, heads * width])

    def _parts(
        self,
        memory_obj: Any,
        start: int,
        end: int,
        *,
        kvcaches: list[torch.Tensor],
        slot_mapping: torch.Tensor,
        **_: Any,
    ) -> Any:
        """Of each layer its pages, its part of the object's bytes, and the pages' numbers."""
        tokens = kvcaches[0].shape[2]
        blocks = slot_mapping[start:end:tokens] // tokens
        assert (end - start) % tokens == 0
        raw = memory_obj.raw_data[: memory_obj.get_size()]
        for pages, part in zip(kvcaches, raw.chunk(len(kvcaches)), strict=True):
            yield pages, part, blocks


def _create(config: Any, metadata: LMCacheMetadata, *_: Any, **__: Any) -> CpuCopies:
    return CpuCopies(metadata)


connectors.CreateGPUConnector = _create
# For a CPU vLLM looks into all objects of all modules, and at this one, which LMCache brings with
# numba, it fails: whatever attribute it is asked for, it takes for a function of its library's.
ffi.lib._fntab["__dict__"] = {}
