"""New tokens that decode attention rotates and writes to the pages itself: one launch, not two.

A block of threads that has a sequence's newest tokens makes their keys from the inputs, begins its
sums with them, and writes them to their places in the pool; what it reads from the pages ends
before them. So no block reads what another one of the launch writes, and nothing waits. The pages
then hold what `step.rope_append` and `step.rope_append_latent` write; only where there is a norm,
whose sum is taken in another order, a last bit may differ.

`rotate_first` does the same by a launch of its own, for kernels that cannot.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kvstore_kernels.checks import check_tensor, require
from kvstore_kernels.fused_kernels import AppendGeometry
from kvstore_kernels.step import DTYPES, rope_append, rope_append_latent

Tensor = torch.Tensor
_INDEX_DTYPES = (torch.int64, torch.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewTokens:
    """Keys and values of the newest q_tokens tokens of each sequence, before rotation.

    k, v: (batch, q_tokens, kv_heads, dim) of the queries' dtype, in any strides but for the last.
    cos, sin: (batch, q_tokens, dim / 2). page_ids, offsets: (batch, q_tokens) int64 or int32,
    contiguous: where the page table has those tokens. q_norm, k_norm: (dim,) weights of the norms
    of each head before rotation, or none of both; eps: of these norms. interleaved: pairs are
    neighbours, else (i, i + dim / 2); they come out as halves.
    """

    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    page_ids: Tensor
    offsets: Tensor
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    eps: float = 1e-6
    interleaved: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class NewLatents:
    """Latents and keys of the newest q_tokens tokens of each sequence, before norm and rotation.

    q_rope: (batch, q_tokens, heads, rope_dim), of the queries what is rotated. latents: (batch,
    q_tokens, rank + rope_dim), the projected latent and key. norm: (rank,) weight of the latent's
    norm. cos, sin: (batch, q_tokens, rope_dim / 2). All else is as in `NewTokens`.
    """

    q_rope: Tensor
    latents: Tensor
    norm: Tensor
    cos: Tensor
    sin: Tensor
    page_ids: Tensor
    offsets: Tensor
    eps: float = 1e-6
    interleaved: bool = True


New = NewTokens | NewLatents


def rotate_first(q: Tensor, new: New, k_pages: Tensor, v_pages: Tensor | None) -> Tensor:
    """Writes the new tokens to the pages; gives the queries, (batch, q_tokens, heads, dim), as the
    kernels take them where new tokens are in the pages.

    For NewLatents they are q itself, whose last rope_dim columns are overwritten. Raises
    KernelArgumentError.
    """
    cos, sin = new.cos.flatten(0, 1), new.sin.flatten(0, 1)
    places = (new.page_ids.flatten(), new.offsets.flatten())
    if isinstance(new, NewLatents):
        rank = len(new.norm)
        viewable = q.shape[1] == 1 or q.stride(0) == q.shape[1] * q.stride(1)
        require(viewable, "q", "must have its tokens evenly spaced")
        rope_append_latent(
            new.q_rope.flatten(0, 1),
            new.latents.flatten(0, 1),
            *(cos, sin, k_pages, *places),
            norm=new.norm,
            eps=new.eps,
            interleaved=new.interleaved,
            out=q.flatten(0, 1)[..., rank:],
        )
        return q
    require(v_pages is not None, "append", "must be NewLatents without v_pages")
    assert v_pages is not None
    rotated = rope_append(
        *(q.flatten(0, 1), new.k.flatten(0, 1), new.v.flatten(0, 1)),
        *(cos, sin, k_pages, v_pages, *places),
        q_norm=new.q_norm,
        k_norm=new.k_norm,
        eps=new.eps,
        interleaved=new.interleaved,
    )
    return rotated.view(q.shape)


def power_of_two(number: int) -> int:
    """The least that is not smaller."""
    return 1 << (number - 1).bit_length()


def token_geometry(new: NewTokens) -> AppendGeometry:
    """What `gqa_kernel` is compiled for."""
    k, v = new.k.stride(), new.v.stride()
    return AppendGeometry(
        rows=power_of_two(new.page_ids.shape[1]),
        interleaved=new.interleaved,
        normed=new.q_norm is not None,
        eps=new.eps,
        angle_sequence=new.cos.stride(0),
        angle_token=new.cos.stride(1),
        **dict(zip(("k_sequence", "k_token", "k_head"), k, strict=False)),
        **dict(zip(("v_sequence", "v_token", "v_head"), v, strict=False)),
    )


def latent_geometry(new: NewLatents) -> AppendGeometry:
    """What `mla_kernel` is compiled for."""
    return AppendGeometry(
        rows=power_of_two(new.page_ids.shape[1]),
        interleaved=new.interleaved,
        normed=False,
        eps=new.eps,
        angle_sequence=new.cos.stride(0),
        angle_token=new.cos.stride(1),
        k_sequence=new.latents.stride(0),
        k_token=new.latents.stride(1),
        **dict(zip(("q_sequence", "q_token", "q_head"), new.q_rope.stride(), strict=False)),
    )


def check_tokens(q: Tensor, new: NewTokens, kv_heads: int) -> None:
    """Raises KernelArgumentError unless they are new tokens for these queries."""
    batch, q_tokens, _, dim = q.shape
    for name, tensor in (("k", new.k), ("v", new.v)):
        shape = (batch, q_tokens, kv_heads, dim)
        check_tensor(f"append.{name}", tensor, shape=shape, dtypes=(q.dtype,), device=q.device)
    require(
        (new.q_norm is None) == (new.k_norm is None), "append.k_norm", "must be there with q_norm"
    )
    for name, norm in (("q_norm", new.q_norm), ("k_norm", new.k_norm)):
        if norm is not None:
            check_tensor(f"append.{name}", norm, shape=(dim,), dtypes=(q.dtype,), device=q.device)
    _check_pairs(new, k=new.k, q_norm=new.q_norm, k_norm=new.k_norm)
    _check_angles(q, new, dim)


def check_latents(q: Tensor, new: NewLatents, rank: int) -> None:
    """Raises KernelArgumentError unless they are new tokens for these queries."""
    batch, q_tokens, heads, width = q.shape
    dtypes, dim = (q.dtype,), width - rank
    for name, tensor, shape in (
        ("q_rope", new.q_rope, (batch, q_tokens, heads, dim)),
        ("latents", new.latents, (batch, q_tokens, width)),
        ("norm", new.norm, (rank,)),
    ):
        check_tensor(f"append.{name}", tensor, shape=shape, dtypes=dtypes, device=q.device)
    _check_pairs(new, q_rope=new.q_rope, latents=new.latents)
    _check_angles(q, new, dim)


def _check_pairs(new: New, **tensors: Tensor | None) -> None:
    """Interleaved pairs are read as words of both."""
    for name, tensor in tensors.items():
        if new.interleaved and tensor is not None:
            steps = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
            even = not any(step % 2 for size, step in steps if size > 1)
            even &= tensor.data_ptr() % (2 * tensor.itemsize) == 0
            require(even, f"append.{name}", "must have pairs that begin at whole 4 bytes")


def _check_angles(q: Tensor, new: New, dim: int) -> None:
    """Those of the rotation, and the tokens' places."""
    places = q.shape[:2]
    shape = (*places, dim // 2)
    check_tensor("append.cos", new.cos, shape=shape, dtypes=DTYPES, device=q.device)
    check_tensor("append.sin", new.sin, shape=shape, dtypes=(new.cos.dtype,), device=q.device)
    require(new.cos.stride() == new.sin.stride(), "append.sin", "must have cos's strides")
    for part, numbers in (("page_ids", new.page_ids), ("offsets", new.offsets)):
        name = f"append.{part}"
        check_tensor(name, numbers, shape=places, dtypes=_INDEX_DTYPES, device=q.device)
        require(numbers.is_contiguous(), name, "must be contiguous")


def check_places(
    new: New, page_table: Tensor, counts: npt.NDArray[np.int64], page_tokens: int
) -> None:
    """Raises KernelArgumentError unless the new tokens' places are those of the page table, where
    sequences have them. Waits for the GPU."""
    page_ids, offsets = new.page_ids.cpu().numpy(), new.offsets.cpu().numpy()
    table = page_table.cpu().numpy()
    q_tokens = page_ids.shape[1]
    position = counts[:, None] - q_tokens + np.arange(q_tokens)
    there = position >= 0
    column = np.maximum(position, 0) // page_tokens
    pages = np.take_along_axis(table, column, axis=1)
    right = (page_ids == pages) & (offsets == np.maximum(position, 0) % page_tokens)
    wrong = np.argwhere(there & ~right)
    require(
        not len(wrong),
        "append.page_ids",
        f"must have the page table's places of new tokens, unlike at {wrong[:1].tolist()}",
    )
