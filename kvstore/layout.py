"""How the bytes of one block are divided, and the fingerprint under which blocks are shared.

A block holds the keys and values of `block_tokens` tokens. It is cut into cells, the unit that is
checksummed and moved; each cell covers a group of heads and a group of layers, so that a tensor-
or pipeline-parallel worker reads its own cells and nothing else:

    block = [head group][layer group] cells
    cell  = [layer][head][k, v][token][head dim]     (GQA)
            [layer][token][width]                    (MLA: one latent, no k and v)
            then, with scales, [layer][head][k, v] float32 (MLA: [layer] float32)
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import json
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore import limits
from kvstore.errors import InvalidArgument, LayoutMismatch, ProtocolError

LAYOUT_VERSION = 1
DTYPE_BYTES = MappingProxyType({"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3": 1})
SCALES = ("none", "per_head")
SCALE_BYTES = 4  # float32
_PERSON = b"kvstore-layout-1"
_VERSION_FIELD = "version"


class Attention(enum.StrEnum):
    """What the bytes of a block mean."""

    GQA = "gqa"  # keys and values per head; multi-head and multi-query are cases of it
    MLA = "mla"  # one latent vector per token and layer
    OPAQUE = "opaque"  # bytes that only the caller understands; one cell


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One cell: which heads and layers it covers, and its bytes [offset, offset + nbytes)."""

    index: int
    heads: range
    layers: range
    offset: int
    nbytes: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The form of every block of a namespace. Raises InvalidArgument naming the wrong field.

    model: fingerprint of model and weights, not empty. head_dim: elements per head and token (MLA:
    latent plus rope width, with kv_heads 1). layers_per_cell: None for all. scales: "none" or
    "per_head". opaque_bytes: the block's size, for Attention.OPAQUE only; layers, kv_heads and
    head_dim then describe no bytes but still are part of the fingerprint. tag: anything else that
    must not be mixed.
    """

    model: str
    attention: Attention
    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    block_tokens: int
    layers_per_cell: int | None = None
    heads_per_cell: int = 1
    scales: str = "none"
    opaque_bytes: int = 0
    tag: str = ""

    def __post_init__(self) -> None:
        _check_texts(self)
        _check_numbers(self)
        _check_attention(self)
        _check_sizes(self)

    @classmethod
    def opaque(cls, *, model: str, block_bytes: int, block_tokens: int, tag: str = "") -> Layout:
        """Blocks of `block_bytes` that only the caller understands, in one cell."""
        return cls(
            model=model,
            attention=Attention.OPAQUE,
            layers=1,
            kv_heads=1,
            head_dim=1,
            dtype="float8_e4m3",
            block_tokens=block_tokens,
            opaque_bytes=block_bytes,
            tag=tag,
        )

    @property
    def block_bytes(self) -> int:
        """Bytes of one block's payload."""
        if self.attention is Attention.OPAQUE:
            return self.opaque_bytes
        return self.layers * self.kv_heads * _unit_bytes(self)

    @property
    def n_cells(self) -> int:
        """Cells per block."""
        head_groups, layer_groups = _groups(self)
        return head_groups * layer_groups

    @property
    def cells(self) -> tuple[Cell, ...]:
        """The cells in the order of their bytes, without gaps."""
        return _cells(self)

    @property
    def cell_bounds(self) -> npt.NDArray[np.int64]:
        """(n_cells + 1,) int64, read-only: cell i is bytes [bounds[i], bounds[i + 1])."""
        return _cell_bounds(self)

    def cells_of(self, heads: range | None = None, layers: range | None = None) -> tuple[int, ...]:
        """Indices, ascending, of the cells that make up a part; None stands for all.

        Raises InvalidArgument for a range that is empty, has a step or is out of bounds, and
        LayoutMismatch for one that cuts a cell.
        """
        heads_per, layers_per = _per_cell(self)
        head_groups = _groups_of("heads", heads, self.kv_heads, heads_per)
        layer_groups = _groups_of("layers", layers, self.layers, layers_per)
        row = _groups(self)[1]
        return tuple(head * row + layer for head in head_groups for layer in layer_groups)

    def fingerprint(self) -> bytes:
        """32 bytes that differ for layouts that differ in anything."""
        return _fingerprint(self)

    def encode(self) -> bytes:
        """Canonical JSON (ASCII, keys sorted, no blanks), at most limits.MAX_LAYOUT_BYTES."""
        return _encoded(self)

    @classmethod
    def decode(cls, data: bytes) -> Layout:
        """Inverse of `encode`.

        Raises ProtocolError for bytes that no `encode` of this version wrote, and InvalidArgument
        for well-formed fields with a wrong value.
        """
        if len(data) > limits.MAX_LAYOUT_BYTES:
            raise ProtocolError(f"layout is over {limits.MAX_LAYOUT_BYTES} bytes")
        return _decoded(bytes(data))


