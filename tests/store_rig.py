"""A store with one connection and one namespace, checked after each step."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvstore import commands as c
from kvstore.index.boards import BOARDS_BYTES, Boards
from kvstore.layout import Attention, Layout
from kvstore.store import Store, StoreMemory

NO_CELLS = np.empty(0, np.uint32)
LAYOUT = Layout(
    model="test",
    attention=Attention.GQA,
    layers=2,
    kv_heads=2,
    head_dim=16,
    dtype="float32",
    block_tokens=16,
)
SLOT_BYTES = 12 << 10
BLOCKS_PER_MIB = 85  # of LAYOUT: 8,448 bytes with the header, in slots of 12 KiB


class Rig:
    """A store of `blocks` slots with one connection and one namespace."""

    def __init__(
        self,
        pool: int = 1 << 20,
        max_blocks: int = 512,
        policy: str = "lru",
        *,
        boards: bool = False,
    ) -> None:
        """boards: whether clients have some to post to."""
        self.now_ms = 1_000_000
        self.indexes: list[npt.NDArray[np.uint8]] = []
        self.pool = np.zeros(pool, np.uint8)
        self.generations = np.zeros(pool // 4096, np.uint64)
        self.boards = Boards.create(np.zeros(BOARDS_BYTES, np.uint8)) if boards else None
        self.store = Store(
            StoreMemory(
                pool=self.pool,
                generations=self.generations,
                new_index=self._new_index,
                boards=self.boards,
            ),
            secret=b"s" * 32,
            instance_id=7,
            max_blocks=max_blocks,
            policy=policy,
            now_ms=self.now_ms,
        )
        self.me = self.store.connect()
        self.ns = self.open()

    def _new_index(self, nbytes: int) -> npt.NDArray[np.uint8]:
        self.indexes.append(np.zeros(nbytes, np.uint8))
        return self.indexes[-1]

    def pass_ms(self, ms: int) -> None:
        self.now_ms += ms
        self.store.tick(self.now_ms)
        self.store.check()

    def open(self, name: str = "t", layout: Layout = LAYOUT) -> int:
        opened = self.do(c.OpenNamespace(name=name, layout=layout.encode()))
        assert isinstance(opened, c.NamespaceOpened)
        return opened.namespace

    def do(self, command: c.Command, connection: int | None = None) -> c.Result:
        result = self.store.handle(connection or self.me, command, self.now_ms)
        self.store.check()
        return result

    def reserve(self, hashes: c.U8, **options: object) -> c.Reserved:
        connection = options.pop("connection", None)
        fields = {"namespace": self.ns, "put_id": b"p" * 16, "cells": NO_CELLS, **options}
        result = self.do(c.Reserve(hashes=hashes, **fields), connection)  # type: ignore[arg-type]
        assert isinstance(result, c.Reserved)
        return result

    def seal(self, hashes: c.U8, cells: int = LAYOUT.n_cells, **options: object) -> c.Sealed:
        connection = options.pop("connection", None)
        fields = {"namespace": self.ns, "put_id": b"p" * 16, **options}
        sums = np.zeros((len(hashes), cells), np.uint64)
        result = self.do(
            c.Seal(hashes=hashes, checksums=sums, **fields),  # type: ignore[arg-type]
            connection,
        )
        assert isinstance(result, c.Sealed)
        return result

    def put(self, hashes: c.U8, **options: object) -> None:
        """Reserves and seals."""
        self.reserve(hashes, **options)
        options.pop("position", None)
        options.pop("ttl_ms", None)
        self.seal(hashes, **options)

    def hint(self, kind: c.HintKind, for_ms: int, hashes: c.U8) -> int:
        hint = c.Hint(namespace=self.ns, kind=int(kind), for_ms=for_ms, hashes=hashes)
        result = self.do(hint)
        assert isinstance(result, c.Count)
        return result.blocks

    def stored(self, hashes: c.U8) -> list[bool]:
        return [status == c.ExplainStatus.STORED for status in self.explain(hashes)]

    def explain(self, hashes: c.U8) -> list[int]:
        result = self.do(c.Explain(namespace=self.ns, hashes=hashes))
        assert isinstance(result, c.Explained)
        return result.status.tolist()


def keys(*numbers: int) -> c.U8:
    rng = [np.random.default_rng(number).bytes(32) for number in numbers]
    return np.frombuffer(b"".join(rng), np.uint8).reshape(-1, 32)
