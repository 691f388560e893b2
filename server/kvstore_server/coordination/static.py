"""Members that are given and never change: what a cluster without etcd has."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from kvstore.cluster.members import Member, View
from kvstore.errors import InvalidArgument, Unavailable


class StaticCoordination:
    """`Coordination` whose one view, at epoch 1, is a list that every node is given alike.

    me: the name of this node. `InvalidArgument` where it is not in the list.
    """

    def __init__(self, members: Sequence[Member], replicas: int, me: str) -> None:
        self._view = View(epoch=1, replicas=replicas, members=tuple(members))
        self._me = me
        self._closed = asyncio.Event()
        if self._view.find(me) is None:
            names = ", ".join(member.name for member in self._view.members)
            raise InvalidArgument("members", f"this node, {me}, is none of {names or 'no members'}")

    async def register(self, member: Member) -> None:
        """`InvalidArgument` for another name or address than the list has for this node."""
        listed = self._view.find(self._me)
        assert listed
        if (member.name, member.address) != (listed.name, listed.address):
            raise InvalidArgument(
                "members",
                f"this node is {member.name} at {member.address},"
                f" but the list says {listed.name} at {listed.address}",
            )

    async def registered(self) -> Sequence[Member]:
        """All members, whether they live or not."""
        return self._view.members

    async def view(self) -> View | None:
        """The list."""
        return self._view

    async def advance(self, view: View) -> bool:
        """False: there is no other view."""
        del view
        return False

    async def changed(self, timeout_s: float) -> None:
        """Waits for so long, or until `close`; `Unavailable` after it."""
        if self._closed.is_set():
            raise Unavailable("closed")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._closed.wait()

    async def close(self) -> None:
        """Ends what waits."""
        self._closed.set()
