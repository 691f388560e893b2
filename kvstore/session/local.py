"""A session over mapped memory: matches read the index, gets and puts copy, calls are few.

Ours: the order of reads and copies that keeps a racing eviction from ever showing. Not ours:
what to evict, where to put (the store decides), and how commands travel (the port).
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from kvstore import commands as c
from kvstore import limits
from kvstore.block import cell_checksums, header_bytes
from kvstore.errors import InvalidArgument, KVStoreError, LayoutMismatch, StaleNamespace
from kvstore.index.format import IndexView
from kvstore.index.reader import IndexReader
from kvstore.keys import as_hashes
from kvstore.layout import Layout
from kvstore.session.base import (
    CommandPort,
    Hit,
    Miss,
    MissReason,
    NamespaceHandle,
    PutResult,
    Tier,
)

R = TypeVar("R")
Bytes1D = npt.NDArray[np.uint8]
_TIERS = {1: Tier.DRAM, 2: Tier.NVME, 3: Tier.HBM}


class View:
    """Blocks under a lease, without a copy: read-only uint8 arrays. Release it soon."""

    def __init__(self, port: CommandPort, lease: int, blocks: list[Bytes1D], timeout_s: float):
        self._port, self._lease, self._timeout_s = port, lease, timeout_s
        self.blocks = blocks

    def release(self) -> None:
        """Ends the lease; the arrays must not be used afterwards. Safe to call twice."""
        if self._lease:
            lease, self._lease, self.blocks = self._lease, 0, []
            self._port.call(c.Release(lease=lease), self._timeout_s)

    def __enter__(self) -> View:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class LocalSession:
    """One client of one store on the same host (or in the same process).

    pool: uint8, read-only or writable; generations: uint64 a granule; index: uint8.
    """

    def __init__(
        self,
        port: CommandPort,
        *,
        pool: Bytes1D,
        generations: npt.NDArray[np.uint64],
        index: Bytes1D,
        timeout_s: float,
    ) -> None:
        self._port = port
        self._pool = pool
        self._generations = generations
        self._reader = IndexReader(IndexView.open(index))
        self._timeout_s = timeout_s

    def open_namespace(self, name: str, layout: Layout) -> NamespaceHandle:
        """Opens the namespace of `name` and `layout`, creating it where it is new."""
        opened = self._call(c.OpenNamespace(name=name, layout=layout.encode()), c.NamespaceOpened)
        return NamespaceHandle(
            id=opened.namespace,
            name=name,
            layout=layout,
            generation=opened.generation,
            key=opened.key,
        )

    def match(self, namespace: NamespaceHandle, hashes: Sequence[bytes] | c.U8) -> int:
        """How many leading blocks of the chain are stored; makes no call."""
        return self._reader.match(namespace.id, as_hashes(hashes)).count

    def get_into(
        self,
        namespace: NamespaceHandle,
        hashes: Sequence[bytes] | c.U8,
        destinations: Sequence[Bytes1D],
    ) -> list[Hit | Miss]:
        """Copies each block's bytes into its destination (uint8, 1-D, `block_bytes` long).

        Stops at the first miss: blocks behind it are of no use to a prefix. A destination
        counts only where the result says `Hit`.
        """
        chain = as_hashes(hashes)
        self._check_buffers("destinations", namespace, chain, destinations)
        found = self._reader.match(namespace.id, chain)
        n = found.count
        results: list[Hit | Miss] = []
        for i in range(n):
            granule, generation = int(found.granules[i]), int(found.generations[i])
            if not self._copy_out(namespace, granule, generation, destinations[i]):
                results.append(Miss(MissReason.OVERWRITTEN))
                break
            results.append(Hit(_TIERS[int(found.tiers[i])]))
        hits = sum(isinstance(result, Hit) for result in results)
        read = found.granules[:hits].astype(np.uint32)
        self._report(read, found.generations[:hits], len(chain), hits)
        missing = len(chain) - len(results)
        return results + [Miss(MissReason.NOT_STORED)] * missing

    def _copy_out(
        self, namespace: NamespaceHandle, granule: int, generation: int, destination: Bytes1D
    ) -> bool:
        """Copies one slot; False when it changed hands before or during the copy."""
        if int(self._generations[granule]) != generation:
            return False
        destination[:] = self._payload(namespace, granule)
        return int(self._generations[granule]) == generation

    def view(self, namespace: NamespaceHandle, hashes: Sequence[bytes] | c.U8) -> View:
        """Leases the leading stored run of the chain and shows its bytes without a copy."""
        leased = self._call(c.Lease(namespace=namespace.id, hashes=as_hashes(hashes)), c.Leased)
        blocks = []
        for granule in leased.granules:
            block = self._payload(namespace, int(granule)).view()
            block.flags.writeable = False
            blocks.append(block)
        return View(self._port, leased.lease, blocks, self._timeout_s)

    def put(
        self,
        namespace: NamespaceHandle,
        hashes: Sequence[bytes] | c.U8,
        sources: Sequence[Bytes1D],
        *,
        put_id: bytes | None = None,
        cells: Iterable[int] = (),
        parent: bytes = b"",
        position: int = -1,
    ) -> PutResult:
        """Stores blocks, or one rank's cells of them, in order.

        sources: uint8, 1-D, the concatenated bytes of `cells` (none: the whole block). All
        ranks of one put share `put_id` (16 bytes). Blocks that are there already, or for which
        there is no room, are counted, not raised.
        """
        chain = as_hashes(hashes)
        wanted = np.array(sorted(cells), np.uint32)
        self._check_buffers("sources", namespace, chain, sources, wanted)
        put_id = put_id or secrets.token_bytes(16)
        reserved = self._call(
            c.Reserve(
                namespace=namespace.id,
                put_id=put_id,
                hashes=chain,
                cells=wanted,
                parent=parent,
                position=position,
            ),
            c.Reserved,
        )
        granted = np.flatnonzero(reserved.status == c.ReserveStatus.GRANTED).tolist()
        existed = int((reserved.status == c.ReserveStatus.EXISTS).sum())
        if not len(granted):
            return PutResult(stored=0, existed=existed, waiting=0, not_stored=len(chain) - existed)
        try:
            checksums = np.stack(
                [
                    self._copy_in(namespace, int(reserved.granules[i]), sources[i], wanted)
                    for i in granted
                ]
            )
        except BaseException:
            self._call(
                c.Abort(namespace=namespace.id, put_id=put_id, hashes=chain[granted]), c.Count
            )
            raise
        sealed = self._call(
            c.Seal(
                namespace=namespace.id,
                put_id=put_id,
                hashes=chain[granted],
                checksums=checksums,
            ),
            c.Sealed,
        )
        stored = int((sealed.status == c.SealStatus.STORED).sum())
        waiting = int((sealed.status == c.SealStatus.WAITING).sum())
        return PutResult(
            stored=stored,
            existed=existed,
            waiting=waiting,
            not_stored=len(chain) - existed - stored - waiting,
        )

    def _copy_in(
        self, namespace: NamespaceHandle, granule: int, source: Bytes1D, cells: c.U32
    ) -> c.U64:
        """Copies one block's (or part's) cells into a granted slot and hashes what arrived."""
        target = self._payload(namespace, granule)
        bounds = namespace.layout.cell_bounds
        if not len(cells):
            target[:] = source
            return cell_checksums(target, bounds)
        sums = np.empty(len(cells), np.uint64)
        taken = 0
        for k, cell in enumerate(cells):
            start, end = int(bounds[cell]), int(bounds[cell + 1])
            target[start:end] = source[taken : taken + end - start]
            sums[k] = cell_checksums(target[start:end], np.array([0, end - start]))[0]
            taken += end - start
        return sums

    def drop(self, namespace: NamespaceHandle, hashes: Sequence[bytes] | c.U8) -> int:
        """Forgets the blocks; returns how many there were."""
        return self._call(c.Drop(namespace=namespace.id, hashes=as_hashes(hashes)), c.Count).blocks

    def drop_namespace(self, namespace: NamespaceHandle) -> int:
        """Forgets all blocks of the namespace: open it again to go on."""
        nothing = np.empty((0, limits.KEY_BYTES), np.uint8)
        return self._call(c.Drop(namespace=namespace.id, hashes=nothing), c.Count).blocks

    def explain(
        self, namespace: NamespaceHandle, hashes: Sequence[bytes] | c.U8
    ) -> list[c.ExplainStatus]:
        """Why each block of the chain can or cannot be found."""
        explained = self._call(
            c.Explain(namespace=namespace.id, hashes=as_hashes(hashes)), c.Explained
        )
        return [c.ExplainStatus(int(status)) for status in explained.status]

    def stats(self) -> c.Stats:
        """The store's counters."""
        return self._call(c.Stat(), c.Stats)

    # -- inside ------------------------------------------------------------------------

    def _payload(self, namespace: NamespaceHandle, granule: int) -> Bytes1D:
        start = granule * limits.GRANULE_BYTES + header_bytes(namespace.layout.n_cells)
        return self._pool[start : start + namespace.layout.block_bytes]

    def _report(self, granules: c.U32, generations: c.U64, lookups: int, hits: int) -> None:
        """Tells the store what was read; a lost report costs only eviction quality."""
        touch = c.Touch(granules=granules, generations=generations, lookups=lookups, hits=hits)
        try:
            self._call(touch, c.Count)
        except StaleNamespace:
            return

    def _call(self, command: c.Command, expected: type[R]) -> R:
        result = self._port.call(command, self._timeout_s)
        if not isinstance(result, expected):
            raise KVStoreError(f"the store answered {type(result).__name__}")
        return result

    @staticmethod
    def _check_buffers(
        name: str,
        namespace: NamespaceHandle,
        chain: c.U8,
        buffers: Sequence[Bytes1D],
        cells: c.U32 | None = None,
    ) -> None:
        if len(buffers) != len(chain):
            raise InvalidArgument(name, f"{len(buffers)} buffers for {len(chain)} keys")
        layout = namespace.layout
        expected = layout.block_bytes
        if cells is not None and len(cells):
            if int(cells[-1]) >= layout.n_cells:
                raise LayoutMismatch("cells", f"the layout has {layout.n_cells} cells")
            expected = int(np.diff(layout.cell_bounds)[cells].sum())
        for i, buffer in enumerate(buffers):
            if buffer.dtype != np.uint8 or buffer.ndim != 1 or buffer.size != expected:
                raise LayoutMismatch(f"{name}[{i}]", f"expected {expected} uint8, 1-D")