_FIELDS = tuple(field.name for field in dataclasses.fields(Layout))


@functools.lru_cache(maxsize=limits.MAX_NAMESPACES)
def _encoded(layout: Layout) -> bytes:
    fields = {name: getattr(layout, name) for name in _FIELDS}
    fields[_VERSION_FIELD] = LAYOUT_VERSION
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode("ascii")


@functools.lru_cache(maxsize=limits.MAX_NAMESPACES)
def _decoded(data: bytes) -> Layout:
    fields = _parse(data)
    version = fields.pop(_VERSION_FIELD, None)
    if type(version) is not int or version != LAYOUT_VERSION:
        raise ProtocolError(f"layout version {version!r} is unknown")
    if fields.keys() != set(_FIELDS):
        raise ProtocolError("layout fields are missing or unknown")
    try:
        fields["attention"] = Attention(fields["attention"])
    except ValueError as error:
        raise ProtocolError(f"attention {fields['attention']!r} is unknown") from error
    layout = Layout(**fields)
    # One layout has one encoding; else its fingerprint would depend on who wrote it.
    if layout.encode() != data:
        raise ProtocolError("layout is not in canonical form")
    return layout


def _parse(data: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(data.decode("ascii"))
    except (ValueError, RecursionError) as error:  # ValueError: also bad JSON and bad ASCII
        raise ProtocolError("layout is not JSON") from error
    if not isinstance(fields, dict):
        raise ProtocolError("layout is not a JSON object")
    return fields


def _check_texts(layout: Layout) -> None:
    for field in ("model", "dtype", "scales", "tag"):
        value = getattr(layout, field)
        if not isinstance(value, str):
            raise InvalidArgument(field, f"must be a string, not {type(value).__name__}")
    if not layout.model:
        raise InvalidArgument("model", "must not be empty")
    if not isinstance(layout.attention, Attention):
        raise InvalidArgument("attention", f"must be an Attention, not {layout.attention!r}")
    if layout.dtype not in DTYPE_BYTES:
        raise InvalidArgument("dtype", f"{layout.dtype!r} is none of {', '.join(DTYPE_BYTES)}")
    if layout.scales not in SCALES:
        raise InvalidArgument("scales", f"{layout.scales!r} is none of {', '.join(SCALES)}")


def _check_numbers(layout: Layout) -> None:
    for field in ("layers", "kv_heads", "head_dim", "block_tokens", "heads_per_cell"):
        _check_int(field, getattr(layout, field), 1)
    if layout.layers_per_cell is not None:
        _check_int("layers_per_cell", layout.layers_per_cell, 1)
        if layout.layers_per_cell > layout.layers:
            raise InvalidArgument("layers_per_cell", f"is over the {layout.layers} layers")
    if layout.heads_per_cell > layout.kv_heads:
        raise InvalidArgument("heads_per_cell", f"is over the {layout.kv_heads} heads")
    _check_int("opaque_bytes", layout.opaque_bytes, 0)


def _check_int(field: str, value: object, least: int) -> None:
    # bool is an int to isinstance, and True would share 1's fingerprint in memory but not in JSON.
    if type(value) is not int or value < least:
        raise InvalidArgument(field, f"must be an integer >= {least}, not {value!r}")


def _check_attention(layout: Layout) -> None:
    if layout.attention is Attention.OPAQUE:
        _check_opaque(layout)
    elif layout.opaque_bytes:
        raise InvalidArgument("opaque_bytes", "is for opaque attention only")
    elif layout.attention is Attention.MLA and layout.kv_heads != 1:
        raise InvalidArgument("kv_heads", "must be 1 for MLA")


def _check_opaque(layout: Layout) -> None:
    if not layout.opaque_bytes:
        raise InvalidArgument("opaque_bytes", "must be the block's size for opaque attention")
    if layout.layers_per_cell is not None:
        raise InvalidArgument("layers_per_cell", "must be None: an opaque block is one cell")
    if layout.heads_per_cell != 1:
        raise InvalidArgument("heads_per_cell", "must be 1: an opaque block is one cell")
    if layout.scales != "none":
        raise InvalidArgument("scales", 'must be "none" for opaque attention')


def _check_sizes(layout: Layout) -> None:
    if layout.n_cells > limits.MAX_CELLS:
        raise InvalidArgument(
            "heads_per_cell", f"gives {layout.n_cells} cells, over {limits.MAX_CELLS}"
        )
    if layout.block_bytes > limits.MAX_BLOCK_BYTES:
        raise InvalidArgument(
            "opaque_bytes" if layout.attention is Attention.OPAQUE else "block_tokens",
            f"gives a block of {layout.block_bytes} bytes, over {limits.MAX_BLOCK_BYTES}",
        )
    if len(layout.encode()) > limits.MAX_LAYOUT_BYTES:
        field = "model" if len(layout.model) >= len(layout.tag) else "tag"
        raise InvalidArgument(field, f"makes the layout over {limits.MAX_LAYOUT_BYTES} bytes")


def _unit_bytes(layout: Layout) -> int:
    """Bytes of one head of one layer, scales included."""
    planes = 1 if layout.attention is Attention.MLA else 2
    elements = planes * layout.block_tokens * layout.head_dim
    scales = planes * SCALE_BYTES if layout.scales == "per_head" else 0
    return elements * DTYPE_BYTES[layout.dtype] + scales


def _per_cell(layout: Layout) -> tuple[int, int]:
    """(heads, layers) of a full cell."""
    if layout.attention is Attention.OPAQUE:
        return layout.kv_heads, layout.layers
    return layout.heads_per_cell, layout.layers_per_cell or layout.layers


def _groups(layout: Layout) -> tuple[int, int]:
    """(head groups, layer groups)."""
    heads_per, layers_per = _per_cell(layout)
    return -(-layout.kv_heads // heads_per), -(-layout.layers // layers_per)


def _split(total: int, per: int) -> tuple[range, ...]:
    return tuple(range(at, min(at + per, total)) for at in range(0, total, per))


@functools.lru_cache(maxsize=limits.MAX_NAMESPACES)
def _cells(layout: Layout) -> tuple[Cell, ...]:
    heads_per, layers_per = _per_cell(layout)
    opaque = layout.attention is Attention.OPAQUE
    unit = _unit_bytes(layout)
    cells: list[Cell] = []
    offset = 0
    for heads in _split(layout.kv_heads, heads_per):
        for layers in _split(layout.layers, layers_per):
            size = layout.opaque_bytes if opaque else len(heads) * len(layers) * unit
            cells.append(
                Cell(index=len(cells), heads=heads, layers=layers, offset=offset, nbytes=size)
            )
            offset += size
    return tuple(cells)


@functools.lru_cache(maxsize=limits.MAX_NAMESPACES)
def _cell_bounds(layout: Layout) -> npt.NDArray[np.int64]:
    starts = [cell.offset for cell in _cells(layout)]
    bounds = np.array([*starts, layout.block_bytes], dtype=np.int64)
    bounds.setflags(write=False)  # shared by all who ask
    return bounds


@functools.lru_cache(maxsize=limits.MAX_NAMESPACES)
def _fingerprint(layout: Layout) -> bytes:
    return hashlib.blake2b(layout.encode(), digest_size=limits.KEY_BYTES, person=_PERSON).digest()


def _groups_of(field: str, part: range | None, total: int, per: int) -> range:
    """The groups that make up `part` of `total` heads or layers."""
    if part is None:
        part = range(total)
    if not isinstance(part, range) or part.step != 1 or not part:
        raise InvalidArgument(field, f"must be a range with members and step 1, not {part!r}")
    if part.start < 0 or part.stop > total:
        raise InvalidArgument(field, f"{part!r} is outside 0..{total}")
    if part.start % per or (part.stop % per and part.stop != total):
        raise LayoutMismatch(field, f"{part!r} cuts a cell of {per}")
    return range(part.start // per, -(-part.stop // per))
