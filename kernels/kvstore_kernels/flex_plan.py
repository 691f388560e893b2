"""Where the sequences of a batch lie in a pool of pages, as torch's flex_attention can be told.

FlexDecoding walks a list of blocks of one long sequence. Here the pool is that sequence, and a page
is one block: page p is block p * unit of a strided view that has all heads, layers and pages of the
pool in it. Nothing is copied for that. The plan of a step lists the blocks of each sequence, and
which page of its sequence a page of the pool is, for masks that are written in positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from kvstore_kernels.checks import check_tensor, require
from kvstore_kernels.flex_masks import Band, MaskMod, ScoreMod, band_of, needed_for_last

Tensor = torch.Tensor
INDEX_DTYPES = (torch.int32, torch.int64)
MIN_TILE = 16  # keys, of a matrix product
MAX_INDEX = 2**31 - 1
BLOCK = 128  # queries, and keys, of a block in the kernel of many queries
MAX_DECODE_QUERIES = 16  # of a sequence, that are worth reading pages in place
ALIGNMENT = 16  # bytes; of a less aligned input torch makes a copy, which would be the pool's


class BandBlocks(NamedTuple):
    """Blocks of keys that each block of rows has to look at: those that are partly in the mask's
    band, and those that are wholly.

    Counts are (batch, 1, row blocks) int32, lists (batch, 1, row blocks, key blocks) int32.
    """

    partial_counts: Tensor
    partial: Tensor
    whole_counts: Tensor
    whole: Tensor


@dataclass(frozen=True, slots=True)
class PagePlan:
    """Where a batch's sequences lie in a pool: made once a step, for all layers.

    It holds for pools of the same shape and strides and for masks of the same band, and if it was
    made without mods, for none. All tensors are int32 but for `counts`.

    table: (batch, width), page numbers, all inside of the pool. lengths: (batch,). first: (batch,),
    the position of the first query. blocks: (batch, 1, 1, listed), the pages to read, as the kernel
    counts. counts: (batch, 1, 1) int64, how many of them. places: (batch, pages), which page of the
    sequence a page is; of pages that it has not, anything. last: (batch,), where the last page
    begins, as the kernel counts. tail: (batch,), how many tokens that page has. lists: those for
    many queries.
    """

    table: Tensor
    lengths: Tensor
    first: Tensor
    blocks: Tensor
    counts: Tensor
    places: Tensor
    last: Tensor
    tail: Tensor
    lists: BandBlocks | None


def plan_pages(
    k_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    *,
    queries: int = 1,
    query_lengths: Tensor | None = None,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    check: bool = False,
) -> PagePlan:
    """The plan of a step, made by a few small launches and without waiting for the GPU.

    For the arguments, and what is raised, see `flex_attention_paged`. queries: rows of queries a
    sequence.
    """
    _check_tables(k_pages, page_table, lengths, query_lengths)
    if check or page_table.is_cpu:
        _check_values(k_pages, page_table, lengths)
    if queries == 1:
        mask_mod = needed_for_last(mask_mod)
    pages, _, page_tokens, _ = k_pages.shape
    unit = unit_of(k_pages, page_table.shape[1])
    table = page_table.clamp(0, pages - 1).int()
    room = table.shape[1] * page_tokens
    lengths = lengths.clamp(0, room).int()
    first = lengths - (queries if query_lengths is None else query_lengths.clamp(0, queries).int())
    band = band_of(mask_mod)
    used = (lengths + page_tokens - 1) // page_tokens
    begin = _first_page(first, used, page_tokens, band)
    newest = (used - 1).clamp(min=0)
    listed = _from(table, begin, _most_listed(table.shape[1], queries, page_tokens, band))
    in_place = unit and queries <= MAX_DECODE_QUERIES
    read = table.is_cpu or score_mod is not None or mask_mod is not None
    return PagePlan(
        table=table,
        lengths=lengths,
        first=first,
        blocks=(listed * unit)[:, None, None],
        counts=(used - begin)[:, None, None].long(),
        places=_places(table, used, pages) if read else table,
        last=table.gather(1, newest[:, None].long())[:, 0] * (unit * page_tokens),
        tail=lengths - newest * page_tokens,
        lists=None if in_place else band_blocks(first, lengths, queries, room, band),
    )


def unit_of(pages: Tensor, width: int) -> int:
    """How many blocks there are from one page to the next where a page is one block: 1 in a pool
    that is dense token by token, heads * layers * 2 in one whose pages have these outside of their
    tokens. 0 where pages cannot be blocks of a sequence.

    pages: (pages, heads, page_tokens, dim). width: the most pages a sequence can have.
    """
    count, heads, page_tokens, dim = pages.shape
    page_stride, head_stride, token_stride, _ = pages.stride()
    if count == 1:
        page_stride = page_tokens * token_stride
    if page_tokens % MIN_TILE or dim < MIN_TILE or token_stride < dim:
        return 0
    unit, rest = divmod(page_stride, page_tokens * token_stride)
    apart = (token_stride, head_stride if heads > 1 else 0)
    aligned = all(stride * pages.element_size() % ALIGNMENT == 0 for stride in apart)
    if rest or not unit or not aligned or pages.data_ptr() % ALIGNMENT:
        return 0
    if count * unit * page_tokens > MAX_INDEX:
        return 0
    return unit if _declared(pages, unit) >= min(width, count) * page_tokens else 0


def as_sequence(pages: Tensor, unit: int) -> Tensor:
    """The pool as (1, heads, tokens, dim), of which a GPU is told no more tokens than it can count
    elements with 32 bits. What lies behind them is reached all the same."""
    _, heads, _, dim = pages.shape
    _, head_stride, token_stride, _ = pages.stride()
    strides = (0, head_stride, token_stride, 1)
    return pages.as_strided((1, heads, _declared(pages, unit), dim), strides)


def padded_rows(queries: int) -> int:
    """Rows that the kernel of many queries has for so many: whole blocks, and of few numbers."""
    return max(BLOCK, power_of_two(queries))


def power_of_two(n: int) -> int:
    """The smallest one that is not under n."""
    return 1 << (n - 1).bit_length()


def band_blocks(first: Tensor, lengths: Tensor, queries: int, room: int, band: Band) -> BandBlocks:
    """The lists for rows that begin at the positions `first`, (batch,) int32.

    Of the blocks that are touched, whole ones are in the middle and partial ones on both sides. A
    band that is not exact has no whole ones. room: tokens that a sequence may have.

    Not to be computed inside of a graph that torch compiles: there the dimension of heads gets a
    stride of its own making, and the kernel takes the lists for contiguous.
    """
    row = torch.arange(0, padded_rows(queries), BLOCK, device=first.device, dtype=torch.int32)
    low = first[:, None] + row
    end = lengths[:, None].expand_as(low)
    high = torch.minimum(low + BLOCK, end) - 1
    begin, behind = _reach(low, high, end, band)
    behind = torch.where(low < end, -(-behind // BLOCK), 0)
    begin = torch.minimum(begin // BLOCK, behind)
    inner, outer = _reach(high, low, end, band)
    inner = torch.minimum(-(-inner // BLOCK), behind)
    outer = torch.minimum(outer // BLOCK, behind) if band.exact else inner
    outer = torch.maximum(outer, inner)
    column = torch.arange(-(-room // BLOCK), device=first.device, dtype=torch.int32)
    most = (-(-end // BLOCK) - 1).clamp(min=0)[..., None]
    whole = torch.minimum(inner[..., None] + column, most)
    sides = begin[..., None] + column
    sides = torch.where(sides < inner[..., None], sides, sides + (outer - inner)[..., None])
    return BandBlocks(
        (behind - begin - (outer - inner))[:, None],
        torch.minimum(sides, most)[:, None],
        (outer - inner)[:, None],
        whole[:, None],
    )


def _reach(back_from: Tensor, ahead_from: Tensor, end: Tensor, band: Band) -> tuple[Tensor, Tensor]:
    """The first key that the band shows to one query, and the key behind the last that it shows to
    another."""
    begin = torch.zeros_like(end) if band.back is None else (back_from - band.back).clamp(min=0)
    behind = end if band.ahead is None else torch.minimum(ahead_from + band.ahead + 1, end)
    return begin, behind.clamp(min=0)


def _declared(pages: Tensor, unit: int) -> int:
    count, heads, page_tokens, dim = pages.shape
    _, head_stride, token_stride, _ = pages.stride()
    tokens = ((count - 1) * unit + 1) * page_tokens
    if pages.is_cpu:
        return tokens
    return min(tokens, (MAX_INDEX - dim - (heads - 1) * head_stride) // token_stride)


def _first_page(first: Tensor, used: Tensor, page_tokens: int, band: Band) -> Tensor:
    """The first page that any query may see, (batch,)."""
    if band.back is None:
        return torch.zeros_like(used)
    return torch.minimum((first - band.back).clamp(min=0) // page_tokens, used)


def _most_listed(width: int, queries: int, page_tokens: int, band: Band) -> int:
    """How many pages any sequence may have in its list."""
    if band.back is None:
        return width
    return min(width, (band.back + queries - 1) // page_tokens + 2)


def _from(table: Tensor, begin: Tensor, width: int) -> Tensor:
    """(batch, width): so many entries of each row from `begin` on; behind its end, any."""
    if width == table.shape[1]:
        return table
    columns = begin[:, None] + torch.arange(width, device=table.device)
    return table.gather(1, columns.clamp(max=table.shape[1] - 1).long())


def _places(table: Tensor, used: Tensor, pages: int) -> Tensor:
    """(batch, pages): the column in which a page stands, -1 on a CPU if in none that is used."""
    batch, width = table.shape
    # Columns that are not used go to one more page, which is cut off.
    places = table.new_empty(batch, pages + 1)
    if table.is_cpu:  # where all keys of the pool are looked at, of which most are no sequence's
        places.fill_(-1)
    columns = torch.arange(width, dtype=torch.int32, device=table.device).expand(batch, width)
    target = torch.where(columns < used[:, None], table, pages).long()
    return places.scatter_(1, target, columns)[:, :pages]


def _check_tables(
    k_pages: Tensor, page_table: Tensor, lengths: Tensor, query_lengths: Tensor | None
) -> None:
    require(k_pages.dim() == 4 and k_pages.numel() > 0, "k_pages", "must have four sizes, none 0")
    device = k_pages.device
    check_tensor(
        "page_table", page_table, shape=(None, None), dtypes=INDEX_DTYPES, device=device,
        last_contiguous=False,
    )  # fmt: skip
    require(page_table.numel() > 0, "page_table", "must not be empty")
    for name, tensor in (("lengths", lengths), ("query_lengths", query_lengths)):
        if tensor is not None:
            check_tensor(
                name, tensor, shape=(len(page_table),), dtypes=INDEX_DTYPES, device=device,
                last_contiguous=False,
            )  # fmt: skip


def _check_values(k_pages: Tensor, page_table: Tensor, lengths: Tensor) -> None:
    """Waits for tensors on a GPU."""
    pages, _, page_tokens, _ = k_pages.shape
    width = page_table.shape[1]
    fits = bool(((lengths >= 0) & (lengths <= width * page_tokens)).all())
    require(fits, "lengths", f"must be from 0 to {width * page_tokens}, the table's room")
    columns = torch.arange(width, device=page_table.device) * page_tokens
    used = page_table[columns < lengths[:, None]]
    inside = bool(((used >= 0) & (used < pages)).all())
    require(inside, "page_table", f"must have pages from 0 to {pages - 1}")
