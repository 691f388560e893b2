"""The daemon's end of the same-host channel, against clients that err, stall, flood or lie."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import mmap
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore import Layout, limits
from kvstore import commands as c
from kvstore.channel import wire
from kvstore.channel.port import ChannelPort
from kvstore.errors import (
    InvalidArgument,
    KVStoreError,
    PermissionDenied,
    Unavailable,
)
from kvstore.memory import Arena, Arenas, HugePages, Placement
from kvstore.session import local
from kvstore.session.channel import ChannelLink, ChannelSession
from kvstore.session.staging import Staging
from kvstore_server import channel
from kvstore_server.channel import ChannelServer, bind
from kvstore_server.loop import Loop
from kvstore_server.tenants import Tenant, Tenants

LAYOUT = Layout.opaque(model="channel", block_bytes=3840, block_tokens=16)
ALL_CELLS = np.empty(0, np.uint32)
PUT_ID = b"p" * 16
WAIT_S = 10.0


class Bench:
    """A daemon's channel in this process. Its loop turns when the test says so, or in a thread."""

    def __init__(self, folder: Path, trust: str) -> None:
        self.path = folder / "kvstore.sock"
        self.loop = Loop()
        self.tenants = Tenants(
            dram=8 << 20,
            max_blocks=1024,
            eviction="lru",
            tenants=1,
            trust=trust,
            huge_pages=HugePages.OFF,
            numa_node=None,
            prefault=False,
            secret=b"s" * 32,
            version="test",
        )
        self.listener = bind(self.path)
        self.server = ChannelServer(self.loop, self.tenants, self.listener)
        self.thread = threading.Thread(target=self.loop.run)

    @property
    def tenant(self) -> Tenant:
        return self.tenants.for_uid(os.getuid())

    def turn(self, until: Callable[[], bool]) -> None:
        end = time.monotonic() + WAIT_S
        while not until():
            assert time.monotonic() < end
            self.loop.call_later(0.01, lambda: None)  # no turn waits for long
            self.loop._turn()

    def dial(self) -> socket.socket:
        """A bare client, welcomed by a loop that the test turns."""
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(WAIT_S)
        sock.connect(str(self.path))
        before = len(self.server._peers)
        self.turn(lambda: len(self.server._peers) > before)
        sock.recv(4096)
        return sock

    def close(self) -> None:
        if self.thread.ident:
            self.loop.stop()
            self.thread.join()
        self.server.close()
        self.loop.close()
        self.listener.close()
        self.tenants.close()


