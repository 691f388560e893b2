"""SGLang's pages in the store: which are there, and copies between them and host memory.

Knows keys, addresses and sizes, but nothing of SGLang's classes: `storage.py` translates. A key is
what SGLang makes of a page: 32 bytes of SHA-256 over its tokens and all before them, in hex.

A page lies in host memory in pieces: keys and values apart, or one piece a layer and kind. A page
of one or two pieces of one size is as many blocks of the store, copied where it lies. Measured,
that stores more than twice as fast as gathering it first, and loads a quarter faster. Any other
page is one block, gathered on its way: a request waits for loads, which take 1.6 to 4 times as long
with a block for each of many pieces, and the index would have some dozens of rows a page.
`tests/integrations/sglang_speed.py` measures it.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvstore import Hit, Miss, MissReason, NamespaceHandle, Session, limits
from kvstore.errors import KVStoreError, Unavailable
from kvstore.session.copies import copy_in_parallel
from kvstore_integrations.spaces import Spaces

U8 = npt.NDArray[np.uint8]
Addresses = npt.NDArray[np.uint64]
_KEY_DIGITS = 2 * limits.KEY_BYTES
_MOST_BLOCKS = 2  # that make up one page
_GATHERED_BYTES = 8 << 20  # at a time
_MOST_COPIES_KEPT = 1024  # for whoever asks what was copied; the oldest are forgotten
_NO_KEYS = np.empty((0, limits.KEY_BYTES), np.uint8)
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PageForm:
    """How a page lies in host memory: how many tokens it has, and its pieces' sizes in bytes."""

    tokens: int
    pieces: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of a page."""
        return sum(self.pieces)

    @property
    def blocks(self) -> int:
        """How many blocks of the store make up a page."""
        n = len(self.pieces)
        return n if n <= _MOST_BLOCKS and len(set(self.pieces)) == 1 else 1

    @property
    def block_bytes(self) -> int:
        """Bytes of one of them."""
        return self.nbytes // self.blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """One call's copies: pages and bytes that arrived, to the store or from it; seconds."""

    stored: bool
    pages: int
    nbytes: int
    seconds: float


