"""The store as LMCache's remote storage, for engines that run LMCache in their own process.

Translates only. In LMCache's configuration:

remote_storage_plugins: ["kvstore"]
pre_caching_hash_algorithm: sha256_cbor
extra_config:
  remote_storage_plugin.kvstore.module_path: kvstore_integrations.lmcache.remote
  remote_storage_plugin.kvstore.class_name: KVStoreConnectorAdapter
"""

from __future__ import annotations

import asyncio
import functools
import importlib.util
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.exceptions import IrrecoverableException
from lmcache.v1.memory_management import MemoryObj
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend.connector import ConnectorAdapter, ConnectorContext
from lmcache.v1.storage_backend.connector.base_connector import RemoteConnector
from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend

from kvstore.errors import KVStoreError
from kvstore_integrations.lmcache.chunks import ChunkStore
from kvstore_integrations.lmcache.facts import machine_facts
from kvstore_integrations.lmcache.names import chunk_name, kind_of
from kvstore_integrations.lmcache.objects import U8, Objects
from kvstore_integrations.lmcache.settings import LMCacheSettings, check_engine
from kvstore_integrations.lmcache.shelves import Shelves
from kvstore_integrations.settings import ConfigurationError

_SCHEME = "plugin://"
_LMCACHES = ("module_path", "class_name")  # what LMCache itself reads of a plugin's settings
Chunks = list[MemoryObj | None]
R = TypeVar("R")


class FatalConfigurationError(ConfigurationError, IrrecoverableException):
    """A `ConfigurationError` as LMCache has to see it: after another error it would go on."""


class KVStoreConnectorAdapter(ConnectorAdapter):
    """Makes the connector for `plugin://kvstore` and `plugin://kvstore.<instance>`."""

    def __init__(self) -> None:
        super().__init__(f"{_SCHEME}kvstore")

    def create_connector(self, context: ConnectorContext) -> KVStoreConnector:
        """See `ConnectorAdapter`; `FatalConfigurationError` says what to change."""
        return KVStoreConnector(
            context.plugin_name or context.url.removeprefix(_SCHEME),
            context.local_cpu_backend,
            context.config,
            context.metadata,
        )


