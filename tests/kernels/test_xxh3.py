"""XXH3 of rows, in Triton's interpreter, beside the library."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xxhash

from kvstore_engines.gpu_memory import GpuMemory
from kvstore_kernels.errors import KernelArgumentError
from kvstore_kernels.xxh3 import LEAST_BYTES, xxh3_rows

# Around the ends of stripes and of KiBs, with and without whole ones, and an odd number of KiBs.
SIZES = (248, 256, 264, 512, 1016, 1024, 1032, 1088, 1096, 2048, 2056, 5000, 5120, 9216)


def rows_of(n: int, nbytes: int) -> tuple[np.ndarray, torch.Tensor]:
    """Random rows, and where they lie, 8 bytes more apart than they are long."""
    data = np.random.default_rng(nbytes).integers(0, 256, (n, nbytes + 8), np.uint8)
    at = [data.ctypes.data + i * data.strides[0] for i in range(n)]
    return data, torch.tensor(at, dtype=torch.int64)


@pytest.mark.parametrize("nbytes", SIZES)
def test_rows_have_the_hash_of_the_library(nbytes: int) -> None:
    data, at = rows_of(3, nbytes)
    found = xxh3_rows(at, nbytes).numpy().view(np.uint64).tolist()
    assert found == [xxhash.xxh3_64_intdigest(row[:nbytes].tobytes()) for row in data]


def test_any_byte_changes_the_hash() -> None:
    data, at = rows_of(1, 1096)
    seen = {int(xxh3_rows(at, 1096))}
    for i in range(0, 1096, 37):
        data[0, i] ^= 1
        seen.add(int(xxh3_rows(at, 1096)))
        data[0, i] ^= 1
    assert len(seen) == 1 + len(range(0, 1096, 37))


def test_no_rows_have_no_hashes() -> None:
    assert len(xxh3_rows(torch.empty(0, dtype=torch.int64), 256)) == 0


@pytest.mark.parametrize("nbytes", [0, 240, LEAST_BYTES, 252, 1 << 34])
def test_sizes_that_it_does_not_hash_are_refused(nbytes: int) -> None:
    with pytest.raises(KernelArgumentError, match="nbytes"):
        xxh3_rows(torch.zeros(1, dtype=torch.int64), nbytes)


@pytest.mark.parametrize(
    "addresses", [torch.zeros(1, dtype=torch.int32), torch.zeros((1, 1), dtype=torch.int64)]
)
def test_addresses_must_be_one_column_of_int64(addresses: torch.Tensor) -> None:
    with pytest.raises(KernelArgumentError, match="addresses"):
        xxh3_rows(addresses, 256)


def test_a_gpus_memory_hashes_cells_of_several_sizes() -> None:
    memory = GpuMemory("cpu").allocate(4096)
    data = np.random.default_rng(3).integers(0, 256, 4096, np.uint8)
    owner = memory.owner
    assert isinstance(owner, torch.Tensor)
    owner.copy_(torch.from_numpy(data))
    cells = np.array([(0, 0, 256), (512, 256, 1024), (2048, 1280, 256)], np.uint64)
    blocks = np.array([memory.address, memory.address + 2048], np.uint64)
    want = [
        [
            xxhash.xxh3_64_intdigest(data[at + own : at + own + size].tobytes())
            for _, own, size in cells
        ]
        for at in (0, 2048)
    ]
    assert GpuMemory("cpu").checksums(blocks, cells).tolist() == want
