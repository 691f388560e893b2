"""What collation does, in torch and plane by plane: for tests, and to read."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch

from kvstore_kernels.collate_kernels import FP8_MAX, LEAST_MAGNITUDE
from kvstore_kernels.collate_plan import Pairing
from kvstore_kernels.page_table import SCALE_BYTES, PageTable


def collate_reference(
    table: PageTable, pairing: Pairing, runs: torch.Tensor, rows: torch.Tensor
) -> None:
    """What `Collator.collate` does; rows: (blocks, row's bytes), all on one device."""
    form = pairing.form
    pages, tokens = _where(pairing, runs)
    for layer, head, kind in _planes(pairing):
        at, scale_at = form.place(pairing.first_layer + layer, pairing.first_head + head, kind)
        values = table.views[layer][kind][pages, tokens, head].flatten(1)
        if form.scaled:
            values, scales = _quantised(values)
            rows[:, scale_at : scale_at + SCALE_BYTES] = scales.view(torch.uint8)
        rows[:, at : at + form.plane_bytes] = values.view(torch.uint8)


def scatter_reference(
    table: PageTable, pairing: Pairing, runs: torch.Tensor, rows: torch.Tensor
) -> None:
    """What `Collator.scatter` does; rows: (blocks, row's bytes), all on one device."""
    form = pairing.form
    pages, tokens = _where(pairing, runs)
    for layer, head, kind in _planes(pairing):
        at, scale_at = form.place(pairing.first_layer + layer, pairing.first_head + head, kind)
        values = rows[:, at : at + form.plane_bytes].clone().view(form.dtype)
        if form.scaled:
            scales = rows[:, scale_at : scale_at + SCALE_BYTES].clone().view(torch.float32)
            values = values.float() * scales
        plane = table.views[layer][kind]
        plane[pages, tokens, head] = values.to(plane.dtype).view(*tokens.shape, form.head_dim)


def _planes(pairing: Pairing) -> Iterator[tuple[int, int, int]]:
    """(layer, head, kind) of the pages."""
    pages = pairing.pages
    return itertools.product(range(pages.layers), range(pages.heads), range(pages.kinds))


def _where(pairing: Pairing, runs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The page and the place in it of every token of blocks, (blocks, runs per block, tokens)."""
    runs_per_page = pairing.pages.runs_per_page(pairing.form.block_tokens)
    runs = runs[..., None].long()
    tokens = torch.arange(pairing.run_tokens, device=runs.device)
    return runs // runs_per_page, runs % runs_per_page * pairing.run_tokens + tokens


def _quantised(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(blocks, elements) as float8_e4m3fn, and the scales (blocks, 1) float32."""
    values = values.float()
    largest = values.abs().nan_to_num(nan=0.0, posinf=math.inf).amax(1, keepdim=True)
    # By a tensor: a division by a number is a product with its reciprocal on a GPU.
    scales = largest.clamp(min=LEAST_MAGNITUDE.value) / largest.new_full((1, 1), FP8_MAX.value)
    return (values * scales.reciprocal()).to(torch.float8_e4m3fn), scales