class KVStoreConnector(RemoteConnector):
    """A `RemoteConnector`: chunks go from LMCache's memory to the store, and back, as they lie.

    plugin: its name in the configuration, under which its settings are, see `LMCacheSettings`.
    """

    def __init__(
        self,
        plugin: str,
        local_cpu_backend: LocalCPUBackend,
        config: LMCacheEngineConfig,
        metadata: LMCacheMetadata,
    ) -> None:
        super().__init__(config, metadata)
        self._memory = local_cpu_backend
        where = f"remote_storage_plugin.{plugin}"
        try:
            check_engine(
                hash_algorithm=config.pre_caching_hash_algorithm,
                has_vllm=importlib.util.find_spec("vllm") is not None,
                serde=config.remote_serde,
                layerwise=config.use_layerwise,
            )
            settings = LMCacheSettings.read(_settings_of(config, where), "its settings")
            self._client = settings.connect()
            self._open(settings, config, metadata)
        except (ConfigurationError, KVStoreError) as error:
            raise FatalConfigurationError(f"{where}: {error}") from error
        self._finds, self._gets, self._puts = (
            ThreadPoolExecutor(1, f"kvstore-{work}") for work in ("find", "get", "put")
        )

    async def exists(self, key: CacheEngineKey) -> bool:
        """See `RemoteConnector`."""
        return await self.batched_async_contains("", [key]) == 1

    def exists_sync(self, key: CacheEngineKey) -> bool:
        """See `RemoteConnector`."""
        return self.batched_contains([key]) == 1

    async def get(self, key: CacheEngineKey) -> MemoryObj | None:
        """See `RemoteConnector`."""
        return (await self.batched_get([key]))[0]

    async def put(self, key: CacheEngineKey, memory_obj: MemoryObj) -> None:
        """See `RemoteConnector`; its caller gives the memory back."""
        await self.batched_put([key], [memory_obj])

    async def list(self) -> list[str]:
        """See `RemoteConnector`; nothing, because the store keeps no keys that can be read."""
        return []

    async def close(self) -> None:
        """See `RemoteConnector`; waits for the copies that have begun."""
        await asyncio.get_running_loop().run_in_executor(None, self._close)

    def support_batched_get(self) -> bool:
        """See `RemoteConnector`."""
        return True

    async def batched_get(self, keys: Sequence[CacheEngineKey]) -> Sequence[MemoryObj | None]:
        """See `RemoteConnector`."""
        work = functools.partial(self._get, [chunk_name(key) for key in keys])
        getting = asyncio.get_running_loop().run_in_executor(self._gets, work)
        try:
            return await asyncio.shield(getting)
        except asyncio.CancelledError:  # the copy goes on, but nobody will have it
            getting.add_done_callback(_give_back)
            raise

    def support_batched_put(self) -> bool:
        """See `RemoteConnector`."""
        return True

    async def batched_put(
        self, keys: Sequence[CacheEngineKey], memory_objs: Sequence[MemoryObj]
    ) -> None:
        """See `RemoteConnector`; its caller gives the memory back."""
        names = [chunk_name(key) for key in keys]
        work = functools.partial(self._chunks.put, names, [_row(one) for one in memory_objs])
        # Where the caller gives up, it still must not give the memory back before the copy's end.
        await _to_the_end(asyncio.get_running_loop().run_in_executor(self._puts, work))

    def support_batched_async_contains(self) -> bool:
        """See `RemoteConnector`."""
        return True

    async def batched_async_contains(
        self,
        lookup_id: str,  # noqa: ARG002
        keys: Sequence[CacheEngineKey],
        pin: bool = False,  # noqa: ARG002
    ) -> int:
        """See `RemoteConnector`; nothing is pinned."""
        work = functools.partial(self.batched_contains, keys)
        return await asyncio.get_running_loop().run_in_executor(self._finds, work)

    def support_batched_get_non_blocking(self) -> bool:
        """See `RemoteConnector`."""
        return True

    async def batched_get_non_blocking(
        self,
        lookup_id: str,  # noqa: ARG002
        keys: Sequence[CacheEngineKey],
    ) -> Sequence[MemoryObj]:
        """See `RemoteConnector`."""
        came = await self.batched_get(keys)
        end = came.index(None) if None in came else len(came)
        for one in came[end:]:
            if one is not None:
                one.ref_count_down()
        return [one for one in came[:end] if one is not None]

    def support_batched_contains(self) -> bool:
        """See `RemoteConnector`."""
        return True

    def batched_contains(self, keys: Sequence[CacheEngineKey]) -> int:
        """See `RemoteConnector`; reads the shared index."""
        return self._chunks.count([chunk_name(key) for key in keys])

    def remove_sync(self, key: CacheEngineKey) -> bool:
        """See `RemoteConnector`."""
        return self._chunks.drop(chunk_name(key))

    # -- inside ------------------------------------------------------------------------

    def _open(
        self, settings: LMCacheSettings, config: LMCacheEngineConfig, metadata: LMCacheMetadata
    ) -> None:
        form = self.meta_fmt.name
        whole = kind_of(metadata.model_name, self.meta_shapes, self.meta_dtypes, form)
        facts = {**machine_facts(), "kv_shape": list(metadata.kv_shape)}
        self._shelves = Shelves(
            self._client, "lmcache-engine", settings.identify, facts, tenant=settings.tenant
        )
        # Of several tensors in an object LMCache shortens the first only.
        parts = config.save_unfull_chunk and len(self.meta_shapes) == 1
        objects = Objects(self._client, self._shelves, leases=False)
        self._chunks = ChunkStore(objects, whole, parts=parts)
        try:
            if settings.required:
                for kind in (whole, *self._chunks.parts):
                    self._shelves.open_now(kind)
        except BaseException:
            self._shelves.close()
            self._client.close()
            raise

    def _get(self, names: Sequence[bytes]) -> Chunks:
        """What is there of the chunks, in memory of LMCache's."""
        there = [i for i, hit in enumerate(self._chunks.find(names)) if hit]
        made: Chunks = [None] * len(names)
        for i in there:
            # Waiting for memory could take for ever, and stop all others.
            made[i] = self._memory.allocate(
                self.meta_shapes, self.meta_dtypes, self.meta_fmt, busy_loop=False
            )
        some = [(i, one) for i, one in enumerate(made) if one is not None]
        came = self._chunks.get([names[i] for i, _ in some], [_row(one) for _, one in some])
        for (i, one), nbytes in zip(some, came, strict=True):
            made[i] = self.reshape_partial_chunk(one, nbytes) if nbytes else None
            if not nbytes:
                one.ref_count_down()
        return made

    def _close(self) -> None:
        for pool in (self._finds, self._gets, self._puts):
            pool.shutdown(wait=True, cancel_futures=True)
        self._shelves.close()
        self._client.close()


def _settings_of(config: LMCacheEngineConfig, where: str) -> dict[str, Any]:
    """What the user set below `where`, less what LMCache itself reads there."""
    own = {
        name.removeprefix(f"{where}."): value
        for name, value in (config.extra_config or {}).items()
        if name.startswith(f"{where}.")
    }
    return {name: value for name, value in own.items() if name not in _LMCACHES}


def _row(one: MemoryObj) -> U8:
    """The object's bytes, where they lie."""
    return np.frombuffer(one.byte_array.cast("B"), np.uint8)


async def _to_the_end(copy: asyncio.Future[R]) -> R:
    """Waits for a copy also where the task is cancelled, which it learns of afterwards."""
    try:
        return await asyncio.shield(copy)
    except asyncio.CancelledError:
        await asyncio.wait([copy])
        raise


def _give_back(got: asyncio.Future[Chunks]) -> None:
    if not got.cancelled() and got.exception() is None:
        for one in got.result():
            if one is not None:
                one.ref_count_down()
