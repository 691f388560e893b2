"""The last step of every put: headers, then the index, then all that keeps a block where it is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore import limits
from kvstore.block import NO_PARENT, pack_many, pack_parts, write_headers
from kvstore.commands import U8, U32, U64
from kvstore.index.format import DRAM_TIER
from kvstore.store.blocks import IdArray
from kvstore.store.deadlines import Due
from kvstore.store.namespaces import Namespace
from kvstore.store.shelf import Shelf

NO_ROW = -1
_ONE = np.uint64(1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Whole:
    """n blocks of one namespace whose bytes are all in their slots, and which nobody sees yet.

    keys and parents: (n, 32), a parent of zeros where it is unknown. put_ids: n times 16 bytes.
    checksums: (n, cells). positions: int32 (n,), -1 where unknown. ttl_ms: int64 (n,), 0 for ever.
    before: int64 (n,), the row of the block's parent where it comes earlier among these, `NO_ROW`
    else. written: their headers are in their slots too.
    """

    keys: U8
    put_ids: bytes
    ids: IdArray
    granules: U32
    checksums: U64
    parents: U8
    positions: npt.NDArray[np.int32]
    ttl_ms: npt.NDArray[np.int64]
    before: npt.NDArray[np.int64]
    written: bool = False


def publish(shelf: Shelf, namespace: Namespace, whole: Whole) -> npt.NDArray[np.bool_]:
    """Writes the headers, then makes the blocks visible: never the other way round.

    Returns which of them found a place in the index: bool (n,). The others, which were there
    already or met a full index, are as before but for their headers.
    """
    if not whole.written:
        _write_headers(shelf, namespace, whole)
    shelf.lose(shelf.catalog.make_room(len(whole.ids)))
    parents = _stored_parents(shelf, namespace, whole)
    generations = shelf.memory.generations
    generations[whole.granules] = stable(generations[whole.granules])
    shown = shelf.catalog.insert(
        whole.keys,
        namespace=namespace.id,
        length=namespace.layout.block_bytes,
        tier=DRAM_TIER,
        ids=whole.ids,
        granules=whole.granules,
        generations=generations[whole.granules],
    )
    ids, keys = whole.ids, whole.keys
    if not shown.all():
        generations[whole.granules[~shown]] += np.uint64(1)  # odd: nobody's to read
        ids, keys = ids[shown], keys[shown]
    shelf.blocks.appear(ids, namespace.id)
    put_ids = np.frombuffer(whole.put_ids, np.uint8).reshape(len(whole.ids), -1)
    shelf.blocks.put_id[whole.ids] = put_ids
    namespace.blocks += len(ids)
    _link(shelf, namespace, whole, shown, parents)
    shelf.policy.admit(ids, keys[:, :8].copy().view(np.uint64).ravel())
    shelf.counters.stored += len(ids)
    shelf.places.new(ids)
    if whole.ttl_ms.any():
        ttl_ms = whole.ttl_ms[shown]
        for each in np.unique(ttl_ms[ttl_ms > 0]).tolist():
            shelf.deadlines.set(Due.EXPIRY, ids[ttl_ms == each], shelf.now_ms + each)
    return shown


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WholeBlock:
    """One block whose bytes are all in its slot. checksums: (cells,). parent: zeros if unknown.
    written: its header is there too."""

    key: bytes
    put_id: bytes
    block: int
    granule: int
    checksums: U64
    parent: bytes
    position: int
    ttl_ms: int
    written: bool = False


def publish_one(shelf: Shelf, namespace: Namespace, whole: WholeBlock) -> bool:
    """`publish` of one block: the same steps, without arrays, which cost more than the work."""
    generations = shelf.memory.generations
    if not whole.written:
        _write_header(shelf, namespace, whole)
    shelf.lose(shelf.catalog.make_room(1))
    parent = -1
    if whole.parent != NO_PARENT:
        asked = np.frombuffer(whole.parent, np.uint8).reshape(1, -1)
        parent = int(shelf.catalog.find(namespace.id, asked)[0])
    generation = int(generations[whole.granule]) + 1 & ~1  # see `stable`
    generations[whole.granule] = generation
    shown = shelf.catalog.insert_one(
        whole.key,
        namespace=namespace.id,
        length=namespace.layout.block_bytes,
        tier=DRAM_TIER,
        block=whole.block,
        granule=whole.granule,
        generation=generation,
    )
    if not shown:
        generations[whole.granule] = generation + 1  # odd: nobody's to read
        return False
    shelf.blocks.appear_one(whole.block, namespace.id, parent)
    shelf.blocks.put_id[whole.block] = np.frombuffer(whole.put_id, np.uint8)
    namespace.blocks += 1
    ids = np.array([whole.block], np.uint32)
    shelf.policy.admit(ids, np.frombuffer(whole.key, np.uint64, 1))
    shelf.counters.stored += 1
    shelf.places.new(ids)
    if whole.ttl_ms:
        shelf.deadlines.set(Due.EXPIRY, ids, shelf.now_ms + whole.ttl_ms)
    return True


def stable(generations: U64) -> U64:
    """Even: those of slots whose bytes stay as they are. Slots of a client's stock have these from
    the start, so that what is posted keeps the generation that it was posted with."""
    return (generations + _ONE) & ~_ONE


def _stored_parents(shelf: Shelf, namespace: Namespace, whole: Whole) -> npt.NDArray[np.int64]:
    """Block ids (n,) of parents that are stored already, -1 for none. Looked for before the blocks
    themselves are stored: a parent comes before its child, else blocks could hold each other (or
    one itself) in the store for ever, where a caller's own keys make no true chain."""
    parents = np.full(len(whole.ids), -1, np.int64)
    asked = np.flatnonzero((whole.before == NO_ROW) & whole.parents.any(axis=1))
    if len(asked):
        parents[asked] = shelf.catalog.find(namespace.id, whole.parents[asked])
    return parents


def _link(
    shelf: Shelf,
    namespace: Namespace,
    whole: Whole,
    shown: npt.NDArray[np.bool_],
    parents: npt.NDArray[np.int64],
) -> None:
    """Counts each block as its parent's child, so that chains are evicted from the tail."""
    inside = np.flatnonzero(whole.before != NO_ROW)
    if len(inside):
        rows = whole.before[inside]
        parents[inside] = whole.ids[rows]
        others = inside[~shown[rows]]  # whose parents were there already, or found no place
        if len(others):
            keys = whole.keys[whole.before[others]]
            parents[others] = shelf.catalog.find(namespace.id, keys)
    linked = shown & (parents >= 0)
    if linked.any():
        shelf.blocks.link(whole.ids[linked], parents[linked].astype(np.uint32))


def _write_header(shelf: Shelf, namespace: Namespace, whole: WholeBlock) -> None:
    header = pack_parts(
        namespace=namespace.id,
        key=whole.key,
        put_id=whole.put_id,
        length=namespace.layout.block_bytes,
        checksums=whole.checksums,
        parent=whole.parent,
        position=whole.position,
    )
    at = whole.granule * limits.GRANULE_BYTES
    shelf.pool_bytes[at : at + len(header)] = header


def _write_headers(shelf: Shelf, namespace: Namespace, whole: Whole) -> None:
    headers = pack_many(
        namespace=namespace.id,
        keys=whole.keys,
        put_ids=whole.put_ids,
        length=namespace.layout.block_bytes,
        checksums=whole.checksums,
        parents=whole.parents,
        positions=whole.positions,
    )
    write_headers(shelf.memory.pool, whole.granules, headers)
