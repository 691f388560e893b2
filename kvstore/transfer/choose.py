"""Which transfer agents there are, by their names in settings."""

from __future__ import annotations

from kvstore.errors import InvalidArgument
from kvstore.transfer.base import Agent
from kvstore.transfer.stream import Pipes, StreamAgent, no_pipes

KINDS = ("nixl", "ucxx", "grpc")


def make_agent(kind: str, name: str, pipes: Pipes = no_pipes) -> Agent:
    """An agent of a kind. name: unique among those that reach each other by NIXL. pipes: how a
    grpc agent finds the streams of sessions. `InvalidArgument` for another kind, `Unavailable`
    where its library is not there."""
    if kind == "nixl":
        from kvstore.transfer.nixl import NixlAgent

        return NixlAgent(name)
    if kind == "grpc":
        return StreamAgent(name, pipes)
    raise InvalidArgument("transfer", f"{kind!r} is none of {', '.join(KINDS)}")
