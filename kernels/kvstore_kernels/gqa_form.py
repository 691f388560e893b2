"""What launches of `gqa_decode` have in common: a layer's form, how the kernel is compiled for it,
how finely sequences are cut, and the buffers of fixed address."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kvstore_kernels.checks import require
from kvstore_kernels.fused import power_of_two
from kvstore_kernels.worklist import COLUMNS, WorkList, most_items, plan

QUERY_DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 128, 256)
MAX_GROUP = 16
MAX_Q_TOKENS = 4
PAGE_TOKENS = range(16, 129)
MIN_ROWS = 16  # of a matrix product
_MANY_HEADS = 1024  # sequences times KV heads: no longer cut into parts on any GPU


@dataclass(frozen=True, slots=True, kw_only=True)
class GqaForm:
    """What an attention layer's launches have in common. Raises KernelArgumentError.

    heads: query heads, a multiple of kv_heads and at most 16 times as many; neighbours share a KV
    head. head_dim: 64, 128 or 256. page_tokens: 16 to 128. q_tokens: new tokens of each sequence, 1
    to 4. dtype: of queries and output, bfloat16 or float16. kv_dtype: the same, or float8_e4m3fn:
    then products are in float16, which has all its values, and queries beyond float16's range
    (65504) are brought to its ends. scale: of the scores, default head_dim ** -0.5. softcap: scores
    become softcap * tanh(score / softcap). window: how many tokens a query sees, itself included;
    None for all.
    """

    heads: int
    kv_heads: int
    head_dim: int
    page_tokens: int
    q_tokens: int = 1
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype = torch.bfloat16
    scale: float | None = None
    softcap: float | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        _check_heads(self)
        require(self.head_dim in HEAD_DIMS, "head_dim", f"must be one of {HEAD_DIMS}")
        require(self.page_tokens in PAGE_TOKENS, "page_tokens", "must be 16 to 128")
        require(1 <= self.q_tokens <= MAX_Q_TOKENS, "q_tokens", f"must be 1 to {MAX_Q_TOKENS}")
        require(self.dtype in QUERY_DTYPES, "dtype", "must be bfloat16 or float16")
        require(
            self.kv_dtype in (self.dtype, torch.float8_e4m3fn),
            "kv_dtype",
            f"must be float8_e4m3fn or the queries' {self.dtype}",
        )
        require(self.softcap is None or self.softcap > 0, "softcap", "must be above 0")
        require(self.window is None or self.window >= 1, "window", "must be at least 1")

    @property
    def group(self) -> int:
        """Query heads of one KV head."""
        return self.heads // self.kv_heads

    @property
    def rows(self) -> int:
        """Queries that one block of threads attends with."""
        return self.group * self.q_tokens

    @property
    def tile_rows(self) -> int:
        """Rows of the tile that they are in."""
        return max(MIN_ROWS, power_of_two(self.rows))

    @property
    def token_bytes(self) -> int:
        """KV bytes of one token and one KV head."""
        return 2 * self.head_dim * self.kv_dtype.itemsize

    @property
    def partial_bytes(self) -> int:
        """Bytes of one partial result."""
        return self.rows * (self.head_dim + 1) * 4


def _check_heads(form: GqaForm) -> None:
    require(form.kv_heads >= 1, "kv_heads", "must be at least 1")
    require(
        form.heads >= 1 and form.heads % form.kv_heads == 0,
        "heads",
        f"must be a multiple of the {form.kv_heads} KV heads, not {form.heads}",
    )
    require(form.group <= MAX_GROUP, "heads", f"must be at most {MAX_GROUP} for each KV head")


@dataclass(frozen=True, slots=True, kw_only=True)
class GqaConfig:
    """How the kernel is compiled and how finely sequences are cut.

    tile_tokens: read and multiplied at a time. num_stages: tiles in flight, plus one.
    blocks_per_sm: blocks of threads that a multiprocessor holds, by their registers and shared
    memory. min_tokens, item_tokens, cut_tokens, extra_waves: see `worklist.plan`. merge_elements:
    of partial results held in a block's registers at a time. overlap: consecutive launches overlap.
    """

    tile_tokens: int = 64
    num_warps: int = 4
    num_stages: int = 4
    blocks_per_sm: int = 2
    min_tokens: int = 64
    item_tokens: int = 64
    cut_tokens: int | None = 64
    extra_waves: int = 7
    merge_elements: int = 8192
    overlap: bool = True


def config_for(form: GqaForm, max_sequences: int = 1) -> GqaConfig:
    """The configuration that measured best for forms of its class and batches of that size."""
    fp8 = form.kv_dtype is torch.float8_e4m3fn
    tile = {64: 128, 128: 64, 256: 32}[form.head_dim]  # 16 KiB of keys in bfloat16
    wide = form.head_dim == 256
    if form.tile_rows == 16 and fp8:
        return GqaConfig(
            tile_tokens=tile, num_stages=3, blocks_per_sm=2 if wide else 3, merge_elements=4096
        )
    if form.tile_rows == 16 and max_sequences * form.kv_heads < _MANY_HEADS:
        # Where there is little to read, half as many blocks have half as many results to merge.
        return GqaConfig(
            tile_tokens=2 * tile,
            num_stages=3,
            num_warps=8,
            blocks_per_sm=1,
            item_tokens=256,
            cut_tokens=256,
        )
    if form.tile_rows <= 32:
        return GqaConfig(tile_tokens=tile, num_stages=3 if wide and form.tile_rows == 32 else 4)
    if wide:
        return GqaConfig(tile_tokens=tile, num_warps=8, blocks_per_sm=1)
    return GqaConfig(tile_tokens=64, num_stages=3)


class GqaWorkspace:
    """The buffers of fixed address that launches of one form need: the plan and partial results.

    One workspace serves all layers of a model, one launch after another; launches that may run at
    the same time, on several streams, need one each. Once per step `plan` cuts the sequences (host
    only), and `load` copies the plan to the device, before the launches or the replay of a graph
    that has them.

    max_sequences: of a batch. config: default `config_for(form, max_sequences)`. workers: blocks
    that run at once; default the device's multiprocessors times config.blocks_per_sm.
    """

    def __init__(
        self,
        form: GqaForm,
        *,
        max_sequences: int,
        device: torch.device | str,
        config: GqaConfig | None = None,
        workers: int | None = None,
    ) -> None:
        require(max_sequences >= 1, "max_sequences", "must be at least 1")
        self.form = form
        self.config = config or config_for(form, max_sequences)
        self.device = torch.device(device)
        self.max_sequences = max_sequences
        self.workers = workers or _workers(self.device, self.config)
        self.max_items = most_items(
            max_sequences, form.kv_heads, self.workers, self.config.extra_waves
        )
        self.items = torch.full((self.max_items, COLUMNS), -1, dtype=torch.int32, device=device)
        self.partials = torch.empty(
            (self.max_items, form.rows, form.head_dim), dtype=torch.float32, device=device
        )
        self.lse = torch.empty((self.max_items, form.rows), dtype=torch.float32, device=device)
        counters = max_sequences * form.kv_heads
        self.counters = torch.zeros(counters, dtype=torch.int32, device=device)
        self.grid = 0  # blocks that a launch has
        self.lengths = np.zeros(0, np.int32)  # of the sequences that are planned

    def plan(self, lengths: npt.ArrayLike) -> WorkList:
        """Cuts sequences of these lengths; pure host code. Raises KernelArgumentError."""
        return plan_gqa(self.form, self.config, lengths, self.workers)

    def load(self, worklist: WorkList, *, grid: int | None = None) -> None:
        """Makes the launches that follow on this stream do this list.

        grid: blocks that a launch has, so that a captured graph can be replayed with other lists of
        at most as many items; those without work end at once. Default: as many as there are items.
        Modifies items. Raises KernelArgumentError when the list is for more sequences than
        max_sequences, or grid is less than its items or more than max_items.
        """
        rows = worklist.items if grid is None else worklist.padded(grid)
        require(
            len(rows) <= self.max_items and worklist.n_counters <= len(self.counters),
            "worklist",
            f"must be for at most {self.max_sequences} sequences and {self.max_items} blocks",
        )
        self.items[: len(rows)].copy_(torch.from_numpy(rows))
        self.grid, self.lengths = len(rows), worklist.lengths()


def plan_gqa(form: GqaForm, config: GqaConfig, lengths: npt.ArrayLike, workers: int) -> WorkList:
    """The work list of sequences of these lengths, new tokens included, for so many workers."""
    counts = np.asarray(lengths)
    starts = None
    if form.window is not None:
        starts = np.maximum(counts - form.q_tokens - form.window + 1, 0)
    return plan(
        counts,
        groups=form.kv_heads,
        workers=workers,
        partial_bytes=form.partial_bytes,
        token_bytes=form.token_bytes,
        min_tokens=config.min_tokens,
        item_tokens=config.item_tokens,
        cut_tokens=config.cut_tokens,
        extra_waves=config.extra_waves,
        starts=starts,
    )


def _workers(device: torch.device, config: GqaConfig) -> int:
    if device.type != "cuda":
        return config.blocks_per_sm
    return torch.cuda.get_device_properties(device).multi_processor_count * config.blocks_per_sm
