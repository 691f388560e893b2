"""Stand-ins for what SGLang needs a GPU's libraries for; imported before SGLang, in each process.

Copies between its KV memory and its host memory are done by torch. Everything else of HiCache, and
all of our backend, is the real thing.
"""

from __future__ import annotations

import torch
from sglang.srt.mem_cache.pool_host import common, mha, mla

Tensors = list[torch.Tensor]


def copy_rows(
    src_layers: Tensors,
    dst_layers: Tensors,
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """Between KV memory and host memory of the layout layer_first, of some layers."""
    for source, target in zip(src_layers, dst_layers, strict=True):
        target[dst_indices] = source[src_indices]


def copy_out(
    src_ptrs: Tensors,
    dst_ptrs: Tensors,
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """From KV memory to host memory of the layout page_first_direct, all layers."""
    pages, rows = dst_indices[::page_size] // page_size, src_indices.view(-1, page_size)
    layers = len(src_ptrs) // len(dst_ptrs)
    for number, source in enumerate(src_ptrs):
        dst_ptrs[number // layers][pages, number % layers] = source[rows]


def copy_in(
    src_ptrs: Tensors,
    dst_ptrs: Tensors,
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    layer_id: int,
    page_size: int,
) -> None:
    """From host memory of the layout page_first_direct to KV memory, one layer."""
    pages, rows = src_indices[::page_size] // page_size, dst_indices.view(-1, page_size)
    for source, target in zip(src_ptrs, dst_ptrs, strict=True):
        target[rows] = source[pages, layer_id]


def _do_not_pin(*_args: object, **_kwargs: object) -> None:
    """Host memory stays ordinary memory."""


common._cuda_host_register = _do_not_pin
for _pools in (mha, mla):
    _pools.transfer_kv_direct = copy_rows
    _pools.transfer_kv_all_layer_direct_lf_pf = copy_out
    _pools.transfer_kv_per_layer_direct_pf_lf = copy_in
