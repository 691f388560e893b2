"""What `kvstore cluster` shows and does: the members as they see themselves and each other, drains.

How far a drain is can only be asked, so it is asked again and again, until it is over.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from kvstore.cluster import messages as m
from kvstore.cluster.members import Member, MemberState, View, decode_view
from kvstore.errors import DeadlineExceeded, InvalidArgument, ProtocolError, Unavailable
from kvstore.sizes import format_size
from kvstore_client.cli import output

_ASK_AGAIN_S = 0.5
_COLUMNS = (
    *("name", "address", "state", "serving", "suspected by", ">blocks", ">used", ">total"),
    *(">epoch", ">settled", ">repair left", ">failed transfers"),
)

Statuses = Mapping[str, m.Status | None]


class Cluster(Protocol):
    """What is needed of a session with a cluster."""

    def status(self, *, timeout_s: float | None = None) -> Statuses:
        """What each member says of itself, None for one that does not answer."""

    def change(self, message: m.Drain | m.Join, *, timeout_s: float | None = None) -> None:
        """Drains a member, or lets it join again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One member. pong and counters: None and empty for one that does not answer."""

    member: Member
    suspected_by: tuple[str, ...]
    pong: m.Pong | None
    counters: Mapping[str, int]

    def as_json(self) -> output.Json:
        """One of the members in the answer of `cluster status`; null where it does not answer."""
        pong, member = self.pong, self.member
        return {
            "name": member.name,
            "address": member.address,
            "state": member.state,
            "weight": member.weight,
            "answers": pong is not None,
            "serving": bool(pong.serving) if pong else None,
            "suspected_by": list(self.suspected_by),
            "blocks": pong.blocks if pong else None,
            "used_bytes": pong.used_bytes if pong else None,
            "total_bytes": pong.total_bytes if pong else None,
            "epoch": pong.epoch if pong else None,
            "settled": pong.settled if pong else None,
            "counters": dict(self.counters),
        }

    def as_row(self) -> tuple[str, ...]:
        """The same as text."""
        member, pong = self.member, self.pong
        known = (member.name, member.address, str(member.state))
        suspects = ",".join(self.suspected_by) or "-"
        if pong is None:
            return (*known, "NO ANSWER", suspects, *("-" for _ in _COLUMNS[5:]))
        return (
            *known,
            "yes" if pong.serving else "not yet",
            suspects,
            f"{pong.blocks:,}",
            format_size(pong.used_bytes),
            format_size(pong.total_bytes),
            str(pong.epoch),
            str(pong.settled) if pong.settled >= 0 else "-",
            f"{self.counters.get('repair_left_blocks', 0):,}",
            f"{self.counters.get('failed_transfers', 0):,}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The members in the latest view that any of them goes by."""

    view: View
    rows: tuple[Row, ...]

    @property
    def all_answer(self) -> bool:
        """Whether every member has answered."""
        return all(row.pong for row in self.rows)

    def state_of(self, name: str) -> MemberState | None:
        """What a member is for; None for one that is none (any more)."""
        member = self.view.find(name)
        return member.state if member else None

    def as_json(self) -> output.Json:
        """The answer of `cluster status`."""
        return {
            "epoch": self.view.epoch,
            "replicas": self.view.replicas,
            "members": [row.as_json() for row in self.rows],
        }

    def show(self) -> None:
        """Prints the answer of `cluster status`."""
        copies = "copy" if self.view.replicas == 1 else "copies"
        members = output.count(len(self.rows), "member")
        print(f"epoch {self.view.epoch}, {self.view.replicas} {copies}, {members}")
        output.show(output.table(_COLUMNS, [row.as_row() for row in self.rows]))


def report(cluster: Cluster, timeout_s: float) -> Report:
    """Asks all members. `Unavailable` where none answers."""
    found = cluster.status(timeout_s=timeout_s)
    said = {name: status for name, status in found.items() if status is not None}
    if not said:
        raise Unavailable("no node of the cluster answers")
    views = [decode_view(status.view) for status in said.values()]
    view = max(views, key=lambda each: each.epoch)
    suspects = {name: status.suspects.split("\n") for name, status in said.items()}
    rows = []
    for member in view.members:
        by = tuple(name for name, names in suspects.items() if member.name in names)
        status = said.get(member.name)
        rows.append(
            Row(
                member=member,
                suspected_by=by,
                pong=_pong(status) if status else None,
                counters=_counters(status) if status else {},
            )
        )
    return Report(view=view, rows=tuple(rows))


def change(cluster: Cluster, message: m.Drain | m.Join, timeout_s: float) -> Report:
    """Has a member drained, or joined again; the members as they are then."""
    cluster.change(message, timeout_s=timeout_s)
    return report(cluster, timeout_s)


def wait_until_out(cluster: Cluster, name: str, *, wait_s: float, call_s: float) -> Report:
    """Waits until a drained member has given away all that it has.

    `DeadlineExceeded` after `wait_s`, and the drain goes on. `InvalidArgument` where somebody lets
    it join again meanwhile, `Unavailable` where it leaves the cluster before it is drained.
    """
    end_s, again = time.monotonic() + wait_s, threading.Event()
    while True:
        found = report(cluster, call_s)
        state = found.state_of(name)
        if state == MemberState.OUT:
            return found
        if state is None:
            raise Unavailable(f"{name} left the cluster before it was drained")
        if state != MemberState.DRAINING:
            raise InvalidArgument("name", f"{name} is {state} again: somebody let it join")
        left_s = end_s - time.monotonic()
        if left_s <= 0:
            raise DeadlineExceeded(f"{name} is still draining, and goes on: see cluster status")
        again.wait(min(_ASK_AGAIN_S, left_s))


def _pong(status: m.Status) -> m.Pong:
    pong = m.CODEC.decode_frame(status.pong)
    if not isinstance(pong, m.Pong):
        raise ProtocolError(f"a status with {type(pong).__name__} instead of Pong")
    return pong


def _counters(status: m.Status) -> dict[str, int]:
    return dict(zip(status.names.split("\n"), status.values.tolist(), strict=True))
