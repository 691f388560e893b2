"""A session with a daemon on the same host: mapped memory, and a unix socket for the calls."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from kvstore import commands as c
from kvstore import limits
from kvstore.channel.port import ChannelPort
from kvstore.errors import DeadlineExceeded, KVStoreError, ProtocolError, Unavailable
from kvstore.index.boards import Boards
from kvstore.index.format import IndexView
from kvstore.index.reader import IndexReader
from kvstore.memory import Arena
from kvstore.session.control import Deadline
from kvstore.session.fork import ForkGuard
from kvstore.session.link import Granted, Memory, fill_directly
from kvstore.session.local import LocalSession
from kvstore.session.posting import Board
from kvstore.session.resilient import ResilientSession
from kvstore.session.staging import Staging

_POOL, _INDEX, _BOARDS = 0, 2, 3  # in the order of their descriptors
_LAST_S = 0.1  # for answers that are on their way at the end
_CLOSE_S = 1.0  # much longer than a copy into staging memory takes


class ChannelLink:
    """One connection to a daemon, and its memory as mapped here. Once lost it stays lost."""

    def __init__(self, path: str, timeout_s: float) -> None:
        """`Unavailable` where no daemon answers at `path`, OSError where its memory won't map,
        `ProtocolError` where it is not what the daemon says it is."""
        self._lock = threading.Lock()
        self._arenas: list[Arena] = []
        self._stop = threading.Event()
        self._populating: list[threading.Thread] = []
        self._port = ChannelPort(path, timeout_s)
        self._staging: Staging | None = None
        self._memory: Memory | None = None
        try:
            self._memory = self._map_all()
        except BaseException as error:
            self.close()
            if isinstance(error, ValueError):
                raise ProtocolError(f"the daemon's memory is not as it says: {error}") from None
            raise
        self._guard = ForkGuard(self._port.abandon)
        pool, generations, index = self._arenas[:_BOARDS]
        welcome = self._port.welcome
        whole = welcome.prefaulted and welcome.pool_bytes <= limits.MAX_POPULATED_BYTES
        self._populate(index, generations)
        if whole:
            self._populate(pool, behind=True)

    @property
    def writes_pool(self) -> bool:
        """See `Link.writes_pool`."""
        return bool(self._port.welcome.writable)

    @property
    def closed(self) -> bool:
        """Whether the connection is over."""
        return self._port.closed

    @property
    def pool_fd(self) -> int:
        """The memfd of the pool, as long as the link is open."""
        return self._arenas[0].fd

    def call(self, command: c.Command, timeout_s: float) -> c.Result:
        """See `Link.call`."""
        self._guard.check()
        return self._port.call(command, timeout_s)

    def cast(
        self, command: c.Command, timeout_s: float, then: Callable[[object], None] | None = None
    ) -> None:
        """See `Link.cast`."""
        self._guard.check()
        self._port.cast(command, timeout_s, then)

    def take_answers(self, timeout_s: float) -> None:
        """See `Link.take_answers`."""
        if self._port.owes:
            self._guard.check()
            self._port.take_answers(timeout_s)

    def say_last(self, command: c.Command) -> None:
        """Sends a command before the end, if that can be done at once."""
        self._port.say_last(command)

    def memory(self, timeout_s: float) -> Memory:
        """See `Link.memory`; makes a call only where the index moved."""
        self._guard.check()
        memory = self._memory
        if memory is None:
            raise Unavailable("the daemon is gone")
        return self._map_index(timeout_s) if memory.index.retired else memory

    @property
    def ready(self) -> Memory | None:
        """See `Link.ready`."""
        memory = self._memory
        if memory is None or memory.index.retired or self._guard.forked:
            return None
        return memory

    def fill(self, granted: Granted, sources: c.U64, timeout_s: float) -> c.U8:
        """See `Link.fill`."""
        deadline = Deadline(max(timeout_s, 1e-3))
        if self.writes_pool:
            memory = self.memory(deadline.left_s)
            return fill_directly(self, memory, granted, sources, deadline.left_s)
        with self._locked(deadline):
            if self._port.closed:
                # The daemon may yet copy what an earlier call has staged and got no answer for:
                # other bytes in its place would be stored under that call's keys.
                raise Unavailable("the daemon is gone")
            if self._staging is None or self._staging.nbytes < granted.part.nbytes:
                self._staging = self._new_staging(granted.part.nbytes, deadline)
            return self._staging.fill(self._port, granted, sources, deadline)

    def wait(self, timeout_s: float | None) -> bool:
        """Waits for the end of the connection: True when it is over. `poke` ends the wait."""
        return self._port.wait(timeout_s)

    @property
    def interrupted(self) -> bool:
        """Whether it is over because a call was broken off in this process."""
        return self._port.interrupted

    def poke(self) -> None:
        """Wakes `wait`."""
        self._port.poke()

    def shut(self) -> None:
        """Ends the connection at once, also for calls under way; `close` follows."""
        memory, self._memory = self._memory, None
        if memory and memory.board:
            memory.board.close()  # first: another client may have it next
        self._stop.set()
        self._port.shut()

    def close(self) -> None:
        """See `Link.close`; views that are still held keep the memory until they go."""
        self.shut()  # ends what other threads wait for under the lock
        for thread in self._populating:
            thread.join(_CLOSE_S)
        # Bounded, because who holds it may wait for us, in the handler of a signal.
        held = self._lock.acquire(timeout=_CLOSE_S)
        try:
            self._unmap()
        finally:
            if held:
                self._lock.release()

    # -- inside ------------------------------------------------------------------------

    def _populate(self, *arenas: Arena, behind: bool = False) -> None:
        """Maps their pages in the background: else each first touch of one is a fault. behind: as
        `Arena.populate` has it."""

        def populate() -> None:
            for arena in arenas:
                arena.populate(self._stop, behind=behind)

        thread = threading.Thread(target=populate, name="kvstore-populate", daemon=True)
        self._populating = [other for other in self._populating if other.is_alive()] + [thread]
        thread.start()

    @contextlib.contextmanager
    def _locked(self, deadline: Deadline) -> Iterator[None]:
        """`DeadlineExceeded` where other threads' calls take that long."""
        if not self._lock.acquire(timeout=deadline.left_s):
            raise DeadlineExceeded("another call held the connection for all of this one's time")
        try:
            yield
        finally:
            self._lock.release()

    def _unmap(self) -> None:
        self._memory = None
        self._port.close()
        for arena in self._arenas:
            arena.close()
        self._arenas.clear()
        if self._staging:
            self._staging.close()
            self._staging = None

    def _map_all(self) -> Memory:
        welcome = self._port.welcome
        fds, self._port.fds = self._port.fds, []
        pool_bytes = welcome.pool_bytes
        sizes = [pool_bytes, pool_bytes // limits.GRANULE_BYTES * 8, welcome.index_bytes]
        sizes += [welcome.boards_bytes] if welcome.boards_bytes else []
        for i, (fd, nbytes) in enumerate(zip(fds, sizes, strict=True)):
            # An arena takes its descriptor over even where it fails; the later ones are ours.
            writable = bool(welcome.writable) and i in (_POOL, _BOARDS)
            try:
                self._arenas.append(Arena(fd, nbytes, writable=writable))
            except BaseException:
                self._port.fds = fds[i + 1 :]
                raise
        pool, generations, index = self._arenas[:_BOARDS]
        boards = None
        if welcome.boards_bytes:
            boards = Boards.open(self._arenas[_BOARDS].array)
        return Memory(
            pool=pool.array,
            generations=generations.array.view(np.uint64),
            index=IndexReader(IndexView.open(index.array), boards),
            instance=welcome.instance,
            board=Board(boards, welcome.board) if boards and welcome.board >= 0 else None,
        )

    def _map_index(self, timeout_s: float) -> Memory:
        deadline = Deadline(max(timeout_s, 1e-3))
        with self._locked(deadline):
            memory = self._memory
            if memory is None:
                raise Unavailable("the daemon is gone")
            if not memory.index.retired:  # another thread was here first
                return memory
            arena = Arena(*self._port.map_index(deadline.left_s), writable=False)
            self._arenas[_INDEX].close()
            self._arenas[_INDEX] = arena
            index = IndexReader(IndexView.open(arena.array), memory.index.boards)
            self._memory = replace(memory, index=index)
            self._populate(arena)
            return self._memory

    def _new_staging(self, block_bytes: int, deadline: Deadline) -> Staging:
        if self._staging:
            self._staging.close()
            self._staging = None
        staging = Staging(max(limits.STAGING_BYTES, block_bytes))
        try:
            self._port.stage(staging.fd, staging.nbytes, deadline.left_s)
        except BaseException:
            staging.close()
            raise
        return staging


class _ChannelConnection(LocalSession):
    """A `LocalSession` whose reads are reported by the thread that watches the connection."""

    def __init__(self, link: ChannelLink, *, timeout_s: float, verify_reads: bool) -> None:
        super().__init__(link, timeout_s=timeout_s, verify_reads=verify_reads, ahead=True)
        self._channel = link
        self._returns: deque[c.Abort | c.Release] = deque()
        self._asleep = True  # whether the watching thread sleeps until it is poked

    def watch(self) -> bool:
        """See `Connection.watch`; until then it reports touches in time, and gives slots back."""
        while not self._channel.wait(self._pause_s()):
            with contextlib.suppress(KVStoreError):
                if self._returns:
                    self._send_returns(self._timeout_s)
                if self._touches.due(time.monotonic()):
                    self.report_touches(self._timeout_s)
        return not self._channel.interrupted

    def shut(self) -> None:
        """Ends the connection, and with it `watch`; slots that nobody writes go back."""
        with contextlib.suppress(KVStoreError):  # there may be slots among them
            self._channel.take_answers(_LAST_S)
        stock = self._writer.stock.take_all()
        if stock:
            self._channel.say_last(c.GiveBack(granules=np.array(stock, np.uint32)))
        self._channel.shut()

    def _pause_s(self) -> float | None:
        """Sleeps for good while nothing was read: an idle client costs no wake-ups."""
        self._asleep = True  # first, so that what comes after the look below wakes us
        self._asleep = not (self._touches.pending or self._returns)
        return None if self._asleep else limits.TOUCH_INTERVAL_MS * 1e-3

    def report_touches(self, timeout_s: float) -> None:
        """See `ControlSession.report_touches`; what is to be given back goes before it."""
        deadline = Deadline(max(timeout_s, 1e-3))
        self._send_returns(deadline.left_s)
        super().report_touches(deadline.left_s)

    def _report_before_eviction(self, deadline: Deadline) -> None:
        if self._returns:
            self._send_returns(deadline.left_s)
        super()._report_before_eviction(deadline)

    def _give_back(self, command: c.Abort | c.Release) -> None:
        """Left to the watching thread: the call that failed may have no time left."""
        self._returns.append(command)
        self._channel.poke()

    def _send_returns(self, timeout_s: float) -> None:
        deadline = Deadline(max(timeout_s, 1e-3))
        while self._returns:
            try:
                command = self._returns.popleft()
            except IndexError:  # another thread sends the last one
                return
            try:
                self._call(command, c.Count, deadline)
            except DeadlineExceeded:  # else it would be ours for as long as we are connected
                self._returns.appendleft(command)
                raise

    def _touched(self, began: bool) -> None:
        # One that ticks anyway is not woken: that would take longer than the read did.
        if (began and self._asleep) or self._touches.full:
            self._channel.poke()


class ChannelSession(ResilientSession):
    """A `Session` with the daemon at a unix socket, which outlives the daemon's deaths.

    path: the channel's socket. timeout_s: the deadline of calls that name none. verify_reads:
    check the checksums at each get too. lazy: do not wait for the daemon here; until it answers,
    nothing is found. Raises `Unavailable` unless lazy, `PermissionDenied` where this user has no
    pool, OSError where the daemon's memory cannot be mapped.
    """

    def __init__(
        self, path: str, *, timeout_s: float = 5.0, verify_reads: bool = False, lazy: bool = False
    ) -> None:
        def connect(timeout_s: float) -> _ChannelConnection:
            link = ChannelLink(path, timeout_s)
            return _ChannelConnection(link, timeout_s=default_s, verify_reads=verify_reads)

        default_s = timeout_s
        super().__init__(connect, timeout_s=timeout_s, lazy=lazy)
