"""What a caller asks, checked whole before anything is done, whether or not the store is there."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from kvstore import commands as c
from kvstore import limits
from kvstore.errors import InvalidArgument
from kvstore.keys import as_hashes
from kvstore.layout import Layout
from kvstore.session.addresses import addresses_of
from kvstore.session.base import Bytes1D, Hashes, Hint, NamespaceHandle
from kvstore.session.parts import Part, checked_cells, part_of

PUT_ID_BYTES = 16


class FindAddresses(Protocol):
    """See `addresses_of`."""

    def __call__(
        self, name: str, buffers: Sequence[Bytes1D], n: int, nbytes: int, *, writable: bool
    ) -> c.U64: ...


@dataclass(frozen=True, slots=True, eq=False)
class GetRequest:
    """Blocks to copy out. targets: the destinations' addresses, valid as long as they are held."""

    namespace: NamespaceHandle
    chain: c.U8
    part: Part
    destinations: Sequence[Bytes1D]
    targets: c.U64

    def behind(self, n: int) -> GetRequest:
        """What is left of it when the first `n` blocks are there."""
        if not n:
            return self
        return replace(
            self,
            chain=self.chain[n:],
            destinations=self.destinations[n:],
            targets=self.targets[n:],
        )


@dataclass(frozen=True, slots=True, eq=False)
class PutRequest:
    """Blocks to store. sources: the buffers; addresses: where they lie while these are held.
    of: how many blocks the call has, of which these may be a piece."""

    namespace: NamespaceHandle
    chain: c.U8
    part: Part
    sources: Sequence[Bytes1D]
    addresses: c.U64
    put_id: bytes
    parent: bytes
    position: int
    ttl_ms: int
    hint: Hint | None
    of: int

    def cut(self, first: int, end: int) -> PutRequest:
        """Blocks [first, end) of it, as a put of their own."""
        return replace(
            self,
            chain=self.chain[first:end],
            sources=self.sources[first:end],
            addresses=self.addresses[first:end],
            parent=self.chain[first - 1].tobytes() if first else self.parent,
            position=self.position + first if self.position >= 0 else -1,
        )

    def reserve(self, number: int) -> c.Reserve:
        """The command that asks for slots in the namespace `number`."""
        return c.Reserve(
            namespace=number,
            put_id=self.put_id,
            hashes=self.chain,
            cells=self.part.cells,
            parent=self.parent,
            position=self.position,
            ttl_ms=self.ttl_ms,
        )


def checked_timeout(timeout_s: float) -> float:
    """`InvalidArgument` unless 0 < timeout_s <= limits.MAX_DEADLINE_MS / 1000."""
    if not 0 < timeout_s <= limits.MAX_DEADLINE_MS / 1e3:
        raise InvalidArgument(
            "timeout_s", f"must be over 0 and at most {limits.MAX_DEADLINE_MS // 1000}"
        )
    return timeout_s


def checked_chain(hashes: Hashes) -> c.U8:
    """(n, 32) uint8, at least one row and at most `limits.MAX_KEYS_PER_CALL`."""
    chain = as_hashes(hashes)
    if not len(chain):
        raise InvalidArgument("hashes", "at least one key, please")
    return chain


def duration_ms(field: str, seconds: float | None, most_ms: int) -> int:
    """Whole milliseconds, rounded up; 0 for None. `InvalidArgument` for what is no duration."""
    if seconds is None:
        return 0
    if not 0 <= seconds <= most_ms / 1e3:
        raise InvalidArgument(field, f"{seconds} is not in 0 to {most_ms // 1000} seconds")
    return int(np.ceil(seconds * 1e3))


def hint_ms(hint: Hint) -> int:
    """A hint's duration in ms; `InvalidArgument` for one that no store takes."""
    if hint.kind not in list(c.HintKind):
        raise InvalidArgument("hint.kind", f"{hint.kind!r} is no kind of hint")
    return duration_ms("hint.for_s", hint.for_s, limits.MAX_HINT_MS)


def checked_get(
    namespace: NamespaceHandle,
    hashes: Hashes,
    destinations: Sequence[Bytes1D],
    cells: Iterable[int],
) -> GetRequest:
    """See `Session.get_into`."""
    chain = checked_chain(hashes)
    part = checked_part(namespace.layout, cells)
    targets = addresses_of("destinations", destinations, len(chain), part.nbytes, writable=True)
    return GetRequest(namespace, chain, part, destinations, targets)


def checked_put(
    namespace: NamespaceHandle,
    hashes: Hashes,
    sources: Sequence[Bytes1D],
    *,
    put_id: bytes | None,
    cells: Iterable[int],
    parent: bytes,
    position: int,
    ttl_s: float | None,
    hint: Hint | None,
    find: FindAddresses = addresses_of,
) -> PutRequest:
    """See `Session.put`. find: how to look where the sources lie."""
    chain = checked_chain(hashes)
    part = checked_part(namespace.layout, cells)
    if put_id is not None and len(put_id) != PUT_ID_BYTES:
        raise InvalidArgument("put_id", f"expected {PUT_ID_BYTES} bytes, got {len(put_id)}")
    if len(parent) not in (0, limits.KEY_BYTES):
        raise InvalidArgument("parent", f"expected {limits.KEY_BYTES} bytes or none")
    if not -1 <= position <= limits.MAX_POSITION - len(chain):
        raise InvalidArgument("position", f"-1 to {limits.MAX_POSITION}, please")
    if hint is not None:
        hint_ms(hint)
    return PutRequest(
        namespace=namespace,
        chain=chain,
        part=part,
        sources=sources,
        addresses=find("sources", sources, len(chain), part.nbytes, writable=False),
        put_id=put_id or os.urandom(PUT_ID_BYTES),
        parent=parent,
        position=position,
        ttl_ms=duration_ms("ttl_s", ttl_s, limits.MAX_TTL_MS),
        hint=hint,
        of=len(chain),
    )


def checked_part(layout: Layout, cells: Iterable[int]) -> Part:
    """The part that these cells make; `LayoutMismatch` names `cells`."""
    if isinstance(cells, tuple) and not cells:
        return part_of(layout)
    return part_of(layout, checked_cells(layout, cells))
