"""The part of a session that only asks: namespaces, hints, drops, explanations, counters."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from kvstore import commands as c
from kvstore import limits
from kvstore.errors import InvalidArgument, KVStoreError, StaleNamespace, Unavailable
from kvstore.layout import Layout
from kvstore.session.base import (
    TIERS,
    BlockReport,
    Hashes,
    Hint,
    NamespaceHandle,
    NamespaceInfo,
    StoreInfo,
)
from kvstore.session.link import Link, Memory
from kvstore.session.requests import checked_chain, checked_timeout, hint_ms
from kvstore.session.touches import TouchLog

R = TypeVar("R")
_NO_HASHES = np.empty((0, limits.KEY_BYTES), np.uint8)


class Deadline:
    """The moment by which a call has to be over."""

    def __init__(self, timeout_s: float) -> None:
        """`InvalidArgument` unless 0 < timeout_s <= limits.MAX_DEADLINE_MS / 1000.

        end_s: the moment on `time.monotonic`.
        """
        self.end_s = time.monotonic() + checked_timeout(timeout_s)

    @property
    def left_s(self) -> float:
        """Seconds left, never below 0."""
        return max(0.0, self.end_s - time.monotonic())


class ControlSession:
    """Commands over a link, in namespaces that are opened again when their ids became stale."""

    def __init__(self, link: Link, *, timeout_s: float) -> None:
        """timeout_s: the deadline of calls that name none; `InvalidArgument` for a bad one."""
        Deadline(timeout_s)
        self._link = link
        self._timeout_s = timeout_s
        self._touches = TouchLog()
        self._epoch = -1
        # (epoch, instance, id) of a handle -> id now. With the epoch, because another thread may
        # have seen a newer one before what is asked here is noted.
        self._ids: dict[tuple[int, int, int], int] = {}

    def open_namespace(
        self, name: str, layout: Layout, *, timeout_s: float | None = None
    ) -> NamespaceHandle:
        """See `Session.open_namespace`."""
        deadline = self._deadline(timeout_s)
        memory = self._link.memory(deadline.left_s)
        instance, epoch = memory.instance, memory.index.namespace_epoch
        opened = self._open(name, layout, deadline)
        self._ids[epoch, instance, opened.namespace] = opened.namespace
        return NamespaceHandle(
            id=opened.namespace,
            name=name,
            layout=layout,
            generation=opened.generation,
            key=opened.key,
            instance=instance,
        )

    def drop(
        self, namespace: NamespaceHandle, hashes: Hashes, *, timeout_s: float | None = None
    ) -> int:
        """See `Session.drop`."""
        chain = checked_chain(hashes)
        return self._inside(
            namespace, timeout_s, lambda number: c.Drop(namespace=number, hashes=chain), c.Count
        ).blocks

    def drop_namespace(self, namespace: NamespaceHandle, *, timeout_s: float | None = None) -> int:
        """See `Session.drop_namespace`."""
        return self._inside(
            namespace,
            timeout_s,
            lambda number: c.Drop(namespace=number, hashes=_NO_HASHES),
            c.Count,
        ).blocks

    def hint(
        self,
        namespace: NamespaceHandle,
        hashes: Hashes,
        hint: Hint,
        *,
        timeout_s: float | None = None,
    ) -> int:
        """See `Session.hint`."""
        chain, for_ms = checked_chain(hashes), hint_ms(hint)
        kind = int(hint.kind)
        return self._inside(
            namespace,
            timeout_s,
            lambda number: c.Hint(namespace=number, kind=kind, for_ms=for_ms, hashes=chain),
            c.Count,
        ).blocks

    def explain(
        self, namespace: NamespaceHandle, hashes: Hashes, *, timeout_s: float | None = None
    ) -> list[BlockReport]:
        """See `Session.explain`."""
        chain = checked_chain(hashes)
        return reports(
            self._inside(
                namespace,
                timeout_s,
                lambda number: c.Explain(namespace=number, hashes=chain),
                c.Explained,
            )
        )

    def stats(self, *, timeout_s: float | None = None) -> c.Stats:
        """See `Session.stats`."""
        deadline = self._deadline(timeout_s)
        self.report_touches(deadline.left_s)
        return self._call(c.Stat(), c.Stats, deadline)

    def info(self, *, timeout_s: float | None = None) -> StoreInfo:
        """See `Session.info`."""
        return store_info(self._call(c.Describe(), c.Description, self._deadline(timeout_s)))

    def report_touches(self, timeout_s: float) -> None:
        """Tells the store what was read; a lost report costs only eviction quality."""
        touch = self._touches.take()
        if touch is not None:
            self._call(touch, c.Count, Deadline(max(timeout_s, 1e-3)))

    # -- inside ------------------------------------------------------------------------

    def _deadline(self, timeout_s: float | None) -> Deadline:
        return Deadline(self._timeout_s if timeout_s is None else timeout_s)

    def _call(self, command: c.Command, expected: type[R], deadline: Deadline) -> R:
        result = self._link.call(command, deadline.left_s)
        if not isinstance(result, expected):
            raise KVStoreError(f"the store answered {type(result).__name__}")
        return result

    def _open(self, name: str, layout: Layout, deadline: Deadline) -> c.NamespaceOpened:
        command = c.OpenNamespace(name=name, layout=layout.encode())
        return self._call(command, c.NamespaceOpened, deadline)

    def _number(self, namespace: NamespaceHandle, deadline: Deadline) -> int:
        """The namespace's id in the store as it is now; a call only where that is not known."""
        return self._number_in(self._link.memory(deadline.left_s), namespace, deadline)

    def _number_in(self, memory: Memory, namespace: NamespaceHandle, deadline: Deadline) -> int:
        """`_number` for who has the link's memory at hand."""
        epoch = memory.index.namespace_epoch
        if epoch != self._epoch:  # some namespace was dropped: its id is never used again
            self._ids.clear()
            self._epoch = epoch
        key = (epoch, namespace.instance, namespace.id)
        number = self._ids.get(key)
        if number is None:
            number = self._reopen(namespace, deadline)
            self._ids[key] = number
        return number

    def _reopen(self, namespace: NamespaceHandle, deadline: Deadline) -> int:
        """The id of a namespace that some store has opened before.

        Where this one cannot, because its pool is too small by now, that is nobody's bad argument:
        `Unavailable`.
        """
        try:
            return self._open(namespace.name, namespace.layout, deadline).namespace
        except InvalidArgument as error:
            raise Unavailable(
                f"the store does not take {namespace.name!r} any more: {error}"
            ) from None

    def _inside(
        self,
        namespace: NamespaceHandle,
        timeout_s: float | None,
        make: Callable[[int], c.Command],
        expected: type[R],
    ) -> R:
        """A command in a namespace, made again where the namespace was dropped meanwhile."""
        deadline = self._deadline(timeout_s)
        number = self._number(namespace, deadline)
        try:
            return self._call(make(number), expected, deadline)
        except StaleNamespace:
            self._ids.clear()
            return self._call(make(self._number(namespace, deadline)), expected, deadline)


