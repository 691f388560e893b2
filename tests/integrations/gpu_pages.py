"""Copies between GPU memory and rows, checked byte by byte and timed.

`python tests/integrations/gpu_pages.py`, on a machine with a GPU and the project's packages.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from kvstore_integrations.vllm.pages import CudaMover, Pages

DEVICE = torch.device("cuda")
BLOCKS = 512
SIZES = {"L": 32, "B": BLOCKS, "H": 8, "N": 16, "C": 256}  # 2 MiB a block in bfloat16
REPEATS = 5


def layers_of(layout: str) -> list[torch.Tensor]:
    """Random KV memory in one of vLLM's physical orders, by layer, each (B, H, N, C)."""
    shape = [SIZES[letter] for letter in layout]
    memory = torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16, device=DEVICE)
    logical = memory.view(torch.bfloat16).permute([layout.index(letter) for letter in "LBHNC"])
    return list(logical.unbind(0))


def seconds_of(work: Callable[[], object]) -> float:
    """The median of some runs, the first of which does not count."""
    times = []
    for _ in range(REPEATS + 1):
        begin = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return sorted(times[1:])[REPEATS // 2]


def check(layout: str) -> None:
    """Gathers blocks in random order, scatters them into others, and compares all bytes."""
    layers = layers_of(layout)
    pages = Pages(layers, BLOCKS)
    mover = CudaMover(DEVICE, pages.block_bytes)
    order = np.random.default_rng(1).permutation(BLOCKS)
    source, target = order[: BLOCKS // 2], order[BLOCKS // 2 :]
    nbytes = len(source) * pages.block_bytes
    rows = mover.host_memory(nbytes).view(len(source), pages.block_bytes)
    before = torch.stack(layers).view(torch.int16).clone()

    def gather() -> None:
        mover.gather(pages, source, rows)()

    out = nbytes / seconds_of(gather) / 1e9
    expected = before[:, torch.from_numpy(source).to(DEVICE)].transpose(0, 1).reshape(len(rows), -1)
    assert torch.equal(rows.view(torch.int16), expected.cpu()), f"{layout}: gathered other bytes"
    back = nbytes / seconds_of(partial(mover.scatter, pages, rows, target, mover.mark())) / 1e9
    before[:, torch.from_numpy(target).to(DEVICE)] = before[:, torch.from_numpy(source).to(DEVICE)]
    after = torch.stack(layers).view(torch.int16)
    assert torch.equal(after, before), f"{layout}: scattered other bytes, or elsewhere"
    print(
        f"{layout}: {nbytes >> 20} MiB right; to the host {out:.1f} GB/s, from it {back:.1f} GB/s"
    )


def main() -> None:
    """The command."""
    print(torch.cuda.get_device_name(DEVICE))
    for layout in ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC"):
        check(layout)


if __name__ == "__main__":
    main()
