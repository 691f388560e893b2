"""How a node's blocks get to other nodes: held under a lease, offered, and pulled by the others."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore import commands as c
from kvstore.block import fixed_fields
from kvstore.cluster.intake import NO_POSITION
from kvstore.cluster.members import Member, View, encode_view
from kvstore.cluster.messages import Learn, Pull, Pulled, PutStatus, WrongEpoch
from kvstore.cluster.placement import places_of_put_ids
from kvstore.cluster.site import Site, Space
from kvstore.cluster.world import Task
from kvstore.errors import DeadlineExceeded, KVStoreError, Unavailable

_SUMS_AT = 104  # where a block header's checksums begin, see `kvstore.block`
_ANSWER_MS = 20.0  # for a node to say how it went, beside the time that its work may take


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Held:
    """Blocks in memory under a lease: where they are, and what their headers say. generation: of
    their namespace when the lease was taken; one that was forgotten since is offered as that.
    ends_ms: when they expire, by the node's own clock, 0 for never."""

    space: Space
    generation: int
    hashes: c.U8
    granules: c.U32
    headers: c.U8
    put_ids: c.U8
    places: c.U64
    ends_ms: npt.NDArray[np.float64]

    def rows(self, which: c.U32) -> Held:
        """Some of them."""
        return Held(
            space=self.space,
            generation=self.generation,
            hashes=self.hashes[which],
            granules=self.granules[which],
            headers=self.headers[which],
            put_ids=self.put_ids[which],
            places=self.places[which],
            ends_ms=self.ends_ms[which],
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Lease:
    """Blocks that stay where they are meanwhile. generation: see `Held`. left_ms: as `Leased`."""

    space: Space
    generation: int
    hashes: c.U8
    granules: c.U32
    left_ms: c.U64

    def held(self, site: Site) -> Held:
        """With what their headers say."""
        granules, left_ms = self.granules, self.left_ms.astype(np.float64)
        headers = site.store.headers(self.space.layout, granules)
        put_ids = _NO_IDS
        if len(granules):
            put_ids = np.ascontiguousarray(fixed_fields(headers)["put_id"])
        places, _placed = places_of_put_ids(put_ids)
        return Held(
            space=self.space,
            generation=self.generation,
            hashes=self.hashes,
            granules=granules,
            headers=headers,
            put_ids=put_ids,
            places=places,
            ends_ms=np.where(left_ms, site.world.now_ms() + left_ms, 0.0),
        )


@asynccontextmanager
async def hold(site: Site, space: Space, hashes: c.U8, wait_ms: float) -> AsyncIterator[Held]:
    """`leased`, and what the blocks' headers say."""
    async with leased(site, space, hashes, wait_ms) as lease:
        yield lease.held(site)


@asynccontextmanager
async def leased(site: Site, space: Space, hashes: c.U8, wait_ms: float) -> AsyncIterator[Lease]:
    """Keeps the leading stored blocks of a chain in memory meanwhile; brings them from NVMe."""
    end_ms = site.world.now_ms() + wait_ms
    generation = site.generation(space.mark)
    command = c.Lease(namespace=space.number, hashes=hashes)
    answer: c.Leased = await site.store.command(command, site.policy.call_ms)
    try:
        # Asked for first, since most often all is in memory.
        if len(answer.granules) < len(hashes) and await _bring(site, space, hashes, end_ms):
            earlier = answer.lease
            generation = site.generation(space.mark)
            answer = await site.store.command(command, site.policy.call_ms)
            if earlier:
                site.world.spawn(_release(site, earlier))
        yield Lease(
            space=space,
            generation=generation,
            hashes=hashes[: len(answer.granules)],
            granules=answer.granules,
            left_ms=answer.left_ms,
        )
    finally:
        if answer.lease:  # nobody has to wait for that
            site.world.spawn(_release(site, answer.lease))


@asynccontextmanager
async def hold_for_copies(
    site: Site, space: Space, hashes: c.U8, wait_ms: float
) -> AsyncIterator[Held]:
    """`hold` for blocks that other nodes may copy meanwhile, which a drop waits for."""
    with site.moves.of(space.mark, hashes):
        async with hold(site, space, hashes, wait_ms) as held:
            yield held


async def _release(site: Site, lease: int) -> None:
    with suppress(Unavailable, DeadlineExceeded):  # then it ends with this process
        await site.store.command(c.Release(lease=lease), site.policy.call_ms)


async def _bring(site: Site, space: Space, hashes: c.U8, end_ms: float) -> bool:
    """Has leading blocks brought from NVMe, as long as more come; whether some were there."""
    before = -1
    while True:
        tiers = site.store.look(space.number, hashes)
        stored, warm = _leading(tiers > 0), _leading((tiers > 0) & (tiers != _NVME))
        left_ms = end_ms - site.world.now_ms()
        if warm >= stored or warm <= before or left_ms <= 0:
            return before >= 0
        before = warm
        fetch = c.Fetch(namespace=space.number, hashes=hashes[:stored], wait_ms=int(left_ms))
        await site.store.command(fetch, left_ms + site.policy.call_ms)


def _leading(holds: npt.NDArray[np.bool_]) -> int:
    return len(holds) if holds.all() else int(holds.argmin())


async def push(
    site: Site,
    held: Held,
    to: Member,
    *,
    view: View,
    timeout_ms: float,
    persist: bool = False,
) -> Pulled:
    """Has another node pull blocks that are held, for as long as they have left here. Raises as
    `World.call`; the other's opinion of this node's health is its own."""
    fixed = fixed_fields(held.headers)
    positions = fixed["position"].astype(np.int64)
    n_cells = held.space.layout.n_cells
    sums = held.headers[:, _SUMS_AT : _SUMS_AT + 8 * n_cells]
    left_ms = np.maximum(held.ends_ms - site.world.now_ms(), 1.0)
    pull = Pull(
        source=site.me.name,
        epoch=view.epoch,
        name=held.space.name,
        layout=held.space.layout.encode(),
        generation=held.generation,
        put_ids=held.put_ids,
        hashes=held.hashes,
        addresses=site.store.addresses(held.space.layout, held.granules),
        checksums=np.ascontiguousarray(sums).view("<u8").astype(np.uint64),
        parents=np.ascontiguousarray(fixed["parent"]),
        positions=np.where(positions < 0, NO_POSITION, positions).astype(np.uint32),
        ttl_ms=np.where(held.ends_ms > 0.0, left_ms, 0.0).astype(np.uint64),
        wait_ms=int(max(timeout_ms - _ANSWER_MS, 1)),
        persist=int(persist),
    )
    pulled: Pulled = await call(site, to, pull, timeout_ms)
    there = int(np.count_nonzero(pulled.status == PutStatus.STORED))
    site.counters.pushed_blocks += there
    site.counters.pushed_bytes += there * held.space.layout.block_bytes
    return pulled


async def call(site: Site, to: Member, message: object, timeout_ms: float) -> Any:
    """`World.call` to a member, whose health is learnt from how it goes."""
    try:
        answer = await site.world.call(to.address, message, timeout_ms)
    except DeadlineExceeded:
        site.health.failed(to.name)
        raise
    except Unavailable:
        site.health.failed(to.name, at_once=True)
        raise
    except WrongEpoch as error:
        site.health.answered(to.name)
        if not site.learn(error.view) and not error.view:
            await tell_view(site, to)
        raise
    site.health.answered(to.name)
    return answer


async def tell_view(site: Site, to: Member) -> None:
    """Tells a member that has an earlier view which one is later."""
    await site.world.call(to.address, Learn(view=encode_view(site.view)), site.policy.call_ms)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Spread:
    """copies: uint8 (n,), at how many nodes each block is, this one among them. persisted: uint8
    (n,), 1 where all of those have synced it."""

    copies: c.U8
    persisted: c.U8


async def spread(
    site: Site,
    held: Held,
    partners: Sequence[Member],
    *,
    copies: int,
    view: View,
    end_ms: float,
    persist: bool,
    own: c.U8,
) -> Spread:
    """Brings blocks to `copies` nodes, this one among them: to the first of their partners at once,
    and to the next one for each that fails or is suspected meanwhile. own: 1 where this node has
    synced a block."""
    n = len(held.hashes)
    found = np.ones(n, np.uint8)
    persisted = own.copy()
    if not n or copies <= 1:
        return Spread(copies=found, persisted=persisted)
    waiting = list(partners)
    running: list[tuple[Member, Task[Pulled]]] = []
    short = copies - 1
    try:
        while short > 0 and (waiting or running):
            # One that does not answer pings either has another one take its place.
            hopeful = sum(not site.health.suspects(to.name) for to, _ in running)
            while hopeful < short and waiting:
                to = waiting.pop(0)
                left = max(end_ms - site.world.now_ms(), 1.0)
                work = push(site, held, to, view=view, timeout_ms=left, persist=persist)
                running.append((to, site.world.spawn(work)))
                hopeful += 1
            left_ms = end_ms - site.world.now_ms()
            await site.world.wait([task for _, task in running], min(left_ms, site.policy.ping_ms))
            over = [(to, task) for to, task in running if task.done]
            if not over and left_ms <= 0:
                break
            for entry in over:
                running.remove(entry)
                there = _outcome(entry[1], view.epoch)
                if there is None:
                    continue
                stored, synced = there
                if stored.all():
                    short -= 1
                found += stored
                persisted &= np.where(stored, synced, persisted)
    finally:
        for _to, task in running:  # what they may yet do is for the next round of anti-entropy
            task.cancel()
    return Spread(copies=found, persisted=persisted)


def _outcome(task: Task[Pulled], epoch: int) -> tuple[c.U8, c.U8] | None:
    """Which blocks a node has, and has synced; None where it has answered in no valid way."""
    try:
        pulled = task.result()
    except KVStoreError:
        return None
    if pulled.epoch != epoch:
        return None  # it has moved on since: what it stored may belong elsewhere by now
    stored = np.isin(pulled.status, (PutStatus.STORED, PutStatus.EXISTS)).astype(np.uint8)
    return stored, pulled.persisted & stored


def groups(places: c.U64) -> Sequence[c.U32]:
    """The rows of each place, in order."""
    if not len(places):
        return []
    order = np.argsort(places, kind="stable").astype(np.uint32)
    edges = np.flatnonzero(np.diff(places[order])) + 1
    return np.split(order, edges)


def by_partners(site: Site, held: Held) -> list[tuple[c.U32, list[Member]]]:
    """Rows of blocks that have the same partners in the same order, and those."""
    together = groups(held.places)
    firsts = np.array([rows[0] for rows in together], np.intp)
    found: dict[tuple[int, ...], list[c.U32]] = {}
    for rows, ranked in zip(together, site.ranked(held.places[firsts]), strict=True):
        found.setdefault(ranked, []).append(rows)
    return [
        (np.sort(np.concatenate(rows)), site.partners_of(ranked)) for ranked, rows in found.items()
    ]


_NVME = 2
_NO_IDS = np.empty((0, 16), np.uint8)
