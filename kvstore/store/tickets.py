"""Calls whose answer has to wait for NVMe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvstore import commands as c

# The answer, if it is known; `last`: whatever is known now, because the time is over.
Poll = Callable[[bool], c.Result | None]


@dataclass(frozen=True, slots=True)
class Deferred:
    """The answer comes later, under this number."""

    ticket: int


@dataclass(slots=True)
class _Ticket:
    connection: int
    due_ms: int
    poll: Poll


class Tickets:
    """The calls that wait, at most one of each connection's."""

    def __init__(self) -> None:
        self._next = 1
        self._waiting: dict[int, _Ticket] = {}
        self._answers: list[tuple[int, c.Result]] = []

    def ask(self, connection: int, poll: Poll, *, due_ms: int, now_ms: int) -> c.Result | Deferred:
        """The answer at once, where it is known or there is no time, else a promise of it."""
        answer = poll(due_ms <= now_ms)
        if answer is not None:
            return answer
        number, self._next = self._next, self._next + 1
        self._waiting[number] = _Ticket(connection, due_ms, poll)
        return Deferred(number)

    def look(self, now_ms: int) -> None:
        """Asks all of them again."""
        for number, ticket in list(self._waiting.items()):
            answer = ticket.poll(ticket.due_ms <= now_ms)
            if answer is not None:
                del self._waiting[number]
                self._answers.append((number, answer))

    def take(self) -> list[tuple[int, c.Result]]:
        """The answers since the last call, by ticket."""
        answers, self._answers = self._answers, []
        return answers

    def forget(self, connection: int) -> None:
        """Nobody waits for its answers any more."""
        self._waiting = {n: t for n, t in self._waiting.items() if t.connection != connection}

    @property
    def next_due_ms(self) -> int | None:
        """When one of them has to be answered, or somebody to `take` answers; None: none waits."""
        if self._answers:
            return 0
        return min((ticket.due_ms for ticket in self._waiting.values()), default=None)
