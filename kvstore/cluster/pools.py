"""Other nodes' pools, as a node reads from them."""

from __future__ import annotations

from dataclasses import dataclass

from kvstore.cluster import messages as m
from kvstore.cluster.members import Member
from kvstore.cluster.site import Site
from kvstore.cluster.world import Attachment, Memory, Transfers
from kvstore.errors import InvalidArgument, KVStoreError, PermissionDenied
from kvstore.transfer.base import Arrived, Pieces, TransferFailed


@dataclass(slots=True, eq=False)
class _Pool:
    attachment: Attachment
    memory: Memory


class Pools:
    """One connection to each node that blocks were pulled from."""

    def __init__(self, site: Site, transfers: Transfers) -> None:
        self._site, self._transfers = site, transfers
        self._pools: dict[str, _Pool] = {}

    async def memory_of(self, name: str) -> Memory:
        """The pool of the node of that name, connected anew where the connection was lost.
        `InvalidArgument` for one that is no member; raises as `World.attach` and
        `Transfers.connect`."""
        member = self._site.view.find(name)
        if member is None:
            raise InvalidArgument("source", f"{name!r} is no member")
        known = self._pools.get(name)
        if known and not known.attachment.lost:
            return known.memory
        if known:
            del self._pools[name]  # before anything is awaited: the next one there is a new one
            await self._end(known)
        made = await self._connect(member)
        other = self._pools.get(name)
        if other:  # another message was faster
            await made.memory.close()
            return other.memory
        self._pools[name] = made
        return made.memory

    async def close(self) -> None:
        """Ends all of them."""
        for pool in self._pools.values():
            await self._end(pool)
        self._pools.clear()

    async def _connect(self, member: Member) -> _Pool:
        site = self._site
        hello = m.Hello(
            version=m.MESSAGES_VERSION,
            name=site.me.name,
            kind=self._transfers.kind,
            agent=b"",
            epoch=site.view.epoch,
        )
        attachment = await site.world.attach(member.address, hello, site.policy.call_ms)
        welcomed = attachment.welcomed
        try:
            memory = await self._transfers.connect(
                welcomed.kind, welcomed.agent, site.policy.call_ms
            )
        except BaseException:
            await attachment.close()
            raise
        return _Pool(attachment=attachment, memory=_Closing(memory, attachment))

    async def _end(self, pool: _Pool) -> None:
        try:
            await pool.memory.close()
        except KVStoreError:
            self._site.counters.failed_transfers += 1


class _Closing:
    """A node's pool, whose connection ends with it."""

    def __init__(self, memory: Memory, attachment: Attachment) -> None:
        self._memory, self._attachment = memory, attachment

    async def read(self, pieces: Pieces, timeout_ms: float, arrived: Arrived | None = None) -> None:
        """See `Memory.read`."""
        if self._attachment.lost:
            raise TransferFailed("the other node is gone")
        await self._memory.read(pieces, timeout_ms, arrived)

    async def write(self, pieces: Pieces, timeout_ms: float) -> None:
        """Never: other nodes write their own pools."""
        del pieces, timeout_ms
        raise PermissionDenied("nobody writes to another node's pool")

    async def close(self) -> None:
        """See `Memory.close`."""
        try:
            await self._memory.close()
        finally:
            await self._attachment.close()
