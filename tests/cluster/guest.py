"""Clients in processes of their own, which tests stop and kill.

`python -m cluster.guest WHAT TRANSFER SEEDS` gets or puts without end, until its standard input,
on which its token comes first, does. It writes a line for each call, then what was wrong.
"""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import subprocess
import sys
import threading
from types import TracebackType
from typing import Self

import numpy as np
import xxhash
from cluster.nodes import Nodes, blocks, chain

from kvstore import Hit, Layout
from kvstore_client.cluster.session import ClusterSession
from kvstore_proto.cluster.rpc import client_token

# A block takes longer than what buffers on its way hold.
LAYOUT = Layout.opaque(model="cluster-guest", block_tokens=16, block_bytes=1 << 20)
SPACE = "guest"
CHAINS, N = 12, 8
_MIB = 1 << 20
_CALL_S = 1.0
_END_S = 30.0


@functools.cache
def data_of(seed: int) -> np.ndarray:
    """The bytes of a chain, which everybody knows."""
    return blocks(N, seed, LAYOUT)


class Guest:
    """One such process, for the length of a `with`."""

    def __init__(self, nodes: Nodes, what: str, transfer: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cluster.guest", what, transfer, ",".join(nodes.seeds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        self._token = client_token(nodes.secret)
        self._changed, self._calls, self._last = threading.Condition(), 0, ""
        self._reader = threading.Thread(target=self._read)

    def __enter__(self) -> Self:
        self._reader.start()
        assert self._process.stdin
        self._process.stdin.write(self._token + "\n")
        self._process.stdin.flush()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe
            pipe.close()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            with self._changed:
                self._last = line
                self._calls += 1
                self._changed.notify_all()

    def wait_for(self, calls: int, timeout_s: float = 30.0) -> None:
        """Until it has made so many more."""
        with self._changed:
            enough = self._calls + calls
            assert self._changed.wait_for(lambda: self._calls >= enough, timeout_s), self._calls

    def kill(self) -> None:
        """It dies as it stands."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """It stops as it stands."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Ends a `stop`."""
        self._process.send_signal(signal.SIGCONT)

    def end(self) -> int:
        """Lets it end; how many blocks it has compared, all of which had the right bytes."""
        assert self._process.stdin
        self._process.stdin.close()
        assert self._process.wait(_END_S) == 0
        self._reader.join()
        said = json.loads(self._last)
        assert not said["wrong"], said["wrong"]
        return int(said["right"])


def get_for_ever(session: ClusterSession, ended: threading.Event) -> dict[str, object]:
    """Gets of any of the chains; compares every block."""
    space = session.open_namespace(SPACE, LAYOUT)
    truth = [list(map(_sum, data_of(seed))) for seed in range(CHAINS)]
    found = np.zeros((N, LAYOUT.block_bytes), np.uint8)
    right, wrong, rng = 0, [], random.Random(os.getpid())
    while not ended.is_set():
        seed = rng.randrange(CHAINS)
        got = session.get_into(space, chain(N, seed), list(found))
        for i, each in enumerate(got):
            if isinstance(each, Hit) and _sum(found[i]) == truth[seed][i]:
                right += 1
            elif isinstance(each, Hit):
                wrong.append(f"block {i} of chain {seed}")
        print(flush=True)
    return {"right": right, "wrong": wrong}


def put_for_ever(session: ClusterSession, ended: threading.Event) -> dict[str, object]:
    """Puts of all the chains in turn, which evict each other."""
    space = session.open_namespace(SPACE, LAYOUT)
    data, turn = [data_of(seed) for seed in range(CHAINS)], 0
    while not ended.is_set():
        seed, turn = turn % CHAINS, turn + 1
        session.put(space, chain(N, seed), list(data[seed]), position=0)
        print(flush=True)
    return {"right": 0, "wrong": []}


def _sum(block: np.ndarray) -> int:
    return xxhash.xxh3_64_intdigest(block)


def main() -> None:
    """The command."""
    what, transfer, seeds = sys.argv[1:]
    token, ended = sys.stdin.readline().strip(), threading.Event()

    def wait() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    memory = {"arena_bytes": 2 * N * _MIB, "ring_bytes": 3 * N * _MIB // 2}
    with ClusterSession(
        seeds.split(","), token=token, transfer=transfer, timeout_s=_CALL_S, **memory
    ) as session:
        said = {"get": get_for_ever, "put": put_for_ever}[what](session, ended)
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
