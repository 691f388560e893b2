"""Blocks of KV memory as rows: the bytes are the pages', whatever the layout, and come back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from integrations.vllm_connector import BLOCKS, LAYERS, layers_of  # noqa: E402

from kvstore_integrations.settings import ConfigurationError  # noqa: E402
from kvstore_integrations.vllm.pages import CpuMover, Pages, Ring, mover_for  # noqa: E402

pytestmark = pytest.mark.engines

LAYOUTS = ["LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC"]
CHOSEN = np.array([7, 8, 9, 3, 60, 2, 95, 0])


def random_layers(layout: str) -> Any:
    layers = layers_of(layout)
    generator = torch.Generator().manual_seed(1)
    for layer in layers:
        bits = torch.randint(-(1 << 15), 1 << 15, layer.shape, generator=generator)
        layer.view(torch.int16).copy_(bits)
    return layers


def row_of(layers: Any, block: int) -> bytes:
    """The bytes that a block should have: its pages, one after another, in index order."""
    return b"".join(
        layer[block].contiguous().view(torch.uint8).numpy().tobytes() for layer in layers
    )


def gathered(pages: Pages, blocks: Any) -> Any:
    mover = CpuMover()
    rows = mover.host_memory(len(blocks) * pages.block_bytes).view(len(blocks), -1)
    mover.gather(pages, blocks, rows)()
    return rows


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_has_the_pages_of_all_layers_in_index_order(layout: str) -> None:
    layers = random_layers(layout)
    rows = gathered(Pages(layers, BLOCKS), CHOSEN)
    assert [row.numpy().tobytes() for row in rows] == [row_of(layers, b) for b in CHOSEN]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_come_back_into_other_blocks_and_no_other_byte_changes(layout: str) -> None:
    layers = random_layers(layout)
    pages = Pages(layers, BLOCKS)
    before = [row_of(layers, block) for block in range(BLOCKS)]
    targets = np.array([20, 21, 22, 40, 1, 90, 91, 33])
    CpuMover().scatter(pages, gathered(pages, CHOSEN), targets, None)
    wanted = dict(enumerate(before)) | {
        int(t): before[c] for t, c in zip(targets, CHOSEN, strict=True)
    }
    assert [row_of(layers, block) for block in range(BLOCKS)] == list(wanted.values())


def test_blocks_go_from_one_layout_to_another() -> None:
    layers, others = random_layers("LBHNC"), layers_of("BHLNC")
    CpuMover().scatter(Pages(others, BLOCKS), gathered(Pages(layers, BLOCKS), CHOSEN), CHOSEN, None)
    for one, other in zip(layers, others, strict=True):
        assert torch.equal(one[CHOSEN].view(torch.int16), other[CHOSEN].view(torch.int16))


def test_layers_of_one_memory_are_copied_at_once_and_others_one_by_one() -> None:
    assert len(Pages(random_layers("LBHNC"), BLOCKS).spans) == 1
    apart = [layer.clone() for layer in random_layers("LBHNC")]
    pages = Pages(apart, BLOCKS)
    assert len(pages.spans) == LAYERS
    assert gathered(pages, CHOSEN)[3].numpy().tobytes() == row_of(apart, int(CHOSEN[3]))
    mixed = random_layers("LBHNC") + apart[:1]
    assert gathered(Pages(mixed, BLOCKS), CHOSEN)[0].numpy().tobytes() == row_of(mixed, 7)


def test_layers_in_another_order_than_their_memory() -> None:
    layers = random_layers("LBHNC")[::-1]
    assert gathered(Pages(layers, BLOCKS), CHOSEN)[1].numpy().tobytes() == row_of(layers, 8)


def test_layers_of_one_memory_whose_pages_lie_differently() -> None:
    memory = torch.arange(3 * BLOCKS * 4 * 4 * 8, dtype=torch.int16).view(3, BLOCKS, 4, 4, 8)
    layers = [memory[0], memory[1].transpose(1, 2), memory[2]]
    rows = gathered(Pages(layers, BLOCKS), CHOSEN)
    assert [row.numpy().tobytes() for row in rows] == [row_of(layers, b) for b in CHOSEN]


def test_an_engine_that_divides_blocks_further() -> None:
    layers = random_layers("LBHNC")
    pages = Pages(layers, BLOCKS // 4)
    assert pages.block_bytes == 4 * Pages(layers, BLOCKS).block_bytes
    row = gathered(pages, np.array([5]))[0].numpy().tobytes()
    parts = [layer[20:24].contiguous().view(torch.uint8).numpy().tobytes() for layer in layers]
    assert row == b"".join(parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn, torch.uint8])
@pytest.mark.parametrize("width", [3, 8])
def test_elements_of_any_width(dtype: Any, width: int) -> None:
    raw = torch.randint(0, 256, (BLOCKS, 2, 5, width * dtype.itemsize), dtype=torch.uint8)
    layers = [raw.view(dtype), raw.flip(0).contiguous().view(dtype)]
    rows = gathered(Pages(layers, BLOCKS), CHOSEN)
    assert [row.numpy().tobytes() for row in rows] == [row_of(layers, b) for b in CHOSEN]


def test_memory_that_does_not_divide_into_blocks_is_an_error_that_says_so() -> None:
    with pytest.raises(ConfigurationError, match="does not divide into 7 blocks"):
        Pages(random_layers("LBHNC"), 7)
    with pytest.raises(ConfigurationError, match="Choose another attention backend"):
        Pages(layers_of("LBHCN"), BLOCKS)
    with pytest.raises(ConfigurationError, match="on a CPU or GPU"):
        mover_for([Pages([layer.to("meta") for layer in layers_of()], BLOCKS)])


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 6), st.booleans()), max_size=60))
@settings(deadline=None, max_examples=60)
def test_pieces_that_are_lent_never_overlap_and_all_of_it_can_be_lent_again(
    asked: list[tuple[int, int, bool]],
) -> None:
    memory = torch.zeros(1024, dtype=torch.uint8)
    ring, lent = Ring(memory), []
    for unit, most, last in asked:
        taken = ring.take(unit, most)
        if taken is not None:
            ticket, rows = taken
            assert 1 <= len(rows) <= most
            assert rows.shape[1] == unit
            assert not rows.any()  # nobody else has it
            rows.fill_(1)
            lent.append((ticket, rows))
        elif lent:
            ticket, rows = lent.pop(-1 if last else 0)
            rows.fill_(0)
            ring.give_back(ticket)
    for ticket, rows in lent:
        rows.fill_(0)
        ring.give_back(ticket)
    taken = ring.take(1024, 1)
    assert taken is not None
