"""The daemon's side of the same-host channel: connections in, commands to the stores, answers out.

Decides nothing about blocks. Owns the listening socket, the connections, the pidfds, and the
threads that copy for clients that may not write the pool.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import resource
import socket
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import structlog

from kvstore import commands as c
from kvstore import limits
from kvstore.channel import wire
from kvstore.errors import (
    InvalidArgument,
    KVStoreError,
    PermissionDenied,
    ProtocolError,
    Unavailable,
)
from kvstore.session.parts import part_of
from kvstore.store import Deferred, failed
from kvstore_server.loop import Loop
from kvstore_server.peer import Peer, Process, process_of
from kvstore_server.staging import Copy, StagingArea
from kvstore_server.tenants import Tenant, Tenants

_COPY_THREADS = 2  # more do not help: a copy is bound by the memory, not by the cores
_FULL_PAUSE_S = 0.1
_GRANTING = frozenset((c.Reserve, c.Grant, c.Commit, c.Adopt, c.Lease))
_WRITTEN = frozenset(
    (c.Seal, c.Grant, c.Commit, c.Adopt)
)  # what a client does that writes the pool itself
_START_S = 5.0  # how long to wait for another daemon that is just starting in the same folder

log = structlog.get_logger()


def bind(path: Path, *, for_all_users: bool = False) -> socket.socket:
    """A listening unix socket at `path`; clears a dead daemon's, refuses beside a live one.

    for_all_users: whether others than this process's user may connect to it. `Unavailable`
    beside a live daemon, `InvalidArgument` where something else lies there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        with _alone_in(path.parent):
            _clear_stale(path)
            previous = os.umask(0o111 if for_all_users else 0o177)
            try:
                listener.bind(str(path))
            finally:
                os.umask(previous)
            listener.listen(64)
    except BaseException:
        listener.close()
        raise
    return listener


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """No other daemon clears or makes a socket in this folder meanwhile; else two that start at
    once would each take the other's new socket for a dead one's. `Unavailable` if it takes long."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        end = time.monotonic() + _START_S
        while not _try_lock(fd):
            if time.monotonic() > end:
                raise Unavailable(f"another process holds a lock on {folder}")
            time.sleep(0.01)
        yield
    finally:
        os.close(fd)  # and with it goes the lock


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _clear_stale(path: Path) -> None:
    if not path.exists():
        return
    if not stat.S_ISSOCK(path.stat().st_mode):  # a connection to any other file is refused too
        raise InvalidArgument("socket", f"{path} is there and is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()  # its daemon is dead
            return
        except BlockingIOError:
            pass  # more clients wait than it has accepted: it lives, or is stopped
    raise Unavailable(f"a daemon already serves {path}: stop it or name another --socket")


def _refuse(sock: socket.socket, error: Exception) -> None:
    """Says why instead of just hanging up."""
    known = error if isinstance(error, KVStoreError) else Unavailable(f"no pool: {error}")
    with contextlib.suppress(OSError):
        sock.send(wire.encode(failed(known)))
    sock.close()


def raise_descriptor_limit() -> None:
    """A client takes three descriptors; the usual soft limit is met long before ours is."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class ChannelServer:
    """Serves the tenants' stores to the clients of one unix socket, on a loop of its owner's."""

    def __init__(self, loop: Loop, tenants: Tenants, listener: socket.socket) -> None:
        self._loop, self._tenants, self._listener = loop, tenants, listener
        self._peers: set[Peer] = set()
        self._quarantine: dict[int, tuple[Tenant, int]] = {}  # pidfd -> whose connection it was
        self._copies = ThreadPoolExecutor(_COPY_THREADS, "kvstore-copy")
        self._ticks_at_s: float | None = None
        self._promised: dict[tuple[Tenant, int], Peer] = {}
        tenants.on_change(self._changed)
        loop.watch(listener.fileno(), self._accept)

    def close(self) -> None:
        """Ends all connections; the loop has ended. The listener stays its owner's."""
        self._copies.shutdown()
        for peer in self._peers:
            peer.close()
            os.close(peer.process.pidfd)
        for pidfd in self._quarantine:
            os.close(pidfd)

    # -- connections -------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            sock, _address = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:  # out of descriptors: the waiting client would wake us for ever
            log.warning("cannot accept", reason=str(error))
            self._loop.unwatch(self._listener.fileno())
            self._loop.call_later(_FULL_PAUSE_S, self._accept_again)
            return
        sock.setblocking(False)
        try:
            process = process_of(sock)
        except OSError:
            sock.close()  # it is gone already
            return
        self._admit(sock, process)

    def _accept_again(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.watch(self._listener.fileno(), self._accept)

    def _admit(self, sock: socket.socket, process: Process) -> None:
        try:
            tenant = self._tenants.for_uid(process.uid)
            connection = tenant.store.connect()
        except (KVStoreError, OSError) as error:
            log.warning("client refused", pid=process.pid, uid=process.uid, reason=str(error))
            os.close(process.pidfd)
            _refuse(sock, error)
            return
        peer = Peer(sock, process, tenant, connection)
        self._peers.add(peer)
        self._loop.watch(sock.fileno(), lambda: self._ready(peer))
        self._guarded(peer, lambda: self._welcome(peer))

    def _welcome(self, peer: Peer) -> None:
        arenas, board = peer.tenant.arenas, peer.tenant.store.board_of(peer.connection)
        assert arenas.index
        welcome = wire.Welcome(
            version=wire.WIRE_VERSION,
            instance=peer.tenant.instance,
            writable=int(peer.tenant.writable),
            prefaulted=int(arenas.prefaulted),
            pool_bytes=arenas.pool.nbytes,
            index_bytes=arenas.index.nbytes,
            boards_bytes=arenas.boards.nbytes if arenas.boards else 0,
            board=-1 if board is None else board,
        )
        fds = [arenas.pool.fd, arenas.generations.fd, arenas.index.fd]
        peer.send(welcome, [*fds, arenas.boards.fd] if arenas.boards else fds)

    def _ready(self, peer: Peer) -> None:
        def work() -> None:
            peer.flush()
            if not (peer.busy or peer.has_record):
                peer.receive()
                self._check_unread(peer)
            self._serve(peer)

        self._guarded(peer, work)

    def _check_unread(self, peer: Peer) -> None:
        """`ProtocolError` for who sends large records piece by piece on many connections."""
        if peer.unread_bytes <= limits.MAX_UNREAD_BYTES // limits.MAX_CONNECTIONS:
            return
        mates = (other for other in self._peers if other.tenant is peer.tenant)
        if sum(other.unread_bytes for other in mates) > limits.MAX_UNREAD_BYTES:
            raise ProtocolError("too many unfinished records of this user")

    def _go_on(self, peer: Peer) -> None:
        peer.queued = False
        if peer in self._peers and not peer.busy:
            self._ready(peer)

    def _guarded(self, peer: Peer, work: Callable[[], None]) -> None:
        """Does something for a peer; whatever goes wrong with it ends only its own connection."""
        try:
            with contextlib.suppress(BlockingIOError):
                work()
            if not peer.busy and peer.has_unsent != peer.awaits_room:
                peer.awaits_room = peer.has_unsent
                self._loop.want_write(peer.sock.fileno(), peer.awaits_room)
        except ProtocolError as error:
            log.warning("garbage on the socket", pid=peer.process.pid, reason=str(error))
            self._lost(peer)
        except OSError:
            self._lost(peer)

    def _lost(self, peer: Peer) -> None:
        """The connection is over: its memory waits for its process to end (promise 7).

        Never while a copy for it is under way, because then it is not watched.
        """
        self._peers.discard(peer)
        self._loop.unwatch(peer.sock.fileno())
        peer.close()
        if peer.tenant.store.disconnect(peer.connection, writes=peer.tenant.writable):
            os.close(peer.process.pidfd)
            return
        pidfd = peer.process.pidfd
        self._quarantine[pidfd] = (peer.tenant, peer.connection)
        self._loop.watch(pidfd, lambda: self._died(pidfd))

    def _died(self, pidfd: int) -> None:
        self._loop.unwatch(pidfd)
        tenant, connection = self._quarantine.pop(pidfd)
        tenant.store.holder_died(connection)
        os.close(pidfd)

    # -- records -----------------------------------------------------------------------

    def _serve(self, peer: Peer) -> None:
        """One record, then it is the others' turn: else who sends many would hold them all up."""
        record = None if peer.busy else peer.next_record()
        if record is not None:
            try:
                self._answer(peer, record)
            except ProtocolError:
                raise
            except KVStoreError as error:
                peer.send(failed(error))
        if not peer.busy and not peer.queued and peer.has_record:
            peer.queued = True
            self._loop.call_soon(lambda: self._go_on(peer))

    def _answer(self, peer: Peer, record: Any) -> None:
        kind = type(record)
        if kind in _GRANTING and peer.gone:
            # Nobody would learn what was granted, and it would be held as long as the
            # process lives: after each call that timed out here, a little more.
            raise ConnectionResetError
        if kind in _WRITTEN and not peer.tenant.writable:
            # Whatever its slots held before would be shown under new keys.
            raise PermissionDenied("who may not write the pool seals what it has staged")
        if kind in wire.COMMANDS:
            self._carry_out(peer, record)
            if kind is c.Commit or kind is c.Adopt:
                self._loop.call_soon(functools.partial(self._make_room, peer.tenant))
        elif kind is wire.SealStaged:
            self._copy_in(peer, record)
        elif kind is wire.Stage:
            self._stage(peer, record)
        elif kind is wire.MapIndex:
            index = peer.tenant.arenas.index
            assert index
            peer.send(wire.IndexMapped(index_bytes=index.nbytes), (index.fd,))
        else:
            raise ProtocolError(f"{kind.__name__} is no command")

    def _make_room(self, tenant: Tenant) -> None:
        """What the next put would else wait for; after the records that came meanwhile, since who
        puts durably asks for the write right behind, and the disk has nothing to do until then."""
        tenant.store.make_room()
        tenant.settle()

    def _carry_out(self, peer: Peer, command: c.Command) -> None:
        """Answers one command; what it made due is seen to once the answer is out."""
        self._tenants.tick()
        try:
            result = peer.tenant.store.handle(peer.connection, command, self._tenants.now_ms())
            self._give(peer, result)
        finally:
            peer.tenant.settle()
            self._tick_in_time()

    def _give(self, peer: Peer, result: c.Result | Deferred) -> None:
        """Sends an answer; until one that was promised is there nothing else of the peer is
        served."""
        if not isinstance(result, Deferred):
            peer.send(result)
            return
        self._promised[peer.tenant, result.ticket] = peer
        self._suspend(peer)

    def _changed(self, tenant: Tenant) -> None:
        """A store has heard from its disks: there may be answers, and other times to look again."""
        for ticket, result in tenant.store.nvme.tickets.take():
            peer = self._promised.pop((tenant, ticket), None)
            if peer:
                self._resume(peer, functools.partial(peer.send, result))
        self._tick_in_time()

    def _suspend(self, peer: Peer) -> None:
        peer.busy, peer.awaits_room = True, False
        self._loop.unwatch(peer.sock.fileno())

    def _resume(self, peer: Peer, answer: Callable[[], None]) -> None:
        peer.busy = False
        self._loop.watch(peer.sock.fileno(), lambda: self._ready(peer))

        def work() -> None:
            answer()
            self._serve(peer)

        self._guarded(peer, work)

    def _tick_in_time(self) -> None:
        delay_s = self._tenants.next_due_s()
        if delay_s is None:
            return
        at_s = self._loop.now_s() + delay_s
        if self._ticks_at_s is None or at_s < self._ticks_at_s:
            self._ticks_at_s = at_s
            self._loop.call_later(delay_s, lambda: self._tick(at_s))

    def _tick(self, at_s: float) -> None:
        if at_s != self._ticks_at_s:
            return  # an earlier moment was asked for since, and that call looks further
        self._ticks_at_s = None
        self._tenants.tick()
        for tenant in self._tenants:
            self._changed(tenant)
        self._tick_in_time()

    # -- copy-in -----------------------------------------------------------------------

    def _stage(self, peer: Peer, record: wire.Stage) -> None:
        area = StagingArea(peer.take_fd(), record.nbytes)
        if peer.staging:
            peer.staging.close()
        peer.staging = area
        peer.send(c.Count(blocks=0))

    def _copy_in(self, peer: Peer, record: wire.SealStaged) -> None:
        """Copies in another thread; until it ends nothing else of this peer is served."""
        copy = self._plan(peer, record)
        self._suspend(peer)

        def ended(done: Future[c.Seal]) -> None:
            self._loop.call_soon(lambda: self._sealed(peer, done))

        self._copies.submit(copy.run).add_done_callback(ended)

    def _plan(self, peer: Peer, record: wire.SealStaged) -> Copy:
        if peer.staging is None:
            raise ProtocolError("staged blocks without staging memory")
        granted = peer.tenant.store.granted(
            peer.connection, record.namespace, record.put_id, record.hashes
        )
        part = part_of(granted.layout, granted.cells)
        if record.offsets.shape != (len(record.hashes),):
            raise ProtocolError("staged blocks without their offsets")
        # The threads that copy are there for all users: nobody may keep one for long.
        if len(record.hashes) * part.nbytes > peer.staging.nbytes:
            raise InvalidArgument("hashes", "more blocks than the staging memory holds")
        return Copy(
            record=record,
            part=part,
            sources=[peer.staging.cut(at, part.nbytes) for at in record.offsets.tolist()],
            payloads=granted.payloads,
        )

    def _sealed(self, peer: Peer, done: Future[c.Seal]) -> None:
        def answer() -> None:
            try:
                self._carry_out(peer, done.result())
            except KVStoreError as error:
                peer.send(failed(error))

        self._resume(peer, answer)
