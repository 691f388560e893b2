"""What a store with disks may answer: which bytes a key may have, what must survive a power cut,
and what must not come back. Each put of a key writes other bytes, so that old ones are known."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvstore.block import cell_checksums
from kvstore.layout import Attention, Layout
from kvstore.nvme.volume import Use

U8 = npt.NDArray[np.uint8]
Name = tuple[int, int]  # space, number of the key

SMALL = Layout(
    model="small",
    attention=Attention.GQA,
    layers=2,
    kv_heads=2,
    head_dim=8,
    dtype="float32",
    block_tokens=16,
)
BIG = Layout.opaque(model="big", block_bytes=9000, block_tokens=16)
SPACES = (("a", SMALL), ("b", BIG))
SLOT_GRANULES = (2, 3)


@functools.cache
def chain(space: int, first: int, n: int) -> U8:
    """The hashes (n, 32) of neighbours in a space's one chain."""
    rows = [np.random.default_rng([space, i]).bytes(32) for i in range(first, first + n)]
    return np.frombuffer(b"".join(rows), np.uint8).reshape(n, 32)


@functools.lru_cache(4096)
def payload(space: int, number: int, version: int) -> U8:
    """The bytes of one put of one key."""
    rng = np.random.default_rng([space, number, version])
    return np.frombuffer(rng.bytes(SPACES[space][1].block_bytes), np.uint8)


@functools.lru_cache(4096)
def sums(space: int, number: int, version: int) -> npt.NDArray[np.uint64]:
    """Their checksums, one a cell."""
    return cell_checksums(payload(space, number, version), SPACES[space][1].cell_bounds)


@dataclass(slots=True)
class Known:
    """Of one key: the versions that may be served now, and after a restart; when they expire."""

    now: set[int] = field(default_factory=set)
    ever: set[int] = field(default_factory=set)
    later: set[int] = field(default_factory=set)
    expires: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Promise:
    """A version that was persisted, and where: no use as long as a restart has yet to find it."""

    version: int
    use: Use | None = None
    block: int = -1
    birth: int = -1


class Judge:
    """The expected state. must: keys that were acknowledged as persisted, with their version and
    where their block lies, until something takes the promise back."""

    def __init__(self) -> None:
        self.known: dict[Name, Known] = {}
        self.must: dict[Name, Promise] = {}
        self.versions = 0
        self.served = self.acknowledged = self.forgotten = 0

    def fork(self) -> Judge:
        """Another that goes on from here."""
        other = copy.copy(self)
        other.known = {
            name: Known(set(k.now), set(k.ever), set(k.later), dict(k.expires))
            for name, k in self.known.items()
        }
        other.must = dict(self.must)
        return other

    def of(self, name: Name) -> Known:
        return self.known.setdefault(name, Known())

    def stored(self, name: Name, version: int, expires_ms: int, or_one_of: set[int]) -> None:
        known = self.of(name)
        if name in self.must and known.expires.get(self.must[name].version, 0) != expires_ms:
            del self.must[name]  # one that stays for another time takes its place
        known.now = {version} | or_one_of
        known.later.add(version)
        known.ever.add(version)
        if expires_ms:
            known.expires[version] = expires_ms

    def hidden(self, names: Iterable[Name]) -> dict[Name, set[int]]:
        """A drop began: none of these may be seen in this life. Returns what it is about."""
        gone = {}
        for name in names:
            known = self.of(name)
            gone[name] = set(known.later)
            known.now = set()
            self.must.pop(name, None)
        return gone

    def dropped(self, gone: dict[Name, set[int]]) -> None:
        """It was acknowledged: nor in any other."""
        for name, versions in gone.items():
            self.of(name).later -= versions
            self.forgotten += len(versions)

    def expire(self, now_ms: int) -> None:
        for name, known in self.known.items():
            over = {v for v, at_ms in known.expires.items() if at_ms <= now_ms}
            if over:
                known.now -= over
                known.later -= over
                known.expires = {v: t for v, t in known.expires.items() if v not in over}
                if name in self.must and self.must[name].version in over:
                    del self.must[name]

    def restart(self) -> None:
        for known in self.known.values():
            known.now = set(known.later)
        self.must = {name: Promise(promise.version) for name, promise in self.must.items()}

    def forgive(self) -> None:
        """What was dropped may come back, and what was persisted may be gone."""
        for known in self.known.values():
            known.now, known.later = set(known.ever), set(known.ever)
        self.must.clear()

    def may(self, name: Name) -> set[int]:
        return self.known[name].now if name in self.known else set()