def reports(explained: c.Explained) -> list[BlockReport]:
    """The store's answer as values."""
    columns = (explained.status.tolist(), explained.tiers.tolist(), explained.when_ms.tolist())
    return [
        BlockReport(
            status=c.ExplainStatus(status),
            tier=TIERS.get(tier) if status == c.ExplainStatus.STORED else None,
            when=when / 1e3 if when else None,
        )
        for status, tier, when in zip(*columns, strict=True)
    ]


def store_info(described: c.Description) -> StoreInfo:
    """The store's description as values."""
    rows = zip(
        described.ids.tolist(),
        # Not `splitlines`: names may hold what it takes for the end of a line.
        described.names.split("\n") if len(described.ids) else (),
        described.layouts.split("\n") if len(described.ids) else (),
        described.blocks.tolist(),
        described.generations.tolist(),
        strict=True,
    )
    return StoreInfo(
        version=described.version,
        instance=described.instance,
        policy=described.policy,
        max_blocks=described.max_blocks,
        index_capacity=described.index_capacity,
        started=described.started_ms / 1e3,
        namespaces=tuple(
            NamespaceInfo(
                id=number,
                name=name,
                blocks=blocks,
                layout=Layout.decode(layout.encode()),
                generation=generation,
            )
            for number, name, layout, blocks, generation in rows
        ),
    )
