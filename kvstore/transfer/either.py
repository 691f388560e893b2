"""An agent of several kinds: two of these use the first kind that both have.

Which one that is is decided when they connect, so hosts with NIXL and hosts without it are in one
cluster, and processes of one host need no network between them.
"""

from __future__ import annotations

import contextlib
import struct
import time
from collections.abc import Callable, Sequence

from kvstore.errors import ProtocolError, Unavailable
from kvstore.transfer import description as descriptions
from kvstore.transfer.apart import ApartAgent, export
from kvstore.transfer.base import Agent, Bytes1D, Memory, Remote, TransferFailed

KIND = "auto"
_PART = struct.Struct("<8sI")  # kind, bytes of its description, which follow


class EitherAgent:
    """See `kvstore.transfer.base.Agent`; `share` takes the place of `register`.

    agents: of different kinds, the best first. One that cannot be described is left out.
    """

    kind = KIND

    def __init__(self, agents: Sequence[Agent]) -> None:
        self.agents = list(agents)

    @property
    def on_death(self) -> Callable[[], None] | None:
        """See `ApartAgent`."""
        apart = self._apart()
        return apart[0].on_death if apart else None

    @on_death.setter
    def on_death(self, told: Callable[[], None] | None) -> None:
        for agent in self._apart():
            agent.on_death = told

    def _apart(self) -> list[ApartAgent]:
        return [agent for agent in self.agents if isinstance(agent, ApartAgent)]

    def share(self, fd: int, memory: Bytes1D, *, writable: bool = True) -> None:
        """See `Shares.share`."""
        for agent in self.agents:
            export(agent, memory, fd, writable=writable)

    def register(self, memory: Memory) -> None:
        """See `Agent`; `TransferFailed` where one of the agents takes shared memory only."""
        for agent in self.agents:
            agent.register(memory)

    def describe(self) -> bytes:
        """See `Agent`."""
        parts = []
        for agent in self.agents:
            with contextlib.suppress(Unavailable):
                said = agent.describe()
                parts.append(_PART.pack(agent.kind.encode(), len(said)) + said)
        return descriptions.pack(KIND, b"".join(parts))

    def connect(self, description: bytes, timeout_s: float) -> Remote:
        """See `Agent`; by the first kind that both have and that reaches the other one."""
        end_s = time.monotonic() + timeout_s
        theirs = parts_of(description)
        failed = TransferFailed(
            f"the other side has {', '.join(theirs) or 'nothing'}: none is here"
        )
        for agent in self.agents:
            if agent.kind in theirs:
                try:
                    return agent.connect(theirs[agent.kind], max(0.0, end_s - time.monotonic()))
                except TransferFailed as error:
                    failed = error
        raise failed

    def close(self) -> None:
        """See `Agent`."""
        with contextlib.ExitStack() as stack:  # each of them, whatever one of them says
            for agent in self.agents:
                stack.callback(agent.close)


def parts_of(description: bytes) -> dict[str, bytes]:
    """The descriptions that one of an `EitherAgent` has, by kind; `ProtocolError`."""
    body, found = descriptions.unpack(KIND, description), dict[str, bytes]()
    while body:
        if len(body) < _PART.size:
            raise ProtocolError("an agent's description is cut short")
        name, nbytes = _PART.unpack_from(body)
        part, body = body[_PART.size : _PART.size + nbytes], body[_PART.size + nbytes :]
        if len(part) != nbytes:
            raise ProtocolError("an agent's description is cut short")
        found[name.rstrip(b"\0").decode("ascii", "replace")] = part
    return found
