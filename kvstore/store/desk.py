"""The operations that a store has given out and waits for."""

from __future__ import annotations

from collections.abc import Callable

from kvstore.nvme.ops import Op, Outcome

Then = Callable[[Outcome], None]


class Desk:
    """Numbers operations, keeps those that nobody has taken yet, and what is to be done after."""

    def __init__(self) -> None:
        self._next = 1
        self._out: list[Op] = []
        self._then: dict[int, Then] = {}

    def emit(self, make: Callable[[int], Op], then: Then) -> None:
        """An operation, made with its number; `then` hears what came of it."""
        number, self._next = self._next, self._next + 1
        self._then[number] = then
        self._out.append(make(number))

    def take(self) -> list[Op]:
        """Those that are to be carried out now, in any order and at the same time."""
        out, self._out = self._out, []
        return out

    def hear(self, outcome: Outcome) -> None:
        """What came of one that was taken."""
        self._then.pop(outcome.number)(outcome)

    @property
    def under_way(self) -> int:
        """How many are not over."""
        return len(self._then)
