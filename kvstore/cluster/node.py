"""One node of a cluster: what it answers to clients and to other nodes.

Handlers run to their end even where nobody waits for the answer any more: what they hold (leases,
slots, another process's memory) goes back only in their own last steps.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvstore import commands as c
from kvstore import limits
from kvstore.block import fixed_fields
from kvstore.cluster import messages as m
from kvstore.cluster.coordination import Coordination
from kvstore.cluster.copies import Lease, by_partners, hold, hold_for_copies, leased, spread
from kvstore.cluster.forgetting import forget_all, forget_keys
from kvstore.cluster.heat import Heat
from kvstore.cluster.intake import Arrivals, give_up, take_in
from kvstore.cluster.members import Member, encode_view
from kvstore.cluster.membership import Membership
from kvstore.cluster.parts import take_part
from kvstore.cluster.pools import Pools
from kvstore.cluster.repair import Repair
from kvstore.cluster.site import NodePolicy, Site, Space, mark_of
from kvstore.cluster.world import Ledger, Memory, NodeStore, Transfers, World
from kvstore.errors import (
    DeadlineExceeded,
    InvalidArgument,
    KVStoreError,
    PermissionDenied,
    ProtocolError,
    ResourceExhausted,
    StaleNamespace,
    Unavailable,
)
from kvstore.session.parts import Part, checked_cells, part_of
from kvstore.transfer.base import Pieces, TransferFailed

_STORED = (m.PutStatus.STORED, m.PutStatus.EXISTS)
_PLAIN = NodePolicy()
_ROUNDS = 3  # views under which one put is tried


@dataclass(slots=True, eq=False)
class _Session:
    """One process that is connected. memory: None for one that offers none."""

    is_node: bool
    memory: Memory | None


class Node:
    """Answers messages by `handle`; `run` does what has to be done without being asked.

    store: this node's, through which all blocks go. transfers: with the store's pool registered.
    """

    def __init__(
        self,
        world: World,
        store: NodeStore,
        transfers: Transfers,
        coordination: Coordination,
        ledger: Ledger,
        *,
        me: Member,
        replicas: int,
        policy: NodePolicy = _PLAIN,
    ) -> None:
        """`ProtocolError` for a ledger of another format."""
        self.site = Site(world, store, ledger, me=me, replicas=replicas, policy=policy)
        self.membership = Membership(self.site, coordination)
        self.repair = Repair(self.site)
        self.heat = Heat(self.site)
        self._transfers = transfers
        self._sessions: dict[int, _Session] = {}
        self._next_session = 1
        self._pools = Pools(self.site, transfers)
        self._background = 0

    async def run(self) -> None:
        """Until it is cancelled: membership, repair, and what is hot."""
        tasks = [
            self.site.world.spawn(self.membership.run()),
            self.site.world.spawn(self.membership.ping_for_ever()),
            self.site.world.spawn(self.repair.run()),
            self.site.world.spawn(self.heat.run()),
        ]
        try:
            while not any(task.done for task in tasks):
                await self.site.world.wait(tasks, 3_600_000.0)
        finally:
            for task in tasks:
                task.cancel()
        for task in tasks:
            if task.done:
                task.result()

    async def close(self) -> None:
        """Ends the connections to other nodes' pools."""
        await self._pools.close()

    # -- sessions ----------------------------------------------------------------------

    async def hello(self, hello: m.Hello, *, is_node: bool) -> m.Welcomed:
        """Begins a session. `InvalidArgument` for another transfer kind, `ProtocolError` for
        another version, `ResourceExhausted` for too many."""
        if hello.version != m.MESSAGES_VERSION:
            raise ProtocolError(
                f"the other side speaks version {hello.version} of the cluster's protocol, "
                f"{self.site.me.name} speaks {m.MESSAGES_VERSION}: run the same release on both"
            )
        if len(self._sessions) >= limits.MAX_CLUSTER_SESSIONS:
            raise ResourceExhausted(
                f"{limits.MAX_CLUSTER_SESSIONS} sessions are open at {self.site.me.name}",
                retry_after_ms=limits.RETRY_AFTER_MS,
            )
        number = self._next_session
        self._next_session += 1
        memory = None
        if hello.agent:
            timeout_ms = self.site.policy.call_ms
            memory = await self._transfers.connect(hello.kind, hello.agent, timeout_ms)
        self._sessions[number] = _Session(is_node, memory)
        return m.Welcomed(
            version=m.MESSAGES_VERSION,
            session=number,
            name=self.site.me.name,
            run=self.site.me.run,
            kind=self._transfers.kind,
            agent=self._transfers.describe() if is_node else b"",
            view=encode_view(self.site.view),
        )

    async def ended(self, session: int) -> None:
        """The connection that carried a session is over."""
        known = self._sessions.pop(session, None)
        if known and known.memory:
            try:
                await known.memory.close()
            except KVStoreError:
                self.site.counters.failed_transfers += 1

    @property
    def sessions(self) -> int:
        """How many are open."""
        return len(self._sessions)

    # -- the one handler ---------------------------------------------------------------

    async def handle(self, message: Any, *, is_node: bool) -> Any:
        """The answer to a message of a client or a node; raises a `KVStoreError`."""
        kind = type(message)
        handler = _HANDLERS.get(kind)
        if handler is None:
            raise ProtocolError(f"{kind.__name__} is no question to a node")
        if kind in _BETWEEN_NODES and not is_node:
            raise PermissionDenied(f"{kind.__name__} is for nodes alone")
        return await handler(self, message)

    async def _ping(self, message: m.Ping) -> m.Pong:
        del message
        return await self.membership.pong()

    async def _learn(self, message: m.Learn) -> m.Pong:
        self.site.learn(message.view)
        return await self.membership.pong()

    async def _ask_view(self, message: m.AskView) -> m.Learn:
        del message
        return m.Learn(view=encode_view(self.site.view))

    async def _open(self, message: m.Open) -> m.Opened:
        self.site.check_serving()
        space = await self.site.open(message.name, message.layout)
        return m.Opened(
            namespace=space.number,
            instance=space.instance,
            key=space.key,
            generation=self.site.generation(space.mark),
        )

    # -- reading -----------------------------------------------------------------------

    async def _look(self, message: m.Look) -> m.Seen:
        self.site.check_serving()
        self.site.check_reader(message.epoch)
        space = self.site.space(message.namespace, message.instance)
        tiers = self.site.store.look(space.number, _checked(message.hashes))
        return m.Seen(tiers=tiers, epoch=self.site.view.epoch)

    async def _get(self, message: m.Get) -> m.Got:
        site = self.site
        site.check_serving()
        site.check_reader(message.epoch)
        space = site.space(message.namespace, message.instance)
        hashes = _checked(message.hashes)
        if len(message.addresses) != len(hashes):
            raise InvalidArgument("addresses", "expected one for each block")
        checked_cells(space.layout, message.cells.tolist())
        memory = self._memory_of(message.session)
        site.counters.gets += 1
        n, end_ms = len(hashes), site.world.now_ms() + message.wait_ms
        tiers = site.store.look(space.number, hashes)
        headers: c.U8 | None = None
        hot = np.zeros(n, np.uint8)
        sent = np.zeros(n, bool)
        left = np.flatnonzero(tiers)
        # What is in memory goes first, while what is on NVMe comes. One that is not there hides
        # none of those behind it, which may have no other copy.
        while len(left):
            wait_ms = end_ms - site.world.now_ms()
            async with leased(site, space, hashes[left], wait_ms) as lease:
                k = len(lease.hashes)
                rows = left[:k]
                if k:
                    await self._send(memory, lease, message, rows, end_ms)
                    held = lease.held(site)
                    if headers is None:
                        headers = np.zeros((n, held.headers.shape[1]), np.uint8)
                    headers[rows] = held.headers
                    hot[rows] = self.heat.read(held)
                    sent[rows] = True
            left = left[max(k, 1) :]
            if site.world.now_ms() >= end_ms:
                break
        tiers[~sent] = 0
        none = np.zeros((n, 0), np.uint8)
        epoch = site.view.epoch
        return m.Got(
            tiers=tiers, headers=none if headers is None else headers, hot=hot, epoch=epoch
        )

    async def _send(
        self,
        memory: Memory,
        lease: Lease,
        message: m.Get,
        rows: np.ndarray[Any, np.dtype[np.intp]],
        end_ms: float,
    ) -> None:
        """Writes leased blocks to the sender's memory. They stay leased until no byte of them is
        read any more, which after a failure is when its memory is closed."""
        site, layout = self.site, lease.space.layout
        part = part_of(layout, message.cells)
        k = len(lease.hashes)
        starts = site.store.addresses(layout, lease.granules)
        targets = message.addresses[rows]
        if message.heads:
            head = np.uint64(part.payload_at)
            starts, targets = starts - head, targets - head
        runs = _runs_of(part, heads=bool(message.heads))
        if len(runs) > 1:
            starts, targets = starts[:, None] + runs[:, 0], targets[:, None] + runs[:, 1]
            pieces = Pieces(starts.ravel(), targets.ravel(), np.tile(runs[:, 2], k))
        else:
            at, own, nbytes = runs[0]
            pieces = Pieces(starts + at, targets + own, np.full(k, nbytes))
        try:
            await memory.write(pieces, max(end_ms - site.world.now_ms(), 1.0))
        except KVStoreError as error:
            site.counters.failed_transfers += 1
            if not await give_up(site, memory, np.empty(0, np.uint32)):
                raise DeadlineExceeded("bytes may still arrive") from error
            raise TransferFailed(f"not all bytes could be written: {error}") from error
        site.counters.sent_blocks += k
        site.counters.sent_bytes += k * part.nbytes

    # -- writing -----------------------------------------------------------------------

    async def _put(self, message: m.Put) -> m.Stored:
        site = self.site
        site.check_serving()
        site.fence(message.epoch)
        space = site.space(message.namespace, message.instance)
        hashes = _checked(message.hashes)
        _check_put(message)
        site.counters.puts += 1
        n, end_ms = len(hashes), site.world.now_ms() + message.wait_ms
        status = np.full(n, m.PutStatus.EXISTS, np.uint8)
        absent = np.flatnonzero(site.store.look(space.number, hashes) == 0)
        if len(absent):
            memory = self._memory_of(message.session)
            arrivals = _arrivals(message, space).rows(absent)
            left_ms = max(end_ms - site.world.now_ms(), 1.0)
            cells = checked_cells(space.layout, message.cells.tolist())
            with site.moves.of(space.mark, hashes):
                if len(cells):
                    taken = await take_part(
                        site, space, memory, arrivals, cells=cells, timeout_ms=left_ms
                    )
                else:
                    taken = await take_in(site, space, memory, arrivals, left_ms)
            status[absent] = taken
        there = np.flatnonzero(np.isin(status, _STORED))
        answer = await self._make_copies(
            space,
            hashes[there],
            copies=message.copies,
            end_ms=end_ms,
            persist=bool(message.persist),
        )
        copies, persisted = np.zeros(n, np.uint8), np.zeros(n, np.uint8)
        copies[there], persisted[there] = answer.copies, answer.persisted
        return m.Stored(status=status, copies=copies, persisted=persisted, epoch=answer.epoch)

    async def _make_copies(
        self, space: Space, hashes: c.U8, *, copies: int, end_ms: float, persist: bool
    ) -> m.Stored:
        """Waits for `copies` of blocks that are stored here, all under one view: where that changes
        meanwhile, again under the later one. The others of R come in the background."""
        site, n = self.site, len(hashes)
        found, synced = np.zeros(n, np.uint8), np.zeros(n, np.uint8)
        view = site.view
        if not n:
            return m.Stored(status=found, copies=found, persisted=synced, epoch=view.epoch)
        if min(copies, view.replicas) == 1 and not persist:
            found[:] = 1  # the node that was asked has them
        for _ in range(_ROUNDS if not found.all() else 0):
            view = site.view
            found[:], synced[:] = 0, 0
            left_ms = end_ms - site.world.now_ms()
            async with hold_for_copies(site, space, hashes, left_ms) as held:
                own = np.zeros(len(held.hashes), np.uint8)
                if persist:
                    own = await self._persist(space, held.hashes, end_ms)
                plans = by_partners(site, held)
                tasks = [
                    site.world.spawn(
                        spread(
                            site,
                            held.rows(rows),
                            partners,
                            copies=min(copies, view.replicas),
                            view=view,
                            end_ms=end_ms,
                            persist=persist,
                            own=own[rows],
                        )
                    )
                    for rows, partners in plans
                ]
                left_ms = max(end_ms - site.world.now_ms(), 0.0) + site.policy.call_ms
                await site.world.wait_all(tasks, left_ms)
                for (rows, _partners), task in zip(plans, tasks, strict=True):
                    if task.done:
                        done = task.result()
                        found[rows], synced[rows] = done.copies, done.persisted
            if site.view is view or site.world.now_ms() >= end_ms:
                break
        if site.view is not view:  # what was counted under it may be nowhere that a reader looks
            found[:] = np.minimum(found, 1)
        if n and copies < view.replicas:
            self._later(space, hashes)
        status = np.where(found > 0, m.PutStatus.STORED, m.PutStatus.FAILED).astype(np.uint8)
        return m.Stored(status=status, copies=found, persisted=synced, epoch=view.epoch)

    def _later(self, space: Space, hashes: c.U8) -> None:
        """Copies that nobody waits for; past the limit they are left to anti-entropy."""
        if self._background >= self.site.policy.most_background:
            return
        self._background += 1

        async def work() -> None:
            try:
                end_ms = self.site.world.now_ms() + self.site.policy.transfer_ms
                await self._make_copies(
                    space,
                    hashes,
                    copies=self.site.view.replicas,
                    end_ms=end_ms,
                    persist=False,
                )
            except KVStoreError:
                self.repair.wake()
            finally:
                self._background -= 1

        self.site.world.spawn(work())

    async def _persist(self, space: Space, hashes: c.U8, end_ms: float) -> c.U8:
        left_ms = max(end_ms - self.site.world.now_ms(), 0.0)
        if not len(hashes):
            return np.empty(0, np.uint8)
        command = c.Persist(namespace=space.number, hashes=hashes, wait_ms=int(left_ms))
        persisted: c.Persisted = await self.site.store.command(
            command, left_ms + self.site.policy.call_ms
        )
        return persisted.durable

    async def _pull(self, message: m.Pull) -> m.Pulled:
        """Copies blocks from the node that asks. Where this node has a block of another put, the
        smaller put id stays in the end, so that all replicas become copies of one put."""
        site = self.site
        site.check_serving()
        site.fence(message.epoch)
        space = await self._space_of(message.name, message.layout, message.generation)
        with site.moves.of(space.mark, _checked(message.hashes)):
            return await self._take_over(space, message)

    async def _take_over(self, space: Space, message: m.Pull) -> m.Pulled:
        site, hashes = self.site, message.hashes
        n, end_ms = len(hashes), site.world.now_ms() + message.wait_ms
        arrivals = _arrivals(message, space)
        status = np.full(n, m.PutStatus.EXISTS, np.uint8)
        tiers = site.store.look(space.number, hashes)
        there = np.flatnonzero(tiers)
        beaten = await self._beaten(space, hashes, message.put_ids, there, end_ms)
        absent = np.flatnonzero((tiers == 0) | beaten)
        if len(absent):
            memory = await self._pools.memory_of(message.source)
            if beaten.any():
                site.counters.replaced += int(beaten.sum())
                drop = c.Drop(namespace=space.number, hashes=hashes[beaten])
                await site.store.command(drop, site.policy.call_ms)
            left_ms = max(end_ms - site.world.now_ms(), 1.0)
            taken = await take_in(site, space, memory, arrivals.rows(absent), left_ms)
            status[absent] = taken
            stored = int(np.count_nonzero(taken == m.PutStatus.STORED))
            site.counters.pulled_blocks += stored
            site.counters.pulled_bytes += stored * space.layout.block_bytes
        persisted = np.zeros(n, np.uint8)
        if message.persist:
            persisted = await self._persist(space, hashes, end_ms)
        return m.Pulled(status=status, persisted=persisted, epoch=site.view.epoch)

    async def _beaten(
        self,
        space: Space,
        hashes: c.U8,
        put_ids: c.U8,
        there: np.ndarray[Any, Any],
        end_ms: float,
    ) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which blocks this node has of a put whose id is above the one offered. One on NVMe comes
        into memory for that."""
        beaten = np.zeros(len(hashes), bool)
        for row in there.tolist():  # only where a put meets another of the same key
            wait_ms = max(end_ms - self.site.world.now_ms(), 0.0)
            async with hold(self.site, space, hashes[row : row + 1], wait_ms) as held:
                if len(held.hashes):
                    own = fixed_fields(held.headers)["put_id"][0].tobytes()
                    beaten[row] = own > put_ids[row].tobytes()
        return beaten

    def _memory_of(self, session: int) -> Memory:
        known = self._sessions.get(session)
        if known is None:
            raise Unavailable(f"session {session} is over: begin another one")
        if known.memory is None:
            raise InvalidArgument("session", "offers no memory to transfer to or from")
        return known.memory

    # -- between nodes -----------------------------------------------------------------

    async def _space_of(self, name: str, layout: bytes, generation: int) -> Space:
        """A namespace at the sender's generation. `StaleNamespace` where it is behind this one's;
        where it is ahead, this node forgets first what it missed."""
        mark = mark_of(name, layout)
        own = self.site.generation(mark)
        if generation < own:
            raise StaleNamespace(f"{name} was forgotten since: {generation} is not {own}")
        if generation > own:
            await forget_all(self.site, name, layout, generation)
        return await self.site.open(name, layout)

    async def _compare(self, message: m.Compare) -> m.Compared:
        self.site.check_serving()
        self.site.fence(message.epoch)
        space = await self._space_of(message.name, message.layout, message.generation)
        own = await self.repair.digests(space.number, message.source)
        if own.shape != message.digests.shape:
            raise ProtocolError(f"{len(message.digests)} digests, expected {len(own)}")
        differ = (own != message.digests).astype(np.uint8)
        return m.Compared(differ=differ, epoch=self.site.view.epoch)

    async def _offer(self, message: m.Offer) -> m.Wanted:
        self.site.check_serving()
        self.site.fence(message.epoch)
        space = await self._space_of(message.name, message.layout, message.generation)
        hashes = _checked(message.hashes)
        wants = (self.site.store.look(space.number, hashes) == 0).astype(np.uint8)
        there = np.flatnonzero(wants == 0)
        if len(there):
            own = await self.repair.put_ids(space.number, hashes[there])
            above = [a > b for a, b in zip(own, map(bytes, message.put_ids[there]), strict=True)]
            wants[there[above]] = 1
        return m.Wanted(wants=wants, epoch=self.site.view.epoch)

    async def _forget(self, message: m.Forget) -> c.Count:
        if message.all_of_it:
            forgetting = forget_all(self.site, message.name, message.layout, message.generation)
        else:
            space = await self.site.open(message.name, message.layout)
            forgetting = forget_keys(self.site, space, _checked(message.hashes))
        return c.Count(blocks=await forgetting)

    async def _ask_generations(self, message: m.AskGenerations) -> m.Generations:
        del message
        return await self.membership.generations()

    # -- the rest ----------------------------------------------------------------------

    async def _doubt(self, message: m.Doubt) -> c.Count:
        """Blocks that did not arrive as their headers say are looked at here: a damaged one must
        not be promised again."""
        site = self.site
        space = site.space(message.namespace, message.instance)
        bad = 0
        for key in _checked(message.hashes):
            row = key.reshape(1, -1)
            async with hold(site, space, row, site.policy.call_ms) as held:
                if not len(held.hashes):
                    continue
                sums = await site.store.sums(space.layout, held.granules)
                n_cells = space.layout.n_cells
                said = np.ascontiguousarray(held.headers[:, 104 : 104 + 8 * n_cells]).view("<u8")
                if (sums == said).all():
                    continue
            site.counters.corrupted += 1
            bad += 1
            drop = c.Drop(namespace=space.number, hashes=row)
            await site.store.command(drop, site.policy.call_ms)
        if bad:
            self.repair.wake()
        return c.Count(blocks=bad)

    async def _advise(self, message: m.Advise) -> c.Count:
        space = self.site.space(message.namespace, message.instance)
        hint = c.Hint(
            namespace=space.number,
            kind=message.kind,
            for_ms=message.for_ms,
            hashes=_checked(message.hashes),
        )
        count: c.Count = await self.site.store.command(hint, self.site.policy.call_ms)
        return count

    async def _ask(self, message: m.Ask) -> c.Explained:
        space = self.site.space(message.namespace, message.instance)
        explain = c.Explain(namespace=space.number, hashes=_checked(message.hashes))
        said: c.Explained = await self.site.store.command(explain, self.site.policy.call_ms)
        return said

    async def _drain(self, message: m.Drain) -> m.Learn:
        return m.Learn(view=encode_view(await self.membership.drain(message.name)))

    async def _join(self, message: m.Join) -> m.Learn:
        return m.Learn(view=encode_view(await self.membership.join(message.name)))

    async def _status(self, message: m.AskStatus) -> m.Status:
        del message
        pong = await self.membership.pong()
        counters = self.site.counters
        names = list(counters.__slots__)
        values = [getattr(counters, name) for name in names]
        clients = sum(not session.is_node for session in self._sessions.values())
        names += ["sessions", "client_sessions", "repair_left_blocks"]
        values += [self.sessions, clients, self.repair.left_blocks]
        return m.Status(
            pong=m.CODEC.encode(pong),
            view=encode_view(self.site.view),
            suspects="\n".join(self.site.health.names),
            names="\n".join(names),
            values=np.array(values, np.uint64),
        )

    async def _stat(self, message: c.Stat) -> Any:
        return await self.site.store.command(message, self.site.policy.call_ms)


@functools.lru_cache(maxsize=256)
def _runs_of(part: Part, *, heads: bool) -> c.U64:
    """Where in a block, where in the part, bytes: uint64 (n, 3). heads: behind a header each."""
    runs = np.array(part.runs, np.uint64).reshape(-1, 3)
    return _with_heads(runs, part.payload_at) if heads else runs


def _with_heads(runs: c.U64, head: int) -> c.U64:
    """The same runs behind a header of so many bytes, in front of which nothing is."""
    behind = runs + np.array([head, head, 0], np.uint64)
    if runs[0, :2].any():
        return np.concatenate((np.array([[0, 0, head]], np.uint64), behind))
    behind[0] = (0, 0, head + int(runs[0, 2]))  # neighbours on both sides
    return behind


def _checked(hashes: c.U8) -> c.U8:
    if hashes.shape[1:] != (limits.KEY_BYTES,):
        raise InvalidArgument("hashes", f"{hashes.shape} is not (n, {limits.KEY_BYTES})")
    if len(hashes) > limits.MAX_KEYS_PER_CALL:
        raise InvalidArgument("hashes", f"at most {limits.MAX_KEYS_PER_CALL} in one call, please")
    return hashes


def _check_put(message: m.Put) -> None:
    n = len(message.hashes)
    if not n:
        raise InvalidArgument("hashes", "at least one, please")
    # Most differ in their first words; sorting rows to be sure takes longer than all else here.
    words = np.ascontiguousarray(message.hashes[:, :8]).view(np.uint64)[:, 0]
    if len(set(words.tolist())) != n and len(np.unique(message.hashes, axis=0)) != n:
        raise InvalidArgument("hashes", "a key comes twice")
    if not 0 <= message.ttl_ms <= limits.MAX_TTL_MS:
        raise InvalidArgument("ttl_ms", f"0 to {limits.MAX_TTL_MS}, please")
    if not 1 <= message.copies <= limits.MAX_REPLICAS:
        raise InvalidArgument("copies", f"1 to {limits.MAX_REPLICAS}, please")


def _arrivals(message: m.Put | m.Pull, space: Space) -> Arrivals:
    """What is to arrive; `InvalidArgument` names an array of another shape than the others."""
    n, n_cells = len(message.hashes), space.layout.n_cells
    if isinstance(message, m.Put) and len(message.cells):
        n_cells = len(message.cells)
    ttl_ms = message.ttl_ms
    ttls = np.full(n, ttl_ms, np.uint64) if isinstance(ttl_ms, int) else ttl_ms
    shapes = {
        "put_ids": (message.put_ids.shape, (n, 16)),
        "addresses": (message.addresses.shape, (n,)),
        "checksums": (message.checksums.shape, (n, n_cells)),
        "parents": (message.parents.shape, (n, limits.KEY_BYTES)),
        "positions": (message.positions.shape, (n,)),
        "ttl_ms": (ttls.shape, (n,)),
    }
    for name, (found, expected) in shapes.items():
        if found != expected:
            raise InvalidArgument(name, f"is {found}, expected {expected}")
    return Arrivals(
        hashes=message.hashes,
        addresses=message.addresses,
        checksums=message.checksums,
        put_ids=message.put_ids,
        parents=message.parents,
        positions=message.positions,
        ttl_ms=ttls,
    )


_BETWEEN_NODES = frozenset((m.Pull, m.Compare, m.Offer, m.AskGenerations, m.Learn))
_HANDLERS: dict[type, Callable[[Node, Any], Awaitable[Any]]] = {
    m.Ping: Node._ping,
    m.Learn: Node._learn,
    m.AskView: Node._ask_view,
    m.Open: Node._open,
    m.Look: Node._look,
    m.Get: Node._get,
    m.Put: Node._put,
    m.Pull: Node._pull,
    m.Compare: Node._compare,
    m.Offer: Node._offer,
    m.Forget: Node._forget,
    m.AskGenerations: Node._ask_generations,
    m.Doubt: Node._doubt,
    m.Advise: Node._advise,
    m.Ask: Node._ask,
    m.Drain: Node._drain,
    m.Join: Node._join,
    m.AskStatus: Node._status,
    c.Stat: Node._stat,
    c.Describe: Node._stat,
}
