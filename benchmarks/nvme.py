"""The NVMe tier beside fio on the same disk, and a trace by tier: `python -m benchmarks.nvme`.

Puts wait for the sync of what they put (`persist=True`); gets find every block on NVMe only,
because the daemon was started anew. Both are timed by a client of the daemon, over shared memory,
so they hold the copies and all checksums as well. fio does O_DIRECT transfers of the blocks' size
in a file beside the volume, right before, and syncs as often: one transfer after the other, all of
one buffer, which stays in the processor's cache, so that where the disk is as fast as memory that
alone makes a difference; and by libaio with a buffer for each block of a call, so that it moves as
much memory as ours. All are measured as one and as four at a time, and the better one counts.
Engines (`--engine`) take turns. The folder has to be on the disk that is meant.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import limits
from benchmarks.daemon import daemon
from benchmarks.replay_store import MODEL, whole_slabs
from benchmarks.replay_tiers import TieredHits, replay_tiers
from benchmarks.replay_trace import read_trace
from kvstore import Hit, Layout, Tier
from kvstore.errors import KVStoreError
from kvstore_client import KVStoreClient

SIZES = (256 << 10, 1 << 20, 4 << 20)
TOTAL_BYTES = 1 << 30  # of blocks for each size and round
VOLUME_BYTES = 4 << 30
POOL_BYTES = 1536 << 20
BATCH_BYTES = 64 << 20  # of one call
JOBS = (1, 4)
_DEADLINE_S = 120.0
DRAM_SHARE, NVME_SHARE = 0.10, 0.50


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes a second, medians over the rounds; of each the better of both numbers of jobs."""

    block_bytes: int
    engine: str
    put: float
    get: float
    fio_write: float
    fio_read: float
    fio_all_write: float
    fio_all_read: float


def measure(folder: Path, rounds: int, engines: list[str]) -> list[Rates]:
    """All sizes and engines, in turns. `KVStoreError` where a byte is wrong."""
    found: dict[tuple[int, str], list[tuple[float, ...]]] = {}
    for number in range(rounds):
        for size in SIZES:
            others = (*fio_rates(folder, size), *fio_rates(folder, size, whole=True))
            for engine in engines:
                own = folder / f"daemon-{number}-{size}-{engine}"
                tier = tier_rates(own, size, seed=number, engine=engine)
                found.setdefault((size, engine), []).append((*tier, *others))
    return [
        Rates(*which, *(statistics.median(column) for column in zip(*rows, strict=True)))
        for which, rows in found.items()
    ]


def tier_rates(folder: Path, size: int, seed: int, engine: str) -> tuple[float, float]:
    """Bytes a second put and got through the tier, with the better number of clients.

    size: of a block with its header, so that both move it.
    """
    best = [0.0, 0.0]
    for clients in JOBS:
        for number, rate in enumerate(_tier_rates(folder, size, seed, clients, engine)):
            best[number] = max(best[number], rate)
    return best[0], best[1]


@dataclass(frozen=True, slots=True)
class _Work:
    """What one client puts and gets: blocks of one size, of which each batch has its own bytes."""

    layout: Layout
    hashes: npt.NDArray[np.uint8]
    rows: npt.NDArray[np.uint8]
    into: npt.NDArray[np.uint8]

    @classmethod
    def of(cls, size: int, count: int, batch: int, rng: np.random.Generator) -> _Work:
        layout = Layout.opaque(model="benchmark", block_bytes=size - 4096, block_tokens=16)
        rows = rng.integers(0, 256, (batch, layout.block_bytes), np.uint8)
        return cls(layout, rng.integers(0, 256, (count, 32), np.uint8), rows, np.empty_like(rows))

    def batches(self) -> Iterator[npt.NDArray[np.uint8]]:
        """The keys, call by call; `rows` holds the blocks until the next."""
        for first in range(0, len(self.hashes), len(self.rows)):
            self.rows[:, :8].view(np.int64)[:] = first
            yield self.hashes[first : first + len(self.rows)]


