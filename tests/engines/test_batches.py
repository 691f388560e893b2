"""A batch tells for each new token where it stands, and for each sequence which pages it has."""

import pytest

torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")

from kvstore_engines.attention import Batch, make_batch  # noqa: E402

pytestmark = pytest.mark.engines
BLOCK_TOKENS = 16
SEQUENCES = [([7, 3, 9], 40, 41), ([2], 0, 5), ([4, 0], 14, 18), ([1, 5, 6, 8], 31, 32)]
PLACES = [(40, 9, 8), *((at, 2, at) for at in range(5)), (14, 4, 14), (15, 4, 15), (16, 0, 0),
          (17, 0, 1), (31, 5, 15)]  # fmt: skip


def places(batch: Batch) -> list[tuple[int, ...]]:
    columns = (batch.positions, batch.pages, batch.offsets)
    return list(zip(*(column.tolist() for column in columns), strict=True))


@pytest.mark.parametrize("arrays", [False, True])
def test_where_each_token_stands(arrays: bool) -> None:
    kind = (lambda table: np.array(table, np.int64)) if arrays else list
    batch = make_batch([(kind(table), *span) for table, *span in SEQUENCES], BLOCK_TOKENS)
    assert places(batch) == PLACES
    spans = [(s.start, s.tokens, s.page_table.tolist(), s.context_len) for s in batch.spans]
    assert spans == [(0, 1, [7, 3, 9], 41), (1, 5, [2], 5), (6, 4, [4, 0], 18), (10, 1, [1, 5], 32)]
    columns = (batch.positions, batch.pages, batch.offsets)
    assert all(column.dtype == torch.int64 and column.stride() == (1,) for column in columns)


@pytest.mark.parametrize("sequences", range(1, 6))
def test_each_column_begins_at_a_multiple_of_16_bytes(sequences: int) -> None:
    """For other addresses a kernel would be compiled once more."""
    batch = make_batch([([3], 4, 5)] * sequences, BLOCK_TOKENS)
    for column in (batch.positions, batch.pages, batch.offsets):
        assert (column.data_ptr() - batch.positions.data_ptr()) % 16 == 0
    assert places(batch) == [(4, 3, 4)] * sequences


def test_a_sequence_without_enough_pages_is_refused() -> None:
    """And does not read its neighbour's."""
    with pytest.raises(IndexError, match="page for each"):
        make_batch([([1], 16, 17), ([2, 3], 16, 17)], BLOCK_TOKENS)
