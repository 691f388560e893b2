"""A `Session` over the nodes of a cluster: matches, gets and puts that survive any one of them.

Ours: the bytes' way between the caller's buffers and the memory that nodes reach. Whom to ask is
`kvstore.cluster.router`'s, which runs on a loop in a thread of its own.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

from kvstore import commands as c
from kvstore import limits
from kvstore.block import unpack
from kvstore.cluster import messages as m
from kvstore.cluster.contacts import ClusterSpace, RouterPolicy
from kvstore.cluster.gets import Accept
from kvstore.cluster.placement import place_of, places_of, segment_blocks
from kvstore.cluster.router import Router
from kvstore.commands import ExplainStatus
from kvstore.errors import (
    Corrupted,
    DeadlineExceeded,
    KVStoreError,
    ProtocolError,
    ResourceExhausted,
    Unavailable,
)
from kvstore.layout import Layout
from kvstore.session.base import (
    NOTHING_MATCHED,
    TIERS,
    BlockReport,
    Bytes1D,
    Hashes,
    Hint,
    Hit,
    Matched,
    Miss,
    MissReason,
    NamespaceHandle,
    NamespaceInfo,
    PutResult,
    StoreInfo,
)
from kvstore.session.buffers import check_buffers
from kvstore.session.control import Deadline, reports, store_info
from kvstore.session.copies import groups_of, in_parallel
from kvstore.session.parts import Part, part_of
from kvstore.session.requests import (
    PutRequest,
    checked_chain,
    checked_get,
    checked_put,
    hint_ms,
)
from kvstore.transfer.apart import make_safe_agent
from kvstore_client.cluster.loop import SLACK_S, LoopThread
from kvstore_client.cluster.memory import LandingRing, RingView, landing_bytes
from kvstore_client.cluster.puts import PutPlan, Putter
from kvstore_client.transfer import CopiedView
from kvstore_proto.cluster.pipes import Streams
from kvstore_proto.cluster.rpc import Tls
from kvstore_proto.cluster.world import AsyncWorld

T = TypeVar("T")
Arrive = Callable[[npt.NDArray[np.intp], c.U64], c.U64]
ARENA_BYTES = 64 << 20
RING_BYTES = 128 << 20
_CHAINS = 64  # chains whose segments are remembered for later puts
_CLOSE_S = 30.0
_RANK = {ExplainStatus.STORED: 9, ExplainStatus.CORRUPTED: 8, ExplainStatus.NOT_SEALED: 7}


class ClusterSession:
    """One client of a cluster; implements `Session`, thread-safe.

    seeds: addresses of some nodes, HOST:PORT each. token: the cluster's, for clients. transfer: how
    the bytes travel, as the nodes have it. replicas: for how many copies a put waits; None: as many
    as the cluster keeps. arena_bytes and ring_bytes: memory for what is put and got.
    `Unavailable` where no node answers, unless lazy.
    """

    def __init__(
        self,
        seeds: Sequence[str],
        *,
        token: str,
        timeout_s: float = 5.0,
        transfer: str = "nixl",
        replicas: int | None = None,
        tls: Tls | None = None,
        arena_bytes: int = ARENA_BYTES,
        ring_bytes: int = RING_BYTES,
        policy: RouterPolicy | None = None,
        lazy: bool = False,
    ) -> None:
        Deadline(timeout_s)
        self._timeout_s, self._replicas = timeout_s, replicas
        self._streams = Streams()

        def new_agent() -> Any:
            agent = make_safe_agent(transfer, "client", self._streams.book.find)
            self._streams.set_agent(agent)
            return agent

        self._ring = LandingRing(new_agent, arena_bytes=arena_bytes, ring_bytes=ring_bytes)
        self._copies = ThreadPoolExecutor(1, "kvstore-landing")
        self._spaces: dict[tuple[str, bytes], ClusterSpace] = {}
        self._chains: deque[c.U8] = deque(maxlen=_CHAINS)
        self._closed = False
        self._thread = LoopThread("kvstore-cluster")
        try:
            made = self._make(seeds, token, tls, policy)
            self._world, self.router = self._run(made, timeout_s)
            if not lazy:
                self._run(self.router.refresh(), timeout_s)
        except BaseException:
            self.close()
            raise
        self._putter = Putter(self.router, self._ring, self._thread)

    async def _make(
        self, seeds: Sequence[str], token: str, tls: Tls | None, policy: RouterPolicy | None
    ) -> tuple[AsyncWorld, Router]:
        world = AsyncWorld(token=token, tls=tls, streams=self._streams)
        router = Router(world, self._ring, seeds, policy)
        world.spawn(router.run())
        return world, router

    # -- namespaces --------------------------------------------------------------------

    def open_namespace(
        self, name: str, layout: Layout, *, timeout_s: float | None = None
    ) -> NamespaceHandle:
        """See `Session.open_namespace`."""
        deadline = self._deadline(timeout_s)
        space = self._run(self.router.open(name, layout), deadline.left_s)
        self._spaces[name, layout.encode()] = space
        return NamespaceHandle(
            id=0, name=name, layout=layout, generation=space.generation, key=space.key
        )

    def _space(self, namespace: NamespaceHandle, deadline: Deadline) -> ClusterSpace:
        key = (namespace.name, namespace.layout.encode())
        known = self._spaces.get(key)
        if known is None:
            known = self._run(self.router.open(namespace.name, namespace.layout), deadline.left_s)
            self._spaces[key] = known
        return known

    # -- reading -----------------------------------------------------------------------

    def match(
        self,
        namespace: NamespaceHandle,
        hashes: Hashes,
        *,
        hint: Hint | None = None,
        prefetch: bool = False,
        timeout_s: float | None = None,
    ) -> Matched:
        """See `Session.match`; one call to each node that has a segment of the chain, and one more
        to the other replicas where the leading part ends. prefetch: left to the get."""
        del prefetch
        deadline = self._deadline(timeout_s)
        chain = checked_chain(hashes)
        if hint:
            hint_ms(hint)
        try:
            space = self._space(namespace, deadline)
            places = self._places_of_chain(namespace.layout, chain)
            left_ms = 1e3 * max(deadline.left_s - SLACK_S, 1e-3)
            tiers = self._run(self.router.match(space, chain, places, left_ms), deadline.left_s)
        except (Unavailable, DeadlineExceeded):
            return NOTHING_MATCHED
        if hint and len(tiers):
            self._advise(namespace, chain[: len(tiers)], hint, deadline)
        return Matched(len(tiers), tiers)

    def get_into(
        self,
        namespace: NamespaceHandle,
        hashes: Hashes,
        destinations: Sequence[Bytes1D],
        *,
        cells: Iterable[int] = (),
        timeout_s: float | None = None,
    ) -> list[Hit | Miss]:
        """See `Session.get_into`; nodes write to this client's ring, from where sound blocks are
        copied to the destinations."""
        deadline = self._deadline(timeout_s)
        request = checked_get(namespace, hashes, destinations, cells)
        n, part = len(request.chain), request.part
        targets = np.array(request.targets, np.uint64)
        reason = MissReason.NOT_STORED

        def arrive(rows: npt.NDArray[np.intp], addresses: c.U64) -> c.U64:
            return part.take_out(addresses, targets[rows])

        try:
            space = self._space(namespace, deadline)
            tiers = self._run(
                self.router.get(
                    space,
                    request.chain,
                    self._places_of_chain(namespace.layout, request.chain),
                    cells=part.cells,
                    nbytes=part.nbytes,
                    accept=self._accepting(request.chain, part, arrive),
                    timeout_ms=1e3 * max(deadline.left_s - SLACK_S, 1e-3),
                ),
                deadline.left_s,
            )
        except (Unavailable, DeadlineExceeded):
            tiers, reason = np.zeros(n, np.uint8), MissReason.UNAVAILABLE
        leading = n if tiers.all() else int(tiers.argmin())
        results: list[Hit | Miss] = [Hit(TIERS[code]) for code in tiers[:leading].tolist()]
        if leading < n:
            results += [Miss(reason)] + [Miss(MissReason.NOT_STORED)] * (n - leading - 1)
        return results

    def view(
        self, namespace: NamespaceHandle, hashes: Hashes, *, timeout_s: float | None = None
    ) -> RingView | CopiedView:
        """See `Session.view`; the blocks lie where they landed, in this client's ring. Views may
        hold half of it; beyond that the blocks are copies."""
        deadline = self._deadline(timeout_s)
        matched = self.match(namespace, hashes, timeout_s=deadline.left_s)
        chain = checked_chain(hashes)[: matched.count]
        if not len(chain):
            return CopiedView([])
        nbytes = len(chain) * landing_bytes(namespace.layout.block_bytes)
        if self._ring.hold(nbytes):
            view = RingView(self._ring, nbytes)
            try:
                self._land(namespace, chain, view, deadline)
            except BaseException:
                view.release()
                raise
            return view
        rows = list(np.empty((len(chain), namespace.layout.block_bytes), np.uint8))
        got = self.get_into(namespace, chain, rows, timeout_s=max(deadline.left_s, 1e-3))
        hits = sum(isinstance(each, Hit) for each in got)
        return CopiedView(rows[:hits])

    def _land(
        self, namespace: NamespaceHandle, chain: c.U8, view: RingView, deadline: Deadline
    ) -> None:
        """Gets blocks to stay where they land; the leading ones that came are the view's."""
        part, space = part_of(namespace.layout), self._space(namespace, deadline)
        landed = np.zeros(len(chain), np.uint64)

        def arrive(rows: npt.NDArray[np.intp], addresses: c.U64) -> c.U64:
            landed[rows] = addresses
            return part.own_sums(addresses)

        try:
            tiers = self._run(
                self.router.get(
                    space,
                    chain,
                    self._places_of_chain(namespace.layout, chain),
                    cells=part.cells,
                    nbytes=part.nbytes,
                    accept=self._accepting(chain, part, arrive),
                    keep=view.keep,
                    timeout_ms=1e3 * max(deadline.left_s - SLACK_S, 1e-3),
                ),
                deadline.left_s,
            )
        except (Unavailable, DeadlineExceeded):
            return
        leading = len(chain) if tiers.all() else int(tiers.argmin())
        addresses = landed[:leading].tolist()
        view.blocks = [_read_only(self._ring.row(each, part.nbytes)) for each in addresses]

    def _accepting(self, chain: c.U8, part: Part, arrive: Arrive) -> Accept:
        """Says which blocks are sound, of `arrive`'s checksums of rows that landed at addresses.
        Where it copies, they are the copies': whatever lands later cannot change what was
        checked."""

        def check(
            rows: npt.NDArray[np.intp], addresses: c.U64, headers: c.U8
        ) -> npt.NDArray[np.bool_]:
            said, sound = _said(headers, chain[rows], part)

            def check_some(first: int, end: int) -> None:
                found = arrive(rows[first:end], addresses[first:end])
                sound[first:end] &= (found == said[first:end]).all(axis=1)

            groups, end_s = groups_of(len(rows), part.nbytes), time.monotonic() + self._timeout_s
            done = in_parallel(check_some, groups, part.nbytes * len(rows), end_s)
            for first, end in groups[done:]:
                sound[first:end] = False
            return sound

        async def accept(
            rows: npt.NDArray[np.intp], addresses: c.U64, headers: c.U8
        ) -> npt.NDArray[np.bool_]:
            loop = self._thread.loop
            return await loop.run_in_executor(self._copies, check, rows, addresses, headers)

        return accept

    # -- writing -----------------------------------------------------------------------

    def put(
        self,
        namespace: NamespaceHandle,
        hashes: Hashes,
        sources: Sequence[Bytes1D],
        *,
        put_id: bytes | None = None,
        cells: Iterable[int] = (),
        parent: bytes = b"",
        position: int = -1,
        ttl_s: float | None = None,
        hint: Hint | None = None,
        persist: bool = False,
        timeout_s: float | None = None,
    ) -> PutResult:
        """See `Session.put`; blocks that lie in `buffers` are not copied. Ranks that put cells of
        the same blocks do so through clients of their own. `PutResult.replicated` says how many
        blocks are at as many nodes as were waited for."""
        deadline = self._deadline(timeout_s)
        put = checked_put(
            namespace,
            hashes,
            sources,
            put_id=put_id,
            cells=cells,
            parent=parent,
            position=position,
            ttl_s=ttl_s,
            hint=hint,
        )
        try:
            space = self._space(namespace, deadline)
        except (Unavailable, DeadlineExceeded):
            n = len(put.chain)
            return PutResult(stored=0, existed=0, waiting=0, not_stored=n, retry_after_ms=1000)
        replicas = self.router.view.replicas if self.router.view else 1
        plan = PutPlan(
            space=space,
            request=put,
            places=self._places_of_put(put),
            copies=self._replicas or replicas,
            persist=persist,
            deadline=deadline,
        )
        result = self._putter.put(plan)
        self._remember(put)
        if hint:
            self._advise(namespace, put.chain, hint, deadline)
        return result

    def buffers(self, n: int, nbytes: int) -> RingView:
        """See `Session.buffers`; with views they may hold half of the ring."""
        check_buffers(n, nbytes)
        held = n * landing_bytes(nbytes)
        full = ResourceExhausted(
            f"{held} bytes more of the ring cannot be held: set ring_bytes higher",
            retry_after_ms=limits.RETRY_AFTER_MS,
        )
        if not self._ring.hold(held):
            raise full
        view = RingView(self._ring, held)
        addresses = self._ring.take(n, nbytes)
        if addresses is None:
            view.release()
            raise full
        view.keep(addresses)
        view.blocks = [self._ring.row(address, nbytes) for address in addresses.tolist()]
        return view

    # -- places ------------------------------------------------------------------------

    def _places_of_chain(self, layout: Layout, chain: c.U8) -> c.U64:
        """Of a chain from its beginning, or of one that a match or put has shown before."""
        segment = segment_blocks(layout.block_tokens)
        known = self._chain_with(chain[0].tobytes())
        if known is not None:
            at, earlier = known
            if at:
                head = earlier[at // segment * segment].tobytes()
                return places_of(chain, position=at, segment=segment, first_place=place_of(head))
        self._chains.append(chain)
        return places_of(chain, position=0, segment=segment)

    def _places_of_put(self, put: PutRequest) -> c.U64:
        segment = segment_blocks(put.namespace.layout.block_tokens)
        if put.position <= 0 or put.position % segment == 0:
            return places_of(put.chain, position=put.position, segment=segment)
        known = self._chain_with(put.parent) if put.parent else None
        first_place = None
        if known is not None and known[0] == put.position - 1:
            head = known[1][put.position // segment * segment]
            first_place = place_of(head.tobytes())
        return places_of(put.chain, position=put.position, segment=segment, first_place=first_place)

    def _remember(self, put: PutRequest) -> None:
        """So that what follows in the chain finds its segment."""
        if put.position == 0:
            self._chains.append(put.chain)
        elif put.position > 0 and put.parent:
            known = self._chain_with(put.parent)
            if known is not None and known[0] == put.position - 1:
                self._chains.append(np.concatenate((known[1][: put.position], put.chain)))

    def _chain_with(self, key: bytes) -> tuple[int, c.U8] | None:
        """The position of a key in the latest chain that has it, and that chain."""
        wanted = np.frombuffer(key, np.uint64)
        for chain in reversed(self._chains):
            words = np.ascontiguousarray(chain).view(np.uint64).reshape(-1, 4)
            found = np.flatnonzero(words[:, 0] == wanted[0])
            for at in found.tolist():
                if (words[at] == wanted).all():
                    return at, chain
        return None

    # -- the rest ----------------------------------------------------------------------

    def drop(
        self, namespace: NamespaceHandle, hashes: Hashes, *, timeout_s: float | None = None
    ) -> int:
        """See `Session.drop`; a node that is away keeps what it has, and brings it back."""
        deadline = self._deadline(timeout_s)
        chain = checked_chain(hashes)
        space = self._space(namespace, deadline)
        return self._run(self.router.drop(space, chain, 1e3 * deadline.left_s), deadline.left_s)

    def drop_namespace(self, namespace: NamespaceHandle, *, timeout_s: float | None = None) -> int:
        """See `Session.drop_namespace`; `Unavailable` unless every member has forgotten it."""
        deadline = self._deadline(timeout_s)
        space = self._space(namespace, deadline)
        left_ms = 1e3 * deadline.left_s
        return self._run(self.router.drop_namespace(space, left_ms), deadline.left_s)

    def hint(
        self,
        namespace: NamespaceHandle,
        hashes: Hashes,
        hint: Hint,
        *,
        timeout_s: float | None = None,
    ) -> int:
        """See `Session.hint`; told to every member."""
        deadline = self._deadline(timeout_s)
        chain, for_ms = checked_chain(hashes), hint_ms(hint)
        space = self._space(namespace, deadline)
        advising = self.router.advise(
            space, chain, kind=int(hint.kind), for_ms=for_ms, timeout_ms=1e3 * deadline.left_s
        )
        return self._run(advising, deadline.left_s)

    def explain(
        self, namespace: NamespaceHandle, hashes: Hashes, *, timeout_s: float | None = None
    ) -> list[BlockReport]:
        """See `Session.explain`; of each block the best that any member says."""
        deadline = self._deadline(timeout_s)
        chain = checked_chain(hashes)
        space = self._space(namespace, deadline)
        said = self._run(self.router.explain(space, chain, 1e3 * deadline.left_s), deadline.left_s)
        if not said:
            raise Unavailable("no node of the cluster answers")
        columns = [reports(explained) for explained in said.values()]
        return [max(each, key=_rank) for each in zip(*columns, strict=True)]

    def stats(self, *, timeout_s: float | None = None) -> c.Stats:
        """See `Session.stats`; the sums over all members that answer."""
        answers = self._ask_all(c.Stat(), self._deadline(timeout_s))
        names = c.Stats.__slots__
        total = {name: sum(getattr(each, name) for each in answers) for name in names}
        total["nvme_health"] = max(each.nvme_health for each in answers)
        total["nvme_ready"] = min(each.nvme_ready for each in answers)
        return c.Stats(**total)

    def info(self, *, timeout_s: float | None = None) -> StoreInfo:
        """See `Session.info`; of the first member that answers, with the namespaces of all. Their
        ids are good in this answer alone, and each copy of a block counts."""
        answers = self._ask_all(c.Describe(), self._deadline(timeout_s))
        infos = [store_info(answer) for answer in answers]
        return replace(
            infos[0],
            max_blocks=sum(info.max_blocks for info in infos),
            namespaces=_merged(infos),
        )

    def status(self, *, timeout_s: float | None = None) -> dict[str, m.Status | None]:
        """What each member says of itself, None for one that does not answer."""
        deadline = self._deadline(timeout_s)
        view = self._run(self.router.refresh(), deadline.left_s)

        async def ask(address: str) -> m.Status | None:
            try:
                answer: m.Status = await self._world.call(
                    address, m.AskStatus(), 1e3 * min(deadline.left_s, 2.0)
                )
            except KVStoreError:
                return None
            return answer

        async def ask_all() -> list[m.Status | None]:
            return list(await asyncio.gather(*(ask(member.address) for member in view.members)))

        found = self._run(ask_all(), deadline.left_s)
        return {m.name: status for m, status in zip(view.members, found, strict=True)}

    def change(self, message: m.Drain | m.Join, *, timeout_s: float | None = None) -> None:
        """Drains a member, or lets it join again. `InvalidArgument`, `Unavailable`."""
        deadline = self._deadline(timeout_s)
        view = self._run(self.router.refresh(), deadline.left_s)
        error: KVStoreError = Unavailable("no node of the cluster answers")
        for member in view.members:
            try:
                asking = self._world.call(member.address, message, 1e3 * deadline.left_s)
                self._run(asking, deadline.left_s)
            except (Unavailable, DeadlineExceeded) as found:
                error = found
                continue
            return
        raise error

    def close(self) -> None:
        """See `Session.close`: when it returns no node writes to this client's memory any more."""
        if self._closed:
            return
        self._closed = True
        self._thread.refuse()
        if hasattr(self, "router"):
            self._thread.finish(self.router.close(), _CLOSE_S)
            self._thread.finish(self._world.close(), _CLOSE_S)
        self._ring.close()
        self._thread.close()
        self._copies.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    # -- inside ------------------------------------------------------------------------

    def _advise(
        self, namespace: NamespaceHandle, chain: c.U8, hint: Hint, deadline: Deadline
    ) -> None:
        """Advice beside a match or a put: where it is not taken, nothing is lost."""
        try:
            self.hint(namespace, chain, hint, timeout_s=max(deadline.left_s, 1e-3))
        except (Unavailable, DeadlineExceeded, ResourceExhausted):
            return

    def _ask_all(self, message: Any, deadline: Deadline) -> list[Any]:
        view = self._run(self.router.refresh(), deadline.left_s)
        answers = []
        for member in view.members:
            try:
                asking = self.router.call(member, message, 1e3 * min(deadline.left_s, 1.0))
                answers.append(self._run(asking, deadline.left_s))
            except (Unavailable, DeadlineExceeded):
                continue
        if not answers:
            raise Unavailable("no node of the cluster answers")
        return answers

    def _deadline(self, timeout_s: float | None) -> Deadline:
        return Deadline(self._timeout_s if timeout_s is None else timeout_s)

    def _run(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        try:
            return self._thread.run(work, timeout_s)
        finally:
            self._ring.sweep()


def _said(headers: c.U8, chain: c.U8, part: Part) -> tuple[c.U64, npt.NDArray[np.bool_]]:
    """What headers (n, bytes) say the checksums of the part's cells are, and which of them are
    sound headers of the chain's blocks."""
    said = np.zeros((len(headers), len(part.cell_runs)), np.uint64)
    sound = np.zeros(len(headers), bool)
    for i, (packed, key) in enumerate(zip(headers, chain, strict=True)):
        try:
            header = unpack(packed)
        except (Corrupted, ProtocolError):
            continue
        sums = header.checksums
        if header.key == key.tobytes() and len(sums) > int(part.cells.max(initial=0)):
            own = sums[part.cells] if len(part.cells) else sums
            sound[i] = len(own) == said.shape[1]
            if sound[i]:
                said[i] = own
    return said, sound


def _read_only(block: Bytes1D) -> Bytes1D:
    block.flags.writeable = False
    return block


def _merged(infos: Sequence[StoreInfo]) -> tuple[NamespaceInfo, ...]:
    """The namespaces of all members, by name and layout: each one has numbers of its own."""
    found: dict[tuple[str, bytes], NamespaceInfo] = {}
    for each in (namespace for info in infos for namespace in info.namespaces):
        key = (each.name, each.layout.encode())
        known = found.get(key)
        found[key] = replace(each, blocks=each.blocks + known.blocks) if known else each
    return tuple(replace(found[key], id=i) for i, key in enumerate(sorted(found), start=1))


def _rank(report: BlockReport) -> tuple[int, float]:
    return _RANK.get(report.status, int(report.status)), report.when or 0.0
