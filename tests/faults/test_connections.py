"""Connections that break in the middle: no wrong byte, no call past its deadline, nothing kept."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from faults.workers import content, hashes, layout, says, worker

from daemon import Daemon, daemon
from kvstore import Hit, KVStore, Miss, MissReason, NamespaceHandle
from kvstore import commands as c
from kvstore.channel import port as port_module
from kvstore.channel.port import ChannelPort
from kvstore.errors import DeadlineExceeded, ProtocolError, StaleNamespace, Unavailable
from kvstore.index import IndexReader
from kvstore.memory import Arena
from kvstore.session import writes
from kvstore.session.addresses import addresses_of
from kvstore.session.channel import ChannelLink, ChannelSession, _ChannelConnection
from kvstore.session.link import Granted, Memory, copy_all_in
from kvstore.session.parts import part_of
from kvstore.session.single import UNSEEN
from kvstore.streaming import U64, copy_rows

BLOCK_BYTES = 3840
LAYOUT = layout(BLOCK_BYTES)
PUT_ID = b"p" * 16
WAIT_S = 10.0


@pytest.fixture(scope="module")
def direct(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with daemon(tmp_path_factory.mktemp("direct"), "--dram", "4MiB") as running:
        yield running


@pytest.fixture(scope="module")
def copy_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("copy-in")
    with daemon(folder, "--dram", "4MiB", "--trust", "copy-in") as running:
        yield running


@contextlib.contextmanager
def linked(running: Daemon) -> Iterator[ChannelLink]:
    link = ChannelLink(str(running.socket), WAIT_S)
    try:
        yield link
    finally:
        link.close()


@contextlib.contextmanager
def connected(running: Daemon) -> Iterator[_ChannelConnection]:
    """A connection with its watching thread, as a session has them."""
    link = ChannelLink(str(running.socket), WAIT_S)
    session = _ChannelConnection(link, timeout_s=WAIT_S, verify_reads=False)
    watching = threading.Thread(target=session.watch)
    watching.start()
    try:
        yield session
    finally:
        session.shut()
        watching.join()
        session.close()


def reserved(link: ChannelLink, n: int, seed: int) -> Granted:
    """Blocks that were granted to a link."""
    opened: Any = link.call(c.OpenNamespace(name="broken", layout=LAYOUT.encode()), WAIT_S)
    keys, every = hashes(n, seed), np.empty(0, np.uint32)
    command = c.Reserve(namespace=opened.namespace, put_id=PUT_ID, hashes=keys, cells=every)
    answer: Any = link.call(command, WAIT_S)
    return Granted(
        namespace=opened.namespace,
        layout=LAYOUT,
        put_id=PUT_ID,
        hashes=keys,
        granules=answer.granules,
        part=part_of(LAYOUT, every),
    )


def fill_with(
    link: ChannelLink, granted: Granted, blocks: list[np.ndarray], timeout_s: float = WAIT_S
) -> None:
    """`Link.fill` from arrays."""
    sources = addresses_of("blocks", blocks, len(blocks), BLOCK_BYTES, writable=False)
    link.fill(granted, sources, timeout_s)


def within(seconds: float, work: Callable[[], object]) -> BaseException | None:
    """Does something in a thread, which has to end in time; what it raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it went on past its deadline"
    return raised[0] if raised else None


