"""How blocks travel over gRPC: a put's messages, and what a get's answer amounts to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from kvstore.errors import InvalidArgument, ProtocolError
from kvstore.session.base import Bytes1D, Hit, Miss, MissReason
from kvstore.session.buffers import HeldBlocks
from kvstore_proto.v1 import kvstore_pb2 as pb
from kvstore_proto.v1.chunks import Assembly, cut
from kvstore_proto.v1.translate import reason_of, tier_of


def put_requests(header: pb.PutHeader, sources: Sequence[Bytes1D]) -> Iterator[pb.PutRequest]:
    """The messages of one put. Reads each source only when its turn has come."""
    yield pb.PutRequest(header=header)
    for block, source in enumerate(sources):
        for offset, data in cut(source):
            yield pb.PutRequest(chunk=pb.PutChunk(block=block, offset=offset, data=data))


class Arrival:
    """What has arrived of `n_blocks` blocks of `block_bytes`: whole blocks count, whatever follows.

    target: where block i's bytes go (uint8, 1-D, `block_bytes` long), asked once for each block
    that begins.
    """

    def __init__(self, n_blocks: int, block_bytes: int, target: Callable[[int], Bytes1D]) -> None:
        self.hits: list[Hit] = []
        self.reason: MissReason | None = None
        self._n_blocks = n_blocks
        self._assembly = Assembly(n_blocks, block_bytes)
        self._target = target
        self._ended = False

    def take(self, parts: Iterable[pb.GetResponse]) -> None:
        """Takes an answer in; `ProtocolError` for one that is not of the protocol."""
        for part in parts:
            if self._ended:
                raise ProtocolError("a get's answer goes on after its outcome")
            if part.HasField("outcome"):
                self._end(part.outcome)
            else:
                self._take_chunk(part.chunk)
        if not self._ended:
            raise ProtocolError("a get's answer ends without its outcome")

    def results(self) -> list[Hit | Miss]:
        """What became of each block; of those of which nobody said anything: unavailable."""
        reason = self.reason or MissReason.UNAVAILABLE
        away = reason is MissReason.UNAVAILABLE
        results: list[Hit | Miss] = [*self.hits]
        if len(results) < self._n_blocks:
            results.append(Miss(reason))
        behind = Miss(MissReason.UNAVAILABLE if away else MissReason.NOT_STORED)
        return results + [behind] * (self._n_blocks - len(results))

    def _take_chunk(self, chunk: pb.GetChunk) -> None:
        try:
            whole = self._assembly.accept(chunk)
        except InvalidArgument as error:
            raise ProtocolError(f"a get's answer: {error}") from None
        if whole != chunk.last:
            raise ProtocolError(f"block {chunk.block} ends where it should not")
        if chunk.offset == 0:
            self._buffer = self._target(chunk.block)
        data = np.frombuffer(chunk.data, np.uint8)
        self._buffer[chunk.offset : chunk.offset + data.size] = data
        if whole:
            self.hits.append(Hit(tier_of(chunk.tier)))

    def _end(self, outcome: pb.GetOutcome) -> None:
        if outcome.hits != len(self.hits) or self._assembly.offset:
            raise ProtocolError(f"{outcome.hits} blocks are said to be got, {len(self.hits)} were")
        if outcome.hits < self._n_blocks:
            self.reason = reason_of(outcome.reason)
        self._ended = True


class CopiedView(HeldBlocks):
    """A `View` of private copies: nothing is held in the store, and they stay good as they are."""

    def __init__(self, blocks: list[Bytes1D]) -> None:
        for block in blocks:
            block.flags.writeable = False
        super().__init__(blocks)
