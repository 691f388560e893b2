"""The engines that move an NVMe volume's bytes, side by side: `python -m benchmarks.nvme_engines`.

Blocks that are neighbours on disk and not in memory, as those of a batch are, past the page cache;
64 of them at one time: in one call, in four calls of 16 by as many threads, or in 64 calls of one.
Writes end with a sync. The engines take turns, so that a disk that drifts does so for both. The
folder has to be on the disk that is meant.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks import limits
from kvstore.errors import KVStoreError
from kvstore.nvme.disk import Buffer, Engine, MakeEngine, Pread
from kvstore.nvme.format import aligned
from kvstore.nvme.nixl import NixlEngine

ENGINES: dict[str, MakeEngine] = {"pread": Pread, "nixl": NixlEngine}
SIZES = (256 << 10, 1 << 20, 4 << 20)
IN_FLIGHT = 64
THREADS = (1, 4, 64)
FILE_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class Turn:
    """Medians over the rounds. rate: bytes a second; cpu: seconds of processor time for a GB."""

    block_bytes: int
    threads: int
    kind: str
    engine: str
    rate: float
    cpu: float


def measure(folder: Path, rounds: int) -> list[Turn]:
    """All of it, on a file of its own. `KVStoreError` where a byte is wrong."""
    file = os.open(folder / "engines", os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    engines = {name: make(file) for name, make in ENGINES.items()}
    found: dict[tuple[int, int, str, str], list[tuple[float, float]]] = {}
    try:
        for number in range(rounds):
            for size in SIZES:
                work = _Work(file, size, seed=number)
                for threads in THREADS:
                    for kind, turn in (("write", work.write), ("read", work.read)):
                        for name, engine in engines.items():
                            which = (size, threads, kind, name)
                            found.setdefault(which, []).append(turn(engine, threads))
    finally:
        for engine in engines.values():
            engine.close()
        os.close(file)
    return [
        Turn(*which, *(statistics.median(column) for column in zip(*turns, strict=True)))
        for which, turns in found.items()
    ]


class _Work:
    """Blocks of one size, and memory to read them into: each second one of a larger memory."""

    def __init__(self, file: int, size: int, seed: int) -> None:
        self._file, self._size = file, size
        self._blocks, self._into = (
            aligned(2 * IN_FLIGHT * size).reshape(IN_FLIGHT, 2, size)[:, 0] for _ in range(2)
        )
        self._blocks[:] = np.random.default_rng(seed).integers(0, 256, self._blocks.shape, np.uint8)
        self.write(Pread(file), 1)  # new room on a disk is slower than old

    def write(self, engine: Engine, threads: int) -> tuple[float, float]:
        """Bytes a second, and seconds of processor time for a GB."""
        return self._timed(engine.write, self._blocks, threads)

    def read(self, engine: Engine, threads: int) -> tuple[float, float]:
        """The same, with the bytes compared afterwards."""
        self._into[:] = 0
        result = self._timed(engine.read, self._into, threads)
        if not np.array_equal(self._into, self._blocks):
            raise KVStoreError("a block is wrong")
        return result

    def _timed(
        self, move: Callable[[int, list[Buffer]], None], memory: Buffer, threads: int
    ) -> tuple[float, float]:
        each = IN_FLIGHT // threads
        whole = IN_FLIGHT * self._size

        def call(at: int) -> None:
            first = at % whole // self._size
            move(at, list(memory[first : first + each]))

        with ThreadPoolExecutor(threads) as pool:
            begin, cpu = time.monotonic(), _cpu_s()
            for first in range(0, FILE_BYTES, whole):
                list(pool.map(call, range(first, first + whole, each * self._size)))
            os.fdatasync(self._file)
            seconds, cpu = time.monotonic() - begin, _cpu_s() - cpu
        return FILE_BYTES / seconds, cpu / (FILE_BYTES / 1e9)


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def tables(turns: list[Turn]) -> Iterator[str]:
    """Lines of Markdown."""
    facts = ", ".join(f"{name} {value}" for name, value in limits.facts().items())
    yield f"Machine: {facts}.\n"
    yield (
        f"GB/s of {FILE_BYTES >> 20} MiB with {IN_FLIGHT} blocks at one time, and milliseconds of"
        " processor time for a GB.\n"
    )
    yield "| block | engine | threads x blocks a call | write | processor | read | processor |"
    yield "|---" * 7 + "|"
    by = {(turn.block_bytes, turn.threads, turn.engine, turn.kind): turn for turn in turns}
    for size in SIZES:
        for threads in THREADS:
            for name in ENGINES:
                cells = [f"{size >> 10} KiB", name, f"{threads} x {IN_FLIGHT // threads}"]
                for kind in ("write", "read"):
                    turn = by[size, threads, name, kind]
                    cells += [f"{turn.rate / 1e9:.2f}", f"{turn.cpu * 1e3:.0f}"]
                yield f"| {' | '.join(cells)} |"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".cache"), help="on the disk to use")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="nvme-", dir=options.folder) as name:
        turns = measure(Path(name), options.rounds)
    if options.json:
        options.json.write_text(json.dumps([asdict(turn) for turn in turns], indent=1) + "\n")
    print("\n".join(tables(turns)))


if __name__ == "__main__":
    main()
