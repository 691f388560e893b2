"""Brings a node's blocks to where they belong, and finds out where copies are missing.

One round goes through all blocks and all other members. Where this node and another one should both
have a block, digests over (key, put id) are compared, bucket by bucket, and only buckets that
differ are gone through key by key. Blocks that do not belong here (any more) are offered to all of
their targets, and are the first to be evicted once all of those have them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore import commands as c
from kvstore import limits
from kvstore.cluster.copies import call, hold_for_copies, push
from kvstore.cluster.forgetting import catch_up
from kvstore.cluster.members import Member, MemberState, View
from kvstore.cluster.messages import (
    AskGenerations,
    Compare,
    Compared,
    Generations,
    Offer,
    PutStatus,
    Wanted,
)
from kvstore.cluster.placement import Ranks, places_of_put_ids
from kvstore.cluster.site import Site, Space
from kvstore.errors import KVStoreError, StaleNamespace

DIGESTS = 1024
_OFFERED = 4096  # keys of one offer
_MIX = np.uint64(0x9E3779B97F4A7C15)
_TARGETS = (MemberState.UP, MemberState.JOINING)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Inventory:
    """The blocks of one namespace that a cluster placed, as they were at some moment.

    targets: members' numbers, (n, R) int16, the best first.
    """

    number: int
    hashes: c.U8
    put_ids: c.U8
    targets: Ranks

    def shared_with(self, me: int, other: int) -> npt.NDArray[np.bool_]:
        """Which of the blocks both members should have."""
        both: npt.NDArray[np.bool_] = (self.targets == me).any(axis=1)
        both &= (self.targets == other).any(axis=1)
        return both

    def strays_for(self, me: int, other: int) -> npt.NDArray[np.bool_]:
        """Which of them the other one should have, and this one should not."""
        strays: npt.NDArray[np.bool_] = ~(self.targets == me).any(axis=1)
        strays &= (self.targets == other).any(axis=1)
        return strays


def buckets_of(hashes: c.U8) -> npt.NDArray[np.int64]:
    """Which of the `DIGESTS` a key counts in."""
    words = np.ascontiguousarray(hashes[:, -4:]).view("<u4").ravel()
    return (words % DIGESTS).astype(np.int64)


def digests_of(hashes: c.U8, put_ids: c.U8) -> c.U64:
    """One digest a bucket: the same for the same (key, put id), in whatever order."""
    words = np.ascontiguousarray(hashes).view("<u8").reshape(-1, 4)
    puts = np.ascontiguousarray(put_ids).view("<u8").reshape(-1, 2)
    mixed = words[:, 0] ^ (words[:, 1] * _MIX) ^ (words[:, 2] << np.uint64(1)) ^ words[:, 3]
    mixed = (mixed ^ (puts[:, 0] * _MIX) ^ puts[:, 1]) * _MIX
    mixed ^= mixed >> np.uint64(29)
    digests = np.zeros(DIGESTS, np.uint64)
    np.bitwise_xor.at(digests, buckets_of(hashes), mixed)
    return digests


class Repair:
    """One node's part in it."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._awake = True
        self._tokens = 0.0
        self._tokens_at_ms = 0.0
        self.left_blocks = 0  # that the present round has still to bring somewhere

    def wake(self) -> None:
        """Something is known to be missing: the next round is due."""
        self._awake = True

    async def run(self) -> None:
        """For ever: a round after each change of the view, when a member is back, when something
        is known to be missing, and now and then."""
        site = self._site
        last_ms, last_epoch = -site.policy.compare_ms, -1
        while True:
            due = site.world.now_ms() - last_ms >= site.policy.compare_ms
            changed = site.view.epoch != last_epoch or site.settled < site.view.epoch
            if not (self._awake or due or changed or site.missed) or not site.serving:
                await site.world.sleep(site.policy.retry_ms)
                continue
            self._awake = False
            missed, site.missed = site.missed, set()
            view = site.view
            last_ms, last_epoch = site.world.now_ms(), view.epoch
            if await self._round(view):
                site.settled = max(site.settled, view.epoch)
            else:
                site.missed |= missed
                await site.world.sleep(site.policy.retry_ms)

    async def _round(self, view: View) -> bool:
        """Whether all is where it belongs now, as far as this node can see to it."""
        site = self._site
        whole = True
        try:
            spaces = await self._spaces()
            for space in spaces:
                inventory = await self.inventory(space.number)
                whole &= await self._bring(view, space, inventory)
        except KVStoreError:
            return False
        site.counters.compared_rounds += 1
        self.left_blocks = 0
        return whole and site.view is view

    async def _bring(self, view: View, space: Space, inventory: Inventory) -> bool:
        site = self._site
        numbers = {member.name: i for i, member in enumerate(view.members)}
        me = numbers.get(site.me.name, -1)
        whole = True
        strays = np.zeros(len(inventory.hashes), np.int64)  # how many targets have a stray block
        for member in site.others():
            if member.state not in _TARGETS:
                continue
            if site.view is not view:
                return False
            other = numbers[member.name]
            try:
                await self._compare(
                    view, space, inventory, member, inventory.shared_with(me, other)
                )
                alone = inventory.strays_for(me, other)
                await self._offer(view, space, inventory, member, np.flatnonzero(alone))
                strays[alone] += 1
            except StaleNamespace:
                await self._catch_up(member)
                return False
            except KVStoreError:
                whole = False
        wanted = np.minimum(view.replicas, inventory.targets.shape[1])
        done = np.flatnonzero((strays >= wanted) & (strays > 0))
        await self._let_go(space, inventory.hashes[done])
        return whole

    async def _catch_up(self, member: Member) -> None:
        """Forgets what a member has, which refuses blocks of it. A drop that was not answered may
        have come to that one alone, and it tells nobody by itself who drains, nor of a namespace
        that its store does not have any more."""
        site = self._site
        found = await call(site, member, AskGenerations(), site.policy.call_ms)
        assert isinstance(found, Generations)
        await catch_up(site, found)

    async def _compare(
        self,
        view: View,
        space: Space,
        inventory: Inventory,
        member: Member,
        shared: npt.NDArray[np.bool_],
    ) -> None:
        site = self._site
        rows = np.flatnonzero(shared)
        message = Compare(
            source=site.me.name,
            epoch=view.epoch,
            name=space.name,
            layout=space.layout.encode(),
            generation=site.generation(space.mark),
            digests=digests_of(inventory.hashes[rows], inventory.put_ids[rows]),
        )
        compared = await call(site, member, message, site.policy.call_ms)
        assert isinstance(compared, Compared)
        differ = compared.differ.astype(bool)
        if differ.any() and len(rows):
            rows = rows[differ[buckets_of(inventory.hashes[rows])]]
            await self._offer(view, space, inventory, member, rows)

    async def _offer(
        self,
        view: View,
        space: Space,
        inventory: Inventory,
        member: Member,
        rows: npt.NDArray[np.intp],
    ) -> None:
        """Offers blocks, and has those pulled that the other one wants. Raises where some of them
        are not there afterwards."""
        site = self._site
        self.left_blocks += len(rows)
        for first in range(0, len(rows), _OFFERED):
            page = rows[first : first + _OFFERED]
            offer = Offer(
                source=site.me.name,
                epoch=view.epoch,
                name=space.name,
                layout=space.layout.encode(),
                generation=site.generation(space.mark),
                hashes=inventory.hashes[page],
                put_ids=inventory.put_ids[page],
            )
            wanted = await call(site, member, offer, site.policy.call_ms)
            assert isinstance(wanted, Wanted)
            await self._push(view, space, inventory, member, page[wanted.wants.astype(bool)])
            self.left_blocks -= len(page)

    async def _push(
        self,
        view: View,
        space: Space,
        inventory: Inventory,
        member: Member,
        rows: npt.NDArray[np.intp],
    ) -> None:
        """In batches under the budget. A block that has gone meanwhile is nobody's to bring."""
        site, size = self._site, space.layout.block_bytes
        step = max(1, site.policy.repair_batch_bytes // size)
        for first in range(0, len(rows), step):
            batch = rows[first : first + step]
            await self._pay(len(batch) * size)
            keys, at = inventory.hashes[batch], 0
            while at < len(batch):
                async with hold_for_copies(site, space, keys[at:], site.policy.transfer_ms) as held:
                    k = len(held.hashes)
                    if k:
                        pulled = await push(
                            site,
                            held,
                            member,
                            view=view,
                            timeout_ms=site.policy.transfer_ms,
                        )
                        site.counters.repaired_blocks += int(
                            np.count_nonzero(pulled.status == PutStatus.STORED)
                        )
                        bad = np.isin(pulled.status, (PutStatus.FAILED, PutStatus.BUSY))
                        if bad.any():
                            raise StaleNamespace("some blocks did not arrive whole")
                at += k + 1 if k < len(keys[at:]) else k

    async def _pay(self, nbytes: int) -> None:
        """Waits until the budget covers so many more bytes; it may be overdrawn by one batch."""
        site = self._site
        rate = site.policy.repair_bytes_per_ms
        now = site.world.now_ms()
        most = float(site.policy.repair_batch_bytes)
        self._tokens = min(most, self._tokens + (now - self._tokens_at_ms) * rate)
        self._tokens_at_ms = now
        if self._tokens < 0:
            await site.world.sleep(-self._tokens / rate)
        self._tokens -= nbytes

    async def _let_go(self, space: Space, hashes: c.U8) -> None:
        """Blocks that all of their targets have are the first to make room here."""
        for first in range(0, len(hashes), limits.MAX_KEYS_PER_CALL):
            hint = c.Hint(
                namespace=space.number,
                kind=int(c.HintKind.SESSION_ENDS),
                for_ms=0,
                hashes=hashes[first : first + limits.MAX_KEYS_PER_CALL],
            )
            await self._site.store.command(hint, self._site.policy.call_ms)

    # -- what is there -----------------------------------------------------------------

    async def _spaces(self) -> list[Space]:
        site = self._site
        found: c.Description = await site.store.command(c.Describe(), site.policy.call_ms)
        names = found.names.split("\n") if found.names else []
        layouts = found.layouts.split("\n") if found.layouts else []
        return [
            await site.open(name, layout.encode())
            for name, layout, blocks in zip(names, layouts, found.blocks.tolist(), strict=True)
        ]

    async def inventory(self, number: int) -> Inventory:
        """The blocks of a namespace (its number in this node's store) that a cluster placed."""
        site = self._site
        pages, first = [], 0
        while True:
            scan = c.Scan(first=first, most=limits.MAX_KEYS_PER_CALL // 4)
            page: c.Scanned = await site.store.command(scan, site.policy.call_ms)
            pages.append((page, page.namespaces == number))
            first = page.following
            if not first:
                break
        hashes = np.concatenate([page.hashes[here] for page, here in pages])
        put_ids = np.concatenate([page.put_ids[here] for page, here in pages])
        places, placed = places_of_put_ids(put_ids)
        copies = site.ranking.copies
        return Inventory(
            number=number,
            hashes=hashes[placed],
            put_ids=put_ids[placed],
            targets=site.ranking.targets(places[placed], most=copies),
        )

    async def digests(self, number: int, source: str) -> c.U64:
        """Digests of what this node and another one should both have."""
        view = self._site.view
        inventory = await self.inventory(number)
        numbers = {member.name: i for i, member in enumerate(view.members)}
        me, other = numbers.get(self._site.me.name, -1), numbers.get(source, -1)
        shared = inventory.shared_with(me, other)
        return digests_of(inventory.hashes[shared], inventory.put_ids[shared])

    async def put_ids(self, number: int, hashes: c.U8) -> list[bytes]:
        """The put ids of blocks here, in the order of `hashes`; empty where one has gone."""
        inventory = await self.inventory(number)
        known = dict(zip(map(bytes, inventory.hashes), map(bytes, inventory.put_ids), strict=True))
        return [known.get(key.tobytes(), b"") for key in hashes]
