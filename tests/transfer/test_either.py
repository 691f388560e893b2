"""Agents of several kinds use the first one that both sides have."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transfer.pipes import MemoryPipe, memory_pipes

from kvstore.errors import ProtocolError
from kvstore.memory import Arena
from kvstore.transfer import description
from kvstore.transfer.apart import export
from kvstore.transfer.base import Pieces, TransferFailed
from kvstore.transfer.either import KIND, EitherAgent, parts_of
from kvstore.transfer.stream import StreamAgent

SIZE, TIMEOUT_S = 1 << 20, 5.0
FAST, PLAIN = "nixl", "grpc"


class Both:
    """Two sides of one process, over pipes in memory. used: the kinds that a way was sought by."""

    def __init__(self, near: Sequence[str], far: Sequence[str], *, refused: str = "") -> None:
        self.used: list[str] = []
        self.refused = refused
        self.here, self.there = (Arena.create("test", SIZE) for _ in range(2))
        self.passive = {kind: StreamAgent("far", kind=kind) for kind in far}
        self.far = EitherAgent(list(self.passive.values()))
        self.near = EitherAgent([self._active(kind) for kind in near])
        export(self.near, self.here.array, self.here.fd)
        export(self.far, self.there.array, self.there.fd)

    def _active(self, kind: str) -> StreamAgent:
        def pipe(_body: bytes, _timeout_s: float) -> MemoryPipe:
            self.used.append(kind)
            if kind == self.refused:
                raise TransferFailed("there is no way")
            near, far = memory_pipes()
            self.passive[kind].serve(far)
            return near

        return StreamAgent("near", pipe, kind=kind)

    def move(self) -> None:
        """All bytes from the far side to this one."""
        self.there.array[:] = np.random.default_rng(1).integers(0, 256, SIZE, np.uint8)
        remote = self.near.connect(self.far.describe(), TIMEOUT_S)
        here, there = (int(a.array.ctypes.data) for a in (self.here, self.there))
        at = [np.array([value], np.uint64) for value in (here, there, SIZE)]
        remote.read(Pieces(*at), TIMEOUT_S)
        assert np.array_equal(self.here.array, self.there.array)

    def close(self) -> None:
        self.near.close()
        self.far.close()
        self.here.close()
        self.there.close()


@contextlib.contextmanager
def both(near: Sequence[str], far: Sequence[str], *, refused: str = "") -> Iterator[Both]:
    with contextlib.closing(Both(near, far, refused=refused)) as made:
        yield made


def test_both_use_the_better_one_where_both_have_it() -> None:
    with both([FAST, PLAIN], [FAST, PLAIN]) as made:
        made.move()
        assert made.used == [FAST]


@pytest.mark.parametrize("near", [[FAST, PLAIN], [PLAIN]])
def test_the_other_one_is_used_where_one_side_lacks_the_better(near: list[str]) -> None:
    with both(near, [PLAIN] if FAST in near else [FAST, PLAIN]) as made:
        made.move()
        assert made.used == [PLAIN]


def test_the_other_one_is_used_where_the_better_does_not_reach_it() -> None:
    with both([FAST, PLAIN], [FAST, PLAIN], refused=FAST) as made:
        made.move()
        assert made.used == [FAST, PLAIN]


def test_sides_with_nothing_in_common_are_told_so() -> None:
    with both([FAST], [PLAIN]) as made, pytest.raises(TransferFailed, match="grpc"):
        made.near.connect(made.far.describe(), TIMEOUT_S)


@settings(derandomize=True)
@given(st.binary(max_size=64))
def test_garbage_is_no_description(body: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        parts_of(description.pack(KIND, body))
    with pytest.raises(ProtocolError):
        parts_of(body)
