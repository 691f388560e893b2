"""Where KV lies on either side of a collation: in an engine's pages, and in rows of cells.

A *plane* is what one pointer leads to: keys or values of one layer, or its one latent (MLA). All
pages have the same number of tokens. A *run* is what a page and a block have in common: gcd
(page tokens, block tokens) neighbouring tokens of one page. So a block is a whole number of runs
and a page too, whichever of them is larger, and one number names a run: page * runs per page + its
place in the page. `runs_of` makes these numbers of page numbers.

A *row* is what a block is on the other side: all its cells, or those of a part (the heads and
layers of one rank), one after another as the store keeps them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvstore_kernels.checks import check_tensor, require

SCALE_BYTES = 4  # float32
KV_DTYPES = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.uint8,
)
Planes = Sequence[Sequence[torch.Tensor]]  # of each layer


@dataclass(frozen=True, slots=True, kw_only=True)
class CellForm:
    """The bytes of a row:

        row  = [head group][layer group] cells
        cell = [layer][head][kind][token][head dim], then with scales [layer][head][kind] float32

    Raises KernelArgumentError for a number that no row has.

    layers, heads: of the row, a block's or a part's. kinds: 2 for keys and values, 1 for a latent.
    layers_per_cell: None for all; the last cell may have fewer. scaled: with a float32 scale for
    each head, layer and kind, by which the elements (float8_e4m3fn) are multiplied.
    """

    layers: int
    heads: int
    head_dim: int
    block_tokens: int
    dtype: torch.dtype
    kinds: int = 2
    layers_per_cell: int | None = None
    heads_per_cell: int = 1
    scaled: bool = False

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "head_dim", "block_tokens", "heads_per_cell"):
            require(getattr(self, name) >= 1, name, "must be at least 1")
        require(self.kinds in (1, 2), "kinds", "must be 2 (keys and values) or 1 (a latent)")
        require(self.cell_layers >= 1, "layers_per_cell", "must be at least 1")
        require(
            not self.scaled or self.dtype is torch.float8_e4m3fn,
            "dtype",
            "must be float8_e4m3fn where there are scales",
        )
        require(
            not self.scaled or self.plane_bytes % SCALE_BYTES == 0,
            "head_dim",
            "times block_tokens must be a multiple of 4, so that scales are aligned",
        )

    @property
    def cell_layers(self) -> int:
        """Layers of a full cell."""
        return self.layers if self.layers_per_cell is None else self.layers_per_cell

    @property
    def plane_bytes(self) -> int:
        """Bytes of one head of one plane, without its scale."""
        return self.block_tokens * self.head_dim * self.dtype.itemsize

    @property
    def head_bytes(self) -> int:
        """Bytes of one head of one layer, scales included."""
        return self.kinds * (self.plane_bytes + SCALE_BYTES * self.scaled)

    @property
    def nbytes(self) -> int:
        """Bytes of a row."""
        return self.layers * self.heads * self.head_bytes

    def place(self, layer: int, head: int, kind: int) -> tuple[int, int]:
        """Where a head's plane begins in its row, and where its scale would, in bytes."""
        first_head = head - head % self.heads_per_cell
        first_layer = layer - layer % self.cell_layers
        heads = min(self.heads_per_cell, self.heads - first_head)
        layers = min(self.cell_layers, self.layers - first_layer)
        cell = (first_head * self.layers + first_layer * heads) * self.head_bytes
        index = ((layer - first_layer) * heads + head - first_head) * self.kinds + kind
        scales = cell + layers * heads * self.kinds * self.plane_bytes
        return cell + index * self.plane_bytes, scales + index * SCALE_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class PageForm:
    """What an engine's pages look like, apart from where they are.

    Strides are in elements, and 0 along a dimension of size 1.
    """

    layers: int
    kinds: int
    dtype: torch.dtype
    pages: int
    page_tokens: int
    heads: int
    head_dim: int
    page_stride: int
    token_stride: int
    head_stride: int

    def run_tokens(self, block_tokens: int) -> int:
        """Tokens that a page and a block of so many tokens have in common."""
        return math.gcd(self.page_tokens, block_tokens)

    def runs_per_page(self, block_tokens: int) -> int:
        """Runs of a page, for blocks of so many tokens."""
        return self.page_tokens // self.run_tokens(block_tokens)

    def runs_per_block(self, block_tokens: int) -> int:
        """Runs of a block of so many tokens."""
        return block_tokens // self.run_tokens(block_tokens)


