"""Shared memory between processes of one host: who gets it, what is refused, and what is left."""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transfer.peer import TIMEOUT_S, everything, pattern, peer
from transfer.pipes import memory_pipes

from benchmarks.networks import alone, why_not
from kvstore import limits
from kvstore.errors import (
    DeadlineExceeded,
    InvalidArgument,
    KVStoreError,
    ProtocolError,
    ResourceExhausted,
    Unavailable,
)
from kvstore.memory import Arena
from kvstore.transfer import description, handover, shm
from kvstore.transfer.base import Pieces, Remote, TransferFailed
from kvstore.transfer.either import EitherAgent
from kvstore.transfer.handover import Door, Handed
from kvstore.transfer.shm import ShmAgent, ShmRemote
from kvstore.transfer.stream import StreamAgent

SIZE, LARGE = 1 << 20, 48 << 20
MIB = 1 << 20


class Pair:
    """Two agents of this process. The passive one shares several memories."""

    def __init__(self, *, writable: Sequence[bool] = (True,), nbytes: int = SIZE) -> None:
        self.here = Arena.create("test-here", nbytes)
        self.there = [Arena.create("test-there", nbytes) for _ in writable]
        self.active, self.passive = ShmAgent(), ShmAgent()
        self.active.share(self.here.fd, self.here.array)
        for arena, may in zip(self.there, writable, strict=True):
            self.passive.share(arena.fd, arena.array, writable=may)

    def connect(self) -> ShmRemote:
        return self.active.connect(self.passive.describe(), TIMEOUT_S)

    def pieces(self, nbytes: int = SIZE, which: int = 0) -> Pieces:
        columns = (self.here.array.ctypes.data, self.there[which].array.ctypes.data, nbytes)
        return Pieces(*(np.array([value], np.uint64) for value in columns))

    def close(self) -> None:
        self.active.close()
        self.passive.close()
        for arena in (self.here, *self.there):
            arena.close()


@pytest.fixture(scope="module", autouse=True)
def nothing_is_there_of_others() -> None:
    """Their memory may go in our time else, and its descriptors with it."""
    gc.collect()


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No descriptor, mapping or thread stays, whatever went wrong."""
    before = held()
    yield
    deadline = time.monotonic() + TIMEOUT_S
    pace = threading.Event()
    while held() != before and time.monotonic() < deadline:
        pace.wait(0.01)
    assert held() == before


def held() -> tuple[int, int, int]:
    """Descriptors, mappings of tests' memfds, threads of ours."""
    maps = Path("/proc/self/maps").read_text().count("memfd:kvstore-test")
    threads = [each for each in threading.enumerate() if each.name.startswith("kvstore-shm")]
    return len(os.listdir("/proc/self/fd")), maps, len(threads)


@pytest.fixture
def pair() -> Iterator[Pair]:
    with contextlib.closing(Pair()) as made:
        yield made


# -- what moves --------------------------------------------------------------------------------


def test_each_of_several_memories_is_where_the_other_side_has_it() -> None:
    with contextlib.closing(Pair(writable=(True,) * 5)) as pair:
        remote = pair.connect()
        for which, arena in enumerate(pair.there):
            arena.array[:] = pattern(SIZE, which)
            remote.read(pair.pieces(which=which), TIMEOUT_S)
            assert np.array_equal(pair.here.array, arena.array)
            pair.here.array[:] = pattern(SIZE, which + 9)
            remote.write(pair.pieces(which=which), TIMEOUT_S)
            assert np.array_equal(pair.here.array, arena.array)


def test_memory_that_is_shared_for_reading_is_never_written() -> None:
    with contextlib.closing(Pair(writable=(False, True))) as pair:
        remote = pair.connect()
        pair.there[0].array[:] = 3
        with pytest.raises(TransferFailed, match="nobody write"):
            remote.write(pair.pieces(), TIMEOUT_S)
        assert (pair.there[0].array == 3).all()
        remote.write(pair.pieces(which=1), TIMEOUT_S)
        remote.read(pair.pieces(), TIMEOUT_S)
        assert (pair.here.array == 3).all()
        # Nor could somebody by mistake: what was handed over cannot be mapped for writing.
        sock, memories = asked(pair.passive)
        with sock, pytest.raises(PermissionError):
            mmap.mmap(memories[0].fd, SIZE)
        for memory in memories:
            os.close(memory.fd)


