"""A daemon killed under load, again and again: what it acknowledged as persisted is there."""

from __future__ import annotations

import queue
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from daemon import Daemon
from kvstore import Hit, Layout
from kvstore.nvme.nixl import why_not
from kvstore_client import KVStoreClient

LAYOUT = Layout.opaque(model="kills", block_bytes=60_000, block_tokens=16)
BATCH = 8
WAIT_S = 60.0


def block(key: bytes) -> np.ndarray:
    """What is stored under a key: it follows from it."""
    return np.random.default_rng([*key]).integers(0, 256, LAYOUT.block_bytes, np.uint8)


class Load:
    """Puts batches until the daemon is gone. acknowledged: keys that the store called persisted."""

    def __init__(self, target: str, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._client = KVStoreClient(target, timeout_s=WAIT_S)
        self.acknowledged: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        namespace = self._client.open_namespace("kills", LAYOUT)
        while not self._over.is_set():
            keys = self._rng.integers(0, 256, (BATCH, 32), np.uint8)
            rows = [block(key.tobytes()) for key in keys]
            put = self._client.put(namespace, keys, rows, persist=True, timeout_s=WAIT_S)
            if put.persisted == BATCH:
                for key in keys:
                    self.acknowledged.put(key.tobytes())

    def end(self) -> list[bytes]:
        """The keys that were acknowledged and not taken yet."""
        self._over.set()
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()
        self._client.close()
        rest = []
        while not self.acknowledged.empty():
            rest.append(self.acknowledged.get())
        return rest


def wait_recovered(client: KVStoreClient) -> None:
    end_s = time.monotonic() + WAIT_S
    while not client.stats(timeout_s=WAIT_S).nvme_ready:
        assert time.monotonic() < end_s


def check_all_there(target: str, keys: list[bytes]) -> None:
    with KVStoreClient(target, timeout_s=WAIT_S) as client:
        wait_recovered(client)
        namespace = client.open_namespace("kills", LAYOUT)
        for at in range(0, len(keys), 32):
            some = keys[at : at + 32]
            rows = [np.empty(LAYOUT.block_bytes, np.uint8) for _ in some]
            results = client.get_into(namespace, some, rows, timeout_s=WAIT_S)
            assert all(isinstance(result, Hit) for result in results), results
            for key, row in zip(some, rows, strict=True):
                assert (row == block(key)).all()
        assert client.stats().corrupted == 0


def kill_again_and_again(folder: Path, cycles: int, seed: int, engine: str) -> int:
    """Returns how many blocks were acknowledged over all cycles."""
    rng = np.random.default_rng(seed)
    volume = folder / "nvme"
    volume.mkdir()
    flags = ("--dram", "16MiB", "--nvme", f"{volume}:1GiB", "--nvme-engine", engine)
    known: list[bytes] = []
    for cycle in range(cycles):
        process = Daemon(folder, *flags)
        try:
            process.wait_ready()
            # In the order of chance, so that what is read is not always what is in memory.
            check_all_there(process.target, [known[i] for i in rng.permutation(len(known))])
            load = Load(process.target, seed=1000 * seed + cycle)
            try:
                count = BATCH * int(rng.integers(1, 12))
                known += [load.acknowledged.get(timeout=WAIT_S) for _ in range(count)]
            finally:
                process.kill(signal.SIGKILL)
                known += load.end()
        finally:
            process.end()
    with_all = Daemon(folder, *flags)
    try:
        check_all_there(with_all.wait_ready().target, known)
        with_all.terminate()
    finally:
        with_all.end()
    return len(known)


NIXL = pytest.param(
    "nixl",
    marks=pytest.mark.skipif(bool(why_not()), reason="NIXL's POSIX plugin does not work here"),
)


@pytest.mark.parametrize("engine", ["pread", NIXL])
def test_what_was_persisted_survives_kills(tmp_path: Path, engine: str) -> None:
    assert kill_again_and_again(tmp_path, cycles=4, seed=1, engine=engine) > 0


@pytest.mark.long
@pytest.mark.timeout(600)  # a minute where nothing runs beside it, three where much does
@pytest.mark.parametrize("engine", ["pread", NIXL])
def test_what_was_persisted_survives_fifty_kills(tmp_path: Path, engine: str) -> None:
    assert kill_again_and_again(tmp_path, cycles=50, seed=2, engine=engine) > 0