class PageStore:
    """The pages of one engine process, of one tenant.

    SGLang calls from a thread that asks, one that loads and one that stores: all calls are safe
    from any thread, and none of them raises but `open` and `clear`. What the store cannot do
    counts as missing. ttl_s: of the pages stored.
    """

    def __init__(
        self,
        session: Session,
        spaces: Spaces,
        form: PageForm,
        *,
        tenant: str,
        ttl_s: float | None = None,
    ) -> None:
        self._session, self._spaces, self._form = session, spaces, form
        self._tenant, self._ttl_s = tenant, ttl_s
        self._lock = threading.Lock()  # of the spaces, which know one thread only
        self._masks = _masks(form.blocks)
        self._loading, self._storing = _way(form), _way(form)
        self._copies: deque[Copied] = deque(maxlen=_MOST_COPIES_KEPT)

    def open(self) -> None:
        """Opens the tenant's namespace, waiting for it. Errors: see `Spaces.open_now`."""
        with self._lock:
            self._spaces.open_now(self._tenant)

    def count_leading(self, keys: Sequence[str]) -> int:
        """How many leading pages are stored, whole; one pass over the shared index, no call."""
        count, most = 0, limits.MAX_KEYS_PER_CALL
        with _missing("looked up"):
            space, chain = self._space(), self._chain(keys)
            if space is None:
                return 0
            for first in range(0, len(chain), most):
                count += self._session.match(space, chain[first : first + most]).count
                if count < min(first + most, len(chain)):
                    break
        return count // self._form.blocks

    def load(self, keys: Sequence[str], addresses: Sequence[int]) -> list[bool]:
        """Copies pages into host memory, and says which are there; behind a miss, none is.

        addresses: of each page's pieces, page by page; writable. What lies at the addresses of a
        page that is not there means nothing.
        """
        begin, loaded = time.monotonic(), 0
        with _missing("loaded"), self._loading as way:
            space, chain = self._space(), self._chain(keys)
            if space is None:
                return [False] * len(keys)
            for run in self._runs(chain, addresses, way):
                hits = self._load(space, run, way)
                loaded += hits
                if hits < run.pages:
                    break
        self._note(begin, loaded, stored=False)
        return [page < loaded for page in range(len(keys))]

    def store(
        self, keys: Sequence[str], addresses: Sequence[int], before: Sequence[str] | None
    ) -> list[bool]:
        """Puts pages that follow each other, and says which are stored now.

        addresses: as in `load`; nobody changes the pages meanwhile. before: the keys of all pages
        before them, None where those are unknown.
        """
        begin, stored = time.monotonic(), 0
        with _missing("stored"), self._storing as way:
            space, chain = self._space(), self._chain(keys)
            if space is None:
                return [False] * len(keys)
            parent = self._chain(before[-1:])[-1:] if before else _NO_KEYS
            position = -1 if before is None else len(before) * self._form.blocks
            for run in self._runs(chain, addresses, way):
                put = self._session.put(
                    space,
                    run.hashes,
                    way.sources(run.addresses),
                    parent=(chain[run.row - 1] if run.row else parent).tobytes(),
                    position=position + run.row if before is not None else -1,
                    ttl_s=self._ttl_s,
                )
                if put.not_stored:
                    break
                stored += run.pages
        self._note(begin, stored, stored=True)
        return [page < stored for page in range(len(keys))]

    def clear(self) -> int:
        """Forgets the tenant's pages of this kind, whoever stored them; how many blocks it were.

        Waits for the store; errors are those of the client.
        """
        space = self._space()
        if space is None:
            raise Unavailable("the store has not answered yet, so nothing is cleared")
        return self._session.drop_namespace(space)

    def copies(self) -> list[Copied]:
        """What was copied since the last call. Never waits."""
        return [self._copies.popleft() for _ in range(len(self._copies))]

    def close(self) -> None:
        """Ends the thread that opens the namespace."""
        self._spaces.close()

    # -- inside ------------------------------------------------------------------------

    def _space(self) -> NamespaceHandle | None:
        """The tenant's namespace, if it is open; else it is being opened. Never waits."""
        with self._lock:
            return self._spaces.get(self._tenant)

    def _chain(self, keys: Sequence[str]) -> U8:
        """(n * blocks, 32): the keys of the pages' blocks. ValueError for what is no key."""
        if any(len(key) != _KEY_DIGITS for key in keys):
            raise ValueError(f"expected keys of {_KEY_DIGITS} hexadecimal digits")
        digests = np.frombuffer(bytes.fromhex("".join(keys)), np.uint64)
        words = digests.reshape(len(keys), 1, -1) ^ self._masks
        return words.view(np.uint8).reshape(-1, limits.KEY_BYTES)

    def _runs(self, chain: U8, addresses: Sequence[int], way: _Way) -> Iterator[_Run]:
        """As many pages at once as the way takes. ValueError where addresses are missing."""
        blocks, pieces = self._form.blocks, len(self._form.pieces)
        n = len(chain) // blocks
        if len(addresses) != n * pieces:
            raise ValueError(f"{len(addresses)} addresses for {n} pages of {pieces} pieces")
        for first in range(0, n, way.most):
            end = min(first + way.most, n)
            yield _Run(
                pages=end - first,
                row=first * blocks,
                hashes=chain[first * blocks : end * blocks],
                addresses=addresses[first * pieces : end * pieces],
            )

    def _load(self, space: NamespaceHandle, run: _Run, way: _Way) -> int:
        """How many leading pages of the run have arrived."""
        answers = self._session.get_into(space, run.hashes, way.targets(run.addresses))
        hits = sum(isinstance(answer, Hit) for answer in answers) // self._form.blocks
        spoiled = [
            key
            for key, answer in zip(run.hashes, answers, strict=False)
            if isinstance(answer, Miss) and answer.reason is MissReason.CORRUPTED
        ]
        if spoiled:
            log.warning("a stored page's bytes fail their checksum; it counts as missing")
            # Else it would be promised, and taken for stored, for ever.
            self._session.drop(space, np.array(spoiled))
        way.arrived(run.addresses, hits)
        return hits

    def _note(self, begin: float, pages: int, *, stored: bool) -> None:
        if pages:
            seconds = time.monotonic() - begin
            nbytes = pages * self._form.nbytes
            self._copies.append(Copied(stored=stored, pages=pages, nbytes=nbytes, seconds=seconds))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """Pages that follow each other, moved at once.

    row: of their first block in the call's chain. hashes: (pages * blocks, 32), of their blocks.
    addresses: of their pieces.
    """

    pages: int
    row: int
    hashes: U8
    addresses: Sequence[int]