def test_memory_that_is_sealed_against_writers_is_mapped_for_reading() -> None:
    with contextlib.closing(Pair()) as pair:
        pair.there[0].forbid_new_writers()
        remote = pair.connect()
        remote.read(pair.pieces(), TIMEOUT_S)
        with pytest.raises(TransferFailed, match="nobody write"):
            remote.write(pair.pieces(), TIMEOUT_S)


def asked(agent: ShmAgent) -> tuple[socket.socket, list[Handed]]:
    body = description.unpack("shm", agent.describe())
    return handover.ask(body[16:32], body[32:], TIMEOUT_S)


def test_a_peer_that_is_stopped_is_read_and_written_all_the_same() -> None:
    with contextlib.closing(Pair(nbytes=LARGE)) as pair, peer("passive", "shm", LARGE) as other:
        remote = pair.active.connect(other.description, TIMEOUT_S)
        other.stop()
        moved = everything(pair.here.array, other.address)
        remote.read(moved, TIMEOUT_S)
        assert np.array_equal(pair.here.array, pattern(LARGE, 1))
        pair.here.array[:] = 5
        remote.write(moved, TIMEOUT_S)
        remote.close()
        other.go_on()
        assert other.ask("hash")


def test_a_deadline_ends_a_copy_and_the_connection_goes_on() -> None:
    with contextlib.closing(Pair(nbytes=LARGE)) as pair:
        remote = pair.connect()
        pair.there[0].array[:] = 1
        with pytest.raises(DeadlineExceeded):
            remote.read(pair.pieces(LARGE), 0.0)
        assert not pair.here.array[-1]
        remote.read(pair.pieces(LARGE), TIMEOUT_S)
        assert pair.here.array.all()


