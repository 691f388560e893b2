"""Blocks of a get that are looked at while they land."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvstore import commands as c
from kvstore.block import NO_PARENT, cell_checksums, header_bytes, pack_many
from kvstore.cluster.node import _with_heads
from kvstore.layout import Layout
from kvstore.session.parts import part_of
from kvstore.streaming import hash_rows
from kvstore_client.cluster.landing import Landings
from kvstore_client.cluster.memory import landing_bytes

N, SIZE = 6, 4096
LAYOUT = Layout.opaque(model="landing", block_bytes=SIZE, block_tokens=16)
HEAD = header_bytes(LAYOUT.n_cells)
STEP = landing_bytes(HEAD + SIZE)


class Rig:
    """A piece of a ring, the blocks that are to land there, and who looks at it."""

    def __init__(self) -> None:
        self.memory = np.full(N * STEP, 7, np.uint8)
        self.start = int(self.memory.__array_interface__["data"][0])
        rng = np.random.default_rng(5)
        self.keys = rng.integers(0, 256, (N, 32), np.uint8)
        self.data = rng.integers(0, 256, (N, SIZE), np.uint8)
        self.headers = pack_many(
            namespace=3,
            keys=self.keys,
            put_ids=bytes(16 * N),
            length=SIZE,
            checksums=np.array([cell_checksums(row, LAYOUT.cell_bounds) for row in self.data]),
            parents=np.tile(np.frombuffer(NO_PARENT, np.uint8), (N, 1)),
            positions=np.full(N, -1, np.int32),
        )
        self.looked_at: list[int] = []
        ring: Any = SimpleNamespace(row=self._row)
        self.landings = Landings(ring, N, SIZE, head=HEAD, verify=self._verify)
        self.addresses = (self.start + HEAD + STEP * np.arange(N)).astype(np.uint64)
        self.sound = np.zeros(N, bool)
        self.landings.expect(np.arange(N), self.addresses, self.sound)

    def _row(self, address: int, nbytes: int) -> npt.NDArray[np.uint8]:
        at = address - self.start
        return self.memory[at : at + nbytes]

    def _verify(
        self, rows: npt.NDArray[np.intp], addresses: c.U64, headers: c.U8
    ) -> npt.NDArray[np.bool_]:
        self.looked_at += rows.tolist()
        said = (headers == self.headers[rows]).all(axis=1)
        sums = hash_rows(addresses, SIZE)
        wanted = [int(cell_checksums(self.data[row], LAYOUT.cell_bounds)[0]) for row in rows]
        return said & (sums == np.array(wanted, np.uint64))

    def land(self, row: int, nbytes: int = HEAD + SIZE) -> None:
        """The first bytes of a block, from its header on."""
        whole = np.concatenate((self.headers[row], self.data[row]))
        at = row * STEP
        self.memory[at : at + nbytes] = whole[:nbytes]


def test_blocks_are_sound_once_they_have_landed_whole() -> None:
    rig = Rig()
    rig.landings._look()
    assert rig.looked_at == []
    rig.land(0)
    rig.land(1)
    rig.land(2, HEAD + SIZE - 8)  # all but its end
    rig.landings._look()
    assert rig.looked_at == [0, 1]
    assert rig.sound.tolist() == [True, True, False, False, False, False]
    for row in range(2, N):
        rig.land(row)
    assert not rig.landings.complete
    rig.landings.follow(lambda: False, end_s=float("inf"))
    assert rig.landings.complete
    assert rig.sound.all()


def test_what_is_not_as_its_header_says_has_not_landed() -> None:
    rig = Rig()
    for row in range(N):
        rig.land(row)
    rig.memory[HEAD + 100] ^= 1
    rig.landings._look()
    assert rig.sound.tolist() == [False, True, True, True, True, True]
    rig.memory[HEAD + 100] ^= 1  # bytes may come in another order
    rig.landings._look()
    assert rig.landings.complete
    rig = Rig()
    rig.land(3)
    rig.memory[3 * STEP + HEAD] ^= 1
    for _ in range(50):
        rig.landings._look()
    assert len(rig.looked_at) == 8  # then it is left to the node's answer
    assert not rig.sound.any()


def test_nobody_looks_at_what_is_forgotten_or_was_there_before() -> None:
    rig = Rig()
    rig.land(0)
    rig.landings.forget(rig.addresses)
    rig.landings._look()
    assert rig.looked_at == []
    rig.landings.expect(np.arange(N), rig.addresses, rig.sound)  # used again, for the same blocks
    rig.landings._look()
    assert not rig.sound.any()


def test_nobody_waits_awake_where_a_block_has_landed_or_none_is_to_come() -> None:
    rig = Rig()
    assert not rig.landings._has_more()
    rig.land(2)
    assert not rig.landings._has_more()  # they come in order
    rig.land(0)
    assert rig.landings._has_more()
    rig.landings._stay_awake(float("inf"))
    rig.landings._look()
    assert not rig.landings._has_more()
    for row in range(N):
        rig.land(row)
    rig.landings._look()
    assert rig.landings.complete
    assert not rig.landings._has_more()
    rig.landings.forget(rig.addresses)
    rig.landings._stay_awake(float("inf"))


def test_a_piece_of_which_no_more_is_believed_keeps_nobody_awake() -> None:
    rig = Rig()
    rig.land(0)
    rig.memory[HEAD] ^= 1
    for _ in range(8):
        assert rig.landings._has_more()
        rig.landings._look()
    assert not rig.landings._has_more()


def test_a_watch_ends_with_the_get_or_its_time() -> None:
    rig = Rig()
    rig.landings.follow(lambda: True, end_s=float("inf"))
    rig.landings.follow(lambda: False, end_s=0.0)
    assert not rig.landings.complete


@pytest.mark.parametrize(
    ("n", "nbytes", "head", "worth"),
    [(64, 1 << 18, 256, True), (7, 1 << 18, 256, False), (4096, 1024, 256, False)],
)
def test_small_gets_and_small_blocks_are_not_watched(
    n: int, nbytes: int, head: int, worth: bool
) -> None:
    assert Landings.worth_it(n, nbytes, head) == worth


def test_a_header_comes_in_front_of_whatever_is_sent_of_a_block() -> None:
    whole = np.array([[0, 0, 1000], [1000, 1000, 24]], np.uint64)
    assert _with_heads(whole, 256).tolist() == [[0, 0, 1256], [1256, 1256, 24]]
    some = np.array([[512, 0, 512], [2048, 512, 64]], np.uint64)
    assert _with_heads(some, 256).tolist() == [[0, 0, 256], [768, 256, 512], [2304, 768, 64]]
    layout = Layout.opaque(model="m", block_bytes=3 << 20, block_tokens=16)
    runs = np.array(part_of(layout).runs, np.uint64)
    assert _with_heads(runs, 256)[:, 2].sum() == 256 + (3 << 20)