@pytest.fixture(params=["copy-in"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path, request.param)
    yield made
    made.close()


@pytest.fixture
def served(bench: Bench) -> Bench:
    bench.thread.start()
    return bench


@contextlib.contextmanager
def dialled(bench: Bench) -> Iterator[ChannelPort]:
    port = ChannelPort(str(bench.path), WAIT_S)
    try:
        yield port
    finally:
        port.close()


def opened(port: ChannelPort) -> int:
    command = c.OpenNamespace(name="n", layout=LAYOUT.encode())
    result = port.call(command, WAIT_S)
    assert isinstance(result, c.NamespaceOpened)
    return result.namespace


def keys(n: int) -> c.U8:
    return np.random.default_rng(n).integers(0, 256, (n, 32), np.uint8)


def reserve(port: ChannelPort, namespace: int, hashes: c.U8) -> None:
    command = c.Reserve(namespace=namespace, put_id=PUT_ID, hashes=hashes, cells=ALL_CELLS)
    result = port.call(command, WAIT_S)
    assert isinstance(result, c.Reserved)
    assert (result.status == c.ReserveStatus.GRANTED).all()


def stats(port: ChannelPort) -> c.Stats:
    result = port.call(c.Stat(), WAIT_S)
    assert isinstance(result, c.Stats)
    return result


def until(condition: Callable[[], bool]) -> None:
    """Asks until it holds; the condition is one that no event tells of."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        threading.Event().wait(0.01)


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


# -- what only a staged copy may do -----------------------------------------------------------


def test_who_copies_in_cannot_seal_what_it_has_not_staged(served: Bench) -> None:
    with dialled(served) as port:
        namespace, hashes = opened(port), keys(4)
        reserve(port, namespace, hashes)
        seal = c.Seal(
            namespace=namespace, put_id=PUT_ID, hashes=hashes, checksums=np.zeros((4, 1), np.uint64)
        )
        with pytest.raises(PermissionDenied, match="staged"):
            port.call(seal, WAIT_S)
        assert (stats(port).blocks, stats(port).pending_blocks) == (0, 4)
        port.call(c.Abort(namespace=namespace, put_id=PUT_ID, hashes=hashes), WAIT_S)
        assert (stats(port).pending_blocks, stats(port).used_bytes) == (0, 0)


@pytest.mark.parametrize("bench", ["direct"], indirect=True)
def test_who_writes_the_pool_seals_it(served: Bench) -> None:
    with dialled(served) as port:
        namespace, hashes = opened(port), keys(4)
        reserve(port, namespace, hashes)
        sums = np.zeros((4, 1), np.uint64)
        seal = c.Seal(namespace=namespace, put_id=PUT_ID, hashes=hashes, checksums=sums)
        result = port.call(seal, WAIT_S)
        assert isinstance(result, c.Sealed)
        assert stats(port).blocks == 4


# -- staging ----------------------------------------------------------------------------------


def staged(
    namespace: int, hashes: c.U8, offsets: list[int] | None = None, put_id: bytes = PUT_ID
) -> wire.SealStaged:
    at = [i * LAYOUT.block_bytes for i in range(len(hashes))] if offsets is None else offsets
    return wire.SealStaged(
        namespace=namespace, put_id=put_id, hashes=hashes, offsets=np.array(at, np.uint64)
    )


@pytest.mark.parametrize("offset", [1, 4096, (1 << 64) - 1, (1 << 64) - LAYOUT.block_bytes])
def test_an_offset_outside_the_staging_is_refused(served: Bench, offset: int) -> None:
    with dialled(served) as port:
        namespace, hashes = opened(port), keys(1)
        reserve(port, namespace, hashes)
        memory = Staging(LAYOUT.block_bytes)
        port.stage(memory.fd, memory.nbytes, WAIT_S)
        with pytest.raises(InvalidArgument, match="offsets"):
            port.seal_staged(staged(namespace, hashes, [offset]), WAIT_S)
        assert port.seal_staged(staged(namespace, hashes), WAIT_S).status.tolist() == [0]
        memory.close()


def test_one_copy_is_no_larger_than_the_staging(served: Bench) -> None:
    """Else blocks that share their bytes would keep a thread that copies for other users too."""
    with dialled(served) as port:
        namespace, hashes = opened(port), keys(2)
        reserve(port, namespace, hashes)
        memory = Staging(LAYOUT.block_bytes)
        port.stage(memory.fd, memory.nbytes, WAIT_S)
        with pytest.raises(InvalidArgument, match="staging"):
            port.seal_staged(staged(namespace, hashes, [0, 0]), WAIT_S)
        assert stats(port).pending_blocks == 2
        memory.close()


def test_staging_is_bounded(served: Bench) -> None:
    """What the client never wrote would become the daemon's memory when it is read."""
    memory = Arena.create("staging", 1 << 30)
    with dialled(served) as port:
        with pytest.raises(InvalidArgument, match="at most"):
            port.stage(memory.fd, memory.nbytes, WAIT_S)
        assert stats(port).blocks == 0
    memory.close()


def test_staging_on_reserved_pages_is_refused(served: Bench) -> None:
    """Punched out again, those may be gone when they are read, and the read would kill us."""
    try:
        fd = os.memfd_create("staging", os.MFD_HUGETLB | os.MFD_ALLOW_SEALING)
    except OSError:
        pytest.skip("this kernel has no huge pages")
    os.ftruncate(fd, 2 << 20)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    with dialled(served) as port:
        with pytest.raises(InvalidArgument, match="staging"):
            port.stage(fd, 2 << 20, WAIT_S)
        assert stats(port).blocks == 0
    os.close(fd)


def test_new_staging_behind_a_copy_waits_for_it(bench: Bench) -> None:
    sock, hashes = bench.dial(), keys(8)
    first, other = Staging(8 * LAYOUT.block_bytes), Staging(8 * LAYOUT.block_bytes)
    first._arena.array[:], other._arena.array[:] = 1, 2
    sock.sendall(wire.encode(c.OpenNamespace(name="n", layout=LAYOUT.encode())))
    bench.turn(lambda: bool(bench.tenant.store._describe().ids.size))
    namespace = int(bench.tenant.store._describe().ids[0])
    command = c.Reserve(namespace=namespace, put_id=PUT_ID, hashes=hashes, cells=ALL_CELLS)
    stages = [wire.encode(wire.Stage(nbytes=memory.nbytes)) for memory in (first, other)]
    socket.send_fds(sock, [wire.encode(command) + stages[0]], [first.fd])
    socket.send_fds(sock, [wire.encode(staged(namespace, hashes)) + stages[1]], [other.fd])
    peer = next(iter(bench.server._peers))
    bench.turn(lambda: bench.tenant.store.stats().blocks == 8 and not peer.has_record)
    leased = bench.tenant.store.handle(
        peer.connection, c.Lease(namespace=namespace, hashes=hashes), bench.tenants.now_ms()
    )
    assert isinstance(leased, c.Leased)
    for granule in leased.granules.tolist():
        at = granule * limits.GRANULE_BYTES + limits.GRANULE_BYTES - LAYOUT.block_bytes
        assert (bench.tenant.arenas.pool.array[at : at + LAYOUT.block_bytes] == 1).all()
    first.close()
    other.close()
    sock.close()


# -- one client and the others ----------------------------------------------------------------


def garbled(namespace: int) -> Iterator[bytes]:
    """Records whose arrays have other dimensions than their fields."""
    one, generations = np.zeros((1, 32), np.uint8), np.zeros(1, np.uint64)
    for shape in ((1,), (1, 1), (1, 0)):
        cells = np.zeros(shape, np.uint32)
        reserve = c.Reserve(namespace=namespace, put_id=PUT_ID, hashes=one, cells=cells)
        touch = c.Touch(granules=cells, generations=generations, lookups=1, hits=1, cold_hits=0)
        for record in (reserve, touch):
            frame = wire.encode(record)
            yield frame if len(shape) > 1 else without_dimensions(frame)
    for command in (c.Drop, c.Lease, c.Explain):
        yield wire.encode(command(namespace=namespace, hashes=np.zeros(32, np.uint8)))


def without_dimensions(frame: bytes) -> bytes:
    """The frame with its u32 array of one number as a bare number, which has no length."""
    body = frame[wire.FRAME.size :].replace(b"\1\1\1\0\0\0", b"\1\0", 1)
    _, number, version = wire.FRAME.unpack(frame[: wire.FRAME.size])
    return wire.FRAME.pack(len(body), number, version) + body


def test_an_array_of_other_dimensions_ends_its_senders_connection_only(served: Bench) -> None:
    with dialled(served) as port:
        namespace = opened(port)
        for frame in garbled(namespace):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(WAIT_S)
                sock.connect(str(served.path))
                sock.recv(4096)
                sock.sendall(frame)
                assert sock.recv(4096) == b""
        assert stats(port).pending_blocks == 0


def test_counters_that_do_not_fit_a_frame_are_an_error_of_that_call(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.tenant.store._shelf.counters.lookups = 1 << 63
    bench.thread.start()
    with dialled(bench) as port:
        with pytest.raises(InvalidArgument, match="lookups"):
            stats(port)
        assert opened(port)


def answers(sock: socket.socket) -> int:
    """How many answers lie ready."""
    sock.setblocking(False)
    data, count = sock.recv(1 << 20), 0
    while data:
        data = data[wire.FRAME.size + wire.body_length(data[: wire.FRAME.size]) :]
        count += 1
    return count


class _Stopped(ChannelPort):
    """Its process stood still until the answer was there, and the time for it was over."""

    def _receive(self, deadline: float, fds_wanted: int) -> Any:
        assert self._readable.poll(WAIT_S * 1e3)
        return super()._receive(deadline - 2 * WAIT_S, fds_wanted)


class _Interrupted(ChannelPort):
    """As `_Stopped`, in the middle of the wait: as Python's own, which tells of nothing then."""

    def _receive(self, deadline: float, fds_wanted: int) -> Any:
        real = self._readable

        class Poll:
            def poll(self, timeout_ms: float) -> list[tuple[int, int]]:
                found = real.poll(timeout_ms)
                assert found
                return found if timeout_ms == 0 else []

        self._readable = Poll()  # type: ignore[assignment]
        try:
            return super()._receive(deadline, fds_wanted)
        finally:
            self._readable = real


@pytest.mark.parametrize("kind", [_Stopped, _Interrupted])
def test_an_answer_that_came_while_its_client_stood_still_counts(
    served: Bench, kind: type[ChannelPort]
) -> None:
    port = kind(str(served.path), WAIT_S)
    assert isinstance(port.call(c.Stat(), WAIT_S), c.Stats)
    assert not port.closed
    port.close()


def test_who_sends_many_records_takes_turns_with_the_others(bench: Bench) -> None:
    many, one = bench.dial(), bench.dial()
    many.sendall(wire.encode(c.Stat()) * 200)
    one.sendall(wire.encode(c.Stat()))
    for _ in range(4):
        bench.loop._turn()
    assert answers(one) == 1
    assert answers(many) < 16
    many.close()
    one.close()


def test_all_records_that_came_at_once_are_answered(bench: Bench) -> None:
    sock = bench.dial()
    served, frame = 0, wire.encode(c.Stat())
    sock.sendall(frame * 200)

    def all_served() -> bool:
        nonlocal served
        with contextlib.suppress(BlockingIOError):
            served += answers(sock)
        return served == 200

    bench.turn(all_served)
    sock.close()


def test_who_never_reads_its_answers_is_cut_off_and_holds_no_descriptors(bench: Bench) -> None:
    gc.collect()  # other tests' memory may go meanwhile, and its descriptors with it
    before = open_fds()
    sock = bench.dial()
    sock.sendall(wire.encode(wire.MapIndex()) * 4_000)
    most = 0

    def cut_off() -> bool:
        nonlocal most
        most = max(most, open_fds())
        return not bench.server._peers

    bench.turn(cut_off)
    assert most < before + 64
    sock.close()
    assert open_fds() <= before


def test_a_client_that_hung_up_is_granted_nothing(bench: Bench) -> None:
    """It gave up waiting; its process lives, and would hold the slots until it ends."""
    sock = bench.dial()
    sock.sendall(wire.encode(c.OpenNamespace(name="n", layout=LAYOUT.encode())))
    bench.turn(lambda: bool(bench.tenant.store._describe().ids.size))
    namespace = int(bench.tenant.store._describe().ids[0])
    command = c.Reserve(namespace=namespace, put_id=PUT_ID, hashes=keys(4), cells=ALL_CELLS)
    sock.sendall(wire.encode(command))
    sock.close()
    bench.turn(lambda: not bench.server._peers)
    counted = bench.tenant.store.stats()
    assert (counted.pending_blocks, counted.quarantined_blocks, counted.connections) == (0, 0, 0)


def test_a_frame_that_dribbles_in_holds_only_its_own_bytes(bench: Bench) -> None:
    sock = bench.dial()
    peer = next(iter(bench.server._peers))
    sock.sendall(wire.FRAME.pack(limits.MAX_FRAME_BYTES, 5, wire.WIRE_VERSION))
    for at in range(64):
        sock.sendall(b"x")
        bench.turn(lambda at=at: len(peer._inbox) == wire.FRAME.size + at + 1)
    sock.close()
    bench.turn(lambda: not bench.server._peers)


def test_unfinished_frames_of_one_user_hold_no_more_than_the_limit(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_UNREAD_BYTES", 1 << 20)
    half = bytes(600_000)
    head = wire.FRAME.pack(limits.MAX_FRAME_BYTES, 5, wire.WIRE_VERSION)
    with contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(bench.dial()) for _ in range(2))
        for sock in (first, second):
            threading.Thread(target=_send_all, args=(sock, head + half)).start()
        bench.turn(lambda: len(bench.server._peers) == 1)
        assert sum(peer.unread_bytes for peer in bench.server._peers) <= 1 << 20


def _send_all(sock: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):
        sock.sendall(data)


def test_a_descriptor_that_cannot_be_copied_leaks_no_other(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, copied, dup = open_fds(), [], os.dup

    def scarce(fd: int) -> int:
        if len(copied) == 2:
            raise OSError(24, "too many open files")
        copied.append(dup(fd))
        return copied[-1]

    monkeypatch.setattr(os, "dup", scarce)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(bench.path))
        bench.turn(lambda: bool(copied) and not bench.server._peers)
    assert open_fds() == before


# -- the socket's file ------------------------------------------------------------------------


def test_a_file_that_is_no_socket_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("years of work")
    with pytest.raises(InvalidArgument, match="no socket"):
        bind(path)
    assert path.read_text() == "years of work"


def test_a_stopped_daemon_whose_queue_is_full_is_a_live_one(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(path))
        listener.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                client = stack.enter_context(socket.socket(socket.AF_UNIX))
                client.setblocking(False)
                client.connect(str(path))
        with pytest.raises(Unavailable, match="already serves"):
            bind(path)


def test_of_daemons_that_start_at_once_one_gets_the_socket(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    for _ in range(30):
        with socket.socket(socket.AF_UNIX) as dead:
            path.unlink(missing_ok=True)
            dead.bind(str(path))
        together, bound = threading.Barrier(4), list[socket.socket]()

        def start(together: threading.Barrier = together, bound: list[socket.socket] = bound):
            together.wait()
            with contextlib.suppress(KVStoreError, OSError):
                bound.append(bind(path))

        threads = [threading.Thread(target=start) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(bound) == 1
        assert stat.S_ISSOCK(path.stat().st_mode)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
        bound[0].close()


def test_a_folder_that_somebody_else_keeps_locked_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "_START_S", 0.05)
    fd = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(Unavailable, match="lock"):
        bind(tmp_path / "s.sock")
    os.close(fd)
    bind(tmp_path / "s.sock").close()


# -- memory -----------------------------------------------------------------------------------


def test_where_no_new_index_can_be_made_the_old_one_stays(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    arenas = bench.tenant.arenas

    def none(name: str, nbytes: int) -> Arena:
        raise OSError(12, "no memory")

    with monkeypatch.context() as patch:
        patch.setattr(Arena, "create", none)
        with pytest.raises(OSError, match="no memory"):
            arenas.store_memory().new_index(1 << 20)
    bench.thread.start()
    with dialled(bench) as port:  # a new client gets the index that is still used
        assert opened(port)


def test_a_domain_that_cannot_be_made_whole_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before, create = open_fds(), Arena.create

    def pool_only(name: str, nbytes: int, **options: bool) -> Arena:
        if name != "pool":
            raise OSError(24, "too many open files")
        return create(name, nbytes, **options)

    monkeypatch.setattr(Arena, "create", pool_only)
    with pytest.raises(OSError, match="too many"):
        Arenas(1 << 20, Placement(huge_pages=HugePages.OFF), pool_writable=False)
    assert open_fds() == before


def test_a_kernel_without_transparent_huge_pages_gives_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 0x7FFF)  # which no kernel knows
    arena = Arena.create("test", 1 << 20)
    arena.array[:] = 1
    arena.close()


@pytest.mark.parametrize("bench", ["direct"], indirect=True)
def test_the_pieces_of_a_durable_put_find_their_slots_ahead(
    served: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They grow, so that what the last one took is not enough for the next; and they are asked for
    once a call, which waits for none but in the first."""
    calls: list[type[c.Command]] = []
    casts: list[type[c.Command]] = []
    call, cast = ChannelLink.call, ChannelLink.cast

    def noted(self: ChannelLink, command: c.Command, timeout_s: float) -> c.Result:
        calls.append(type(command))
        return call(self, command, timeout_s)

    def noted_cast(
        self: ChannelLink, command: c.Command, timeout_s: float, then: Any = None
    ) -> None:
        casts.append(type(command))
        cast(self, command, timeout_s, then)

    monkeypatch.setattr(ChannelLink, "call", noted)
    monkeypatch.setattr(ChannelLink, "cast", noted_cast)
    sizes = (17 * LAYOUT.block_bytes, 34 * LAYOUT.block_bytes)
    monkeypatch.setattr(local, "_DURABLE_PIECE_BYTES", sizes)
    grants = []
    with ChannelSession(str(served.path), timeout_s=WAIT_S) as session:
        namespace = session.open_namespace("n", LAYOUT)
        blocks = [np.full(LAYOUT.block_bytes, i, np.uint8) for i in range(60)]
        for number in range(2):
            calls.clear()
            casts.clear()
            hashes = np.random.default_rng(number).integers(0, 256, (60, 32), np.uint8)
            assert session.put(namespace, hashes, blocks, persist=True).stored == 60
            grants.append((calls.count(c.Grant), casts.count(c.Grant), casts.count(c.Adopt)))
        casts.clear()
        assert session.put(namespace, hashes, blocks, persist=True).existed == 60
        assert c.Grant not in casts  # nothing of it needs a slot
    assert grants == [(1, 1, 0), (0, 1, 0)]