def until(condition: Callable[[], bool]) -> None:
    """Asks until it holds; the condition is one that no event tells of."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        threading.Event().wait(0.01)


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


# -- no wrong byte ----------------------------------------------------------------------------


def test_staging_is_not_written_again_after_a_seal_without_an_answer(copy_in: Daemon) -> None:
    """The daemon may copy it later; other bytes there would be stored under the first keys."""
    with linked(copy_in) as link:
        first, other = reserved(link, 2, seed=1), reserved(link, 2, seed=2)
        fill_with(link, first, [np.full(BLOCK_BYTES, 1, np.uint8)] * 2)
        assert link._staging
        link._port.shut()  # as a call does whose deadline is over
        with pytest.raises(Unavailable):
            fill_with(link, other, [np.full(BLOCK_BYTES, 2, np.uint8)] * 2)
        assert (link._staging._arena.array[: 2 * BLOCK_BYTES] == 1).all()


def test_a_child_that_closes_the_parents_store_keeps_its_own_memory() -> None:
    """The child has not got the mapping; its own may lie at those addresses by then."""
    store = KVStore(dram=64 << 20)
    child = os.fork()
    if child == 0:
        own = [np.ones(60 << 20, np.uint8) for _ in range(3)]
        store.close()
        del store
        os._exit(0 if all(block.all() for block in own) else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0
    store.close()


# -- deadlines --------------------------------------------------------------------------------


def test_a_put_waits_for_other_puts_no_longer_than_its_deadline(copy_in: Daemon) -> None:
    with linked(copy_in) as link:
        granted = reserved(link, 1, seed=3)
        with link._lock:  # another thread's put is under way
            block = [np.zeros(BLOCK_BYTES, np.uint8)]
            error = within(WAIT_S, lambda: fill_with(link, granted, block, 0.05))
        assert isinstance(error, DeadlineExceeded)


def test_a_moved_index_is_waited_for_no_longer_than_the_deadline(direct: Daemon) -> None:
    with linked(direct) as link, link._lock:
        error = within(WAIT_S, lambda: link._map_index(0.05))
        assert isinstance(error, DeadlineExceeded)


def test_a_call_without_time_left_costs_no_connection(direct: Daemon) -> None:
    with linked(direct) as link:
        with pytest.raises(DeadlineExceeded):
            link.call(c.Stat(), 0.0)
        assert isinstance(link.call(c.Stat(), WAIT_S), c.Stats)


def test_a_put_that_runs_out_of_time_in_its_copies_gives_the_slots_back(
    direct: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "kvstore.session.copies.GROUP_BYTES", BLOCK_BYTES
    )  # a look at the clock each
    blocks = [content(key, 1, BLOCK_BYTES) for key in range(8)]
    with connected(direct) as session:
        namespace = session.open_namespace("slow copies", LAYOUT)
        real, fill = time.monotonic, session._link.fill

        def late(granted: Granted, sources: Any, timeout_s: float) -> c.U8:
            # From now on each look at the clock finds a second gone.
            steps = iter(range(1, 1 << 30))
            with monkeypatch.context() as patch:
                patch.setattr("kvstore.session.link.time.monotonic", lambda: real() + next(steps))
                return fill(granted, sources, timeout_s)

        session._link.fill = late  # type: ignore[method-assign]
        with pytest.raises(DeadlineExceeded, match="copied in time"):
            session.put(namespace, hashes(8, seed=4), blocks, cells=[0], timeout_s=4.0)
        session._link.fill = fill  # type: ignore[method-assign]
        until(lambda: session.stats().pending_blocks == 0)
        assert session.put(namespace, hashes(8, seed=4), blocks).stored == 8


def test_a_put_of_whole_blocks_that_runs_out_of_time_keeps_its_slots_for_the_next(
    direct: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "kvstore.session.copies.GROUP_BYTES", BLOCK_BYTES
    )  # a look at the clock each
    blocks = [content(key, 1, BLOCK_BYTES) for key in range(8)]
    with connected(direct) as session:
        namespace = session.open_namespace("slow whole copies", LAYOUT)

        def late(*a: Any, end_s: float, **rest: Any) -> c.U64:
            return copy_all_in(*a, end_s=end_s - 2 * WAIT_S, **rest)

        with monkeypatch.context() as patch:
            patch.setattr(writes, "copy_all_in", late)
            with pytest.raises(DeadlineExceeded, match="copied in time"):
                session.put(namespace, hashes(8, seed=4), blocks)
        assert session.match(namespace, hashes(8, seed=4)).count == 0
        grants = Counter[str]()
        real = session._link.call

        def counted(command: c.Command, timeout_s: float) -> c.Result:
            grants[type(command).__name__] += 1
            return real(command, timeout_s)

        monkeypatch.setattr(session._link, "call", counted)
        assert session.put(namespace, hashes(8, seed=4), blocks).stored == 8
        assert not grants  # nothing had to be asked for


def test_a_put_of_whole_blocks_goes_into_a_namespace_that_was_dropped_meanwhile(
    direct: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes after the drop then, as it may: nobody has had its answer yet."""
    block, target = [content(1, 1, BLOCK_BYTES)], [np.zeros(BLOCK_BYTES, np.uint8)]
    with ChannelSession(str(direct.socket)) as session, ChannelSession(str(direct.socket)) as other:
        namespace = session.open_namespace("dropped before", LAYOUT)

        def dropped_first(*a: Any, **rest: Any) -> c.U64:
            other.drop_namespace(namespace)
            monkeypatch.undo()
            return copy_all_in(*a, **rest)

        monkeypatch.setattr(writes, "copy_all_in", dropped_first)
        assert session.put(namespace, hashes(1, seed=9), block).stored == 1
        assert isinstance(session.get_into(namespace, hashes(1, seed=9), target)[0], Hit)
        assert (target[0] == block[0]).all()


