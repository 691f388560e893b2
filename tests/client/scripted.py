"""A store in memory whose counters and explanations a test writes; for the command line alone."""

from __future__ import annotations

import dataclasses

import numpy as np

from kvstore import Attention, Layout
from kvstore.commands import ExplainStatus, Stats
from kvstore.keys import as_hashes, namespace_key
from kvstore.session.base import (
    BlockReport,
    Matched,
    NamespaceHandle,
    NamespaceInfo,
    StoreInfo,
    Tier,
)

LAYOUT = Layout(
    model="demo",
    attention=Attention.GQA,
    layers=2,
    kv_heads=3,
    head_dim=16,
    dtype="float32",
    block_tokens=16,
)
OTHER_LAYOUT = dataclasses.replace(LAYOUT, dtype="float16")
_SECRET = bytes(range(32))


def stats(**given: int) -> Stats:
    """Counters, 0 unless given."""
    return Stats(**{field.name: given.get(field.name, 0) for field in dataclasses.fields(Stats)})


class ScriptedStore:
    """Implements what the commands use of `Session`.

    script: what `stats` returns or raises, call by call; reports: what `explain` returns; both
    follow from the content where they are empty.
    """

    def __init__(self) -> None:
        self.script: list[Stats | BaseException] = []
        self.reports: list[BlockReport] = []
        self._namespaces: dict[tuple[str, Layout], int] = {}
        self._blocks: set[tuple[int, bytes]] = set()

    def content(self) -> set[tuple[int, bytes]]:
        """The namespace id and hash of each block."""
        return set(self._blocks)

    def hold(self, namespace: NamespaceHandle, hashes: np.ndarray) -> None:
        """Lets the blocks be stored."""
        self._blocks |= {(namespace.id, row.tobytes()) for row in hashes}

    def open_namespace(self, name: str, layout: Layout) -> NamespaceHandle:
        number = self._namespaces.setdefault((name, layout), len(self._namespaces) + 1)
        key = namespace_key(_SECRET, layout_fingerprint=layout.fingerprint(), name=name)
        return NamespaceHandle(id=number, name=name, layout=layout, generation=0, key=key)

    def match(self, namespace: NamespaceHandle, hashes: np.ndarray) -> Matched:
        stored = [status is ExplainStatus.STORED for status in self._statuses(namespace, hashes)]
        count = [*stored, False].index(False)
        return Matched(count, np.ones(count, np.uint8))

    def explain(self, namespace: NamespaceHandle, hashes: np.ndarray) -> list[BlockReport]:
        tiers = {ExplainStatus.STORED: Tier.DRAM}
        statuses = self._statuses(namespace, hashes)
        return self.reports or [BlockReport(status=s, tier=tiers.get(s)) for s in statuses]

    def drop(self, namespace: NamespaceHandle, hashes: np.ndarray) -> int:
        found = self._blocks & {(namespace.id, row.tobytes()) for row in as_hashes(hashes)}
        self._blocks -= found
        return len(found)

    def drop_namespace(self, namespace: NamespaceHandle) -> int:
        found = {block for block in self._blocks if block[0] == namespace.id}
        self._blocks -= found
        return len(found)

    def stats(self) -> Stats:
        if not self.script:
            return stats(blocks=len(self._blocks), total_bytes=32 << 20)
        found = self.script.pop(0)
        if isinstance(found, BaseException):
            raise found
        return found

    def info(self) -> StoreInfo:
        numbers = [number for number, _ in self._blocks]
        return StoreInfo(
            version="9.9",
            instance=1,
            policy="lru",
            max_blocks=64,
            index_capacity=128,
            started=1e9,
            namespaces=tuple(
                NamespaceInfo(
                    id=number, name=name, blocks=numbers.count(number), layout=layout, generation=0
                )
                for (name, layout), number in self._namespaces.items()
            ),
        )

    def _statuses(self, namespace: NamespaceHandle, hashes: np.ndarray) -> list[ExplainStatus]:
        kinds = (ExplainStatus.NEVER_STORED, ExplainStatus.STORED)
        return [kinds[(namespace.id, row.tobytes()) in self._blocks] for row in as_hashes(hashes)]
