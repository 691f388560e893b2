"""Puts and gets of the public protocol: blocks that arrive and leave in chunks.

Memory is bounded: a call has a buffer of `BUFFER_BYTES`, or of one block where that is larger.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore import commands as c
from kvstore.errors import InvalidArgument
from kvstore.session.base import (
    Hint,
    Hit,
    Miss,
    MissReason,
    NamespaceHandle,
    PutResult,
    Session,
)
from kvstore_proto.v1 import kvstore_pb2 as pb
from kvstore_proto.v1 import translate as t
from kvstore_proto.v1.chunks import Assembly, cut

BUFFER_BYTES = 8 << 20
_PUT_ID_BYTES = 16

Rows = npt.NDArray[np.uint8]  # (k, bytes of the part)
LeftS = Callable[[], float]


def new_buffer(n_blocks: int, block_bytes: int) -> Rows:
    """Room for as many of the blocks as a call may hold, at least one: (k, block_bytes)."""
    rows = max(1, min(n_blocks, BUFFER_BYTES // block_bytes))
    return np.empty((rows, block_bytes), np.uint8)


# -- get -----------------------------------------------------------------------------------


def get(
    session: Session, namespace: NamespaceHandle, request: pb.GetRequest, left_s: LeftS
) -> Iterator[pb.GetResponse]:
    """The chunks of the leading stored blocks, then the outcome."""
    chain = t.keys_of(request.keys)
    cells = list(request.cells)
    part = t.part_of_cells(namespace.layout, cells)
    buffer = new_buffer(len(chain), part.nbytes)
    for first in range(0, len(chain), len(buffer)):
        hashes = chain[first : first + len(buffer)]
        rows = list(buffer[: len(hashes)])
        answers = session.get_into(namespace, hashes, rows, cells=cells, timeout_s=left_s())
        for i, answer in enumerate(answers):
            if isinstance(answer, Miss):
                yield _outcome(first + i, answer.reason)
                return
            yield from _chunks(first + i, rows[i], answer)
    yield _outcome(len(chain), None)


def _chunks(block: int, row: npt.NDArray[np.uint8], hit: Hit) -> Iterator[pb.GetResponse]:
    tier = t.TIER_TO_WIRE[hit.tier]
    for offset, data in cut(row):
        last = offset + len(data) == row.size
        chunk = pb.GetChunk(block=block, offset=offset, data=data, last=last, tier=tier)
        yield pb.GetResponse(chunk=chunk)


def _outcome(hits: int, reason: MissReason | None) -> pb.GetResponse:
    said = t.REASON_TO_WIRE[reason] if reason else pb.MISS_REASON_UNSPECIFIED
    return pb.GetResponse(outcome=pb.GetOutcome(hits=hits, reason=said))


# -- put -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Put:
    """What a put's header asks for, checked as far as no store is needed.

    chain: uint8 (n, 32). cells: as sent, none for all. ttl_s: None for blocks without an end.
    """

    chain: c.U8
    put_id: bytes
    cells: list[int]
    block_bytes: int
    parent: bytes
    position: int
    ttl_s: float | None
    hint: Hint | None
    persist: bool

    @classmethod
    def of(cls, header: pb.PutHeader, namespace: NamespaceHandle) -> Put:
        """`InvalidArgument` names the wrong field."""
        cells = list(header.cells)
        return cls(
            chain=t.keys_of(header.keys),
            # All of a call's blocks are one put, also where they reach the store bit by bit.
            put_id=_put_id(header.put_id),
            cells=cells,
            block_bytes=t.part_of_cells(namespace.layout, cells).nbytes,
            parent=header.parent,
            position=header.position if header.HasField("position") else -1,
            ttl_s=header.ttl_ms / 1e3 if header.ttl_ms else None,
            hint=t.hint_of(header.hint) if header.HasField("hint") else None,
            persist=header.persist,
        )

    def store(
        self,
        session: Session,
        namespace: NamespaceHandle,
        first: int,
        rows: Rows,
        timeout_s: float,
    ) -> PutResult:
        """Puts the blocks from `first` on, whose bytes are `rows`."""
        return session.put(
            namespace,
            self.chain[first : first + len(rows)],
            list(rows),
            put_id=self.put_id,
            cells=self.cells,
            parent=self.chain[first - 1].tobytes() if first else self.parent,
            position=self.position + first if self.position >= 0 else -1,
            ttl_s=self.ttl_s,
            hint=self.hint,
            persist=self.persist,
            timeout_s=timeout_s,
        )


def header_of(requests: Iterator[pb.PutRequest]) -> pb.PutHeader:
    """The first message of a put; `InvalidArgument` where it is no header."""
    first = next(requests, None)
    if first is None or not first.HasField("header"):
        raise InvalidArgument("header", "a put begins with its header")
    return first.header


def batches(requests: Iterator[pb.PutRequest], put: Put) -> Iterator[tuple[int, Rows]]:
    """The blocks as they become whole, some at a time: the first one's index, and their bytes.

    The bytes change with the next step. `InvalidArgument` for chunks that do not follow each
    other, or that end before the last block does.
    """
    n_blocks = len(put.chain)
    buffer = new_buffer(n_blocks, put.block_bytes)
    arrived, first = Assembly(n_blocks, put.block_bytes), 0
    for request in requests:
        if not request.HasField("chunk"):
            raise InvalidArgument("part", "only chunks follow the header")
        chunk = request.chunk
        whole = arrived.accept(chunk)
        data = np.frombuffer(chunk.data, np.uint8)
        buffer[chunk.block - first, chunk.offset : chunk.offset + data.size] = data
        if whole and (arrived.done or arrived.blocks - first == len(buffer)):
            yield first, buffer[: arrived.blocks - first]
            first = arrived.blocks
    if not arrived.done:
        raise InvalidArgument("chunk", f"{arrived.blocks} of {n_blocks} blocks arrived whole")


def _put_id(put_id: bytes) -> bytes:
    if put_id and len(put_id) != _PUT_ID_BYTES:
        raise InvalidArgument("put_id", f"must have {_PUT_ID_BYTES} bytes, or none")
    return put_id or secrets.token_bytes(_PUT_ID_BYTES)
