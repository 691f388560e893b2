"""What a cluster may answer, kept by nobody but the test: the bytes of each put, and its promises.

Each put of a key writes other bytes, which begin with the put's number, so that what a get returns
tells which put it was of, and whether that one may still be seen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvstore.layout import Attention, Layout
from kvstore.session.parts import Part

Bytes1D = npt.NDArray[np.uint8]
Name = tuple[int, int, int]  # space, chain, position in it

# Segments of four blocks, so that a short chain has several; two cells, so that parts can be read.
SMALL = Layout(
    model="small",
    attention=Attention.GQA,
    layers=2,
    kv_heads=2,
    head_dim=1,
    dtype="float16",
    block_tokens=128,
)
ODD = Layout.opaque(model="odd", block_bytes=3333, block_tokens=128)
SPACES = (("small", SMALL), ("odd", ODD))
_NUMBER_BYTES = 8
LATE_MS = 30_000.0  # what copies that come later may add to a block's time


@functools.cache
def key(name: Name) -> bytes:
    """The hash of a block."""
    return np.random.default_rng(name).bytes(32)


def keys(space: int, chain: int, first: int, n: int) -> npt.NDArray[np.uint8]:
    """The hashes (n, 32) of neighbours in a chain."""
    rows = [key((space, chain, first + i)) for i in range(n)]
    return np.frombuffer(b"".join(rows), np.uint8).reshape(n, 32).copy()


@functools.lru_cache(8192)
def payload(space: int, number: int) -> Bytes1D:
    """The bytes that the put numbered so writes."""
    nbytes = SPACES[space][1].block_bytes
    data = np.frombuffer(np.random.default_rng([space, number]).bytes(nbytes), np.uint8).copy()
    data[:_NUMBER_BYTES] = np.frombuffer(number.to_bytes(_NUMBER_BYTES, "little"), np.uint8)
    data.flags.writeable = False
    return data


@dataclass(slots=True)
class Written:
    """One put of one key. ended: when all of its calls were over, None as long as they are not.
    ttl_ms: 0 for ever. deaths: that there had been by then. lacking: cells that nobody has begun
    to put. calls: that are not over. sure: whether it was carried out once, and nothing of it may
    come later."""

    name: Name
    began: float
    deaths: int
    ttl_ms: float = 0.0
    ended: float | None = None
    lacking: set[int] = field(default_factory=set)
    calls: int = 1
    sure: bool = True


@dataclass(slots=True)
class Promise:
    """A key that must be readable: so many nodes had it when it was promised, and since then so
    many have died with what they held."""

    copies: int
    since: float
    deaths: int = 0

    @property
    def left(self) -> int:
        """How many nodes have it at least."""
        return self.copies - self.deaths


@dataclass(slots=True)
class Forgotten:
    """A drop of a whole namespace. ended: when it was acknowledged, under the view of `epoch`: who
    reads by an earlier one may read what was dropped."""

    began: float
    epoch: int = 0
    ended: float | None = None


@dataclass(slots=True)
class Dropped:
    """A drop of single keys, as `Forgotten`. ended: None also where some node may not have heard
    of it."""

    began: float
    ended: float | None = None


@dataclass(slots=True)
class Truth:
    """Everything that was ever asked for, and what came of it."""

    present_epoch: Callable[[], int] = lambda: 0  # that the coordinator has agreed on
    hosts: Callable[[], set[str]] = set  # all there are, dead or alive
    written: list[Written] = field(default_factory=list)
    promises: dict[Name, Promise] = field(default_factory=dict)
    drops: dict[int, list[Forgotten]] = field(default_factory=dict)
    key_drops: dict[Name, list[Dropped]] = field(default_factory=dict)
    deaths: int = 0
    hits: int = 0
    misses: int = 0
    acknowledged: int = 0

    # -- puts ----------------------------------------------------------------------------

    def begin_put(
        self, name: Name, now: float, ttl_ms: float = 0.0, *, cells: Collection[int] = ()
    ) -> int:
        """A put's number, which its bytes are made of. All puts of a key have a time, or none.
        cells: of one that is put in parts, each by a call of its own, which `begin_part` begins."""
        calls = 0 if cells else 1
        written = Written(name, now, self.deaths, ttl_ms, lacking=set(cells), calls=calls)
        self.written.append(written)
        return len(self.written) - 1

    def begin_part(self, number: int, cell: int) -> None:
        """Another call of a put in parts has begun."""
        written = self.written[number]
        written.lacking.discard(cell)
        written.calls += 1
        written.ended = None

    def end_put(
        self, number: int, now: float, copies: int, *, epoch: int, sure: bool = False
    ) -> None:
        """A call of it has ended. copies: on how many nodes the block is, as it was told; 0 where
        nothing was. Some of them may have died while that was on its way; and those who go by an
        earlier view than they should have not heard of drops that take it with them."""
        written = self.written[number]
        written.calls -= 1
        written.sure &= sure
        if not written.calls:
            written.ended = now
        space = written.name[0]
        forgotten = written.ttl_ms or self._dropped_since(space, written.began)
        forgotten = forgotten or (epoch < self.present_epoch() and self.drops.get(space))
        forgotten = forgotten or any(
            drop.ended is None or drop.ended >= written.began
            for drop in self.key_drops.get(written.name, ())
        )
        if copies and not forgotten:
            self.acknowledged += 1
            made = Promise(copies, now, self.deaths - written.deaths)
            known = self.promises.get(written.name)
            if made.left > max(known.left if known else 0, 0):
                self.promises[written.name] = made

    def _dropped_since(self, space: int, since: float) -> bool:
        drops = self.drops.get(space, ())
        return any(drop.ended is None or drop.ended >= since for drop in drops)

    def settled(self) -> None:
        """Nobody calls, and all nodes know of each drop that was begun: one that some of them had
        not heard of can forget nothing later."""
        for space, drops in self.drops.items():
            self.drops[space] = [drop for drop in drops if drop.ended is not None]
        for name, dropped in self.key_drops.items():
            self.key_drops[name] = [drop for drop in dropped if drop.ended is not None]

    # -- drops ---------------------------------------------------------------------------

    def begin_drop(self, space: int, now: float) -> Forgotten:
        """From now on nothing of a namespace has to be there."""
        drop = Forgotten(now)
        self.drops.setdefault(space, []).append(drop)
        self.release(lambda name: name[0] == space)
        return drop

    def begin_key_drop(self, names: Collection[Name], now: float) -> Dropped:
        """From now on these keys do not have to be there."""
        drop = Dropped(now)
        for name in names:
            self.key_drops.setdefault(name, []).append(drop)
        self.release(lambda name: name in names)
        return drop

    def release(self, which: object) -> None:
        """Promises that are none any more."""
        assert callable(which)
        for name in [name for name in self.promises if which(name)]:
            del self.promises[name]

    # -- deaths --------------------------------------------------------------------------

    def death(self) -> None:
        """A node died with what it held."""
        self.deaths += 1
        for name, promise in list(self.promises.items()):
            promise.deaths += 1
            if promise.left <= 0:
                del self.promises[name]

    # -- gets ----------------------------------------------------------------------------

    def check_get(self, name: Name, got: Bytes1D, part: Part, *, began: float, epoch: int) -> int:
        """That these are the bytes of a part of one put of the key, which may be seen in a get
        that began then, under the view of that epoch; returns its number."""
        number = self.number_of(name, got, part)
        written = self.written[number]
        assert not written.lacking, f"{name} of put {number} is served, and was put in part"
        for dropped in self.key_drops.get(name, ()):
            if dropped.ended is not None and dropped.ended < began and written.sure:
                ended_before = written.ended is not None and written.ended <= dropped.began
                assert not ended_before, f"{name} of put {number} was dropped alone, and is served"
        for drop in self.drops.get(name[0], ()):
            if drop.ended is not None and drop.ended < began and drop.epoch <= epoch:
                ended_before = written.ended is not None and written.ended < drop.began
                assert not ended_before, f"{name} of put {number} was dropped, and is served"
        if written.ttl_ms and written.ended is not None:
            over = written.ended + written.ttl_ms + LATE_MS < began
            assert not over, f"{name} of put {number} has expired, and is served"
        self.hits += 1
        return number

    def number_of(self, name: Name, got: Bytes1D, part: Part) -> int:
        """Which put of a key these bytes are of; AssertionError where they are of none."""
        number = int.from_bytes(got[:_NUMBER_BYTES].tobytes(), "little")
        assert number < len(self.written), f"{name} is served with bytes that nobody put"
        written = self.written[number]
        assert written.name == name, f"{name} is served with the bytes of {written.name}"
        whole = payload(name[0], number)
        wanted = np.concatenate([whole[at : at + nbytes] for at, _own, nbytes in part.runs])
        assert np.array_equal(got, wanted), f"{name} is served in part, or spoilt"
        return number