class _Way(Protocol):
    """How pages get to the store and from it. most: at a time. Held by one thread at a time."""

    most: int

    def __enter__(self) -> _Way: ...

    def __exit__(self, *error: object) -> None: ...

    def sources(self, addresses: Sequence[int]) -> list[U8]:
        """The bytes of the pages' blocks."""

    def targets(self, addresses: Sequence[int]) -> list[U8]:
        """Where the bytes of the pages' blocks are to go; `arrived` follows."""

    def arrived(self, addresses: Sequence[int], pages: int) -> None:
        """The first `pages` pages' bytes are there."""


def _way(form: PageForm) -> _Way:
    return _InPlace(form) if form.blocks == len(form.pieces) else _Gathered(form)


class _InPlace:
    """Blocks are where SGLang has them."""

    def __init__(self, form: PageForm) -> None:
        self._form = form
        self.most = limits.MAX_KEYS_PER_CALL // form.blocks

    def __enter__(self) -> _InPlace:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing is shared."""

    def sources(self, addresses: Sequence[int]) -> list[U8]:
        return [_bytes_at(address, self._form.block_bytes) for address in addresses]

    targets = sources

    def arrived(self, addresses: Sequence[int], pages: int) -> None:
        """They are in place."""


class _Gathered:
    """A block is a page's pieces one after another, in memory of ours."""

    def __init__(self, form: PageForm) -> None:
        self._form = form
        self._lock = threading.Lock()
        self.most = max(1, _GATHERED_BYTES // form.nbytes)
        self._rows = np.empty((self.most, form.nbytes), np.uint8)
        self._offsets = np.cumsum((0, *form.pieces[:-1]))

    def __enter__(self) -> _Gathered:
        self._lock.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def sources(self, addresses: Sequence[int]) -> list[U8]:
        for pieces, ours, nbytes in self._pairs(addresses):
            _copy(ours, pieces, nbytes)
        return self.targets(addresses)

    def targets(self, addresses: Sequence[int]) -> list[U8]:
        return list(self._rows[: len(addresses) // len(self._form.pieces)])

    def arrived(self, addresses: Sequence[int], pages: int) -> None:
        for pieces, ours, nbytes in self._pairs(addresses[: pages * len(self._form.pieces)]):
            _copy(pieces, ours, nbytes)

    def _pairs(self, addresses: Sequence[int]) -> Iterator[tuple[Addresses, Addresses, int]]:
        """For each size of pieces their addresses, those of their place in our rows, and it."""
        if not len(addresses):
            return
        table = np.array(addresses, np.uint64).reshape(-1, len(self._form.pieces))
        starts = self._rows.ctypes.data + np.arange(len(table)) * self._form.nbytes
        sizes = np.array(self._form.pieces)
        for nbytes in np.unique(sizes).tolist():
            of_size = np.flatnonzero(sizes == nbytes)
            ours = starts[:, np.newaxis] + self._offsets[of_size]
            yield table[:, of_size].ravel(), ours.ravel().astype(np.uint64), nbytes


def _copy(targets: Addresses, sources: Addresses, nbytes: int) -> None:
    copy_in_parallel(targets, sources, [(0, 0, nbytes)], math.inf)


def _bytes_at(address: int, nbytes: int) -> U8:
    """The bytes at an address, which must stay mapped."""
    return np.frombuffer(memoryview((ctypes.c_uint8 * nbytes).from_address(address)), np.uint8)


def _masks(blocks: int) -> npt.NDArray[np.uint64]:
    """(blocks, 4): what tells the keys of a page's blocks apart; the first has the page's own.

    They differ in all bits: the store's index finds its places by a few of them.
    """
    digests = (hashlib.sha256(b"kvstore page block %d" % block).digest() for block in range(blocks))
    masks = np.frombuffer(b"".join(digests), np.uint64).reshape(blocks, -1).copy()
    masks[0] = 0
    return masks


@contextlib.contextmanager
def _missing(done: str) -> Iterator[None]:
    """Ends quietly where the store cannot do it, with a line in the log."""
    try:
        yield
    except (KVStoreError, OSError, ValueError) as error:
        log.warning("pages are not %s: %s", done, error)
