"""A GPU's memory as a cluster client's: hashed by a kernel, moved by NIXL to and from nodes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
import xxhash

from kvstore.transfer.base import DeviceBytes
from kvstore_engines.gpu_memory import GpuMemory
from kvstore_kernels.xxh3 import xxh3_rows

REPEATS = 100


@pytest.mark.parametrize("nbytes", [248, 1024, 1032, 8192, 65536 + 8, 1 << 20])
def test_rows_have_the_hash_of_the_library(gpu: torch.device, nbytes: int) -> None:
    torch.manual_seed(5)
    data = torch.randint(0, 256, (67, nbytes), dtype=torch.uint8, device=gpu)
    at = data.data_ptr() + nbytes * torch.arange(67, device=gpu)
    first = xxh3_rows(at, nbytes)
    want = [xxhash.xxh3_64_intdigest(row.tobytes()) for row in data.cpu().numpy()]
    assert first.cpu().numpy().view(np.uint64).tolist() == want
    differ = torch.zeros((), dtype=torch.int64, device=gpu)
    for _ in range(REPEATS):
        differ += (xxh3_rows(at, nbytes) != first).sum()
    assert int(differ) == 0


def write(block: DeviceBytes, data: npt.NDArray[np.uint8]) -> None:
    torch.as_tensor(block, device="cuda").copy_(torch.from_numpy(data))


def read(block: DeviceBytes) -> npt.NDArray[np.uint8]:
    return torch.as_tensor(block, device="cuda").cpu().numpy()


@pytest.mark.parametrize("transfer", ["nixl", "auto"])
def test_blocks_are_put_from_a_gpus_memory_and_got_there(
    gpu: torch.device, transfer: str, tmp_path: Path
) -> None:
    # Nodes need the server's packages, which a machine for kernels need not have.
    pytest.importorskip("kvstore_server.cli", exc_type=ImportError)
    from kvstore.errors import Unavailable
    from kvstore.transfer import nixl

    try:
        nixl.load()
    except Unavailable as error:
        pytest.skip(str(error))
    from cluster.device_scene import assert_blocks_go_and_come
    from cluster.nodes import nodes

    with nodes(tmp_path, 2, "--transfer", transfer) as running:
        running.wait_until_well()
        with running.client(
            transfer=transfer,
            device=GpuMemory(),
            device_over_tcp=True,
            ring_bytes=64 << 20,
        ) as session:
            assert_blocks_go_and_come(session, write, read)
