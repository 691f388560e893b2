"""How a cluster agrees on its members: two registers, which etcd or a static list implements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvstore.cluster.members import Member, View


class Coordination(Protocol):
    """Live registrations and one agreed view. Every call may raise `Unavailable` or
    `DeadlineExceeded`; nothing that moves blocks waits for any of them."""

    async def register(self, member: Member) -> None:
        """Keeps `member` registered until this process ends or `close`, under a lease that it
        renews by itself; registers again by itself after the lease was lost. `InvalidArgument`
        where a living process of another run has the name."""

    async def registered(self) -> Sequence[Member]:
        """Who is registered now; a linearizable read."""

    async def view(self) -> View | None:
        """The agreed view; None before there was one. A linearizable read."""

    async def advance(self, view: View) -> bool:
        """Makes `view` the agreed one if the epoch before it is the present one (or there is none
        and its epoch is 1); False where somebody else was first."""

    async def changed(self, timeout_s: float) -> None:
        """Waits until registrations or the view may have changed, or for so long."""

    async def close(self) -> None:
        """Ends the registration, and gives all back."""
