"""Tests of kvstore.layout: sizes, cells, the encoding, every error."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import InvalidArgument, LayoutMismatch, ProtocolError
from kvstore.layout import Attention, Layout

GQA: dict[str, Any] = {
    "model": "m",
    "attention": Attention.GQA,
    "layers": 5,
    "kv_heads": 3,
    "head_dim": 8,
    "dtype": "bfloat16",
    "block_tokens": 4,
    "layers_per_cell": 2,
    "heads_per_cell": 2,
    "scales": "per_head",
}
PLAIN: dict[str, Any] = {**GQA, "layers_per_cell": None, "heads_per_cell": 1, "scales": "none"}
MLA: dict[str, Any] = {**PLAIN, "attention": Attention.MLA, "kv_heads": 1}
OPAQUE: dict[str, Any] = {**PLAIN, "attention": Attention.OPAQUE, "opaque_bytes": 1000}
GOLDEN = (
    b'{"attention":"gqa","block_tokens":4,"dtype":"bfloat16","head_dim":8,"heads_per_cell":2,'
    b'"kv_heads":3,"layers":5,"layers_per_cell":2,"model":"m","opaque_bytes":0,'
    b'"scales":"per_head","tag":"","version":1}'
)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    attention = draw(st.sampled_from([Attention.GQA, Attention.MLA]))
    layers = draw(st.integers(1, 12))
    heads = 1 if attention is Attention.MLA else draw(st.integers(1, 8))
    return Layout(
        model=draw(st.text(min_size=1, max_size=8)),
        attention=attention,
        layers=layers,
        kv_heads=heads,
        head_dim=draw(st.integers(1, 16)),
        dtype=draw(st.sampled_from(["float32", "bfloat16", "float16", "float8_e4m3"])),
        block_tokens=draw(st.integers(1, 8)),
        layers_per_cell=draw(st.none() | st.integers(1, layers)),
        heads_per_cell=draw(st.integers(1, heads)),
        scales=draw(st.sampled_from(["none", "per_head"])),
        tag=draw(st.text(max_size=8)),
    )


def test_golden_encoding_and_fingerprint() -> None:
    layout = Layout(**GQA)
    assert layout.encode() == GOLDEN
    assert layout.fingerprint().hex() == (
        "16be5cab43db4d6d44f8eb80da0d38b00858b6120092f02ba82ac6ad054beb0c"
    )


def test_last_groups_may_be_smaller() -> None:
    layout = Layout(**GQA)
    assert layout.n_cells == 6
    assert layout.cell_bounds.tolist() == [0, 544, 1088, 1360, 1632, 1904, 2040]
    assert (layout.cells[2].heads, layout.cells[2].layers) == (range(2), range(4, 5))
    assert (layout.cells[3].heads, layout.cells[3].layers) == (range(2, 3), range(2))


@pytest.mark.parametrize(
    ("fields", "block_bytes", "n_cells"),
    [
        (PLAIN, 5 * 3 * 2 * 4 * 8 * 2, 3),
        ({**PLAIN, "scales": "per_head"}, 5 * 3 * 2 * (4 * 8 * 2 + 4), 3),
        (MLA, 5 * 4 * 8 * 2, 1),
        ({**MLA, "scales": "per_head"}, 5 * (4 * 8 * 2 + 4), 1),
        (OPAQUE, 1000, 1),
    ],
)
def test_sizes(fields: dict[str, Any], block_bytes: int, n_cells: int) -> None:
    layout = Layout(**fields)
    assert (layout.block_bytes, layout.n_cells) == (block_bytes, n_cells)
    assert layout.cell_bounds[-1] == block_bytes


@given(layout=layouts())
def test_cells_cover_the_block_once(layout: Layout) -> None:
    covered = [(h, la) for cell in layout.cells for h in cell.heads for la in cell.layers]
    assert len(covered) == len(set(covered)) == layout.layers * layout.kv_heads
    bounds = layout.cell_bounds
    assert bounds.dtype == np.int64
    assert not bounds.flags.writeable
    assert [cell.index for cell in layout.cells] == list(range(layout.n_cells))
    assert [cell.offset for cell in layout.cells] == bounds[:-1].tolist()
    assert [cell.nbytes for cell in layout.cells] == np.diff(bounds).tolist()
    assert bounds[-1] == layout.block_bytes


@given(layout=layouts())
def test_decode_inverts_encode(layout: Layout) -> None:
    again = Layout.decode(layout.encode())
    assert again == layout
    assert again.fingerprint() == layout.fingerprint()


@given(layout=layouts())
def test_parts_of_whole_cells(layout: Layout) -> None:
    assert layout.cells_of() == tuple(range(layout.n_cells))
    for cell in layout.cells:
        assert layout.cells_of(cell.heads, cell.layers) == (cell.index,)
        row = [c.index for c in layout.cells if c.heads == cell.heads]
        assert layout.cells_of(cell.heads) == tuple(row)


def test_parts_of_several_groups() -> None:
    layout = Layout(**GQA)
    assert layout.cells_of(layers=range(2, 5)) == (1, 2, 4, 5)
    assert layout.cells_of(range(3), range(2)) == (0, 3)
    assert Layout(**OPAQUE).cells_of(range(3), range(5)) == (0,)


@pytest.mark.parametrize(
    ("heads", "layers", "field"),
    [(range(1), None, "heads"), (range(1, 3), None, "heads"), (None, range(2, 3), "layers")],
)
def test_a_part_that_cuts_a_cell(heads: range | None, layers: range | None, field: str) -> None:
    with pytest.raises(LayoutMismatch) as caught:
        Layout(**GQA).cells_of(heads, layers)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "layers", [range(0), range(3, 3), range(0, 4, 2), range(-2, 2), range(6), (0, 1)]
)
def test_a_part_that_is_no_part(layers: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Layout(**GQA).cells_of(layers=layers)
    assert caught.value.field == "layers"
    assert not isinstance(caught.value, LayoutMismatch)


@pytest.mark.parametrize(
    ("base", "field", "value"),
    [
        (GQA, "model", ""),
        (GQA, "model", 5),
        (GQA, "model", "m" * 4096),
        (GQA, "tag", "t" * 4096),
        (GQA, "tag", None),
        (GQA, "attention", "gqa"),
        (GQA, "dtype", "int8"),
        (GQA, "scales", "per_token"),
        *[
            (GQA, field, value)
            for field in ("layers", "kv_heads", "head_dim", "block_tokens", "heads_per_cell")
            for value in (0, -1, True, 1.0, None)
        ],
        (GQA, "layers_per_cell", 0),
        (GQA, "layers_per_cell", 6),
        (GQA, "heads_per_cell", 4),
        (GQA, "opaque_bytes", -1),
        (GQA, "opaque_bytes", 1),
        (MLA, "kv_heads", 2),
        (OPAQUE, "opaque_bytes", 0),
        (OPAQUE, "opaque_bytes", (64 << 20) + 1),
        (OPAQUE, "layers_per_cell", 1),
        (OPAQUE, "heads_per_cell", 2),
        (OPAQUE, "scales", "per_head"),
        (GQA, "block_tokens", 1 << 20),
    ],
)
def test_wrong_fields(base: dict[str, Any], field: str, value: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Layout(**{**base, field: value})
    assert caught.value.field == field


def test_too_many_cells() -> None:
    fields = {**PLAIN, "layers": 257, "kv_heads": 1, "layers_per_cell": 1}
    with pytest.raises(InvalidArgument, match="257 cells"):
        Layout(**fields)
    assert Layout(**{**fields, "layers": 256}).n_cells == 256


def test_every_field_changes_the_fingerprint() -> None:
    base = Layout(**PLAIN)
    changes: dict[str, Any] = {
        "model": "n",
        "layers": 6,
        "kv_heads": 4,
        "head_dim": 9,
        "dtype": "float16",
        "block_tokens": 5,
        "layers_per_cell": 5,
        "heads_per_cell": 3,
        "scales": "per_head",
        "tag": "t",
    }
    prints = {dataclasses.replace(base, **{k: v}).fingerprint() for k, v in changes.items()}
    prints |= {base.fingerprint(), Layout(**MLA).fingerprint(), Layout(**OPAQUE).fingerprint()}
    assert len(prints) == len(changes) + 3


def _changed(**changes: Any) -> bytes:
    fields = {**json.loads(GOLDEN), **changes}
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"{",
        b"[]",
        b"[" * 4000,
        b" " * 4097,
        GOLDEN + b" ",
        _changed(version=2),
        _changed(version=True),
        _changed(version=None),
        _changed(more=1),
        _changed(attention="mha"),
        _changed(attention=[]),
        b"{}",
        b'{"version":1}',
    ],
)
def test_decode_refuses_foreign_bytes(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        Layout.decode(data)


def test_decode_refuses_wrong_values() -> None:
    with pytest.raises(InvalidArgument) as caught:
        Layout.decode(_changed(layers="5"))
    assert caught.value.field == "layers"
