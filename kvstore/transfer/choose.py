"""Which transfer agents there are, by their names in settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvstore.errors import InvalidArgument, Unavailable
from kvstore.transfer.base import Agent
from kvstore.transfer.stream import Pipes, StreamAgent, no_pipes

_OVER_TCP = "over TCP, what others reach in a process of its own"
KINDS = ("shm", "nixl", "ucxx", "grpc", "auto")
AUTO = ("shm", "nixl", "grpc")  # of which `auto` uses the first one that both sides have


def make_agent(
    kind: str,
    name: str,
    pipes: Pipes = no_pipes,
    *,
    host: str = "",
    over_tcp: bool = False,
) -> Agent:
    """An agent of a kind.

    name: for logs. pipes: how a grpc agent finds the streams of sessions. host: this host's address
    as others reach it, for ucxx; its name unless given. over_tcp: see `NixlAgent`.
    `InvalidArgument` for another kind, `Unavailable` where its library or device is not there.
    """
    if kind == "shm":
        from kvstore.transfer.shm import ShmAgent

        return ShmAgent()
    if kind == "nixl":
        from kvstore.transfer.nixl import NixlAgent

        return NixlAgent(name, over_tcp=over_tcp)
    if kind == "ucxx":
        from kvstore.transfer.ucxx import UcxxAgent

        return UcxxAgent(name, host=host)
    if kind == "grpc":
        return StreamAgent(name, pipes)
    raise InvalidArgument("transfer", f"{kind!r} is none of {', '.join(KINDS)}")


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether agents of a kind can be made here. words: what they can do, or what is missing."""

    kind: str
    usable: bool
    words: str


def available() -> list[Availability]:
    """Each kind, the fastest first. Loads the libraries that there are."""
    from kvstore.transfer import nixl, shm, ucxx

    found = [
        _tried("shm", shm.boot_id, "between processes of one user on this host"),
        _tried("nixl", nixl.load, "over RDMA" if nixl.has_rdma() else _OVER_TCP),
        _tried("ucxx", ucxx.load, "copies at both ends"),
        Availability("grpc", True, "copies at both ends"),
    ]
    here = [each.kind for each in found if each.usable and each.kind in AUTO]
    words = f"{', else '.join(here)}, as the other side has it"
    return [*found, Availability("auto", True, words)]


def _tried(kind: str, load: Callable[[], object], words: str) -> Availability:
    try:
        load()
    except Unavailable as error:
        return Availability(kind, False, str(error))
    return Availability(kind, True, words)
