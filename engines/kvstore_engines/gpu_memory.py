"""A GPU's memory as a cluster client's: blocks are put from there and got there without a copy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from kvstore.transfer.base import DeviceBytes
from kvstore_kernels.xxh3 import xxh3_rows

U64 = npt.NDArray[np.uint64]


class GpuMemory:
    """Implements `kvstore_client.cluster.backing.DeviceMemory` with torch.

    device: as torch names it; its number is that of CUDA's in this process.
    """

    def __init__(self, device: str = "cuda") -> None:
        self._device = torch.device(device)

    def allocate(self, nbytes: int) -> DeviceBytes:
        """See `DeviceMemory`; raises what torch raises where there is not enough."""
        memory = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        return DeviceBytes(memory.data_ptr(), nbytes, max(memory.get_device(), 0), memory)

    def checksums(self, addresses: U64, cells: U64) -> U64:
        """See `DeviceMemory`; a launch for each size that cells have."""
        own, sizes = cells[:, 1], cells[:, 2]
        rows = addresses[:, None] + own[None, :]
        found = np.empty(rows.shape, np.uint64)
        for size in np.unique(sizes).tolist():
            chosen = np.flatnonzero(sizes == size)
            at = torch.from_numpy(np.ascontiguousarray(rows[:, chosen]).ravel().view(np.int64))
            hashes = xxh3_rows(at.to(self._device), size).cpu().numpy().view(np.uint64)
            found[:, chosen] = hashes.reshape(len(addresses), len(chosen))
        return found
