"""The transfer by frames alone: over pipes in memory, and against ends that lie."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transfer.pipes import MemoryPipe, SocketPipe, memory_pipes

from kvstore import limits
from kvstore.errors import DeadlineExceeded, ProtocolError, ResourceExhausted
from kvstore.transfer import frames
from kvstore.transfer.base import Pieces, TransferFailed
from kvstore.transfer.frames import Kind
from kvstore.transfer.registered import Region, Regions, Registered, checked, merged
from kvstore.transfer.stream import StreamAgent, StreamRemote

TIMEOUT_S = 5.0
SIZE = 3 << 20
PLAIN = settings(
    derandomize=True,
    deadline=None,
    max_examples=200,
    suppress_health_check=[HealthCheck.too_slow],  # so is a busy machine
)


def u64(*values: int) -> np.ndarray:
    return np.array(values, np.uint64)


class Both:
    """An active and a passive agent of one process, over a pipe in memory."""

    def __init__(self) -> None:
        self.here, self.there = np.zeros(SIZE, np.uint8), np.zeros(SIZE, np.uint8)
        self.there[:] = np.random.default_rng(5).integers(0, 256, SIZE, np.uint8)
        self.passive = StreamAgent("passive")
        self.active = StreamAgent("active", self._pipe)
        self.active.register(self.here)
        self.passive.register(self.there)

    def _pipe(self, body: bytes, timeout_s: float) -> MemoryPipe:
        near, far = memory_pipes()
        self.passive.serve(far)
        return near

    def pieces(self, here: int, there: int, nbytes: int) -> Pieces:
        return Pieces(
            u64(self.here.ctypes.data + here), u64(self.there.ctypes.data + there), u64(nbytes)
        )


@pytest.fixture
def both() -> Iterator[Both]:
    made = Both()
    yield made
    made.active.close()
    made.passive.close()


def test_both_ways_over_a_pipe_in_memory(both: Both) -> None:
    remote = both.active.connect(both.passive.describe(), TIMEOUT_S)
    remote.read(both.pieces(1, 5, SIZE - 5), TIMEOUT_S)
    assert np.array_equal(both.here[1:-4], both.there[5:])
    both.here[:] = 3
    remote.write(both.pieces(0, 0, SIZE), TIMEOUT_S)
    assert (both.there == 3).all()


def test_a_closed_passive_agent_refuses_and_nothing_is_written(both: Both) -> None:
    remote = both.active.connect(both.passive.describe(), TIMEOUT_S)
    before = both.there.copy()
    both.passive.close()
    both.here[:] = 3
    with pytest.raises(TransferFailed):
        remote.write(both.pieces(0, 0, SIZE), TIMEOUT_S)
    assert np.array_equal(both.there, before)


def test_another_agent_s_token_is_refused(both: Both) -> None:
    with (
        contextlib.closing(StreamAgent("other")) as other,
        pytest.raises(TransferFailed, match="unknown token"),
    ):
        both.active.connect(other.describe(), TIMEOUT_S)


def test_a_read_or_write_before_the_token_ends_the_pipe(both: Both) -> None:
    near, far = memory_pipes()
    both.passive.serve(far)
    answers: list[bytes] = []
    lost = threading.Event()
    near.start(answers.append, lost.set)
    address = u64(both.there.ctypes.data)
    before = both.there.copy()
    near.send(frames.encode(Kind.WRITE, 9, [bytes(8)], address, u64(8)), TIMEOUT_S)
    assert lost.wait(TIMEOUT_S)
    near.close()
    assert not answers
    assert np.array_equal(both.there, before)


class Liar:
    """A passive end that welcomes, and then answers as it is told."""

    def __init__(self, answer: bytes | None) -> None:
        self.pipe, self.far = memory_pipes()
        self.answer = answer
        self.far.start(self._deliver, lambda: None)

    def _deliver(self, data: bytes) -> None:
        if frames.decode(data).kind is Kind.HELLO:
            self.far.send(frames.encode(Kind.WELCOME, frames.VERSION), TIMEOUT_S)
        elif self.answer is not None:
            self.far.send(self.answer, TIMEOUT_S)

    def close(self) -> None:
        self.far.close()


@contextlib.contextmanager
def lied_to(registered: Registered, answer: bytes | None) -> Iterator[tuple[Liar, StreamRemote]]:
    """A connection to such an end."""
    with (
        contextlib.closing(Liar(answer)) as liar,
        contextlib.closing(StreamRemote(registered, liar.pipe)) as remote,
    ):
        remote.open(bytes(16), TIMEOUT_S)
        yield liar, remote


FIRST = frames.VERSION + 1  # the number of a connection's first chunk
LIES = {
    "nonsense": b"nonsense",
    "too few bytes": frames.encode(Kind.DATA, FIRST, [b"abc"]),
    "too many bytes": frames.encode(Kind.DATA, FIRST, [bytes(9)]),
    "an answer to nothing": frames.encode(Kind.DATA, FIRST + 5, [bytes(8)]),
    "the wrong answer": frames.encode(Kind.WRITTEN, FIRST),
    "a question": frames.encode(Kind.HELLO, FIRST),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_passive_end_fails_the_connection_and_writes_nothing(lie: str) -> None:
    memory = np.full(8, 7, np.uint8)
    registered = Registered()
    registered.add(memory)
    with lied_to(registered, LIES[lie]) as (_, remote):
        piece = Pieces(u64(memory.ctypes.data), u64(64), u64(8))
        with pytest.raises(TransferFailed):
            remote.read(piece, TIMEOUT_S)
    assert (memory == 7).all()


def test_an_answer_after_the_deadline_changes_nothing() -> None:
    memory = np.full(16, 7, np.uint8)
    registered = Registered()
    registered.add(memory)
    first, second = (Pieces(u64(memory.ctypes.data + offset), u64(64), u64(8)) for offset in (0, 8))
    with lied_to(registered, None) as (liar, remote):
        with pytest.raises(DeadlineExceeded):
            remote.read(first, 0.05)
        liar.answer = frames.encode(Kind.DATA, FIRST + 1, [bytes(8)])
        liar.far.send(frames.encode(Kind.DATA, FIRST, [bytes(8)]), TIMEOUT_S)
        remote.read(second, TIMEOUT_S)  # its answer comes behind the late one
    assert memory.tolist() == [7] * 8 + [0] * 8


def test_a_side_that_takes_nothing_more_is_met_by_the_deadline() -> None:
    near, far = socket.socketpair()

    def send_on_and_on(pipe: SocketPipe) -> None:
        while True:
            pipe.send(bytes(frames.MAX_FRAME_BYTES), 0.1)

    with (
        contextlib.closing(far),
        contextlib.closing(SocketPipe(near)) as pipe,
        pytest.raises(DeadlineExceeded),
    ):
        send_on_and_on(pipe)


@PLAIN
@given(data=st.binary(max_size=200), kind=st.integers(0, 9), n=st.integers(0, 3))
def test_a_frame_of_any_bytes_is_a_frame_or_a_protocol_error(
    data: bytes, kind: int, n: int
) -> None:
    head = frames._HEAD.pack(kind, n, max(0, len(data) - 16 * n), 1)
    for whole in (data, head + data):
        with contextlib.suppress(ProtocolError):
            frame = frames.decode(whole)
            assert len(frame.addresses) == len(frame.nbytes) <= limits.STREAM_CHUNK_PIECES
            assert int(frame.nbytes.sum()) <= limits.STREAM_CHUNK_BYTES


@PLAIN
@given(
    sizes=st.lists(st.integers(0, 5), max_size=12),
    gaps=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=12, max_size=12),
)
def test_merged_pieces_are_the_same_bytes(sizes: list[int], gaps: list[tuple[int, int]]) -> None:
    local, remote, rows = 100, 900, []
    for size, (here, there) in zip(sizes, gaps, strict=False):
        rows.append((local, remote, size))
        local, remote = local + size + here, remote + size + there
    table = np.array(rows, np.uint64).reshape(-1, 3)
    pieces = checked(Pieces(table[:, 0], table[:, 1], table[:, 2]))
    fewer = merged(pieces)
    assert _bytes(fewer) == _bytes(pieces)
    kept = sum(
        1
        for i in range(1, len(pieces.nbytes))
        if pieces.local[i - 1] + pieces.nbytes[i - 1] != pieces.local[i]
        or pieces.remote[i - 1] + pieces.nbytes[i - 1] != pieces.remote[i]
    )
    assert len(fewer.nbytes) == (kept + 1 if len(pieces.nbytes) else 0)


def _bytes(pieces: Pieces) -> list[tuple[int, int]]:
    rows = zip(pieces.local.tolist(), pieces.remote.tolist(), pieces.nbytes.tolist(), strict=True)
    return [(local + i, remote + i) for local, remote, size in rows for i in range(size)]


@PLAIN
@given(
    address=st.one_of(st.integers(0, 60), st.integers((1 << 64) - 60, (1 << 64) - 1)),
    nbytes=st.one_of(st.integers(0, 60), st.integers((1 << 64) - 60, (1 << 64) - 1)),
)
def test_regions_hold_what_lies_within_one_of_them(address: int, nbytes: int) -> None:
    ranges = [Region(10, 10), Region(20, 5), Region(40, 8)]
    inside = any(begin <= address and address + nbytes <= begin + size for begin, size, _ in ranges)
    assert (Regions(ranges).find(u64(address), u64(nbytes)) is not None) == inside
    assert Regions([]).find(u64(address), u64(nbytes)) is None


def test_pieces_are_found_each_in_its_own_region() -> None:
    ranges = [Region(100, 50), Region(150, 50), Region(2**64 - 60, 50)]
    addresses = u64(149, 150, 199, 100, 2**64 - 60, 110)
    found = Regions(ranges).find(addresses, u64(1, 50, 1, 50, 50, 0))
    assert found is not None
    assert found.tolist() == [0, 1, 1, 0, 2, 0]
    for address, nbytes in ((149, 2), (199, 2), (99, 1), (2**64 - 20, 2**63)):
        pieces = u64(110, address), u64(1, nbytes)
        assert Regions(ranges).find(*pieces) is None


def test_an_agent_registers_so_many_memories_and_no_more() -> None:
    registered = Registered()
    memory = np.zeros(limits.MAX_AGENT_REGIONS + 1, np.uint8)
    for i in range(limits.MAX_AGENT_REGIONS):
        registered.add(memory[i : i + 1])
    with pytest.raises(ResourceExhausted):
        registered.add(memory[-1:])
