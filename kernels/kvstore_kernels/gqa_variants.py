"""The specialisations of the kernels of `gqa_decode` and `gqa_ring` that are compiled without a
GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from kvstore_kernels import gqa_ring
from kvstore_kernels.compiling import Variant
from kvstore_kernels.fused import power_of_two
from kvstore_kernels.fused_kernels import AppendGeometry
from kvstore_kernels.gqa_decode import NEW, geometry_of
from kvstore_kernels.gqa_form import GqaConfig, GqaForm, config_for
from kvstore_kernels.gqa_kernel import gqa_kernel

_TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float8_e4m3fn: "*fp8e4nv"}


def variants() -> Iterator[Variant]:
    """The usual forms, and those that need most of something."""
    llama = GqaForm(heads=32, kv_heads=8, head_dim=128, page_tokens=16)
    forms = {
        "llama": llama,
        "pages_of_64": replace(llama, page_tokens=64),
        "float16": replace(llama, dtype=torch.float16, kv_dtype=torch.float16),
        "float8": replace(llama, kv_dtype=torch.float8_e4m3fn),
        "drafts": replace(llama, q_tokens=4),
        "dim_64": replace(llama, head_dim=64),
        "dim_256_window_cap": replace(llama, head_dim=256, softcap=50.0, window=4096),
        "group_1": replace(llama, kv_heads=32),
        "group_7": replace(llama, heads=28, kv_heads=4),
        "group_8_drafts": replace(llama, heads=64, q_tokens=4),
        "group_16_drafts": replace(llama, heads=128, q_tokens=4),
        "dim_256_group_16_drafts": replace(llama, heads=128, head_dim=256, q_tokens=4),
    }
    for name, form in forms.items():
        yield _variant(f"gqa_{name}", form, config_for(form))
    many = 1024 // llama.kv_heads
    for name in ("llama", "drafts", "dim_64", "group_16_drafts"):
        form = forms[name]
        yield _variant(f"gqa_append_{name}", form, config_for(form, many), appends=True)
    yield _variant("gqa_append_few", llama, config_for(llama), appends=True)
    normed = _variant("gqa_append_normed", llama, config_for(llama, many), appends=True)
    yield _with_norms(normed, llama)
    yield from gqa_ring.variants()


def _variant(name: str, form: GqaForm, config: GqaConfig, *, appends: bool = False) -> Variant:
    """As compiled for dense pools [pages, kv_heads, 2, page_tokens, head_dim]."""
    scaled = form.kv_dtype is torch.float8_e4m3fn
    scales = ("k_scale_ptr", "v_scale_ptr")
    pointers = {
        **dict.fromkeys(("q_ptr", "out_ptr"), _TYPES[form.dtype]),
        **dict.fromkeys(("k_ptr", "v_ptr"), _TYPES[form.kv_dtype]),
        **dict.fromkeys(("table_ptr", "items_ptr", "counter_ptr"), "*i32"),
        **dict.fromkeys(("partial_ptr", "lse_ptr", *(scales if scaled else ())), "*fp32"),
    }
    new: dict[str, Any] = dict.fromkeys(NEW)
    if appends:
        kinds = (*[_TYPES[form.dtype]] * 2, *["*i64"] * 2, *[_TYPES[form.dtype]] * 2)
        new |= zip(NEW, kinds, strict=False)
    pointers |= {key: kind for key, kind in new.items() if kind}
    numbers = dict.fromkeys(("n_pages", "max_pages", "table_stride"), "i32")
    geometry = geometry_of(
        form, config, _dense_strides(form), paired=scaled, scaled=scaled, gpu=True
    )
    absent = [key for key in (*scales, *NEW) if key not in pointers]
    return Variant(
        name=name,
        kernel=gqa_kernel,
        signature=pointers | numbers,
        constants={"g": geometry, "n": _dense_new(form) if appends else None}
        | dict.fromkeys(absent),
        aligned=tuple(pointers),
        options={
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "enable_fp_fusion": True,
        },
        # As many blocks as planned fit a multiprocessor: it has 64 Ki registers, handed out to
        # warps in units of 256, and 228 KiB of shared memory, 1 KiB of which is a block's own.
        max_registers=(65536 // (32 * config.num_warps * config.blocks_per_sm)) // 8 * 8,
        max_shared_bytes=(228 // config.blocks_per_sm - 1) << 10,
    )


def _with_norms(variant: Variant, form: GqaForm) -> Variant:
    """With norms of heads."""
    constants = dict(variant.constants)
    signature = dict(variant.signature)
    for key in NEW[-2:]:
        del constants[key]
        signature[key] = _TYPES[form.dtype]
    constants["n"] = replace(constants["n"], normed=True)
    aligned = (*variant.aligned, *NEW[-2:])
    return replace(variant, signature=signature, constants=constants, aligned=aligned)


def _dense_new(form: GqaForm) -> AppendGeometry:
    """Queries, keys and values as parts of one merged projection."""
    token = (form.heads + 2 * form.kv_heads) * form.head_dim
    strides = dict.fromkeys(("k_sequence", "v_sequence"), form.q_tokens * token)
    return AppendGeometry(
        rows=power_of_two(form.q_tokens),
        interleaved=False,
        normed=False,
        eps=1e-6,
        angle_sequence=form.q_tokens * form.head_dim // 2,
        angle_token=form.head_dim // 2,
        **strides,
        **dict.fromkeys(("k_token", "v_token"), token),
        **dict.fromkeys(("k_head", "v_head"), form.head_dim),
    )


def _dense_strides(form: GqaForm) -> list[tuple[int, ...]]:
    plane = form.page_tokens * form.head_dim
    pool = (form.kv_heads * 2 * plane, 2 * plane, form.head_dim)
    rows = (form.q_tokens * form.heads * form.head_dim, form.heads * form.head_dim, form.head_dim)
    return [rows, pool, pool, rows]
