"""LMCache's storage manager, as its server has one, over our adapter."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from integrations.lmcache_rig import WAIT_S, wait_until
from lmcache.v1.distributed.api import (
    GroupedObjectKeys,
    MemoryLayoutDesc,
    ObjectKey,
    PrefetchResult,
    PrefetchTaskSpec,
)
from lmcache.v1.distributed.config import parse_args
from lmcache.v1.distributed.internal_api import L2AdapterListener
from lmcache.v1.distributed.storage_manager import StorageManager

# Two groups of layers: of the second there is half, of another dtype.
LAYOUTS = {
    0: MemoryLayoutDesc([torch.Size([2, 4, 16, 64])], [torch.float16]),
    1: MemoryLayoutDesc([torch.Size([2, 2, 16, 32])], [torch.float32]),
}
RANKS = (0, 1)


class Manager(L2AdapterListener):
    """One storage manager and its only adapter; tells what came to the adapter's ears.

    adapter: how the configuration names it. params: its settings.
    """

    def __init__(
        self,
        adapter: Mapping[str, Any],
        *,
        l1_bytes: int = 8 << 20,
        **params: Any,
    ) -> None:
        spec = {"type": "plugin", **adapter, "adapter_params": params}
        config = parse_args(
            [
                f"--l1-size-gb={l1_bytes / (1 << 30)}",
                "--eviction-policy=noop",
                f"--l2-adapter={json.dumps(spec)}",
                "--no-l1-use-lazy",
            ]
        )
        # Else it is named after the process, which may have several managers here.
        config.l1_manager_config.memory_config.shm_name = ""
        self.manager = StorageManager(config)
        (self.adapter,) = self.manager._l2_adapters.values()
        self._changed = threading.Condition()
        self.stored: dict[ObjectKey, int] = {}
        self.adapter.register_listener(self)

    def on_l2_keys_stored(self, keys: list[ObjectKey], sizes: list[int]) -> None:
        with self._changed:
            self.stored.update(zip(keys, sizes, strict=True))
            self._changed.notify_all()

    def on_l2_keys_accessed(self, keys: list[ObjectKey]) -> None:
        """Nothing is told of it."""

    def on_l2_keys_deleted(self, keys: list[ObjectKey]) -> None:
        with self._changed:
            for key in keys:
                self.stored.pop(key, None)

    def write(self, keys: Sequence[ObjectKey]) -> None:
        """Writes the objects' own values, and waits until the adapter has stored them."""
        self.begin(keys)
        with self._changed:
            assert self._changed.wait_for(lambda: set(keys) <= set(self.stored), WAIT_S)

    def begin(self, keys: Sequence[ObjectKey]) -> None:
        """Writes the objects' own values to LMCache's memory."""
        for group, layout in LAYOUTS.items():
            some = [key for key in keys if key.object_group_id == group]
            reserved = self.manager.reserve_write(some, layout)
            assert len(reserved) == len(some)
            for key, one in reserved.items():
                one.tensor.copy_(values(key))
        self.manager.finish_write(list(keys))

    def clear(self) -> None:
        """Empties LMCache's own memory."""
        wait_until(lambda: self.manager.report_status()["is_healthy"] and self._idle())
        for l1 in self.manager._l1_managers_by_id.values():
            l1.clear(force=True)

    def prefetch(self, *rows: Sequence[ObjectKey], policy: Any = "prefix") -> PrefetchResult:
        """What is in LMCache's memory then, and read-locked."""
        groups = [
            GroupedObjectKeys(list(row), row[0].object_group_id, LAYOUTS[row[0].object_group_id])
            for row in rows
        ]
        spec = PrefetchTaskSpec(groups, fetching_policy=policy)
        handle = self.manager.submit_prefetch_task(spec)
        assert self.manager.wait_prefetch_status(handle, WAIT_S)
        result = self.manager.query_prefetch_status(handle)
        assert result is not None
        wait_until(lambda: self.adapter.report_status()["locked"] == 0)
        return result

    def check(self, keys: Sequence[ObjectKey]) -> None:
        """Compares prefetched objects with their values, and lets go of them."""
        with self.manager.read_prefetched_results(list(keys)) as objects:
            assert objects is not None
            for key, one in zip(keys, objects, strict=True):
                assert torch.equal(one.tensor, values(key))
        self.manager.finish_read_prefetched(list(keys))

    def close(self) -> None:
        self.manager.close()

    def _idle(self) -> bool:
        return all(
            controller.report_status()["in_flight_task_count"] == 0
            for controller in self.manager._store_controllers.values()
        )


OURS = {
    "module_path": "kvstore_integrations.lmcache.l2",
    "class_name": "KVStoreL2Adapter",
}


def chain(
    seed: int, n: int, *, rank: int = 0, group: int = 0, salt: str = "", model: str = "m"
) -> list[ObjectKey]:
    """The keys of n chunks that follow each other."""
    return [
        ObjectKey(
            chunk_hash=bytes([seed, i]) * 16,
            model_name=model,
            kv_rank=ObjectKey.ComputeKVRank(len(RANKS), rank, len(RANKS), rank),
            object_group_id=group,
            cache_salt=salt,
        )
        for i in range(n)
    ]


def rows_of(seed: int, n: int, **fields: Any) -> list[list[ObjectKey]]:
    """A prompt's objects, as a request asks for them."""
    return [chain(seed, n, rank=rank, group=group, **fields) for group in LAYOUTS for rank in RANKS]


def values(key: ObjectKey) -> torch.Tensor:
    """What the object of this name holds in all tests."""
    layout = LAYOUTS[key.object_group_id]
    made = torch.Generator().manual_seed(hash_of(key))
    return torch.randn(layout.shapes[0], generator=made).to(layout.dtypes[0])


def hash_of(key: ObjectKey) -> int:
    """A number of its own for each object."""
    fields = (key.kv_rank, key.object_group_id, *key.cache_salt.encode())
    return int.from_bytes(key.chunk_hash[:4], "big") * 31 + sum(
        (i + 1) * n for i, n in enumerate(fields)
    )
