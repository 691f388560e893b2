"""How fast SGLang's pages get to a real daemon and back, in place and gathered:
`PYTHONPATH=tests python tests/integrations/sglang_speed.py`, on a machine that is quiet.

Prints a line for each kind of page and each way: the upper quartile of the last rounds, GiB/s, and
the quickest look-up. Takes a minute, and 2 GiB of memory.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from integrations.sglang_pool import HostPool

from daemon import daemon
from kvstore_client import KVStoreClient
from kvstore_integrations.identity import Identity
from kvstore_integrations.sglang import pages
from kvstore_integrations.spaces import Spaces

ROUNDS, COUNTED = 24, 12  # the first ones fill the pool, whose memory is new
_8B = {"layer_num": 32, "head_num": 8, "head_dim": 128, "v_head_dim": 128, "itemsize": 2}
POOLS = {
    "page_first, 64 tokens, 8 MiB": HostPool(64 * 32, page_size=64, **_8B),
    "page_first, 8 tokens, 1 MiB": HostPool(8 * 128, page_size=8, **_8B),
    "layer_first, 64 tokens, 8 MiB": HostPool(64 * 32, page_size=64, layout="layer_first", **_8B),
    "layer_first, 8 tokens, 1 MiB": HostPool(8 * 128, page_size=8, layout="layer_first", **_8B),
    "MLA page_first, 64 tokens": HostPool(64 * 32, page_size=64, layer_num=61, latent=1152),
}


class InPlace(pages.PageForm):
    """A block a piece, however many there are."""

    @property
    def blocks(self) -> int:
        return len(self.pieces)


class Gathered(pages.PageForm):
    """A block a page."""

    @property
    def blocks(self) -> int:
        return 1


class Way:
    """One way of one kind of page, and the seconds that its calls took."""

    def __init__(self, client: KVStoreClient, form: pages.PageForm) -> None:
        name = type(form).__name__
        spaces = Spaces(
            client,
            Identity("speed", "m", {"way": name}),
            block_bytes=form.block_bytes,
            block_tokens=form.tokens,
        )
        self.name, self.form = name, form
        self.store = pages.PageStore(client, spaces, form, tenant="t")
        self.store.open()
        self.seconds: dict[str, list[float]] = {"store": [], "load": [], "look up": []}

    def round(self, number: int, addresses: list[int], n: int) -> None:
        keys = [hashlib.sha256(f"{self.name} {number} {i}".encode()).hexdigest() for i in range(n)]
        assert all(self._timed("store", lambda: self.store.store(keys, addresses, [])))
        assert self._timed("look up", lambda: self.store.count_leading(keys)) == n
        assert all(self._timed("load", lambda: self.store.load(keys, addresses)))

    def speed(self, what: str, nbytes: int) -> float:
        return nbytes / 2**30 / float(np.quantile(self.seconds[what][-COUNTED:], 0.25))

    def _timed(self, what: str, work: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = work()
        self.seconds[what].append(time.perf_counter() - begin)
        return result


def measure(name: str, pool: HostPool) -> None:
    """Both ways in turn, so that the machine's moods meet both."""
    n = pool.size // pool.page_size
    pool.fill(1)
    addresses = pool.addresses(np.random.default_rng(0).permutation(n).tolist())
    with (
        tempfile.TemporaryDirectory() as folder,
        daemon(Path(folder), "--dram", "1536MiB") as server,
        KVStoreClient(server.target, verify_reads=True) as client,
    ):
        kinds = (InPlace, Gathered) if len(pool.pieces) > 1 else (InPlace,)
        ways = [Way(client, kind(pool.page_size, pool.pieces)) for kind in kinds]
        for number in range(ROUNDS):
            for way in ways:
                way.round(number, addresses, n)
        for way in ways:
            nbytes = n * way.form.nbytes
            chosen = way.form.blocks == pages.PageForm(pool.page_size, pool.pieces).blocks
            print(
                f"{name:30} {way.name:9}{'*' if chosen else ' '} {n} pages:"
                f" store {way.speed('store', nbytes):5.1f} load {way.speed('load', nbytes):5.1f}"
                f" GiB/s, look-up {min(way.seconds['look up']) * 1e6:.0f} us",
                flush=True,
            )
            way.store.close()


if __name__ == "__main__":
    print("*: the way that is chosen")
    for kind_name, kind_pool in POOLS.items():
        measure(kind_name, kind_pool)