class PageTable:
    """The pages of all layers of one engine rank; holds on to their memory.

    planes: of each layer its keys and values, or its latent, as views of shape (pages, page_tokens,
    heads, head_dim). Any strides will do as long as they are the same for all planes and the last
    dimension is dense. Raises KernelArgumentError for others, and for no layers.
    """

    def __init__(self, planes: Planes) -> None:
        require(len(planes) > 0 and len(planes[0]) > 0, "planes", "must have at least one layer")
        self.views = tuple(tuple(layer) for layer in planes)
        self.form = _form_of(self.views)
        self.device = self.views[0][0].device
        addresses = [plane.data_ptr() for layer in self.views for plane in layer]
        self.alignment = math.gcd(16, *addresses)  # bytes, of every plane's beginning
        self.pointers = torch.tensor(addresses, dtype=torch.int64).to(self.device)

    @classmethod
    def of(
        cls,
        pools: torch.Tensor | Sequence[torch.Tensor] | Sequence[Sequence[torch.Tensor]],
        dims: str,
    ) -> PageTable:
        """The table of pools as engines make them; raises KernelArgumentError.

        dims: a letter for each dimension, in the pools' order: P page, N token in the page, H head,
        D head dim, K keys and values, L layer. With L: one tensor. Without: one for each layer, or
        without K too, a pair of keys and values for each layer. Without H there is one head. So
        "PNHD" and "PHND" are the usual two forms, "KPNHD" has keys and values in one tensor, and
        "PND" is a latent.
        """
        require(
            len(set(dims)) == len(dims) and {"P", "N", "D"} <= set(dims) <= set("LPKNHD"),
            "dims",
            f"must be some letters of LPKNHD, P, N and D among them, not {dims!r}",
        )
        if isinstance(pools, torch.Tensor):
            require("L" in dims, "dims", "must have L for all layers in one tensor")
            require(pools.dim() == len(dims), "pools", f"must have {len(dims)} dimensions")
            pools = pools.unbind(dims.index("L"))
        else:
            require("L" not in dims, "pools", "must be one tensor for dims with L")
        rest = dims.replace("L", "")
        return cls([[_in_order(t, rest) for t in _kinds(layer, rest)] for layer in pools])


def runs_of(pages: torch.Tensor, page_tokens: int, block_tokens: int) -> torch.Tensor:
    """The runs of the blocks that pages hold: (blocks, runs per block), of the pages' dtype.

    pages: (n,) page numbers of one sequence, in the order of its tokens. Only whole blocks count:
    tokens behind the last of them are left out.
    """
    run_tokens = math.gcd(page_tokens, block_tokens)
    per_page, per_block = page_tokens // run_tokens, block_tokens // run_tokens
    parts = torch.arange(per_page, dtype=pages.dtype, device=pages.device)
    runs = (pages[:, None] * per_page + parts).flatten()
    blocks = len(runs) // per_block
    return runs[: blocks * per_block].view(blocks, per_block)


def _kinds(layer: torch.Tensor | Sequence[torch.Tensor], dims: str) -> Sequence[torch.Tensor]:
    """Keys and values of one layer, or its latent."""
    if not isinstance(layer, torch.Tensor):
        return layer
    require(layer.dim() == len(dims), "pools", f"must have {len(dims)} dimensions for {dims!r}")
    return layer.unbind(dims.index("K")) if "K" in dims else (layer,)


def _in_order(plane: torch.Tensor, dims: str) -> torch.Tensor:
    """As (pages, page_tokens, heads, head_dim)."""
    left = dims.replace("K", "")
    require(plane.dim() == len(left), "pools", f"must have {len(left)} dimensions for {left!r}")
    if "H" not in left:
        plane, left = plane.unsqueeze(-1), left + "H"
    return plane.permute([left.index(letter) for letter in "PNHD"])


def _form_of(planes: Planes) -> PageForm:
    """What all planes have in common; raises KernelArgumentError where something differs."""
    first, kinds = planes[0][0], len(planes[0])
    require(kinds in (1, 2), "planes", f"must be 1 or 2 a layer, not {kinds}")
    require(
        all(len(layer) == kinds for layer in planes), "planes", f"must be {kinds} in each layer"
    )
    check_tensor("planes", first, shape=(None,) * 4, dtypes=KV_DTYPES)
    require(first.numel() > 0, "planes", "must not be empty")
    strides = _strides(first)
    for plane in (plane for layer in planes for plane in layer):
        check_tensor("planes", plane, shape=first.shape, dtypes=(first.dtype,), device=first.device)
        require(_strides(plane) == strides, "planes", "must have the same strides")
    return PageForm(
        layers=len(planes),
        kinds=kinds,
        dtype=first.dtype,
        pages=first.shape[0],
        page_tokens=first.shape[1],
        heads=first.shape[2],
        head_dim=first.shape[3],
        page_stride=strides[0],
        token_stride=strides[1],
        head_stride=strides[2],
    )


def _strides(plane: torch.Tensor) -> tuple[int, ...]:
    sizes = zip(plane.shape, plane.stride(), strict=True)
    return tuple(0 if size == 1 else stride for size, stride in sizes)
