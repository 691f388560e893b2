"""A `Session` over the nodes of a cluster: matches, gets and puts that survive any one of them.

Ours: the bytes' way between the caller's buffers and the memory that nodes reach. Whom to ask is
`kvstore.cluster.router`'s, which runs on a loop in a thread of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np

from kvstore import commands as c
from kvstore import limits
from kvstore.cluster import messages as m
from kvstore.cluster.contacts import ClusterSpace, RouterPolicy
from kvstore.cluster.router import Router
from kvstore.commands import ExplainStatus
from kvstore.errors import (
    DeadlineExceeded,
    InvalidArgument,
    KVStoreError,
    ResourceExhausted,
    Unavailable,
)
from kvstore.layout import Layout
from kvstore.session.addresses import addresses_of
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
from kvstore.session.parts import Part, part_of
from kvstore.session.requests import checked_chain, checked_get, checked_put, hint_ms
from kvstore.transfer.apart import make_safe_agent
from kvstore.transfer.base import Agent
from kvstore.transfer.nixl import has_rdma
from kvstore.transfer.ucxx import address_towards
from kvstore_client.cluster.backing import (
    DeviceBacking,
    DeviceMemory,
    HostBacking,
    addresses_on_device,
    agent_of_device,
    check_cells,
)
from kvstore_client.cluster.chains import Chains
from kvstore_client.cluster.gets import GetPlan, Getter
from kvstore_client.cluster.loop import SLACK_S, LoopThread
from kvstore_client.cluster.memory import LandingRing, RingView
from kvstore_client.cluster.puts import PutPlan, Putter
from kvstore_client.transfer import CopiedView
from kvstore_proto.cluster.pipes import Streams
from kvstore_proto.cluster.rpc import Tls
from kvstore_proto.cluster.world import AsyncWorld

T = TypeVar("T")
ARENA_BYTES = 64 << 20
RING_BYTES = 128 << 20
_CLOSE_S = 30.0
_RANK = {ExplainStatus.STORED: 9, ExplainStatus.CORRUPTED: 8, ExplainStatus.NOT_SEALED: 7}


class ClusterSession:
    """One client of a cluster; implements `Session`, thread-safe.

    seeds: addresses of some nodes, HOST:PORT each. token: the cluster's, for clients. transfer: how
    the bytes travel, as the nodes have it. replicas: for how many copies a put waits; None: as many
    as the cluster keeps. arena_bytes and ring_bytes: memory for what is put and got.
    `Unavailable` where no node answers, unless lazy.

    device: a GPU whose memory the ring is to be, which NIXL reads and writes where it is; there is
    no arena then. Views and `buffers` are `DeviceBytes` there: what is put must lie in `buffers`,
    and `get_into` is refused, as all that would copy through the host. device_over_tcp: also
    without an RDMA device, where this process may abort when a node dies.
    """

    def __init__(
        self,
        seeds: Sequence[str],
        *,
        token: str,
        timeout_s: float = 5.0,
        transfer: str = "auto",
        replicas: int | None = None,
        tls: Tls | None = None,
        arena_bytes: int = ARENA_BYTES,
        ring_bytes: int = RING_BYTES,
        policy: RouterPolicy | None = None,
        lazy: bool = False,
        device: DeviceMemory | None = None,
        device_over_tcp: bool = False,
    ) -> None:
        Deadline(timeout_s)
        self._timeout_s, self._replicas = timeout_s, replicas
        self._streams = Streams()

        def new_agent() -> Agent:
            if device:
                return agent_of_device(transfer, over_tcp=device_over_tcp)
            host = address_towards(seeds) if transfer == "ucxx" else ""
            agent = make_safe_agent(transfer, "client", self._streams.book.find, host=host)
            self._streams.set_agent(agent)
            return agent

        self._ring = LandingRing(
            new_agent,
            arena_bytes=0 if device else arena_bytes,
            ring_bytes=ring_bytes,
            make_backing=partial(DeviceBacking, device) if device else HostBacking,
        )
        self._spaces: dict[tuple[str, bytes], ClusterSpace] = {}
        self._chains = Chains()
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
        # A network card that hears no acknowledgement reads and writes once more, maybe from slots
        # that are others' by then: what lands so is final only when the node has answered.
        early = not (device or has_rdma())
        self._getter = Getter(self.router, self._ring, self._thread, early=early)
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
        """See `Session.open_namespace`; `LayoutMismatch` also for cells that a GPU does not hash,
        where the memory is one's."""
        deadline = self._deadline(timeout_s)
        if self._ring.on_device:
            check_cells(layout)
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
            places = self._chains.places(namespace.layout, chain)
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
        copied to the destinations. `InvalidArgument` where that is a GPU's memory."""
        deadline = self._deadline(timeout_s)
        if self._ring.on_device:
            raise InvalidArgument("destinations", "in a GPU's memory blocks are got by view")
        request = checked_get(namespace, hashes, destinations, cells)
        n, reason = len(request.chain), MissReason.NOT_STORED
        try:
            plan = self._plan(namespace, request.chain, request.part, deadline)
            tiers = self._getter.into(plan, np.array(request.targets, np.uint64)).tolist()
        except (Unavailable, DeadlineExceeded):
            tiers, reason = [], MissReason.UNAVAILABLE
        results: list[Hit | Miss] = [Hit(TIERS[code]) for code in tiers]
        if len(results) < n:
            results.append(Miss(reason))
        return results + [Miss(MissReason.NOT_STORED)] * (n - len(results))

    def view(
        self, namespace: NamespaceHandle, hashes: Hashes, *, timeout_s: float | None = None
    ) -> RingView | CopiedView:
        """See `Session.view`; the blocks lie where they landed, in this client's ring. Views may
        hold half of it; beyond that the blocks are copies, or `ResourceExhausted` where the ring
        is in a GPU's memory."""
        deadline = self._deadline(timeout_s)
        chain, nbytes = checked_chain(hashes), namespace.layout.block_bytes
        view = self._ring.reserve(len(chain), nbytes)
        if view is None:  # for all of them: for those that are there it may do
            matched = self.match(namespace, chain, timeout_s=deadline.left_s)
            chain = chain[: matched.count]
            if not len(chain):
                return CopiedView([])
            view = self._ring.reserve(len(chain), nbytes)
        if view is not None:
            try:
                plan = self._plan(namespace, chain, part_of(namespace.layout), deadline)
                self._getter.land(plan, view)
            except (Unavailable, DeadlineExceeded):
                view.release()
            except BaseException:
                view.release()
                raise
            return view
        if self._ring.on_device:
            raise _full(len(chain), nbytes)
        rows = list(np.empty((len(chain), nbytes), np.uint8))
        got = self.get_into(namespace, chain, rows, timeout_s=max(deadline.left_s, 1e-3))
        hits = sum(isinstance(each, Hit) for each in got)
        return CopiedView(rows[:hits])

    def _plan(
        self, namespace: NamespaceHandle, chain: c.U8, part: Part, deadline: Deadline
    ) -> GetPlan:
        return GetPlan(
            space=self._space(namespace, deadline),
            chain=chain,
            places=self._chains.places(namespace.layout, chain),
            part=part,
            deadline=deadline,
        )

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
            find=addresses_on_device if self._ring.on_device else addresses_of,
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
            places=self._chains.places_of_put(put),
            copies=self._replicas or replicas,
            persist=persist,
            deadline=deadline,
        )
        result = self._putter.put(plan)
        self._chains.remember(put)
        if hint:
            self._advise(namespace, put.chain, hint, deadline)
        return result

    def buffers(self, n: int, nbytes: int) -> RingView:
        """See `Session.buffers`; with views they may hold half of the ring."""
        check_buffers(n, nbytes)
        view = self._ring.reserve(n, nbytes)
        if view is None:
            raise _full(n, nbytes)
        addresses = self._ring.take(n, nbytes)
        if addresses is None:
            view.release()
            raise _full(n, nbytes)
        view.keep(addresses)
        view.blocks = [self._ring.row(address, nbytes) for address in addresses.tolist()]
        return view

    # -- the rest ----------------------------------------------------------------------

    def drop(
        self, namespace: NamespaceHandle, hashes: Hashes, *, timeout_s: float | None = None
    ) -> int:
        """See `Session.drop`; a node that is away keeps what it has, and brings it back."""
        deadline = self._deadline(timeout_s)
        chain = checked_chain(hashes)
        space = self._space(namespace, deadline)
        dropping = self.router.drop(space, chain, 1e3 * deadline.left_s)
        return self._run(dropping, deadline.left_s).blocks

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
        if hasattr(self, "_getter"):
            self._getter.close()

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


def _full(n: int, nbytes: int) -> ResourceExhausted:
    return ResourceExhausted(
        f"{n} blocks of {nbytes} bytes more cannot be held: set ring_bytes higher",
        retry_after_ms=limits.RETRY_AFTER_MS,
    )


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
