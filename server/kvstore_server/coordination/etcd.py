"""Members and their view in etcd: registrations under leases, the view by compare-and-swap.

    /kvstore/<cluster>/members/<name>    a member as it registered itself, as long as its lease
    /kvstore/<cluster>/view              the agreed view

Nothing else is kept there. Needs the extra `etcd`.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

import structlog

from kvstore import limits
from kvstore.cluster.members import (
    Member,
    View,
    decode_member,
    decode_view,
    encode_member,
    encode_view,
)
from kvstore.errors import InvalidArgument, KVStoreError, ProtocolError, Unavailable
from kvstore_server.coordination.etcd_client import Access, Entry, EtcdClient, Lease
from kvstore_server.supervisor import BackOff

T = TypeVar("T")

_CLUSTER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_ROOT = "/kvstore"
_MOST_TTL_S = 3600
_RENEWALS = 3  # in each time to live
_RETRIES = 10  # likewise, where renewing fails
_LOOK_S = 0.25  # between two looks at a name that somebody else may still have
# etcd tells what a lease has left in whole seconds, rounded down; it looks for ended ones twice a
# second, and then has to agree that they ended.
_EXPIRY_S = 2.5
_WATCH_AGAIN = BackOff(first_s=0.1, limit_s=2.0, reset_after_s=10.0)

log = structlog.get_logger()


class EtcdCoordination:
    """`Coordination` by etcd. endpoints: `http://HOST:PORT` or `https://HOST:PORT` of its members.

    cluster: the name that its nodes share. access: None where etcd asks for nothing. lease_ttl_s:
    how long a node that says nothing stays registered. timeout_s: of each request to etcd, of which
    `advance` makes two; `register` may have to wait for the end of a lease as well. Belongs to the
    event loop that first uses it.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        cluster: str,
        *,
        access: Access | None = None,
        lease_ttl_s: int = 5,
        timeout_s: float = 2.0,
    ) -> None:
        """Connects with the first call. `InvalidArgument` for what cannot be tried at all."""
        if not _CLUSTER.fullmatch(cluster):
            raise InvalidArgument(
                "cluster", f"{cluster!r}: 1 to 63 letters, digits, dots, dashes, please"
            )
        if not 1 <= lease_ttl_s <= _MOST_TTL_S:
            raise InvalidArgument("lease_ttl_s", f"{lease_ttl_s}: 1 to {_MOST_TTL_S}, please")
        self._client = EtcdClient(endpoints, access=access or Access(), timeout_s=timeout_s)
        root = f"{_ROOT}/{cluster}/"
        self._members, self._view = f"{root}members/", f"{root}view"
        self._registration = _Registration(self._client, self._members, lease_ttl_s)
        self._changes = _Changes(self._client, root)

    async def register(self, member: Member) -> None:
        """Waits as long as the lease of an earlier run of the same name may take to end.

        `InvalidArgument` where it does not end: that run lives. Another call of the same run says
        anew what the member is.
        """
        try:
            await self._registration.begin(member)
        except Unavailable as error:
            self._registration.tell(str(error))
            raise

    async def registered(self) -> Sequence[Member]:
        """By name. `ProtocolError` names a key whose value is no member, or not of that name."""
        entries = await self._client.under(self._members, most=limits.MAX_MEMBERS)
        members = [_decoded(decode_member, entry) for entry in entries]
        for entry, member in zip(entries, members, strict=True):
            if entry.key != self._members + member.name:
                raise ProtocolError(f"etcd's {entry.key} is about {member.name}: delete it")
        return members

    async def view(self) -> View | None:
        """`ProtocolError` names the key where its value is no view."""
        entry = await self._client.get(self._view)
        return None if entry is None else _decoded(decode_view, entry)

    async def advance(self, view: View) -> bool:
        """After an `Unavailable` the view may have been taken or not: ask for it."""
        if view.epoch < 1:
            raise InvalidArgument("epoch", f"{view.epoch}: the first is 1")
        there = await self._client.get(self._view)
        present = _decoded(decode_view, there).epoch if there else 0
        if view.epoch != present + 1:
            return False
        revision = there.revision if there else 0
        return await self._client.put_if(self._view, encode_view(view), revision=revision)

    async def changed(self, timeout_s: float) -> None:
        """Returns also when a watch began, since what was before it is not told. Where etcd cannot
        be reached it waits for so long."""
        await self._changes.wait(timeout_s)

    async def close(self) -> None:
        """The name is free at once, if etcd can be reached, else when the lease ends."""
        await self._changes.end()
        await self._registration.end()
        await self._client.close()


