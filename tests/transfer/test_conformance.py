"""What every agent promises, between two real processes: bytes are right, failures are told in
time, and nothing moves after a `close`."""

from __future__ import annotations

import contextlib
import importlib.util
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import xxhash
from transfer.peer import TIMEOUT_S, Peer, agent, everything, pattern, peer

from kvstore.errors import DeadlineExceeded, InvalidArgument, KVStoreError, ProtocolError
from kvstore.memory import Arena
from kvstore.transfer.apart import export
from kvstore.transfer.base import Agent, Pieces, Remote, TransferFailed

SMALL, LARGE = 8 << 20, 48 << 20
LATE_S = 5.0  # a call with a short deadline has ended by then, on a busy machine too
KINDS = [
    pytest.param(
        kind,
        marks=pytest.mark.skipif(
            not any(map(importlib.util.find_spec, modules)), reason=f"no {kind} is installed"
        ),
    )
    for kind, modules in {
        "grpc": ["kvstore"],
        "nixl": ["nixl_cu13", "nixl_cu12"],
        "ucxx": ["ucxx"],
        "shm": ["kvstore"],
    }.items()
]
# Of those where both sides take part in a transfer; what `shm` does instead is in test_shm.py.
IN_TWO = KINDS[:-1]


class Pair:
    """An agent here, connected to one in a peer."""

    def __init__(self, own: Agent, other: Peer, arena: Arena) -> None:
        self.own, self.other = own, other
        self.memory = arena.array
        export(own, self.memory, arena.fd)
        self.remote: Remote = own.connect(other.description, TIMEOUT_S)

    def pieces(self, rows: list[tuple[int, int, int]]) -> Pieces:
        """From (offset here, offset there, bytes)."""
        table = np.array(rows, np.uint64).reshape(-1, 3)
        return Pieces(
            table[:, 0] + np.uint64(self.memory.ctypes.data),
            table[:, 1] + np.uint64(self.other.address),
            table[:, 2].copy(),
        )

    @property
    def all(self) -> Pieces:
        """All of both memories."""
        return everything(self.memory, self.other.address)


@contextlib.contextmanager
def connected(kind: str, nbytes: int) -> Iterator[Pair]:
    with (
        contextlib.closing(Arena.create("test", nbytes)) as arena,
        peer("passive", kind, nbytes) as other,
        agent(kind, "test") as own,
    ):
        yield Pair(own, other, arena)


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """One that no test breaks."""
    with connected(request.param, SMALL) as made:
        yield made


def scattered(rng: np.random.Generator, n: int, nbytes: int) -> list[tuple[int, int, int]]:
    """n pieces of odd sizes that overlap neither here nor there; some neighbours on both sides."""
    cuts = np.sort(rng.choice(nbytes, n, replace=False)).tolist()
    here = list(zip(cuts, [*cuts[1:], nbytes], strict=True))
    room = cuts[0]
    shift = int(rng.integers(0, room + 1))
    return [(begin, begin - shift, end - begin) for begin, end in here if rng.random() < 0.8]


