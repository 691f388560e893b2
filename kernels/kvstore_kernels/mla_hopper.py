"""What the launchers of both latent attention kernels in Gluon have in common: a layer's form, what
they ask of their arguments, workspaces, and the boxes in which the copy engine brings tiles."""

# ruff: noqa: PLR0917 - attention is called by position: queries, pages

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kvstore_kernels.checks import check_tensor, require
from kvstore_kernels.mla_reference import RANK, WIDTH

LOG2_E = math.log2(math.e)
TOKENS = 64  # of a tile
MAX_Q_TOKENS = 4
ALIGNED_ELEMENTS = 8  # 16 bytes, as tensor maps want addresses and strides

_PANEL = 64  # columns of a box: 128 bytes, the widest swizzle
_LAYOUT = gl.NVMMASharedLayout(128, 16, 3)
_SIZES = ("table_stride", "page_tokens", "rows", "heads", "q_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaHopperForm:
    """What an attention layer's launches have in common. Raises KernelArgumentError.

    heads: query heads. q_tokens: new tokens of each sequence, 1 to 4. page_tokens: a multiple of
    64. scale: of the scores.
    """

    heads: int
    scale: float
    q_tokens: int = 1
    page_tokens: int = 64

    def __post_init__(self) -> None:
        require(self.heads >= 1, "heads", "must be at least 1")
        require(self.scale > 0, "scale", "must be above 0")
        require(1 <= self.q_tokens <= MAX_Q_TOKENS, "q_tokens", f"must be 1 to {MAX_Q_TOKENS}")
        require(
            self.page_tokens >= 1 and self.page_tokens % TOKENS == 0,
            "page_tokens",
            f"must be a multiple of {TOKENS}",
        )

    @property
    def rows(self) -> int:
        """Query rows of a sequence."""
        return self.heads * self.q_tokens


Form = TypeVar("Form", bound=MlaHopperForm)


class MlaHopperWorkspace(Generic[Form]):
    """The buffers of fixed address that launches of one form need."""

    def __init__(
        self,
        form: Form,
        *,
        max_sequences: int,
        device: torch.device | str,
        workers: int | None,
    ) -> None:
        """workers: blocks of threads that a launch has; default the device's multiprocessors."""
        require(max_sequences >= 1, "max_sequences", "must be at least 1")
        self.form = form
        self.device = torch.empty(0, device=device).device  # with its index
        self.max_sequences = max_sequences
        self.workers = workers or multiprocessors(self.device)

    def _load(
        self,
        name: str,
        rows: npt.NDArray[np.int32],
        lengths: npt.NDArray[np.int64],
        into: torch.Tensor,
    ) -> None:
        """Copies what sequences of these lengths were cut into, an argument of that name."""
        require(
            len(lengths) <= self.max_sequences and len(rows) <= len(into),
            name,
            f"must be for at most {self.max_sequences} sequences",
        )
        into[: len(rows)].copy_(torch.from_numpy(rows))


def multiprocessors(device: torch.device) -> int:
    """How many the device has; 1 for a CPU."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


# --------------------------------------------------------------------------------- arguments


def check_tensors(
    q: torch.Tensor,
    pages: torch.Tensor,
    page_table: torch.Tensor,
    workspace: MlaHopperWorkspace[Any],
    lengths: npt.NDArray[np.int64],
) -> None:
    """Raises KernelArgumentError unless they are of the workspace's form, for these lengths."""
    form: MlaHopperForm = workspace.form
    device, batch = workspace.device, len(lengths)
    bf16, int32 = (torch.bfloat16,), (torch.int32,)
    check_tensor("q", q, shape=(batch, form.q_tokens, form.heads, WIDTH), dtypes=bf16)
    require(q.device == device, "workspace", f"must be on {q.device}, not {device}")
    spaced = form.q_tokens == 1 or q.stride(1) == form.heads * q.stride(2)
    require(spaced, "q", "must have heads and tokens evenly spaced")
    tokens = (None, form.page_tokens, WIDTH)
    check_tensor("pages", pages, shape=tokens, dtypes=bf16, device=q.device)
    require(len(pages) > 0, "pages", "must not be empty")
    _check_aligned("q", q)
    _check_aligned("pages", pages)
    check_tensor("page_table", page_table, shape=(batch, None), dtypes=int32, device=q.device)
    has = page_table.shape[1] * form.page_tokens
    longest = int(lengths.max(initial=0))
    require(longest <= has, "page_table", f"must have pages for {longest} tokens, not {has}")


def _check_aligned(name: str, tensor: torch.Tensor) -> None:
    strides = [s for size, s in zip(tensor.shape[:-1], tensor.stride(), strict=False) if size > 1]
    require(
        tensor.data_ptr() % 16 == 0 and not any(s % ALIGNED_ELEMENTS for s in strides),
        name,
        "must have its address and strides in whole 16 bytes",
    )


def output_of(q: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """A new output, or the given one. Raises KernelArgumentError unless it is contiguous."""
    if out is None:
        out = torch.empty((*q.shape[:3], RANK), dtype=q.dtype, device=q.device)
    check_tensor("out", out, shape=(*q.shape[:3], RANK), dtypes=(q.dtype,), device=q.device)
    require(out.is_contiguous(), "out", "must be contiguous")
    return out


def check_pages(
    page_table: torch.Tensor, n_pages: int, page_tokens: int, lengths: npt.NDArray[np.int64]
) -> None:
    """Raises KernelArgumentError for pages outside of the pool. Waits for the GPU."""
    used = -(-lengths // page_tokens)
    table = page_table.cpu().numpy()
    numbers = table[np.arange(table.shape[1]) < used[:, None]]
    require(
        bool(((numbers >= 0) & (numbers < n_pages)).all()),
        "page_table",
        f"must have pages of the pool, 0 to {n_pages - 1}",
    )


# ----------------------------------------------------------------------------------- launches


def launch(
    kernel: Any,
    workspace: MlaHopperWorkspace[Any],
    q: torch.Tensor,
    pages: torch.Tensor,
    page_table: torch.Tensor,
    buffers: Iterable[torch.Tensor],
    more: Iterable[Any],
    *,
    q_rows: int,
    options: Mapping[str, int],
) -> None:
    """Starts a kernel.

    buffers: its arguments between the page table and the scale. more: those behind the sizes.
    q_rows: query rows of a box.
    """
    form: MlaHopperForm = workspace.form
    kernel[(workspace.workers,)](
        described(q.flatten(1, 2), q_rows),
        described(pages, TOKENS),
        page_table,
        *buffers,
        form.scale * LOG2_E,
        page_table.stride(0),
        form.page_tokens,
        form.rows,
        form.heads,
        form.q_tokens,
        *more,
        launch_pdl=True,
        **options,
    )


def described(tensor: torch.Tensor, height: int) -> Any:
    """A tensor map over (outer, rows, 576), in boxes of one outer, so many rows, 64 columns."""
    outer, rows, width = tensor.shape
    row = tensor.stride(1) if rows > 1 else width
    return TensorDescriptor(
        tensor,
        [outer, rows, width],
        [tensor.stride(0) if outer > 1 else rows * row, row, 1],
        [1, height, _PANEL],
        _LAYOUT,
    )


def signature_of(buffers: Mapping[str, str], *, q_rows: int) -> dict[str, str]:
    """Triton's types of what `launch` gives a kernel, but for `more`."""
    boxes = {
        name: f"tensordesc<bf16[1, {height}, {_PANEL}],{_LAYOUT!r}>"
        for name, height in (("q_desc", q_rows), ("kv_desc", TOKENS))
    }
    sizes = dict.fromkeys(_SIZES, "i32")
    return {**boxes, "page_table": "*i32", **buffers, "scale": "fp32", **sizes}
