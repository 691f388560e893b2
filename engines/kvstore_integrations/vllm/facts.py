"""What the machine and the release of vLLM decide of the bytes of its blocks."""

from __future__ import annotations

import platform

import torch
from vllm.platforms import current_platform
from vllm.version import __version__ as vllm_version


def release() -> str:
    """vLLM's version without its patch level: a newer minor may lay blocks out otherwise."""
    return ".".join(vllm_version.split("+")[0].split(".")[:2])


def machine_facts() -> dict[str, object]:
    """Two processes with equal facts lay the same KV out as the same bytes, as far as the machine
    goes. On a CPU vLLM packs keys and values as its instruction set likes it."""
    facts: dict[str, object] = {"vllm": release(), "device": current_platform.device_type}
    if current_platform.is_cpu():
        facts["processor"] = platform.machine()
        facts["amx"] = bool(torch.cpu._is_amx_tile_supported())
        facts["avx512"] = bool(torch.cpu._is_avx512_supported())
    return facts
