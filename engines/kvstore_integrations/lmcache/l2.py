"""The store as a tier below the memory of LMCache's server. Translates only.

lmcache server ... --l2-adapter '{"type": "plugin",
  "module_path": "kvstore_integrations.lmcache.l2", "class_name": "KVStoreL2Adapter",
  "adapter_params": {"model_revision": "..."}}'
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.internal_api import L1MemoryDesc, L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
from lmcache.v1.memory_management import MemoryObj
from lmcache.v1.platform import create_event_notifier

from kvstore.errors import KVStoreError
from kvstore_client.targets import DataPath
from kvstore_integrations.lmcache.facts import machine_facts
from kvstore_integrations.lmcache.names import Item, Kind, item_of, kind_of, line_of, object_name
from kvstore_integrations.lmcache.objects import U8, Objects
from kvstore_integrations.lmcache.settings import L2Settings
from kvstore_integrations.lmcache.shelves import Shelves
from kvstore_integrations.lmcache.tier import ObjectTier

_STATUS_S = 0.5


class KVStoreL2Adapter(L2AdapterInterface):
    """An `L2AdapterInterface`: objects are put from and got into LMCache's memory as they lie.

    params: see `L2Settings`. l1_memory_desc: LMCache's memory. `ConfigurationError` says what to
    change where they cannot work.
    """

    def __init__(
        self, params: Mapping[str, Any], l1_memory_desc: L1MemoryDesc | None = None
    ) -> None:
        super().__init__()
        settings = L2Settings.read(params, "adapter_params")
        self._base, self._memory = _memory_of(l1_memory_desc)
        self._client = settings.connect()
        self._shelves = Shelves(
            self._client,
            "lmcache-server",
            settings.identify,
            machine_facts(),
            tenant=settings.tenant,
        )
        self._notifiers = [create_event_notifier() for _ in range(3)]
        stored, found, loaded = self._notifiers
        self._tier = ObjectTier(
            Objects(
                self._client,
                self._shelves,
                leases=self._client.data_path is DataPath.SHARED_MEMORY,
            ),
            on_stored=stored.notify,
            on_found=found.notify,
            on_loaded=loaded.notify,
            most_stores=settings.most_stores,
        )
        self._lock = threading.Lock()
        # Keys and sizes of what is being stored, by the tasks' numbers.
        self._storing: dict[int, tuple[list[ObjectKey], list[int]]] = {}
        self._closed = False

    def get_store_event_fd(self) -> int:
        """See `L2AdapterInterface`."""
        return int(self._notifiers[0].fileno())

    def get_lookup_and_lock_event_fd(self) -> int:
        """See `L2AdapterInterface`."""
        return int(self._notifiers[1].fileno())

    def get_load_event_fd(self) -> int:
        """See `L2AdapterInterface`."""
        return int(self._notifiers[2].fileno())

    def submit_store_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        """See `L2AdapterInterface`."""
        items, rows = self._items(keys, objects), [self._row(one) for one in objects]
        with self._lock:  # so that nobody takes the result before it is known whose it is
            number = self._tier.store(items, rows)
            self._storing[number] = list(keys), [len(row) for row in rows]
        return number

    def pop_completed_store_tasks(self) -> dict[int, L2StoreResult]:
        """See `L2AdapterInterface`."""
        results = {}
        for number, stored in self._tier.stored().items():
            with self._lock:
                keys, sizes = self._storing.pop(number)
            new = [sizes[i] for i in stored.new]
            if new:
                self._notify_keys_stored([keys[i] for i in stored.new], new)
            results[number] = L2StoreResult(stored.complete, sum(new))
        return results

    def submit_lookup_and_lock_task(
        self, keys: list[ObjectKey], group_layout_descs: dict[int, MemoryLayoutDesc]
    ) -> int:
        """See `L2AdapterInterface`."""
        layouts = {
            group: (tuple(layout.shapes), tuple(layout.dtypes))
            for group, layout in group_layout_descs.items()
        }
        return self._tier.look_up(
            [item_of(key, _kind_of(key.model_name, *layouts[key.object_group_id])) for key in keys]
        )

    def query_lookup_and_lock_result(self, task_id: int) -> Bitmap | None:
        """See `L2AdapterInterface`."""
        return _bitmap(self._tier.found(task_id))

    def submit_unlock(self, keys: list[ObjectKey]) -> None:
        """See `L2AdapterInterface`."""
        self._tier.unlock([object_name(key) for key in keys])

    def submit_load_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        """See `L2AdapterInterface`."""
        return self._tier.load(self._items(keys, objects), [self._row(one) for one in objects])

    def query_load_result(self, task_id: int) -> Bitmap | None:
        """See `L2AdapterInterface`."""
        return _bitmap(self._tier.loaded(task_id))

    def delete(self, keys: list[ObjectKey]) -> None:
        """See `L2AdapterInterface`; waits for the store."""
        chains: dict[tuple[str, Any], list[ObjectKey]] = {}
        for key in keys:
            chains.setdefault((key.model_name, line_of(key)), []).append(key)
        for (model, line), some in chains.items():
            nbytes = self._tier.drop(model, line, [object_name(key) for key in some])
            if nbytes:
                self._notify_keys_deleted(some, [nbytes] * len(some))

    def report_status(self) -> dict[str, Any]:
        """See `L2AdapterInterface`. A store that is away makes misses, and nothing ill."""
        try:
            version = self._client.info(timeout_s=_STATUS_S).version
        except KVStoreError as error:
            version = str(error)
        return {
            "is_healthy": not self._closed,
            "type": type(self).__name__,
            "target": self._client.target,
            "data_path": self._client.data_path.value,
            "store": version,
            "locked": self._tier.locked,
        }

    def close(self) -> None:
        """See `L2AdapterInterface`. No copy touches LMCache's memory afterwards."""
        if self._closed:
            return
        self._closed = True
        self._tier.close()
        self._shelves.close()
        self._client.close()
        for notifier in self._notifiers:
            notifier.close()

    def _items(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> list[Item]:
        return [
            item_of(key, _kind_of(key.model_name, tuple(one.get_shapes()), tuple(one.get_dtypes())))
            for key, one in zip(keys, objects, strict=True)
        ]

    def _row(self, one: MemoryObj) -> U8:
        """The object's bytes, where they lie."""
        at, size = one.data_ptr - self._base, one.get_size()
        if at >= 0 and at + size <= len(self._memory):
            return self._memory[at : at + size]
        return np.frombuffer(one.byte_array.cast("B"), np.uint8)  # of another memory


@functools.lru_cache(maxsize=1024)
def _kind_of(model: str, shapes: tuple[torch.Size, ...], dtypes: tuple[torch.dtype, ...]) -> Kind:
    return kind_of(model, shapes, dtypes)


def _memory_of(desc: L1MemoryDesc | None) -> tuple[int, U8]:
    """Where LMCache's memory begins, and all of it as bytes; none where it does not say."""
    if desc is None:
        return 0, np.empty(0, np.uint8)
    memory = (ctypes.c_uint8 * desc.size).from_address(desc.ptr)
    return desc.ptr, np.ctypeslib.as_array(memory)


def _bitmap(hits: list[bool] | None) -> Bitmap | None:
    if hits is None:
        return None
    made = Bitmap(len(hits))
    for i, hit in enumerate(hits):
        if hit:
            made.set(i)
    return made
