"""Boards: what clients post is seen at once, taken over in order, and never believed unseen."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from store_rig import LAYOUT, Rig, keys

from kvstore import commands as c
from kvstore import limits
from kvstore.block import NO_PARENT, pack_parts, unpack
from kvstore.errors import ProtocolError
from kvstore.index import IndexReader, IndexView, looking
from kvstore.index.boards import (
    BOARD_ROWS,
    BOARDS,
    BOARDS_BYTES,
    BoardKeeper,
    Boards,
)
from kvstore.index.format import PAGE_BYTES, key_words
from kvstore.session.posting import Board

LENGTH = LAYOUT.block_bytes
POSTED = PAGE_BYTES // 8  # the first of the counts of posted rows, in words


class Posts:
    """Boards with their keeper, and an index reader beside an empty index."""

    def __init__(self) -> None:
        self.memory = np.zeros(BOARDS_BYTES, np.uint8)
        self.boards = Boards.create(self.memory)
        self.keeper = BoardKeeper(self.boards)
        self.generations = np.arange(2, 2 + 4096, dtype=np.uint64) * 2
        rig = Rig()  # for an index without a block
        self.reader = IndexReader(IndexView.open(rig.indexes[-1]), Boards.open(self.memory))

    def board(self) -> Board:
        number = self.keeper.open()
        assert number is not None
        return Board(self.boards, number)

    def post(self, board: Board, hashes: c.U8, namespace: int = 1, first: int = 0) -> bool:
        return board.post(
            namespace,
            key_words(hashes),
            length=LENGTH,
            granules=np.arange(first, first + len(hashes), dtype=np.uint32),
            generations=self.generations,
        )


def test_what_was_posted_is_found_with_its_place() -> None:
    posts = Posts()
    board, hashes = posts.board(), keys(*range(5))
    assert posts.reader.match(1, hashes).count == 0
    assert posts.post(board, hashes[:3], first=10)
    found = posts.reader.match(1, hashes)
    assert found.count == 3
    assert found.granules.tolist() == [10, 11, 12]
    assert found.generations.tolist() == posts.generations[10:13].tolist()
    assert (found.lengths == LENGTH).all()
    assert (found.tiers == 1).all()
    assert posts.reader.match(2, hashes).count == 0  # another namespace
    looked = posts.reader.lookup(1, hashes[::-1])
    assert looked.found.tolist() == [False, False, True, True, True]


def test_what_several_clients_posted_makes_one_chain() -> None:
    posts = Posts()
    boards, hashes = [posts.board() for _ in range(3)], keys(*range(6))
    for i in range(6):
        assert posts.post(boards[i % 3], hashes[i : i + 1], first=i)
    assert posts.reader.match(1, hashes).granules.tolist() == list(range(6))


@pytest.mark.parametrize("n", [1, 7, BOARD_ROWS])
def test_a_ring_that_goes_round_and_round_keeps_its_order(n: int) -> None:
    posts = Posts()
    board = posts.board()
    for turn in range(2 * BOARD_ROWS // n + 2):
        hashes = keys(*range(turn * n, (turn + 1) * n))
        assert posts.post(board, hashes)
        assert posts.reader.match(1, hashes).count == n
        rows = posts.keeper.posted(0)
        np.testing.assert_array_equal(rows[:, :4], key_words(hashes))
        posts.keeper.move_on(0, n)
        assert not posts.keeper.pending
        assert posts.reader.match(1, hashes).count == 0  # the index has them by now


def test_a_full_board_takes_nothing_and_shows_nothing_of_it() -> None:
    posts = Posts()
    board = posts.board()
    assert posts.post(board, keys(*range(BOARD_ROWS - 1)))
    more = keys(1000, 1001)
    assert not posts.post(board, more)
    assert posts.reader.match(1, more).count == 0
    assert posts.post(board, more[:1])
    assert not posts.post(board, more[1:])
    posts.keeper.move_on(0, 2)
    assert posts.post(board, more[1:])


def test_a_closed_board_shows_nothing_and_takes_nothing() -> None:
    posts = Posts()
    board, hashes = posts.board(), keys(0, 1)
    assert posts.post(board, hashes[:1])
    posts.keeper.close(0)
    posts.keeper.close(0)
    assert posts.reader.match(1, hashes).count == 0
    assert not posts.post(board, hashes[1:])
    with pytest.raises(ProtocolError, match="closed"):
        posts.keeper.posted(0)
    posts.keeper.free(0)
    again = posts.board()  # the same one, as empty as any
    assert posts.reader.match(1, hashes).count == 0
    assert posts.post(again, hashes[1:])
    assert posts.reader.match(1, hashes[1:]).count == 1


def test_who_has_closed_its_board_posts_no_more() -> None:
    posts = Posts()
    board = posts.board()
    board.close()
    assert not posts.post(board, keys(0))
    assert not posts.keeper.pending


def test_there_are_so_many_boards_and_no_more() -> None:
    posts = Posts()
    assert [posts.keeper.open() for _ in range(BOARDS)] == list(range(BOARDS))
    assert posts.keeper.open() is None


@pytest.mark.parametrize("word", range(8))
def test_a_row_that_is_damaged_or_half_written_is_nobodys(word: int) -> None:
    posts = Posts()
    board, hashes = posts.board(), keys(0, 1)
    assert posts.post(board, hashes)
    posts.boards.rows[0, word] ^= np.uint64(1 << 40)
    found = posts.reader.lookup(1, hashes)
    assert found.found.tolist() == [False, True]
    assert not found.rows[0].any()


def test_a_board_that_says_nonsense_hides_nothing_else() -> None:
    posts = Posts()
    hashes = keys(0, 1)
    bad, good = posts.board(), posts.board()
    assert posts.post(bad, hashes[:1])
    assert posts.post(good, hashes[1:])
    posts.boards.words[POSTED] = 1 << 62  # rows that never were
    assert posts.reader.lookup(1, hashes).found.tolist() == [False, True]
    with pytest.raises(ProtocolError, match="at once"):
        posts.keeper.posted(0)
    assert len(posts.keeper.posted(1)) == 1


@pytest.mark.parametrize("nbytes", [0, PAGE_BYTES, BOARDS_BYTES - 1])
def test_memory_that_holds_no_boards_is_refused(nbytes: int) -> None:
    with pytest.raises(ProtocolError, match="boards"):
        Boards.open(np.zeros(nbytes, np.uint8))


def test_boards_of_another_version_are_refused() -> None:
    memory = np.zeros(BOARDS_BYTES, np.uint8)
    Boards.create(memory)
    memory[4] += 1
    with pytest.raises(ProtocolError, match="version"):
        Boards.open(memory)


# -- what a store makes of them ---------------------------------------------------------------


class Client:
    """One that posts to a `Rig`'s store."""

    def __init__(self, rig: Rig) -> None:
        self.rig, self.me = rig, rig.store.connect()
        number = rig.store.board_of(self.me)
        assert number is not None
        assert rig.boards
        self.board = Board(rig.boards, number)

    def grant(self, n: int, namespace: int | None = None) -> c.U32:
        result = self.rig.do(c.Grant(namespace=namespace or self.rig.ns, blocks=n), self.me)
        assert isinstance(result, c.Granted)
        return result.granules

    def post(self, hashes: c.U8, granules: c.U32, **options: Any) -> None:
        """Writes headers and posts; options are of the headers."""
        namespace = options.pop("row_namespace", self.rig.ns)
        keys_in_headers = options.pop("keys", hashes)
        parents = options.pop("parents", [NO_PARENT] * len(hashes))
        fields = {
            "namespace": self.rig.ns,
            "put_id": b"p" * 16,
            "length": LENGTH,
            "checksums": np.arange(LAYOUT.n_cells, dtype=np.uint64),
            "position": -1,
            **options,
        }
        for key, granule, parent in zip(keys_in_headers, granules.tolist(), parents, strict=True):
            header = pack_parts(key=key.tobytes(), parent=parent, **fields)
            at = granule * limits.GRANULE_BYTES
            self.rig.pool[at : at + len(header)] = np.frombuffer(header, np.uint8)
        assert self.board.post(
            namespace,
            key_words(hashes),
            length=LENGTH,
            granules=granules,
            generations=self.rig.generations,
        )

    def put(self, hashes: c.U8, **options: Any) -> c.U32:
        granules = self.grant(len(hashes))
        self.post(hashes, granules, **options)
        return granules

    def adopted(self, more: int = 0) -> c.U32:
        result = self.rig.do(c.Adopt(namespace=self.rig.ns, more=more), self.me)
        assert isinstance(result, c.Granted)
        return result.granules


