"""Two processes and a daemon: `python examples/two_engines.py [TARGET]`.

TARGET: as `KVStoreClient` takes it, such as `unix:///run/kvstore.sock`; this user's daemon unless
given.
"""

from __future__ import annotations

import multiprocessing
import sys

import numpy as np

from kvstore import Layout, hash_chain
from kvstore_client import KVStoreClient

LAYOUT = Layout.opaque(model="my-model@rev1", block_bytes=256 << 10, block_tokens=16)
PROMPT = list(range(16 * 32))


def prefill(target: str | None) -> None:
    """What an engine does that has computed a prompt."""
    with KVStoreClient(target) as client:
        namespace = client.open_namespace("two-engines", LAYOUT)
        chain = hash_chain(PROMPT, block_tokens=LAYOUT.block_tokens, key=namespace.key)
        blocks = [np.full(LAYOUT.block_bytes, i, np.uint8) for i in range(len(chain))]
        done = client.put(namespace, chain, blocks, position=0)
        print("prefill: stored", done.stored, "blocks, there already:", done.existed)


def decode(target: str | None) -> None:
    """What another one does with the same prompt, without computing it."""
    with KVStoreClient(target) as client:
        namespace = client.open_namespace("two-engines", LAYOUT)
        chain = hash_chain(PROMPT, block_tokens=LAYOUT.block_tokens, key=namespace.key)
        found = client.match(namespace, chain).count
        # A view shows the store's own memory: nothing is copied, and nothing in it is evicted.
        with client.view(namespace, chain[:found]) as view:
            firsts = [int(block[0]) for block in view.blocks]
        print("decode: found", found, "of", len(chain), "blocks, right:", firsts == [*range(found)])


def main() -> None:
    """One after the other, each in a process of its own."""
    target = sys.argv[1] if len(sys.argv) > 1 else None
    context = multiprocessing.get_context("spawn")
    for work in (prefill, decode):
        process = context.Process(target=work, args=(target,))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(process.exitcode)


if __name__ == "__main__":
    main()