def _tier_rates(
    folder: Path, size: int, seed: int, clients: int, engine: str
) -> tuple[float, float]:
    folder.mkdir()
    rng = np.random.default_rng([seed, size, clients])
    batch = BATCH_BYTES // size // clients
    works = [_Work.of(size, TOTAL_BYTES // size // clients, batch, rng) for _ in range(clients)]
    nvme = ("--nvme", f"{folder}:{VOLUME_BYTES}", "--nvme-engine", engine)
    flags = ("--no-grpc", *nvme, "--nvme-scrub-rate", "0")
    with _clients(folder / "first", flags, clients) as opened:
        # First all of the file is written once: new room on a disk is slower than old, for fio too.
        for _ in range(VOLUME_BYTES // TOTAL_BYTES):
            filling = [
                replace(work, hashes=rng.integers(0, 256, work.hashes.shape, np.uint8))
                for work in works
            ]
            _together(opened, filling, _put)
        put = _together(opened, works, _put)
    with _clients(folder / "second", flags, clients) as opened:
        get = _together(opened, works, _get)
        _together(opened, works, _compare)
    shutil.rmtree(folder)
    return TOTAL_BYTES / put, TOTAL_BYTES / get


@contextlib.contextmanager
def _clients(folder: Path, flags: tuple[str, ...], count: int) -> Iterator[list[KVStoreClient]]:
    """Clients of a new daemon that knows what lies on NVMe, and that have mapped its memory."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(daemon(folder, POOL_BYTES, *flags))
        opened = [stack.enter_context(server.connect()) for _ in range(count)]
        while not all(client.stats().nvme_ready for client in opened):
            time.sleep(0.01)
        for thread in threading.enumerate():
            if thread.name == "kvstore-populate":
                thread.join()
        yield opened


def _together(
    opened: list[KVStoreClient], works: list[_Work], do: Callable[[KVStoreClient, _Work], None]
) -> float:
    """Seconds until all clients are through, each on a thread of its own."""
    with ThreadPoolExecutor(len(works)) as threads:
        begin = time.monotonic()
        list(threads.map(do, opened, works))
        return time.monotonic() - begin


def _put(client: KVStoreClient, work: _Work) -> None:
    namespace = client.open_namespace("benchmark", work.layout)
    for keys in work.batches():
        done = client.put(namespace, keys, list(work.rows), persist=True, timeout_s=_DEADLINE_S)
        if done.persisted != len(keys):
            raise KVStoreError(f"{done.persisted} of {len(keys)} blocks were persisted")


def _get(client: KVStoreClient, work: _Work) -> None:
    for _ in _read(client, work, Tier.NVME):
        pass


def _compare(client: KVStoreClient, work: _Work) -> None:
    """Byte by byte, what was read before and is in memory now."""
    for _ in _read(client, work, Tier.DRAM):
        if not np.array_equal(work.into, work.rows):
            raise KVStoreError("a block is wrong")


def _read(client: KVStoreClient, work: _Work, tier: Tier) -> Iterator[None]:
    """Call by call; `into` holds the blocks until the next."""
    namespace = client.open_namespace("benchmark", work.layout)
    for keys in work.batches():
        hits = client.get_into(namespace, keys, list(work.into), timeout_s=_DEADLINE_S)
        if hits != [Hit(tier)] * len(keys):
            raise KVStoreError("a block is missing, or was not where it should be")
        yield


def fio_rates(folder: Path, size: int, *, whole: bool = False) -> tuple[float, float]:
    """Bytes a second that fio writes and reads, in transfers of this size.

    whole: of as many buffers as a call of ours has blocks, all under way together; else of one.
    """
    best = [0.0, 0.0]
    for jobs in JOBS:
        batch = BATCH_BYTES // size // jobs
        engine = ("libaio", batch) if whole else ("psync", 1)
        for number, kind in enumerate(("write", "read")):
            command = [
                "fio",
                "--name=limit",
                f"--directory={folder}",
                "--filename=fio",
                f"--rw={kind}",
                f"--bs={size}",
                f"--size={TOTAL_BYTES // jobs}",
                f"--offset_increment={TOTAL_BYTES // jobs}",
                f"--numjobs={jobs}",
                "--direct=1",
                f"--ioengine={engine[0]}",
                f"--iodepth={engine[1]}",
                f"--fdatasync={batch}",
                "--end_fsync=1",
                "--output-format=json",
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            # Until the last is through: the disk serves the jobs one before the other, so that on
            # an average job's time they seem to move up to twice as much as it does.
            last_ms = max(job["job_runtime"] for job in json.loads(done.stdout)["jobs"])
            best[number] = max(best[number], TOTAL_BYTES / (last_ms / 1e3))
    (folder / "fio").unlink()
    return best[0], best[1]


def by_tier(trace: Path, requests: int | None) -> list[TieredHits]:
    """The trace with memory for 10 % of its unique blocks and NVMe for 50 %."""
    chains = read_trace(trace, requests)
    unique = len(np.unique(np.concatenate(chains)))
    dram, nvme = whole_slabs(int(DRAM_SHARE * unique)), int(NVME_SHARE * unique)
    kinds = [(policy, every) for policy in ("lru", "s3fifo") for every in (False, True)]
    with ProcessPoolExecutor() as pool:
        runs = [
            pool.submit(replay_tiers, dram, nvme, policy, chains, every=every)
            for policy, every in kinds
        ]
        return [run.result() for run in runs]


def tables(rates: list[Rates], hits: list[TieredHits]) -> Iterator[str]:
    """Lines of Markdown."""
    facts = ", ".join(f"{name} {value}" for name, value in limits.facts().items())
    yield f"Machine: {facts}.\n"
    yield (
        f"GB/s of {TOTAL_BYTES >> 20} MiB, by one client in calls of {BATCH_BYTES >> 20} MiB or by "
        "four in calls of a quarter, and the share of what fio does by O_DIRECT in transfers of a "
        "block's size: all of one buffer, and of a buffer for each block of a call.\n"
    )
    yield (
        "| block | engine | put, persisted | fio, one buffer | | fio, all buffers | |"
        " get from NVMe | fio, one buffer | | fio, all buffers | |"
    )
    yield "|---" * 12 + "|"
    for row in rates:
        cells = [f"{row.block_bytes >> 10} KiB", row.engine]
        for ours, theirs in (
            (row.put, (row.fio_write, row.fio_all_write)),
            (row.get, (row.fio_read, row.fio_all_read)),
        ):
            cells.append(f"{ours / 1e9:.2f}")
            for limit in theirs:
                cells += [f"{limit / 1e9:.2f}", f"{ours / limit:.0%}"]
        yield f"| {' | '.join(cells)} |"
    if not hits:
        return
    yield ""
    yield (
        f"Trace: {hits[0].lookups:,} look-ups of blocks; memory for {DRAM_SHARE:.0%} of the unique "
        f"blocks, NVMe for {NVME_SHARE:.0%} (blocks of {MODEL.block_bytes >> 20} MiB).\n"
    )
    yield (
        "| policy, written | memory | NVMe | missed | sum | written blocks | written again |"
        " write amplification |"
    )
    yield "|---" * 8 + "|"
    for each in hits:
        total = each.dram_hits + each.nvme_hits + each.misses
        assert total == each.lookups
        counts = (each.dram_hits, each.nvme_hits, each.misses)
        shares = " | ".join(f"{n / total:.3f}" for n in counts)
        yield (
            f"| {each.policy}, {each.admission} | {shares} | {total:,} |"
            f" {each.written:,} | {each.reinserted:,} | {each.amplification:.3f} |"
        )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".cache"), help="on the disk to use")
    # fio's own figures differ by a quarter from round to round.
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--engine", action="append", choices=["pread", "nixl"], help="again for each (pread)"
    )
    parser.add_argument("--trace", type=Path, help="also by tier: JSON lines with `hash_ids`")
    parser.add_argument("--requests", type=int, help="of the trace only so many")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    options = parser.parse_args()
    if shutil.which("fio") is None:
        sys.exit("fio is missing: install it (apt install fio), it is what this is compared with")
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="nvme-", dir=options.folder) as name:
        rates = measure(Path(name).resolve(), options.rounds, options.engine or ["pread"])
    hits = by_tier(options.trace, options.requests) if options.trace else []
    if options.json:
        document: dict[str, Any] = {
            "rates": [asdict(row) for row in rates],
            "trace": [asdict(row) for row in hits],
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    print("\n".join(tables(rates, hits)))


if __name__ == "__main__":
    main()