class _Registration:
    """One member's key, and the lease under which it is kept."""

    def __init__(self, client: EtcdClient, prefix: str, ttl_s: int) -> None:
        self._client, self._prefix, self._ttl_s = client, prefix, ttl_s
        self._member: Member | None = None
        self._lease: Lease | None = None
        self._renewing: asyncio.Task[None] | None = None
        self._trouble = ""  # what was last logged

    async def begin(self, member: Member) -> None:
        """Registers, and renews from then on."""
        self._lease = await self._claim(member, self._lease)
        self.tell("")
        self._member = member
        if self._renewing is None:
            self._renewing = asyncio.create_task(self._renew())

    async def end(self) -> None:
        """Gives the name back."""
        await _cancelled(self._renewing)
        self._renewing = None
        if self._lease:
            with contextlib.suppress(KVStoreError):
                await self._client.revoke(self._lease)

    async def _claim(self, member: Member, lease: Lease | None) -> Lease:
        """Sets the key, under this lease or a new one, once no other run has it; see `register`."""
        key = self._prefix + member.name
        now = asyncio.get_running_loop().time
        holder, until = 0, 0.0
        while True:
            there = await self._client.get(key)
            if there is None or _run(there) == member.run:
                lease = lease or await self._client.grant(self._ttl_s)
                revision = there.revision if there else 0
                value = encode_member(member)
                if await self._client.put_if(key, value, revision=revision, lease=lease.id):
                    return lease
            elif not holder and there.lease:
                holder = there.lease
                until = now() + await self._client.left_s(holder) + _EXPIRY_S
            elif there.lease != holder or now() >= until:
                raise _name_taken(member, there)
            await asyncio.sleep(_LOOK_S)

    async def _renew(self) -> None:
        """Keeps the lease; where it was lost, registers anew. Ends when it is cancelled."""
        pause_s = self._ttl_s / _RENEWALS
        while True:
            await asyncio.sleep(pause_s)
            try:
                await self._renew_once()
                self.tell("")
                pause_s = self._ttl_s / _RENEWALS
            except KVStoreError as error:
                self.tell(str(error))
                pause_s = self._ttl_s / _RETRIES

    async def _renew_once(self) -> None:
        if self._lease and not await self._client.renew(self._lease):
            self._lease = None
        if self._lease is None:
            assert self._member
            log.warning("registration lost; registering again", member=self._member.name)
            self._lease = await self._claim(self._member, None)

    def tell(self, trouble: str) -> None:
        """Logs what has changed, not every attempt."""
        if trouble and not self._trouble:
            made = "renewed" if self._member else "made"
            log.warning(f"the registration cannot be {made}", error=trouble)
        elif self._trouble and not trouble:
            log.info("the registration is renewed again" if self._member else "registered")
        self._trouble = trouble


class _Changes:
    """Whether anything changed that nobody has looked at since."""

    def __init__(self, client: EtcdClient, prefix: str) -> None:
        self._client, self._prefix = client, prefix
        self._seen, self._told = 0, 0
        self._more = asyncio.Condition()
        self._watching: asyncio.Task[None] | None = None
        self._ended = False

    async def wait(self, timeout_s: float) -> None:
        """Returns at the next change, or that which came since the last `wait` ended."""
        if self._ended:
            raise Unavailable("the connection to etcd is closed")
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch())
        told = self._told
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._more:
                await self._more.wait_for(lambda: self._ended or self._seen > told)
        self._told = self._seen

    async def end(self) -> None:
        """Ends what waits."""
        self._ended = True
        await _cancelled(self._watching)
        await self._notify()

    async def _watch(self) -> None:
        """Watches, again and again, in ever longer pauses. Ends when it is cancelled."""
        now = asyncio.get_running_loop().time
        pause_s: float | None = None
        while True:
            began = now()
            try:
                async with contextlib.aclosing(self._client.watch(self._prefix)) as changes:
                    async for _ in changes:
                        await self._notify()
            except KVStoreError as error:
                log.debug("no watch at etcd", error=str(error))
            pause_s = _WATCH_AGAIN.delay_s(pause_s, now() - began)
            await asyncio.sleep(pause_s)

    async def _notify(self) -> None:
        async with self._more:
            self._seen += 1
            self._more.notify_all()


def _decoded(decode: Callable[[bytes], T], entry: Entry) -> T:
    try:
        return decode(entry.value)
    except ProtocolError as error:
        raise ProtocolError(f"etcd's {entry.key}: {error}") from None


def _run(entry: Entry) -> int:
    return _decoded(decode_member, entry).run


def _name_taken(member: Member, there: Entry) -> InvalidArgument:
    other = _decoded(decode_member, there)
    return InvalidArgument(
        "name",
        f"two nodes are called {member.name}: this one at {member.address}, another at"
        f" {other.address}; give one of them another name",
    )


async def _cancelled(task: asyncio.Task[None] | None) -> None:
    """Ends a task of ours, and raises what it ended with before."""
    if task is not None:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
