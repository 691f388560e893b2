"""What an engine knows and the store cannot: `python examples/hints.py [TARGET]`.

TARGET: as `KVStoreClient` takes it; this user's daemon unless given.
"""

from __future__ import annotations

import sys

import numpy as np

from kvstore import Hint, HintKind, Layout, hash_chain
from kvstore_client import KVStoreClient

LAYOUT = Layout.opaque(model="my-model@rev1", block_bytes=64 << 10, block_tokens=16)


def main() -> None:
    """Three conversations, of which the store is told three different things."""
    with KVStoreClient(sys.argv[1] if len(sys.argv) > 1 else None) as client:
        namespace = client.open_namespace("hints", LAYOUT)

        def chain(first: int) -> np.ndarray:
            tokens = range(first, first + 16 * 8)
            return hash_chain(tokens, block_tokens=16, key=namespace.key)

        block = np.ones(LAYOUT.block_bytes, np.uint8)
        system, waiting, over = chain(0), chain(10_000), chain(20_000)
        for each in (system, waiting, over):
            client.put(namespace, each, [block] * len(each), position=0)

        # The system prompt of a busy hour must stay; somebody's next turn comes within a minute;
        # the third has said good-bye, so its blocks go before all others.
        pinned = client.hint(namespace, system, Hint(kind=HintKind.PIN_UNTIL, for_s=3600.0))
        expected = client.hint(namespace, waiting, Hint(kind=HintKind.NEXT_TURN_BY, for_s=60.0))
        ended = client.hint(namespace, over, Hint(kind=HintKind.SESSION_ENDS))
        print("pinned:", pinned, "expected again:", expected, "over:", ended)
        print("pinned blocks in the store:", client.stats().pinned_blocks)


if __name__ == "__main__":
    main()
