"""As much of SGLang's modules as our backend imports, for tests that have no SGLang."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

RELEASE = "0.5.23"


@dataclass
class StorageConfig:
    """What a backend is told of its ranks."""

    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    attn_cp_rank: int = 0
    attn_cp_size: int = 1
    is_mla_model: bool = False
    extra_config: dict[str, Any] | None = None

    @property
    def is_storage_writer(self) -> bool:
        return not self.is_mla_model or self.tp_rank == 0


@dataclass
class StorageMetrics:
    prefetch_pgs: list[int] = field(default_factory=list)
    backup_pgs: list[int] = field(default_factory=list)
    prefetch_bandwidth: list[float] = field(default_factory=list)
    backup_bandwidth: list[float] = field(default_factory=list)


class HiCacheStorage:
    """The base class, as far as ours needs one."""

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        self.mem_pool_host = mem_pool_host

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: str) -> None:
        self.registered_pools = {host_pool_name: host_pool}

    def on_host_pools_registered(self) -> None: ...


class Double:
    """A running SGLang, as our backend sees it. module: our `storage`, loaded with it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any]) -> None:
        self.arguments, self.serving = arguments, SimpleNamespace(weight_version="default")
        modules = {
            "sglang": {},
            "sglang.srt": {},
            "sglang.srt.mem_cache": {},
            "sglang.srt.mem_cache.hicache_storage": {
                "HiCacheStorage": HiCacheStorage,
                "HiCacheStorageConfig": StorageConfig,
                "HiCacheStorageExtraInfo": SimpleNamespace,
                "PoolName": SimpleNamespace(KV="kv"),
            },
            "sglang.srt.observability": {},
            "sglang.srt.observability.metrics_collector": {"StorageMetrics": StorageMetrics},
            "sglang.srt.runtime_context": {
                "get_server_args": lambda: SimpleNamespace(resolved_dict=lambda: self.arguments),
                "get_serving": lambda: self.serving,
            },
            "sglang.version": {"__version__": RELEASE},
        }
        for name, content in modules.items():
            module = ModuleType(name)
            vars(module).update(content)
            monkeypatch.setitem(sys.modules, name, module)
        ours = "kvstore_integrations.sglang.storage"
        monkeypatch.delitem(sys.modules, ours, raising=False)
        self.module = importlib.import_module(ours)
        monkeypatch.delitem(sys.modules, ours)


def save_weights(folder: Path, content: bytes = b"weights") -> Path:
    """A checkpoint's folder, as far as its identity goes."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    weights = (2).to_bytes(8, "little") + b"{}" + content
    (folder / "model.safetensors").write_bytes(weights)
    return folder