def test_close_waits_for_what_is_being_copied(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def copy(*_what: object) -> None:
        begun.set()
        assert go_on.wait(TIMEOUT_S)

    monkeypatch.setattr(shm, "copy_rows", copy)
    remote, failures = pair.connect(), list[KVStoreError]()

    def read() -> None:
        try:
            remote.read(pair.pieces(), TIMEOUT_S)
        except KVStoreError as error:
            failures.append(error)

    threads = [threading.Thread(target=each) for each in (read, remote.close)]
    threads[0].start()
    assert begun.wait(TIMEOUT_S)
    threads[1].start()
    assert remote._ending.wait(TIMEOUT_S)
    assert threads[1].is_alive()
    assert not remote.closed
    go_on.set()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert remote.closed
    assert isinstance(failures[0], TransferFailed)


def test_a_copy_that_does_not_end_keeps_its_memory(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def copy(*_what: object) -> None:
        begun.set()
        assert go_on.wait(TIMEOUT_S)

    monkeypatch.setattr(shm, "copy_rows", copy)
    monkeypatch.setattr(limits, "TRANSFER_CLOSE_S", 0.05)
    remote = pair.connect()

    def read() -> None:
        with contextlib.suppress(TransferFailed):
            remote.read(pair.pieces(), TIMEOUT_S)

    thread = threading.Thread(target=read)
    thread.start()
    assert begun.wait(TIMEOUT_S)
    with pytest.raises(TransferFailed, match="stays in use"):
        remote.close()
    go_on.set()
    thread.join(TIMEOUT_S)
    remote.close()


# -- its end -----------------------------------------------------------------------------------


def test_a_closed_agent_fails_all_calls_and_lets_nobody_in(pair: Pair) -> None:
    remote, said = pair.connect(), pair.passive.describe()
    pair.passive.close()
    for move in (remote.read, remote.write):
        with pytest.raises(TransferFailed, match="gone"):
            move(pair.pieces(), TIMEOUT_S)
    with pytest.raises(TransferFailed):
        pair.active.connect(said, TIMEOUT_S)
    with pytest.raises(TransferFailed):
        pair.passive.describe()


def test_a_call_that_outlives_the_other_agent_fails(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a read that succeeds was over while the other side still held what was read."""
    monkeypatch.setattr(shm, "copy_rows", lambda *_what: pair.passive.close())
    remote = pair.connect()
    with pytest.raises(TransferFailed, match="gone"):
        remote.read(pair.pieces(), TIMEOUT_S)


def test_a_late_writer_fails_and_reaches_no_later_memory() -> None:
    """What cannot be had is to end a writer from here: its memory is not used again instead."""
    with contextlib.closing(Pair(nbytes=LARGE)) as pair, peer("active", "shm", LARGE) as other:
        memory = pair.there[0]
        other.tell(pair.passive.describe().hex(), str(memory.array.ctypes.data))
        assert other.answer() == {"written": 1}
        other.stop()
        pair.passive.close()
        memory.close()
        fresh = Arena.create("test-fresh", LARGE)  # most likely where the last one was
        other.go_on()
        while "failed" not in (answer := other.answer()):
            pass
        assert answer["failed"] == "TransferFailed"
        assert not fresh.array.any()
        fresh.close()


def test_a_peer_s_death_is_harmless_to_a_copy_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    copy_rows = shm.copy_rows
    with contextlib.closing(Pair(nbytes=LARGE)) as pair, peer("passive", "shm", LARGE) as other:
        remote = pair.active.connect(other.description, TIMEOUT_S)

        def copy(targets: np.ndarray, sources: np.ndarray, nbytes: int) -> None:
            other.kill()
            copy_rows(targets, sources, nbytes)

        monkeypatch.setattr(shm, "copy_rows", copy)
        with pytest.raises(TransferFailed, match="gone"):
            remote.read(everything(pair.here.array, other.address), TIMEOUT_S)
        assert np.array_equal(pair.here.array[-MIB:], pattern(LARGE, 1)[-MIB:])
        remote.close()


# -- who is let in -----------------------------------------------------------------------------


def described(body: bytes) -> bytes:
    return description.pack("shm", body)


def test_another_host_s_memory_is_not_here(pair: Pair) -> None:
    body = description.unpack("shm", pair.passive.describe())
    other = described(bytes(16) + body[16:])
    with pytest.raises(TransferFailed, match="another host"):
        pair.active.connect(other, TIMEOUT_S)


def test_a_wrong_secret_opens_nothing(pair: Pair) -> None:
    body = description.unpack("shm", pair.passive.describe())
    for wrong in (bytes(32), body[32:-1] + bytes([body[-1] ^ 1])):
        with pytest.raises(TransferFailed, match="does not hand"):
            pair.active.connect(described(body[:32] + wrong), TIMEOUT_S)
    pair.connect().read(pair.pieces(), TIMEOUT_S)


@settings(derandomize=True, max_examples=60)
@given(st.binary(max_size=80))
def test_garbage_is_no_description(body: bytes) -> None:
    with contextlib.closing(ShmAgent()) as agent, pytest.raises((ProtocolError, TransferFailed)):
        agent.connect(described(body), TIMEOUT_S)


@pytest.mark.parametrize("says", [b"", b"x", bytes(40), bytes(41), bytes(4096)], ids=len)
def test_a_guest_that_says_something_else_is_shown_out(pair: Pair, says: bytes) -> None:
    body = description.unpack("shm", pair.passive.describe())
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as guest:
        guest.settimeout(TIMEOUT_S)
        guest.connect(handover.socket_name(body[16:32]))
        guest.send(says)
        assert guest.recv(100) == b""
    pair.connect()


def test_a_guest_that_says_nothing_is_shown_out_in_time(pair: Pair) -> None:
    body = description.unpack("shm", pair.passive.describe())
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as guest:
        guest.settimeout(TIMEOUT_S)
        guest.connect(handover.socket_name(body[16:32]))
        begin = time.monotonic()
        pair.connect()  # others do not wait meanwhile
        assert guest.recv(100) == b""
        assert time.monotonic() - begin > limits.SHM_HELLO_S / 2


def test_a_guest_that_says_more_loses_its_connection(pair: Pair) -> None:
    sock, memories = asked(pair.passive)
    for memory in memories:
        os.close(memory.fd)
    with sock:
        sock.send(b"more")
        sock.settimeout(TIMEOUT_S)
        assert sock.recv(100) == b""


def test_only_so_many_are_connected(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_SHM_CONNECTIONS", 2)
    first, _second = pair.connect(), pair.connect()
    with pytest.raises(TransferFailed):
        pair.connect()
    first.close()
    deadline = time.monotonic() + TIMEOUT_S
    while True:  # as soon as the other side has noticed
        with contextlib.suppress(TransferFailed):
            pair.connect().read(pair.pieces(), TIMEOUT_S)
            break
        assert time.monotonic() < deadline


def test_another_user_gets_nothing(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    said = pair.passive.describe()
    monkeypatch.setattr(handover.os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(TransferFailed, match=r"another user's|shared memory with"):
        pair.active.connect(said, TIMEOUT_S)


PYTHON = "/usr/bin/python3"  # one that every user can run
AS_ANOTHER_USER = """
import socket, sys
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as guest:
    guest.settimeout(10)
    guest.connect(bytes.fromhex(sys.argv[1]))
    try:
        guest.send(bytes.fromhex(sys.argv[2]))
        print(guest.recv(100))
    except OSError as error:
        print(b"")
"""


@pytest.mark.skipif(
    os.getuid() != 0 or not os.path.exists(PYTHON), reason="cannot run Python as another user"
)
def test_a_process_of_another_user_gets_nothing_though_it_knows_the_secret(pair: Pair) -> None:
    body = description.unpack("shm", pair.passive.describe())
    hello = handover._HELLO.pack(b"KVSH", handover.VERSION, 0, body[32:])
    ran = subprocess.run(
        [PYTHON, "-c", AS_ANOTHER_USER, handover.socket_name(body[16:32]).hex(), hello.hex()],
        capture_output=True,
        text=True,
        user=65534,
        cwd="/",
        timeout=TIMEOUT_S,
        check=True,
    )
    assert ran.stdout == "b''\n"


@pytest.mark.skipif(bool(why_not()), reason="no network namespaces here")
def test_another_network_namespace_takes_the_next_way() -> None:
    """As a container's: it is the same host, and nobody is behind that name there."""
    with contextlib.closing(Pair()) as pair:
        script = "import sys; from kvstore.transfer.shm import ShmAgent\n"
        script += "ShmAgent().connect(bytes.fromhex(sys.argv[1]), 5.0)"
        said = pair.passive.describe().hex()
        command = [*alone(), sys.executable, "-c", script, said]
        ran = subprocess.run(
            command, capture_output=True, text=True, timeout=4 * TIMEOUT_S, check=False
        )
        assert "TransferFailed: no shared memory with the other process" in ran.stderr


def test_where_there_is_no_shared_memory_auto_takes_the_next_kind(pair: Pair) -> None:
    def served(_body: bytes, _timeout_s: float) -> object:
        near, far = memory_pipes()
        other.serve(far)
        return near

    other = StreamAgent("far")
    far, near = EitherAgent([pair.passive, other]), EitherAgent([])
    near.agents = [pair.active, StreamAgent("near", served)]  # type: ignore[arg-type]
    said = far.describe()
    with contextlib.closing(near):
        assert near.connect(said, TIMEOUT_S).kind == "shm"
        pair.passive.close()
        assert near.connect(said, TIMEOUT_S).kind == "grpc"
    far.close()


# -- what may be handed over -------------------------------------------------------------------


class Fake:
    """A door that answers as it likes."""

    def __init__(self, answer: Callable[[socket.socket], None]) -> None:
        self.token = os.urandom(16)
        self._listener = handover._listener(self.token)
        self._listener.settimeout(TIMEOUT_S)
        self._thread = threading.Thread(target=self._run, args=(answer,))
        self._thread.start()

    def _run(self, answer: Callable[[socket.socket], None]) -> None:
        guest, _ = self._listener.accept()
        with guest:
            guest.settimeout(TIMEOUT_S)
            guest.recv(100)
            answer(guest)
            with contextlib.suppress(OSError):
                guest.recv(1)  # until it goes

    def connect(self, agent: ShmAgent) -> Remote:
        return agent.connect(described(shm.boot_id() + self.token + bytes(32)), TIMEOUT_S)

    def close(self) -> None:
        self._listener.close()
        self._thread.join(TIMEOUT_S)


def handing(
    *rows: tuple[int, int],
    fds: Sequence[int],
    magic: bytes = b"KVSH",
    version: int = 1,
    n: int = -1,
) -> Callable[[socket.socket], None]:
    """An answer with these memories, so many of them it says, and these descriptors."""

    def answer(guest: socket.socket) -> None:
        head = handover._HEAD.pack(magic, version, len(rows) if n < 0 else n)
        packed = [handover._MEMORY.pack(*row) for row in rows]
        socket.send_fds(guest, [head, *packed], list(fds))

    return answer


@contextlib.contextmanager
def memfd(nbytes: int = SIZE) -> Iterator[int]:
    """One that nobody has sealed."""
    fd = os.memfd_create("kvstore-test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, nbytes)
        yield fd
    finally:
        os.close(fd)


@pytest.fixture
def sealed() -> Iterator[int]:
    with contextlib.closing(Arena.create("test-sealed", SIZE)) as arena:
        yield arena.fd


def refused(answer: Callable[[socket.socket], None], by: type[KVStoreError]) -> None:
    fake = Fake(answer)
    with contextlib.closing(ShmAgent()) as agent, contextlib.closing(fake), pytest.raises(by):
        fake.connect(agent)


def test_memory_that_may_be_cut_off_is_not_mapped(sealed: int) -> None:
    with memfd() as loose, open(__file__, "rb") as file:
        refused(handing((MIB, SIZE), fds=[loose]), TransferFailed)
        refused(handing((MIB, SIZE), (4 * MIB, SIZE), fds=[sealed, loose]), TransferFailed)
        refused(handing((MIB, 4096), fds=[file.fileno()]), TransferFailed)
    read, write = os.pipe()
    refused(handing((MIB, 4096), fds=[read]), TransferFailed)
    os.close(read)
    os.close(write)


def test_memory_that_is_smaller_than_said_is_not_mapped(sealed: int) -> None:
    for nbytes in (SIZE + 1, 1 << 40, (1 << 64) - 1 - MIB, 0):
        refused(handing((MIB, nbytes), fds=[sealed]), TransferFailed)


def test_an_answer_that_is_none_is_refused(sealed: int) -> None:
    row = (MIB, SIZE)
    many = limits.MAX_SHARED_MEMORIES + 1
    for answer in (
        handing(row, fds=[sealed], magic=b"NONE"),
        handing(row, fds=[sealed], version=2),
        handing(row, fds=[sealed, sealed]),
        handing(row, fds=[]),
        handing(row, fds=[sealed], n=2),
        handing(row, row, fds=[sealed, sealed]),  # they overlap
        handing((1 << 63, 1 << 63), fds=[sealed]),
        handing(*((2 * i * MIB, SIZE) for i in range(many)), fds=[sealed] * many),
        lambda guest: guest.send(b"KV") and None,
        lambda guest: guest.send(bytes(4096)) and None,
    ):
        refused(answer, ProtocolError)


def test_a_door_behind_which_nobody_answers_is_left_in_time() -> None:
    def answer(guest: socket.socket) -> None:
        guest.recv(1)

    begin = time.monotonic()
    refused(answer, TransferFailed)
    assert time.monotonic() - begin < 5 * limits.SHM_HELLO_S


def test_a_door_that_ends_the_connection_is_told() -> None:
    refused(lambda guest: guest.shutdown(socket.SHUT_RDWR), TransferFailed)


# -- what may be shared ------------------------------------------------------------------------


def test_what_can_shrink_is_not_shared() -> None:
    with memfd() as fd, contextlib.closing(ShmAgent()) as agent:
        mapped = mmap.mmap(fd, SIZE)
        with pytest.raises(InvalidArgument, match="sealed"):
            agent.share(fd, np.frombuffer(mapped, np.uint8))


def test_private_memory_is_not_shared() -> None:
    with contextlib.closing(ShmAgent()) as agent, pytest.raises(TransferFailed, match="shared"):
        agent.register(np.zeros(4096, np.uint8))


def test_only_so_many_memories_are_shared() -> None:
    with contextlib.closing(Pair(writable=(True,) * limits.MAX_SHARED_MEMORIES)) as pair:
        more = Arena.create("test-more", SIZE)
        with pytest.raises(ResourceExhausted):
            pair.passive.share(more.fd, more.array)
        assert len(pair.connect()._arenas) == limits.MAX_SHARED_MEMORIES
        more.close()


def test_a_host_that_cannot_be_told_from_others_has_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for content in ("", "not an id"):
        (tmp_path / "boot_id").write_text(content)
        monkeypatch.setattr(shm, "_BOOT_ID", tmp_path / "boot_id")
        with pytest.raises(Unavailable):
            ShmAgent()
    monkeypatch.setattr(shm, "_BOOT_ID", tmp_path / "none")
    with pytest.raises(Unavailable):
        ShmAgent()


def test_a_door_that_cannot_be_made_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_token: bytes) -> socket.socket:
        raise OSError("no more sockets")

    monkeypatch.setattr(handover, "_listener", fail)
    with memfd() as fd, pytest.raises(TransferFailed, match="no more sockets"):
        Door([Handed(MIB, SIZE, os.dup(fd))])
