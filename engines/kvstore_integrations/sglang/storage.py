"""The store below SGLang's host memory, as a storage backend of HiCache. Translates only.

--enable-hierarchical-cache --hicache-mem-layout page_first --hicache-storage-backend dynamic
--hicache-storage-backend-extra-config '{"backend_name": "kvstore", "interface_v1": 1,
  "module_path": "kvstore_integrations.sglang.storage", "class_name": "KVStoreHiCache",
  "hicache_storage_pass_prefix_keys": true}'
"""

from __future__ import annotations

import logging
from typing import Any, NoReturn

import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolName,
)
from sglang.srt.observability.metrics_collector import StorageMetrics
from sglang.srt.runtime_context import get_server_args, get_serving
from sglang.version import __version__ as release

from kvstore_integrations.settings import ConfigurationError
from kvstore_integrations.sglang.facts import identity_of
from kvstore_integrations.sglang.pages import Copied, PageForm, PageStore
from kvstore_integrations.sglang.settings import PageSettings
from kvstore_integrations.spaces import Spaces

log = logging.getLogger(__name__)


class KVStoreHiCache(HiCacheStorage):
    """A `HiCacheStorage` whose pages are put and got where SGLang's host memory has them.

    Settings are those of `PageSettings`, beside SGLang's own in the extra configuration.
    `ConfigurationError` says what to change where they cannot work.
    """

    def __init__(self, storage_config: HiCacheStorageConfig, _kwargs: dict[str, Any]) -> None:
        self._config = storage_config
        self._settings = PageSettings.of_backend(storage_config.extra_config)
        self._weights = get_serving().weight_version
        self._client = self._settings.connect()
        self._pages: PageStore | None = None

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """See `HiCacheStorage`; opens the namespace of the pool's pages.

        `ConfigurationError` for a pool whose pages cannot be told apart from others', or which the
        store does not take.
        """
        super().register_mem_pool_host(mem_pool_host)
        form = _form(mem_pool_host)
        identity = identity_of(
            {**get_server_args().resolved_dict(), "weight_version": self._weights},
            self._config,
            mem_pool_host,
            form,
            release=release,
            model_revision=self._settings.model_revision,
        )
        spaces = Spaces(
            self._client, identity, block_bytes=form.block_bytes, block_tokens=form.tokens
        )
        tenant, ttl_s = self._settings.tenant, self._settings.ttl_s
        self._pages = PageStore(self._client, spaces, form, tenant=tenant, ttl_s=ttl_s)
        if self._settings.required:
            self._pages.open()
        log.info("pages of %d bytes as %d blocks of %s", form.nbytes, form.blocks, identity)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: str) -> None:
        """See `HiCacheStorage`; `ConfigurationError` for what a model keeps beside its KV."""
        if host_pool_name != PoolName.KV:
            raise ConfigurationError(
                f"this model or its draft keeps a pool `{host_pool_name}` beside its KV, which "
                "kvstore does not store. Serve it without --hicache-storage-backend, or without "
                "speculative decoding if that is what keeps it."
            )
        super().register_mem_host_pool_v2(host_pool, host_pool_name)

    def batch_exists(
        self,
        keys: list[str],
        extra_info: HiCacheStorageExtraInfo | None = None,  # noqa: ARG002
    ) -> int:
        """See `HiCacheStorage`; makes no call to the store."""
        pages = self._usable()
        return pages.count_leading(keys) if pages else 0

    def exists(self, key: str) -> bool:
        """See `HiCacheStorage`."""
        return self.batch_exists([key]) == 1

    def batch_get_v1(
        self,
        keys: list[str],
        host_indices: torch.Tensor,
        extra_info: HiCacheStorageExtraInfo | None = None,  # noqa: ARG002
    ) -> list[bool]:
        """See `HiCacheStorage`; behind the first page that is missing, none is read."""
        pages = self._usable()
        if pages is None:
            return [False] * len(keys)
        return pages.load(keys, self.mem_pool_host.get_page_buffer_meta(host_indices)[0])

    def batch_set_v1(
        self,
        keys: list[str],
        host_indices: torch.Tensor,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> list[bool]:
        """See `HiCacheStorage`; of ranks that have the same bytes, one writes."""
        pages = self._usable()
        if pages is None:
            return [False] * len(keys)
        if not self._config.is_storage_writer:
            return [True] * len(keys)
        addresses = self.mem_pool_host.get_page_buffer_meta(host_indices)[0]
        return pages.store(keys, addresses, extra_info.prefix_keys if extra_info else None)

    def clear(self) -> None:
        """See `HiCacheStorage`; forgets the pages of this model, rank and tenant for all engines.

        Errors are those of the client: SGLang tells them whoever asked it to clear.
        """
        if self._pages:
            self._pages.clear()

    def get_stats(self) -> StorageMetrics:
        """See `HiCacheStorage`; what was copied since the last call."""
        metrics = StorageMetrics()
        for copied in self._pages.copies() if self._pages else ():
            if copied.stored:
                metrics.backup_pgs.append(copied.pages)
                metrics.backup_bandwidth.append(_gigabytes_per_second(copied))
            else:
                metrics.prefetch_pgs.append(copied.pages)
                metrics.prefetch_bandwidth.append(_gigabytes_per_second(copied))
        return metrics

    def close(self) -> None:
        """Ends the connection; SGLang makes no further calls."""
        if self._pages:
            self._pages.close()
        self._client.close()

    def get(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Not answered, nor `batch_get`, `set` and `batch_set`: `interface_v1` replaces them."""
        raise NotImplementedError("kvstore copies pages through interface_v1 only")

    batch_get = set = batch_set = get

    # -- inside ------------------------------------------------------------------------

    def _usable(self) -> PageStore | None:
        """The pages, as long as they are those of the weights that the engine began with."""
        if self._weights is None:
            return None
        now = get_serving().weight_version
        if now != self._weights:
            log.error(
                "the weights are another version, %s: pages are neither stored nor loaded any "
                "more. Attach the storage backend again, with another `model_revision`.",
                now,
            )
            self._weights = None
            return None
        return self._pages


def _form(pool: Any) -> PageForm:
    """How the pool's pages lie in it; `ConfigurationError` where it does not tell."""
    try:
        meta = pool.get_page_buffer_meta(torch.arange(pool.page_size))
    except (ValueError, NotImplementedError, AttributeError) as error:
        raise ConfigurationError(
            f"the pages of {type(pool).__name__} cannot be copied where they lie: {error}. Choose "
            "another --hicache-mem-layout: page_first, page_first_direct or layer_first."
        ) from error
    if not meta or not meta[0]:
        raise ConfigurationError(
            f"{type(pool).__name__} holds no pages by itself; kvstore stores plain KV and MLA only"
        )
    return PageForm(tokens=pool.page_size, pieces=tuple(map(int, meta[1])))


def _gigabytes_per_second(copied: Copied) -> float:
    return copied.nbytes / max(copied.seconds, 1e-9) / 1e9
