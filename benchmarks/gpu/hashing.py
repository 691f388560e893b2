"""Checksums of blocks in the GPU's memory, beside a read of as many bytes in the same run.

64 blocks as one cell each, and as a cell a layer. Every hash is compared with the library's.
`python -m benchmarks.gpu.hashing`
"""

from __future__ import annotations

from functools import partial

import torch
import xxhash

from benchmarks.gpu.timing import ceilings, graph_us, rotations
from kvstore_kernels.xxh3 import xxh3_rows

BLOCKS = 64
# Bytes of a block, cells in it.
SHAPES = ((256 << 10, 1), (256 << 10, 32), (2 << 20, 1), (2 << 20, 32), (4 << 20, 64))


def measure(block_bytes: int, cells: int) -> float:
    """Microseconds to hash all cells of all blocks; raises ValueError for a wrong hash."""
    total, size = BLOCKS * block_bytes, block_bytes // cells
    turns = [
        torch.randint(0, 256, (total,), dtype=torch.uint8, device="cuda")
        for _ in range(rotations(total, most=16))
    ]
    starts = size * torch.arange(BLOCKS * cells, device="cuda")
    rows = [data.data_ptr() + starts for data in turns]
    found = xxh3_rows(rows[0], size).tolist()
    for row, hashed in zip(turns[0].view(-1, size).cpu().numpy(), found, strict=True):
        if xxhash.xxh3_64_intdigest(row.tobytes()) != hashed % (1 << 64):
            raise ValueError(f"a wrong hash of {size} bytes")
    return graph_us([partial(xxh3_rows, at, size) for at in rows])


def main() -> None:
    """Prints the table."""
    reads = ceilings().read_bytes
    print(f"this GPU reads {reads / 1e12:.2f} TB/s; {BLOCKS} blocks")
    print(f"{'block':>8} {'cells':>6} {'us':>8} {'GB/s':>8} {'read us':>8}")
    for block_bytes, cells in SHAPES:
        us, total = measure(block_bytes, cells), BLOCKS * block_bytes
        row = f"{us:8.1f} {total / us / 1e3:8.0f} {total / reads * 1e6:8.1f}"
        print(f"{block_bytes >> 10:>5} KiB {cells:>6} {row}", flush=True)


if __name__ == "__main__":
    main()
