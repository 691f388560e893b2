"""Who is a member: the one value that a cluster agrees on."""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvstore import limits
from kvstore.errors import InvalidArgument, ProtocolError

VIEW_VERSION = 1
_BLANK = re.compile(r"[\s/,*=]")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class MemberState(enum.StrEnum):
    """What a member is for."""

    JOINING = "joining"  # new blocks go to it, older ones are still being brought
    UP = "up"
    DRAINING = "draining"  # nothing new goes to it, what it has is being taken away
    OUT = "out"  # drained: nothing is looked for there, until it joins again


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Member:
    """One `kvstore-server`. address: host:port of its peer service. weight: its share of the
    blocks beside the others'. run: differs in each life of its process. joined: the epoch that
    it has been a member since, 0 in a static list, of which all are members all the time."""

    name: str
    address: str
    weight: int = 1
    run: int = 0
    state: MemberState = MemberState.UP
    joined: int = 0

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise InvalidArgument(
                "name", f"{self.name!r}: 1 to 63 letters, digits, dots, dashes, please"
            )
        host, colon, port = self.address.rpartition(":")
        if (
            not colon
            or not host
            or _BLANK.search(host)
            or not _is_number(port)
            or not 0 < int(port) < 1 << 16
        ):
            raise InvalidArgument("address", f"{self.address!r} of {self.name} is not HOST:PORT")
        if not 1 <= self.weight <= limits.MAX_MEMBER_WEIGHT:
            most = limits.MAX_MEMBER_WEIGHT
            raise InvalidArgument("weight", f"{self.weight} of {self.name}: 1 to {most}, please")


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """The members of one epoch, by name. replicas: how many copies a block has.

    Each epoch has one view: who has seen a later one obeys no earlier one.
    """

    epoch: int
    replicas: int
    members: tuple[Member, ...]

    def __post_init__(self) -> None:
        if self.epoch < 0:
            raise InvalidArgument("epoch", f"{self.epoch} is below 0")
        if not 1 <= self.replicas <= limits.MAX_REPLICAS:
            most = limits.MAX_REPLICAS
            raise InvalidArgument("replicas", f"{self.replicas}: 1 to {most}, please")
        if len(self.members) > limits.MAX_MEMBERS:
            raise InvalidArgument("members", f"at most {limits.MAX_MEMBERS}, please")
        for field in ("name", "address"):
            seen: set[str] = set()
            for member in self.members:
                value = getattr(member, field)
                if value in seen:
                    raise InvalidArgument("members", f"two members have the {field} {value}")
                seen.add(value)
        object.__setattr__(self, "members", tuple(sorted(self.members)))

    def find(self, name: str) -> Member | None:
        """The member of that name."""
        return next((member for member in self.members if member.name == name), None)

    def without(self, *names: str) -> View:
        """The next view, in which these are no members."""
        left = tuple(member for member in self.members if member.name not in names)
        return replace(self, epoch=self.epoch + 1, members=left)

    def with_members(self, members: Sequence[Member]) -> View:
        """The next view, in which these are members, instead of those of their names."""
        names = {member.name for member in members}
        left = tuple(member for member in self.members if member.name not in names)
        return replace(self, epoch=self.epoch + 1, members=(*left, *members))

    @property
    def settled(self) -> bool:
        """Whether nobody joins or drains, so that blocks are where one ranking says."""
        moving = (MemberState.JOINING, MemberState.DRAINING)
        return not any(member.state in moving for member in self.members)


def encode_view(view: View) -> bytes:
    """The view as JSON, always the same for the same view."""
    members = [
        {
            "name": m.name,
            "address": m.address,
            "weight": m.weight,
            "run": m.run,
            "state": str(m.state),
            "joined": m.joined,
        }
        for m in view.members
    ]
    fields = {
        "version": VIEW_VERSION,
        "epoch": view.epoch,
        "replicas": view.replicas,
        "members": members,
    }
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


def decode_view(data: bytes) -> View:
    """`ProtocolError` for bytes that are no view of a known version."""
    fields = _fields(data, "view")
    try:
        members = tuple(_member(each) for each in fields["members"])
        return View(
            epoch=_whole(fields["epoch"]), replicas=_whole(fields["replicas"]), members=members
        )
    except (KeyError, TypeError, ValueError, InvalidArgument) as error:
        raise ProtocolError(f"malformed view: {error}") from None


def encode_member(member: Member) -> bytes:
    """One member as JSON, as it registers itself."""
    fields = {
        "version": VIEW_VERSION,
        "name": member.name,
        "address": member.address,
        "weight": member.weight,
        "run": member.run,
        "state": str(member.state),
    }
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


def decode_member(data: bytes) -> Member:
    """`ProtocolError` for bytes that are no member of a known version."""
    try:
        return _member(_fields(data, "member"))
    except (KeyError, TypeError, ValueError, InvalidArgument) as error:
        raise ProtocolError(f"malformed member: {error}") from None


def parse_members(text: str) -> tuple[Member, ...]:
    """`NAME=HOST:PORT`, several with commas between, each maybe with `*WEIGHT` behind it.

    `InvalidArgument` says which is wrong, also for a name or an address that comes twice.
    """
    members = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, rest = part.partition("=")
        if not equals:
            raise InvalidArgument("members", f"{part!r} is not NAME=HOST:PORT")
        address, star, weight = rest.partition("*")
        if star and not _is_number(weight):
            raise InvalidArgument("members", f"{part!r}: the weight is no whole number")
        member = Member(name=name.strip(), address=address.strip(), weight=int(weight or 1))
        members.append(member)
    return View(epoch=0, replicas=1, members=tuple(members)).members


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10


def _whole(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no whole number")
    return value


def _fields(data: bytes, what: str) -> dict[str, Any]:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"malformed {what}: {error}") from None
    if not isinstance(fields, dict):
        raise ProtocolError(f"malformed {what}: not an object")
    if type(fields.get("version")) is not int or fields["version"] != VIEW_VERSION:
        raise ProtocolError(
            f"a {what} of version {fields.get('version')!r}; this release knows {VIEW_VERSION}"
        )
    return fields


def _member(fields: dict[str, Any]) -> Member:
    return Member(
        name=str(fields["name"]),
        address=str(fields["address"]),
        weight=_whole(fields["weight"]),
        run=_whole(fields["run"]),
        state=MemberState(fields["state"]),
        joined=int(fields.get("joined", 0)),
    )
