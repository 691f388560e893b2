"""Client processes that tests start, stop and kill: `python -m faults.workers ROLE TARGET ...`.

Each prints lines that the test waits for, and most wait for the end of their standard input.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kvstore import Hit, Layout
from kvstore import commands as c
from kvstore.block import cell_checksums
from kvstore.errors import PermissionDenied, StaleNamespace
from kvstore.session import ChannelSession
from kvstore.session.link import Link
from kvstore_client import KVStoreClient


def layout(block_bytes: int) -> Layout:
    """Blocks of one size, a multiple of 8 bytes."""
    return Layout.opaque(model="faults", block_bytes=block_bytes, block_tokens=16)


def hashes(n: int, seed: int = 0) -> np.ndarray:
    """n keys, the same in every process."""
    return np.random.default_rng(seed).integers(0, 256, (n, 32), np.uint8)


def content(key: int, version: int, block_bytes: int) -> np.ndarray:
    """The bytes of one block, which tell their key and version in every word."""
    words = np.arange(block_bytes // 8, dtype=np.uint64)
    return (words + np.uint64(key << 40 | version << 20)).view(np.uint8)


def is_right(block: np.ndarray, key: int) -> bool:
    """Whether all words of a block are of this key and of one version."""
    words = block.view(np.uint64)
    ascending = words - words[0] == np.arange(len(words), dtype=np.uint64)
    return int(words[0]) >> 40 == key and bool(ascending.all())


def put_forever(client: KVStoreClient, seed: int, block_bytes: int, n_keys: int) -> None:
    """Puts and drops random keys, in ever new versions, until the input ends."""
    namespace = client.open_namespace("race", layout(block_bytes))
    rng, keys, version, stored = np.random.default_rng(seed), hashes(n_keys), 0, 0
    os.set_blocking(sys.stdin.fileno(), False)
    print("ready", flush=True)
    while _input_open():
        version = (version + 1) % (1 << 20)
        chosen = rng.choice(n_keys, 4, replace=False)
        blocks = [content(int(key), version, block_bytes) for key in chosen]
        stored += client.put(namespace, keys[chosen], blocks).stored
        if rng.random() < 0.2:
            client.drop(namespace, keys[rng.choice(n_keys, 4, replace=False)])
    print(f"stored {stored}", flush=True)


def _input_open() -> bool:
    try:
        return bool(os.read(sys.stdin.fileno(), 1))
    except BlockingIOError:
        return True


def read(client: KVStoreClient, seed: int, block_bytes: int, n_keys: int, reads: int) -> None:
    """Gets and checks `reads` blocks; says how many were hits and how many were wrong."""
    namespace = client.open_namespace("race", layout(block_bytes))
    rng, keys = np.random.default_rng(seed), hashes(n_keys)
    target = np.zeros(block_bytes, np.uint8)
    hits = wrong = 0
    print("ready", flush=True)
    for key in rng.integers(0, n_keys, reads).tolist():
        # One key a call: a chain would end at its first miss.
        answer = client.get_into(namespace, keys[key : key + 1], [target])[0]
        if isinstance(answer, Hit):
            hits += 1
            wrong += not is_right(target, key)
    print(f"hits {hits} wrong {wrong}", flush=True)


def hold_view(client: KVStoreClient, block_bytes: int, n_keys: int) -> None:
    """Holds a view of the first keys until the input ends, or until it is killed."""
    namespace = client.open_namespace("race", layout(block_bytes))
    view = client.view(namespace, hashes(n_keys))
    print(f"holds {len(view.blocks)}", flush=True)
    sys.stdin.buffer.read()


def stop_in_mid_put(client: KVStoreClient, block_bytes: int, n_keys: int) -> None:
    """Reserves slots, waits for a line, writes them, waits for a line, and seals.

    Between the lines it is what a writer is that was stopped at the worst moment: it has slots
    and will write and seal them, whatever has happened meanwhile.
    """
    assert isinstance(client._session, ChannelSession)
    connection: Any = client._session._now()
    link: Link = connection._link
    namespace = client.open_namespace("race", layout(block_bytes))
    keys, none = hashes(n_keys, seed=1), np.empty(0, np.uint32)
    put = {"namespace": namespace.id, "put_id": b"w" * 16, "hashes": keys}
    reserved: Any = link.call(c.Reserve(**put, cells=none), 5.0)
    slots = [link.memory(5.0).payload(namespace.layout, int(g)) for g in reserved.granules]
    print(f"reserved {int((reserved.status == c.ReserveStatus.GRANTED).sum())}", flush=True)
    sys.stdin.readline()
    for slot in slots:
        slot[:] = 0xEE
    print("written", flush=True)
    sys.stdin.readline()
    sums = np.stack([cell_checksums(slot, namespace.layout.cell_bounds) for slot in slots])
    try:
        sealed: Any = link.call(c.Seal(**put, checksums=sums), 5.0)
        print(f"sealed {int((sealed.status == c.SealStatus.STORED).sum())}", flush=True)
    except StaleNamespace:
        print("stale", flush=True)


def seal_unstaged(client: KVStoreClient, block_bytes: int, n_keys: int) -> None:
    """Reserves slots and seals them, though it may not write them and has staged nothing."""
    assert isinstance(client._session, ChannelSession)
    connection: Any = client._session._now()
    link: Link = connection._link
    namespace = client.open_namespace("race", layout(block_bytes))
    keys, none = hashes(n_keys, seed=1), np.empty(0, np.uint32)
    put = {"namespace": namespace.id, "put_id": b"w" * 16, "hashes": keys}
    reserved: Any = link.call(c.Reserve(**put, cells=none), 5.0)
    try:
        link.call(c.Seal(**put, checksums=np.zeros((n_keys, 1), np.uint64)), 5.0)
    except PermissionDenied:
        granted = int((reserved.status == c.ReserveStatus.GRANTED).sum())
        print(f"refused {granted}", flush=True)
    sys.stdin.readline()


def put_untold(client: KVStoreClient, block_bytes: int, n_keys: int) -> None:
    """Puts all keys, of which the daemon is told nothing, and waits."""
    assert isinstance(client._session, ChannelSession)
    connection: Any = client._session._now()
    connection._link.cast = lambda *_: None
    namespace = client.open_namespace("race", layout(block_bytes))
    blocks = [content(key, 1, block_bytes) for key in range(n_keys)]
    result = client.put(namespace, hashes(n_keys, seed=1), blocks)
    print(f"stored {result.stored}", flush=True)
    sys.stdin.readline()


def main() -> None:
    """The process."""
    role, target, *numbers = sys.argv[1:]
    roles = {
        "put": put_forever,
        "read": read,
        "view": hold_view,
        "mid-put": stop_in_mid_put,
        "unstaged": seal_unstaged,
        "untold": put_untold,
    }
    with KVStoreClient(target) as client:
        roles[role](client, *map(int, numbers))  # type: ignore[operator]


@contextlib.contextmanager
def worker(role: str, target: str, *numbers: int) -> Iterator[subprocess.Popen[str]]:
    """A worker for the length of a `with`; killed at its end if it still runs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "faults.workers", role, target, *map(str, numbers)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def says(process: subprocess.Popen[str]) -> str:
    """The next line of a worker, empty at its end."""
    assert process.stdout
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str], line: str = "go") -> None:
    """Lets a waiting worker go on."""
    assert process.stdin
    print(line, file=process.stdin, flush=True)


if __name__ == "__main__":
    main()