@pytest.mark.parametrize("n", [1, 3])
def test_a_put_broken_off_once_it_is_shown_never_writes_there_again(
    direct: Daemon, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    first = [content(key, 1, BLOCK_BYTES) for key in range(n)]
    with connected(direct) as session:
        namespace = session.open_namespace(f"broken off {n}", LAYOUT)
        begun: list[int] = []

        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        def put_for_ever() -> None:
            while True:
                begun.append(1000 + len(begun))
                session.put(namespace, hashes(n, seed=begun[-1]), first)

        with monkeypatch.context() as patch:
            patch.setattr(session._link, "cast", interrupted)
            with pytest.raises(KeyboardInterrupt):  # the first put that asks for slots
                put_for_ever()
        for seed in range(100, 130):
            others = [content(100 + key, seed, BLOCK_BYTES) for key in range(n)]
            assert session.put(namespace, hashes(n, seed=seed), others).stored == n
        found = [np.zeros(BLOCK_BYTES, np.uint8) for _ in range(n)]
        got = session.get_into(namespace, hashes(n, seed=begun[-1]), found)
        assert all(isinstance(each, Hit) for each in got)
        np.testing.assert_array_equal(found, first)


def test_of_a_key_that_comes_twice_in_a_put_one_block_is_stored(direct: Daemon) -> None:
    blocks = [content(key, 1, BLOCK_BYTES) for key in range(3)]
    with connected(direct) as session:
        namespace = session.open_namespace("twice", LAYOUT)
        twice = hashes(2, seed=70)[[0, 1, 0]]
        done = session.put(namespace, twice, blocks)
        assert (done.stored, done.existed) == (2, 1)
        target = [np.zeros(BLOCK_BYTES, np.uint8)]
        assert isinstance(session.get_into(namespace, twice[:1], target)[0], Hit)
        np.testing.assert_array_equal(target[0], blocks[0])


def test_the_daemon_soon_hears_of_what_was_put_though_nobody_calls_it(direct: Daemon) -> None:
    block = [content(1, 1, BLOCK_BYTES)]
    with connected(direct) as session:
        namespace = session.open_namespace("untold", LAYOUT)
        assert session.put(namespace, hashes(1, seed=60), block).stored == 1
        until(lambda: len(session._writer.stock) > 0 or session._link.take_answers(0))
        assert session.put(namespace, hashes(1, seed=61), block).stored == 1
        index = IndexReader(session._link.memory(WAIT_S).index.view)  # without the boards
        until(lambda: index.match(namespace.id, hashes(1, seed=61)).count == 1)


def test_where_the_board_is_full_a_put_shows_its_blocks_by_a_call(
    direct: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = [content(1, 1, BLOCK_BYTES)]
    with connected(direct) as session:
        namespace = session.open_namespace("full board", LAYOUT)
        assert session.put(namespace, hashes(1, seed=40), block).stored == 1
        calls = Counter[str]()
        real = session._link.call

        def counted(command: c.Command, timeout_s: float) -> c.Result:
            calls[type(command).__name__] += 1
            return real(command, timeout_s)

        monkeypatch.setattr(session._link, "call", counted)
        monkeypatch.setattr("kvstore.session.posting.put_one", lambda *_: UNSEEN)
        monkeypatch.setattr("kvstore.index.boards.post_now", lambda *_: False)
        assert session.put(namespace, hashes(1, seed=41), block).stored == 1
        assert calls == {"Commit": 1}
        assert session.match(namespace, hashes(1, seed=41)).count == 1


def test_a_client_that_closes_gives_its_empty_slots_back(direct: Daemon) -> None:
    """Its process lives on, so that nothing else could give them back."""
    with ChannelSession(str(direct.socket)) as watching:
        before = watching.stats()
        with ChannelSession(str(direct.socket)) as session:
            namespace = session.open_namespace("closing", LAYOUT)
            assert session.put(namespace, hashes(1), [np.zeros(BLOCK_BYTES, np.uint8)]).stored == 1
            assert watching.stats().ahead_bytes > before.ahead_bytes
        until(lambda: watching.stats().connections == before.connections)
        until(lambda: watching.stats().ahead_bytes == before.ahead_bytes)


def test_giving_slots_back_takes_nothing_from_the_callers_time(direct: Daemon) -> None:
    """Here another thread's call has the connection for longer than the put has time."""
    with connected(direct) as session:
        namespace = session.open_namespace("give back", LAYOUT)
        link = cast(ChannelLink, session._link)
        fill, busy = link.fill, link._port._lock

        def slow(granted: Granted, sources: Any, timeout_s: float) -> c.U8:
            busy.acquire()
            raise DeadlineExceeded("no time left")

        link.fill = slow  # type: ignore[method-assign]
        block = [np.zeros(BLOCK_BYTES, np.uint8)]
        try:
            began = time.monotonic()
            with pytest.raises(DeadlineExceeded):
                session.put(namespace, hashes(1, seed=5), block, cells=[0])
            assert time.monotonic() - began < WAIT_S / 2
        finally:
            busy.release()
        link.fill = fill  # type: ignore[method-assign]
        until(lambda: session.stats().pending_blocks == 0)
        assert session.put(namespace, hashes(1, seed=5), block).stored == 1


def test_a_get_ends_at_its_deadline_with_what_it_has(
    direct: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = [np.zeros(BLOCK_BYTES, np.uint8) for _ in range(4)]
    with connected(direct) as session:
        namespace = session.open_namespace("late", LAYOUT)
        blocks = [content(key, 1, BLOCK_BYTES) for key in range(4)]
        assert session.put(namespace, hashes(4, seed=6), blocks).stored == 4
        real, ahead_s = time.monotonic, [0.0]

        def slow(targets: U64, sources: U64, nbytes: int) -> None:
            ahead_s[0] += WAIT_S
            copy_rows(targets, sources, nbytes)

        monkeypatch.setattr("kvstore.session.copies.GROUP_BYTES", BLOCK_BYTES)
        monkeypatch.setattr("kvstore.session.copies.copy_rows", slow)
        monkeypatch.setattr("kvstore.session.control.time.monotonic", lambda: real() + ahead_s[0])
        answers = session.get_into(namespace, hashes(4, seed=6), targets, timeout_s=1.5 * WAIT_S)
    assert [isinstance(answer, Miss) for answer in answers] == [False, False, True, True]
    assert answers[2] == Miss(MissReason.UNAVAILABLE)


# -- nothing kept -----------------------------------------------------------------------------


def test_a_view_that_cannot_be_shown_leases_nothing(
    direct: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connected(direct) as session:
        namespace = session.open_namespace("views", LAYOUT)
        assert session.put(namespace, hashes(1, seed=7), [content(0, 1, BLOCK_BYTES)]).stored == 1
        call, memory, leased = session._link.call, session._link.memory, list[bool]()

        def noting(command: c.Command, timeout_s: float) -> c.Result:
            leased.append(isinstance(command, c.Lease))
            return call(command, timeout_s)

        def moved(timeout_s: float) -> Memory:
            if any(leased):
                raise DeadlineExceeded("the index has moved, and the daemon is slow")
            return memory(timeout_s)

        monkeypatch.setattr(session._link, "call", noting)
        monkeypatch.setattr(session._link, "memory", moved)
        with contextlib.suppress(DeadlineExceeded), session.view(namespace, hashes(1, seed=7)):
            pass
        assert session.stats().leased_blocks == 0


def test_the_end_of_a_connection_in_mid_put_is_unavailable(copy_in: Daemon) -> None:
    """The keeper unmaps; it must not do so under a thread that is staging its blocks."""
    block = np.zeros(BLOCK_BYTES, np.uint8)
    with linked(copy_in) as link:
        granted = reserved(link, 2, seed=8)
        closing = threading.Thread(target=link.close)

        sources = addresses_of("blocks", [block, block], 2, BLOCK_BYTES, writable=False)

        class Sources(list[int]):
            def __getitem__(self, at: Any) -> Any:
                closing.start()
                closing.join(0.3)  # does not end where it waits for us
                return sources

        with pytest.raises(Unavailable):
            link.fill(granted, cast("Any", Sources(sources.tolist())), WAIT_S)
        closing.join()


def test_a_signal_handler_may_close_what_it_has_interrupted(copy_in: Daemon) -> None:
    with linked(copy_in) as link, link._lock:  # as if this thread were in the middle of a put
        closing = threading.Thread(target=link.close)
        closing.start()
        closing.join(WAIT_S)
        assert not closing.is_alive()


def test_an_index_mapped_for_a_closed_link_is_given_back(
    direct: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_fds()
    link = ChannelLink(str(direct.socket), WAIT_S)
    memory = link._memory
    assert memory
    monkeypatch.setattr(type(memory.index), "retired", property(lambda _: True))
    ask, closing = link._port.map_index, threading.Thread(target=link.close)

    def answered_at_the_end(timeout_s: float) -> tuple[int, int]:
        answer = ask(timeout_s)
        closing.start()
        closing.join(0.3)  # does not end where it waits for us
        return answer

    monkeypatch.setattr(link._port, "map_index", answered_at_the_end)
    with contextlib.suppress(Unavailable):
        link.memory(WAIT_S)
    closing.join()
    del memory
    with pytest.raises(Unavailable):
        link.memory(WAIT_S)
    assert open_fds() == before


def test_a_put_into_a_namespace_that_is_dropped_meanwhile_is_not_stored(direct: Daemon) -> None:
    block = [np.zeros(BLOCK_BYTES, np.uint8)]
    with ChannelSession(str(direct.socket)) as session, ChannelSession(str(direct.socket)) as other:
        namespace = session.open_namespace("dropped", LAYOUT)
        link = cast(Any, session._now())._link
        fill = link.fill

        def dropped_first(granted: Granted, sources: Any, timeout_s: float) -> c.U8:
            other.drop_namespace(namespace)
            return cast(c.U8, fill(granted, sources, timeout_s))

        link.fill = dropped_first
        result = session.put(namespace, hashes(1, seed=9), block, cells=[0])
        assert (result.stored, result.not_stored) == (0, 1)
        link.fill = fill
        assert session.put(namespace, hashes(1, seed=9), block).stored == 1


def test_a_wake_up_never_reaches_a_descriptor_that_was_given_anew(
    direct: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that reads may wake the port in the moment in which another closes it."""
    port = ChannelPort(str(direct.socket), WAIT_S)
    pipe, opened, close = (port._wake_read, port._wake_write), list[int](), os.close

    def reused(fd: int) -> None:
        close(fd)
        if fd in pipe:
            opened.append(os.open("/dev/null", os.O_RDONLY))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "write", lambda fd, _: written.append(fd))
                port.poke()

    written: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(port_module.os, "close", reused)
        port.close()
    for fd in opened:
        os.close(fd)
    assert opened
    assert not set(written) & set(opened)


def test_a_call_never_waits_for_a_descriptor_that_was_given_anew(direct: Daemon) -> None:
    port = ChannelPort(str(direct.socket), WAIT_S)
    waiting, shut = threading.Event(), threading.Event()

    class Late:
        """A poller that another thread overtakes just before it waits."""

        def __init__(self, real: Any) -> None:
            self._real = real

        def poll(self, timeout_ms: int) -> list[tuple[int, int]]:
            waiting.set()
            assert shut.wait(WAIT_S)
            return cast("list[tuple[int, int]]", self._real.poll(timeout_ms))

    port._readable = Late(port._readable)  # type: ignore[assignment]
    errors: list[BaseException | None] = []
    call = threading.Thread(
        target=lambda: errors.append(within(WAIT_S, lambda: port.call(c.Stat(), 2.0)))
    )
    pipes: list[int] = []
    call.start()
    try:
        assert waiting.wait(WAIT_S)
        number = port._sock.fileno()
        port.shut()
        while number not in pipes and len(pipes) < 16:
            pipes += os.pipe()
        shut.set()
        call.join()
        assert errors[0] is None or isinstance(errors[0], Unavailable)
        assert port._sock.fileno() < 0
    finally:
        shut.set()
        call.join()
        port.close()
        for each in pipes:
            os.close(each)


def test_what_the_daemon_hands_over_is_for_no_program_that_is_started(direct: Daemon) -> None:
    port = ChannelPort(str(direct.socket), WAIT_S)
    inherited = [os.get_inheritable(fd) for fd in port.fds]
    port.close()
    assert inherited == [False] * 4


def test_a_shortage_of_descriptors_takes_no_more_of_them(
    direct: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_fds()

    def none(*_: object) -> object:
        raise OSError(24, "too many open files")

    for scarce in ("socket.socket", "os.pipe2"):
        with monkeypatch.context() as patch:
            patch.setattr(f"kvstore.channel.port.{scarce}", none)
            with pytest.raises(OSError, match="too many"):
                ChannelPort(str(direct.socket), WAIT_S)
        assert open_fds() == before


def test_memory_that_is_not_as_the_daemon_says_is_a_protocol_error(
    direct: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any other kind of error would end the thread that makes connections."""
    before = open_fds()

    def larger(self: Arena, fd: int, nbytes: int, *, writable: bool) -> None:
        init(self, fd, nbytes + (1 << 30), writable=writable)

    init = Arena.__init__
    monkeypatch.setattr(Arena, "__init__", larger)
    with pytest.raises(ProtocolError, match="not as it says"):
        ChannelLink(str(direct.socket), WAIT_S)
    assert open_fds() == before


def test_an_answer_of_another_kind_ends_the_connection(direct: Daemon) -> None:
    """It may be an earlier call's; the next answers would be too."""
    port = ChannelPort(str(direct.socket), WAIT_S)
    with pytest.raises(ProtocolError):
        port._expect(c.Sealed, c.Count(blocks=0))
    assert port.closed
    port.close()


# -- namespaces -------------------------------------------------------------------------------


def test_a_name_with_an_end_of_line_hides_no_other(direct: Daemon) -> None:
    odd = "one\rtwo\x0bthree\x85four\u2028five"
    with ChannelSession(str(direct.socket)) as session:
        session.open_namespace(odd, LAYOUT)
        assert odd in [namespace.name for namespace in session.info().namespaces]


def test_an_id_that_became_stale_while_it_was_asked_for_is_not_kept(
    direct: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread sees the newer epoch first; a reader with the old id would miss for ever."""
    with connected(direct) as session, ChannelSession(str(direct.socket)) as other:
        handle = other.open_namespace("stale", LAYOUT)
        foreign = NamespaceHandle(
            id=handle.id, name="stale", layout=LAYOUT, generation=0, key=b"", instance=-1
        )
        call, asked = session._link.call, list[c.Command]()

        def overtaken(command: c.Command, timeout_s: float) -> c.Result:
            answer = call(command, timeout_s)
            asked.append(command)
            if len(asked) == 1:
                other.drop_namespace(handle)
                session.match(handle, hashes(1))  # the other thread
            return answer

        monkeypatch.setattr(session._link, "call", overtaken)
        session.match(foreign, hashes(1))
        block = content(0, 1, BLOCK_BYTES)
        assert other.put(handle, hashes(1, seed=10), [block]).stored == 1
        assert session.match(foreign, hashes(1, seed=10)).count == 1


def test_an_embedded_store_reads_the_index_that_a_refused_call_has_moved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with KVStore(dram=1 << 20) as store:
        catalog, none = store._own._store._shelf.catalog, np.empty(0, np.uint32)

        def refused(*_: object) -> c.Result:
            catalog._rebuild(4 * catalog.capacity, without=none)
            raise StaleNamespace("dropped")

        with monkeypatch.context() as patch:
            patch.setattr(store._own._store, "handle", refused)
            with pytest.raises(StaleNamespace):
                store.stats()
        assert not store._link.memory(1.0).index.retired


def test_a_worker_that_seals_what_it_did_not_stage_gives_its_slots_back(tmp_path: Path) -> None:
    with (
        daemon(tmp_path, "--dram", "4MiB", "--trust", "copy-in") as running,
        worker("unstaged", running.target, BLOCK_BYTES, 8) as writer,
        ChannelSession(str(running.socket)) as session,
    ):
        assert says(writer) == "refused 8"
        assert (session.stats().blocks, session.stats().pending_blocks) == (0, 8)
        writer.kill()
        until(lambda: session.stats().used_bytes == 0)
        assert session.stats().connections == 1