def reader_of(rig: Rig) -> IndexReader:
    return IndexReader(IndexView.open(rig.indexes[-1]), rig.boards)


def index_of(rig: Rig) -> IndexReader:
    return IndexReader(IndexView.open(rig.indexes[-1]))


@pytest.mark.parametrize("n", [1, 2, 7])
def test_a_store_takes_over_what_was_posted_as_it_is(n: int) -> None:
    rig = Rig(boards=True)
    client, hashes = Client(rig), keys(*range(n))
    slots = client.put(hashes, position=3)
    seen = reader_of(rig).match(rig.ns, hashes)
    assert seen.count == n
    assert index_of(rig).match(rig.ns, hashes).count == 0
    assert len(client.adopted()) == 0
    after = index_of(rig).match(rig.ns, hashes)
    assert after.count == n
    # Whoever copies meanwhile must not see a slot change hands.
    assert after.generations.tolist() == seen.generations.tolist()
    assert after.granules.tolist() == slots.tolist()
    assert rig.store.stats().stored == n
    assert rig.store.stats().ahead_bytes == 0
    for slot in slots.tolist():
        assert unpack(rig.pool[slot * limits.GRANULE_BYTES :]).position == 3


def test_whoever_asks_next_finds_what_was_posted() -> None:
    """No command sees a store that does not know of a put which has returned."""
    rig = Rig(boards=True)
    client = Client(rig)
    for i, ask in enumerate(
        (
            lambda h: (
                rig.do(c.Explain(namespace=rig.ns, hashes=h)).status[0]  # type: ignore[union-attr]
                == c.ExplainStatus.STORED
            ),
            lambda h: len(rig.do(c.Lease(namespace=rig.ns, hashes=h)).granules) == 1,  # type: ignore[union-attr]
            lambda h: rig.do(c.Drop(namespace=rig.ns, hashes=h)).blocks == 1,  # type: ignore[union-attr]
            lambda h: rig.reserve(h).status[0] == c.ReserveStatus.EXISTS,
            lambda h: rig.hint(c.HintKind.SESSION_ENDS, 0, h) == 1,
        )
    ):
        hashes = keys(i)
        client.put(hashes)
        assert ask(hashes), i


