"""What a client does whose memory is a GPU's, for tests with one and for tests without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from cluster.nodes import LAYOUT, blocks, chain, eventually

from kvstore.transfer.base import DeviceBytes
from kvstore_client.cluster.session import ClusterSession

_BEGIN_S = 30.0
Write = Callable[[DeviceBytes, npt.NDArray[np.uint8]], None]
Read = Callable[[DeviceBytes], npt.NDArray[np.uint8]]


def device_blocks(held: Any) -> list[DeviceBytes]:
    """The blocks of a view or of buffers, all of them in a GPU's memory."""
    found = list(held.blocks)
    assert all(isinstance(block, DeviceBytes) for block in found)
    return found


def assert_blocks_go_and_come(session: ClusterSession, write: Write, read: Read) -> None:
    """Blocks are put from the GPU's memory, and come back to other places of it."""
    space = session.open_namespace("device", LAYOUT)
    keys, data = chain(40, 7), blocks(40, 7)  # two segments
    with session.buffers(40, LAYOUT.block_bytes) as buffers:
        sources = device_blocks(buffers)
        for source, block in zip(sources, data, strict=True):
            write(source, block)

        def put() -> bool:
            done = session.put(space, keys, sources, position=0)  # type: ignore[arg-type]
            return done.replicated == 40

        # A node's first transfer with a GPU may take longer than a transfer may: CUDA begins.
        eventually(put, _BEGIN_S, "all are stored")
        assert session.match(space, keys).count == 40
        for source in sources:
            write(source, np.zeros(LAYOUT.block_bytes, np.uint8))

        def got() -> list[npt.NDArray[np.uint8]]:
            with session.view(space, keys) as view:
                landed = device_blocks(view)
                assert not {b.address for b in landed} & {b.address for b in sources}
                return [read(block) for block in landed] if len(landed) == 40 else []

        np.testing.assert_array_equal(eventually(got, _BEGIN_S, "all are got"), data)
    assert session.drop(space, keys[20:]) == 20
    with session.view(space, keys) as view:
        np.testing.assert_array_equal([read(block) for block in device_blocks(view)], data[:20])
