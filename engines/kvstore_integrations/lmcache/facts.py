"""What the machine and the releases of LMCache and vLLM decide of the bytes of objects."""

from __future__ import annotations

import importlib.metadata
import platform

import torch
from lmcache import torch_device_type


def machine_facts() -> dict[str, object]:
    """Two processes with equal facts give equal objects the same bytes, as far as it depends on
    that. On a CPU vLLM packs keys and values as its release and the instruction set have it."""
    facts: dict[str, object] = {"lmcache": _minor("lmcache"), "device": torch_device_type}
    if torch_device_type == "cpu":
        facts["vllm"] = _minor("vllm")
        facts["processor"] = platform.machine()
        facts["amx"] = bool(torch.cpu._is_amx_tile_supported())
        facts["avx512"] = bool(torch.cpu._is_avx512_supported())
    return facts


def _minor(package: str) -> str:
    """Its version without the patch level; empty where it is not installed."""
    try:
        return ".".join(importlib.metadata.version(package).split("+")[0].split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        return ""