def test_slots_for_the_next_put_come_with_the_answer() -> None:
    rig = Rig(boards=True)
    client = Client(rig)
    client.put(keys(0))
    more = client.adopted(more=2)
    assert len(more) == 2
    client.post(keys(1, 2), more)
    client.adopted()
    assert rig.stored(keys(0, 1, 2)) == [True] * 3


@pytest.mark.parametrize("n", [1, 3])
def test_of_two_that_posted_the_same_blocks_one_is_kept(n: int) -> None:
    rig = Rig(boards=True)
    one, other, hashes = Client(rig), Client(rig), keys(*range(n))
    slots = other.grant(n)
    first = one.put(hashes)
    other.post(hashes, slots, put_id=b"q" * 16)
    generations = rig.generations[slots].copy()
    one.adopted()
    found = index_of(rig).match(rig.ns, hashes)
    assert found.granules.tolist() == first.tolist()
    # Who copies from the others sees that they were given up.
    assert (rig.generations[slots] != generations).all()
    assert rig.store.stats().blocks == n
    assert rig.store.stats().ahead_bytes == 0


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(
    "wrong",
    [
        {"namespace": 999},
        {"length": LENGTH + 1},
        {"checksums": np.zeros(LAYOUT.n_cells + 1, np.uint64)},
        {"row_namespace": 999},
        {"keys": keys(7, 8)},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_what_its_header_does_not_say_is_not_stored(n: int, wrong: dict[str, Any]) -> None:
    rig = Rig(boards=True)
    client, hashes = Client(rig), keys(*range(n))
    if "keys" in wrong:
        wrong = {"keys": wrong["keys"][:n]}
    client.put(hashes, **wrong)
    client.put(keys(100))
    client.adopted()
    assert rig.stored(hashes) == [False] * n
    assert rig.stored(keys(100)) == [True]
    assert rig.store.stats().ahead_bytes == 0  # the slots are nobody's any more
    assert rig.store.stats().used_bytes == 12 << 10


def test_a_block_that_ranks_are_putting_may_be_posted_whole() -> None:
    """It is shown: who put it has been told so. The ranks' own comes too late."""
    rig = Rig(boards=True)
    client, hashes = Client(rig), keys(0)
    rig.reserve(hashes)
    client.put(hashes)
    client.adopted()
    assert rig.stored(hashes) == [True]
    rig.seal(hashes)
    assert rig.stored(hashes) == [True]
    found = index_of(rig).match(rig.ns, hashes)
    slot = int(found.granules[0]) * limits.GRANULE_BYTES
    assert unpack(rig.pool[slot:]).checksums.tolist() == list(range(LAYOUT.n_cells))


def test_a_slot_that_the_poster_does_not_hold_is_left_alone() -> None:
    rig = Rig(boards=True)
    client, other = Client(rig), Client(rig)
    mine, theirs = client.grant(1), other.grant(1)
    stored = client.put(keys(5))
    client.adopted()
    client.post(keys(0), theirs)
    client.post(keys(1), stored, keys=keys(5))
    client.post(keys(2), np.array([200], np.uint32))
    client.post(keys(3), mine)
    client.post(keys(4), mine, keys=keys(3))  # twice
    client.adopted()
    assert rig.stored(keys(0, 1, 2, 3, 4, 5)) == [False, False, False, True, False, True]
    other.post(keys(0), theirs)
    other.adopted()
    assert rig.stored(keys(0)) == [True]


def test_a_row_with_another_generation_is_not_stored() -> None:
    rig = Rig(boards=True)
    client = Client(rig)
    slots = client.put(keys(0))
    rig.generations[slots] += np.uint64(2)
    client.adopted()
    assert rig.stored(keys(0)) == [False]


def test_what_was_posted_into_a_dropped_namespace_is_gone() -> None:
    rig = Rig(boards=True)
    client = Client(rig)
    slots = client.grant(1)
    rig.do(c.Drop(namespace=rig.ns, hashes=keys()))
    client.post(keys(0), slots)
    assert len(client.adopted(more=1)) == 0
    assert rig.store.stats().blocks == 0
    assert rig.store.stats().ahead_bytes == 0


def test_what_a_client_posted_last_outlives_its_connection() -> None:
    rig = Rig(boards=True)
    client = Client(rig)
    client.put(keys(0, 1))
    assert rig.store.disconnect(client.me)  # it holds nothing
    assert rig.stored(keys(0, 1)) == [True, True]
    again = Client(rig)
    again.put(keys(2))
    again.adopted()
    assert rig.stored(keys(2)) == [True]


def test_a_connection_that_is_over_shows_nothing_more() -> None:
    """Its process may live, and go on writing to slots that are in quarantine for it."""
    rig = Rig(boards=True)
    client = Client(rig)
    slots = client.grant(2)
    assert not rig.store.disconnect(client.me)
    client_rows = reader_of(rig)
    with pytest.raises(AssertionError):
        client.post(keys(0), slots[:1])
    assert client_rows.match(rig.ns, keys(0)).count == 0
    number = rig.store.board_of(client.me)
    others = [Client(rig) for _ in range(BOARDS - 2)]  # one board is the rig's own
    assert number not in [rig.store.board_of(other.me) for other in others]
    late = rig.store.connect()
    assert rig.store.board_of(late) is None  # it has to do without
    rig.store.holder_died(client.me)
    assert rig.store.board_of(rig.store.connect()) == number


def test_clients_without_a_board_can_still_put() -> None:
    rig = Rig(boards=True)
    for _ in range(BOARDS):
        last = rig.store.connect()
    assert rig.store.board_of(last) is None
    slots = rig.do(c.Grant(namespace=rig.ns, blocks=1), last)
    assert isinstance(slots, c.Granted)


@pytest.mark.parametrize("seed", range(6))
def test_a_chain_that_is_partly_in_the_index_and_partly_on_boards_is_matched_whole(
    seed: int,
) -> None:
    rig, rng = Rig(pool=16 << 20, max_blocks=1024, boards=True), np.random.default_rng(seed)
    clients, n = [Client(rig), Client(rig)], 300
    hashes, posted = keys(*range(n)), rng.random(n) < [0.02, 0.1, 0.5, 0.5, 0.9, 0.3][seed]
    posted[np.flatnonzero(posted)[2 * BOARD_ROWS :]] = False
    slots = [client.grant(n // 2 + 60) for client in clients]
    rig.put(hashes[~posted])
    for i, row in enumerate(np.flatnonzero(posted).tolist()):
        which = int(rng.integers(2)) if i < 2 * 200 else i % 2
        clients[which].post(hashes[row : row + 1], slots[which][:1])
        slots[which] = slots[which][1:]
    reader = reader_of(rig)
    assert reader.match(rig.ns, hashes).count == n
    np.testing.assert_array_equal(
        reader.match(rig.ns, hashes).rows[:, :4], key_words(hashes), strict=True
    )
    for missing in rng.integers(0, n, 20).tolist():
        chain = hashes.copy()
        chain[missing] ^= 0xFF
        assert reader.match(rig.ns, chain).count == missing
        assert reader.lookup(rig.ns, chain).found.sum() == n - 1


def test_a_chain_that_was_posted_is_evicted_from_its_tail() -> None:
    rig = Rig(max_blocks=64, boards=True)
    client, chain = Client(rig), keys(*range(8))
    parents = [NO_PARENT, *(key.tobytes() for key in chain[:-1])]
    client.put(chain[:5], parents=parents[:5])
    client.put(chain[5:6], parents=parents[5:6])
    client.adopted()
    client.put(chain[6:], parents=parents[6:])
    client.adopted()
    for i in range(100, 100 + 60):
        rig.put(keys(i))
    kept = rig.stored(chain)
    assert kept == sorted(kept, reverse=True)
    assert any(kept)


def test_a_reader_finds_each_posted_block_at_every_moment() -> None:
    """One thread takes over what another posts, while a third looks: it never misses a block that
    was posted before it looked. Threads change places within the searches, which hold no lock of
    the interpreter's for long; the order of index and boards is what is at stake."""
    rig = Rig(pool=8 << 20, max_blocks=512, boards=True)
    client, n = Client(rig), 200
    slots, hashes = client.grant(n), keys(*range(n))
    reader, posted, over = reader_of(rig), [0], threading.Event()
    lost: list[int] = []

    def look() -> None:
        while not over.is_set():
            upto = posted[0]
            if upto and reader.match(rig.ns, hashes[:upto]).count < upto:
                lost.append(upto)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for i in range(n):
            client.post(hashes[i : i + 1], slots[i : i + 1])
            posted[0] = i + 1
            if i % 3 == 0:
                rig.store.adopt()
    finally:
        over.set()
        looking.join()
    assert not lost


def test_a_search_between_two_steps_of_a_takeover_misses_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The block is in the index only after the reader has looked there, and off its board before
    the reader looks at that."""
    rig = Rig(boards=True)
    client, hashes = Client(rig), keys(0, 1)
    client.put(hashes)
    reader = reader_of(rig)
    search, calls = looking.search, [0]

    def late(*arguments: Any) -> int:
        found = search(*arguments)
        calls[0] += 1
        if calls[0] == 1:
            rig.store.adopt()
        return found

    # The same look-up as it is written, not as it was compiled: a processor orders Python's loads.
    monkeypatch.setattr(looking, "search", late)
    monkeypatch.setattr(looking, "in_order", lambda: None)
    monkeypatch.setattr(looking, "_look_beside", looking._beside)
    monkeypatch.setattr("kvstore.index.reader.look", looking._look)
    assert reader.match(rig.ns, hashes).count == 2
    assert calls[0] > 1
