"""Blocks as chunks: how they are cut, and the check that all of them arrive, in order."""

from __future__ import annotations

from collections.abc import Iterator

from kvstore.errors import InvalidArgument
from kvstore.session.base import Bytes1D
from kvstore_proto.v1 import kvstore_pb2 as pb
from kvstore_proto.v1.translate import CHUNK_BYTES


def cut(block: Bytes1D) -> Iterator[tuple[int, bytes]]:
    """The chunks of a block (uint8, 1-D, not empty): where each begins, and its bytes."""
    for offset in range(0, block.size, CHUNK_BYTES):
        yield offset, block[offset : offset + CHUNK_BYTES].tobytes()


class Assembly:
    """What arrived of `n_blocks` blocks of `block_bytes` each. Holds no bytes.

    blocks: how many are whole. offset: how many bytes there are of the next one.
    """

    def __init__(self, n_blocks: int, block_bytes: int) -> None:
        self.blocks, self.offset = 0, 0
        self._n_blocks, self._block_bytes = n_blocks, block_bytes

    @property
    def done(self) -> bool:
        """Whether all blocks are whole."""
        return self.blocks == self._n_blocks

    def accept(self, chunk: pb.PutChunk | pb.GetChunk) -> bool:
        """Counts a chunk in; whether it made its block whole.

        `InvalidArgument`, and nothing counted, unless it is the next one and of a legal size.
        """
        self._check(chunk)
        self.offset += len(chunk.data)
        if self.offset < self._block_bytes:
            return False
        self.blocks, self.offset = self.blocks + 1, 0
        return True

    def _check(self, chunk: pb.PutChunk | pb.GetChunk) -> None:
        if self.done or chunk.block != self.blocks:
            expected = "no more chunks" if self.done else f"block {self.blocks}"
            raise InvalidArgument("chunk.block", f"expected {expected}, not {chunk.block}")
        if chunk.offset != self.offset:
            raise InvalidArgument("chunk.offset", f"expected {self.offset}, not {chunk.offset}")
        most = min(CHUNK_BYTES, self._block_bytes - self.offset)
        if not 0 < len(chunk.data) <= most:
            raise InvalidArgument(
                "chunk.data", f"expected 1 to {most} bytes here, not {len(chunk.data)}"
            )