@pytest.mark.parametrize(("n", "seed"), [(1, 0), (2, 1), (17, 2), (300, 3), (5000, 4)], ids=str)
def test_pieces_of_any_size_arrive_where_they_belong(pair: Pair, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = scattered(rng, n, SMALL)
    pair.memory[:] = 0
    pair.remote.write(pair.pieces([(0, 0, SMALL)]), TIMEOUT_S)
    there = pattern(SMALL, seed)
    pair.memory[:] = there
    pair.remote.write(pair.pieces([(0, 0, SMALL)]), TIMEOUT_S)
    assert pair.other.ask("hash")["hash"] == xxhash.xxh3_64_intdigest(there.data)

    pair.memory[:] = 7
    expected = pair.memory.copy()
    for here, far, size in rows:
        expected[here : here + size] = there[far : far + size]
    pair.remote.read(pair.pieces(rows), TIMEOUT_S)
    assert np.array_equal(pair.memory, expected)

    pair.memory[:] = pattern(SMALL, seed + 100)
    for here, far, size in rows:
        there[far : far + size] = pair.memory[here : here + size]
    pair.remote.write(pair.pieces(rows), TIMEOUT_S)
    assert pair.other.ask("hash")["hash"] == xxhash.xxh3_64_intdigest(there.data)


@pytest.mark.parametrize("n", [1, 30, 64])
def test_pieces_are_there_when_that_is_told(pair: Pair, n: int) -> None:
    size = SMALL // 2 // n
    there = pattern(SMALL, n)
    pair.memory[:] = there
    pair.remote.write(pair.pieces([(0, 0, SMALL)]), TIMEOUT_S)
    pair.memory[:] = 0
    # Here in another order than there, so that no two are neighbours on both sides.
    rows = [((7 * i % n) * size, i * size, size) for i in range(n)]
    told: list[int] = []

    def arrived(end: int) -> None:
        for here, far, nbytes in rows[told[-1] if told else 0 : end]:
            assert np.array_equal(pair.memory[here : here + nbytes], there[far : far + nbytes])
        told.append(end)

    pair.remote.read(pair.pieces(rows), TIMEOUT_S, arrived)
    assert told == sorted(set(told))
    assert all(0 < end < n for end in told)
    for here, far, nbytes in rows:
        assert np.array_equal(pair.memory[here : here + nbytes], there[far : far + nbytes])


def test_nothing_to_move_is_no_error(pair: Pair) -> None:
    pair.remote.read(pair.pieces([]), TIMEOUT_S)
    pair.remote.write(pair.pieces([(5, 5, 0)]), TIMEOUT_S)


@pytest.mark.parametrize(
    "row",
    [(0, 0, SMALL + 1), (SMALL, SMALL, 1), (0, 1, SMALL), (0, 1 << 63, 8), (0, -(1 << 20), 8)],
    ids=str,
)
def test_what_is_not_registered_there_is_refused(pair: Pair, row: tuple[int, int, int]) -> None:
    here, far, size = row
    base = pair.pieces([(0, 0, 1)])
    with np.errstate(over="ignore"):
        pieces = Pieces(
            base.local + np.uint64(here),
            base.remote + np.uint64(far % (1 << 64)),
            np.array([size], np.uint64),
        )
    refused = InvalidArgument if here + size > SMALL else TransferFailed
    before = pair.memory.copy()
    for move in (pair.remote.read, pair.remote.write):
        with pytest.raises(refused):
            move(pieces, TIMEOUT_S)
    if not 0 <= far < SMALL:  # else what comes before its end may have arrived
        assert np.array_equal(pair.memory, before)
    pair.remote.read(pair.pieces([(0, 0, 9)]), TIMEOUT_S)  # it goes on


def test_pieces_must_be_what_they_say(pair: Pair) -> None:
    good = pair.pieces([(0, 0, 9), (9, 9, 9)])
    for bad in (
        Pieces(good.local[:1], good.remote, good.nbytes),
        Pieces(good.local.astype(np.int64), good.remote, good.nbytes),  # type: ignore[arg-type]
    ):
        with pytest.raises(InvalidArgument):
            pair.remote.read(bad, TIMEOUT_S)


def test_connections_that_follow_others_work_as_well(pair: Pair) -> None:
    data = pattern(SMALL, 7)
    pair.memory[:] = data
    pair.remote.write(pair.all, TIMEOUT_S)
    for used in (True, False, True, True):
        pair.memory[:] = 0
        with contextlib.closing(pair.own.connect(pair.other.description, TIMEOUT_S)) as another:
            if used:
                another.read(pair.all, TIMEOUT_S)
                np.testing.assert_array_equal(pair.memory, data)


def test_several_threads_share_a_connection(pair: Pair) -> None:
    part, failures = SMALL // 4, []

    def move(which: int) -> None:
        try:
            for turn in range(6):
                mine = slice(which * part, (which + 1) * part)
                row = pair.pieces([(mine.start + 1, mine.start + 1, part - 2)])
                content = pattern(part, 10 * which + turn)
                pair.memory[mine] = content
                pair.remote.write(row, TIMEOUT_S)
                pair.memory[mine] = 0
                pair.remote.read(row, TIMEOUT_S)
                if not np.array_equal(pair.memory[mine][1:-1], content[1:-1]):
                    failures.append((which, turn))
        except KVStoreError as error:
            failures.append((which, repr(error)))

    threads = [threading.Thread(target=move, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_description_that_is_damaged_or_another_kind_s_is_refused(pair: Pair) -> None:
    good = pair.other.description
    damaged = [good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :] for i in range(0, len(good), 5)]
    for bad in (b"", good[:20], good + b"x", bytes(200), *damaged):
        with pytest.raises(ProtocolError):
            pair.own.connect(bad, TIMEOUT_S)


class Background:
    """A call in another thread."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.failure: BaseException | None = None
        self._call = call
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._call()
        except BaseException as error:
            self.failure = error

    def ends(self) -> BaseException | None:
        """What it raised."""
        self._thread.join(2 * TIMEOUT_S)
        assert not self._thread.is_alive()
        return self.failure


def forever(pair: Pair, move: Callable[[Pieces, float], None], timeout_s: float) -> None:
    while True:
        move(pair.all, timeout_s)


def wait_until(changed: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not changed():
        assert time.monotonic() < deadline


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", ["read", "write"])
def test_a_peer_that_is_killed_in_mid_transfer_fails_the_call(kind: str, op: str) -> None:
    with connected(kind, LARGE) as pair:
        pair.remote.read(pair.pieces([(0, 0, 8)]), TIMEOUT_S)
        call = Background(lambda: forever(pair, getattr(pair.remote, op), 2.0))
        if op == "read":
            wait_until(lambda: bool(pair.memory[-1 << 20]))
        pair.other.kill()
        assert isinstance(call.ends(), TransferFailed | DeadlineExceeded)
        begin = time.monotonic()
        pair.remote.close()
        pair.remote.close()
        assert time.monotonic() - begin < LATE_S
        with pytest.raises(TransferFailed):
            pair.remote.read(pair.pieces([(0, 0, 8)]), TIMEOUT_S)


@pytest.mark.parametrize("kind", IN_TWO)
def test_nothing_arrives_from_a_stopped_peer_after_close(kind: str) -> None:
    with connected(kind, LARGE) as pair:
        call = Background(lambda: forever(pair, pair.remote.read, 0.5))
        wait_until(lambda: bool(pair.memory[-1 << 20]))
        pair.memory[:] = 0
        pair.other.stop()
        begin = time.monotonic()
        assert isinstance(call.ends(), DeadlineExceeded)
        assert time.monotonic() - begin < LATE_S
        pair.remote.close()
        after = pair.memory.copy()
        pair.other.go_on()
        # A NIXL peer that was being read from may abort now.
        with contextlib.suppress(EOFError, BrokenPipeError):
            pair.other.ask("hash")
        assert np.array_equal(pair.memory, after)


@pytest.mark.parametrize("kind", IN_TWO)
def test_a_write_to_a_stopped_peer_meets_its_deadline(kind: str) -> None:
    with connected(kind, LARGE) as pair:
        pair.memory[:] = 9
        pair.other.stop()
        begin = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            pair.remote.write(pair.all, 0.5)
        assert time.monotonic() - begin < LATE_S
        pair.remote.close()
        pair.other.go_on()
        # What its agent has closed is not written any more, whatever was on its way. A NIXL peer
        # that was being written to may abort now, if seldom.
        with contextlib.suppress(EOFError, BrokenPipeError):
            closed = pair.other.ask("close")["hash"]
            assert pair.other.ask("hash")["hash"] == closed


@pytest.mark.parametrize("kind", IN_TWO)
def test_a_closed_agent_s_memory_is_not_written_by_a_peer_that_goes_on(kind: str) -> None:
    memory = np.zeros(LARGE, np.uint8)
    with peer("active", kind, LARGE) as other, agent(kind, "test") as own:
        own.register(memory)
        other.tell(own.describe().hex(), str(memory.ctypes.data))
        assert other.answer() == {"written": 1}
        wait_until(lambda: int(memory[-1]) != int(memory[0]))  # in the midst of a later one
        other.stop()
        own.close()
        after = memory.copy()
        other.go_on()
        while "failed" not in (answer := other.answer()):
            pass
        assert answer["failed"] in ("TransferFailed", "DeadlineExceeded")
        assert np.array_equal(memory, after)
        with pytest.raises(TransferFailed):
            own.describe()


@pytest.mark.parametrize("kind", KINDS)
def test_close_fails_the_calls_of_other_threads(kind: str) -> None:
    with connected(kind, LARGE) as pair:
        call = Background(lambda: forever(pair, pair.remote.read, TIMEOUT_S))
        wait_until(lambda: bool(pair.memory[-1 << 20]))
        pair.remote.close()
        after = pair.memory.copy()
        assert isinstance(call.ends(), TransferFailed)
        assert np.array_equal(pair.memory, after)


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_there_is_told_in_time(kind: str) -> None:
    with peer("passive", kind, SMALL) as other, agent(kind, "test") as own:
        other.kill()
        begin = time.monotonic()
        with pytest.raises((TransferFailed, DeadlineExceeded)):
            own.connect(other.description, 1.0)
        assert time.monotonic() - begin < LATE_S


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_registered_before_it_is_described(kind: str) -> None:
    with (
        contextlib.closing(Arena.create("test", 4096)) as arena,
        contextlib.closing(Arena.create("late", 4096)) as late,
        agent(kind, "test") as own,
    ):
        memory = arena.array
        for bad in (memory[::2], memory.view(np.uint32), memory[:0], memory.reshape(2, -1)):
            with pytest.raises(InvalidArgument):
                export(own, bad, arena.fd)  # type: ignore[arg-type]
        export(own, memory, arena.fd)
        with pytest.raises(InvalidArgument):
            export(own, memory[100:200], arena.fd)
        own.describe()
        with pytest.raises(InvalidArgument):
            export(own, late.array, late.fd)
        del bad, memory
