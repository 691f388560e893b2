"""A store in this process: `python examples/embedded.py`."""

from __future__ import annotations

import numpy as np

from kvstore import Attention, Hit, KVStore, Layout, hash_chain

LAYOUT = Layout(
    model="my-model@rev1",
    attention=Attention.GQA,
    layers=2,
    kv_heads=2,
    head_dim=64,
    dtype="bfloat16",
    block_tokens=16,
)


def main() -> None:
    """Puts a prompt's blocks, then asks with a longer prompt that begins like it."""
    with KVStore(dram=64 << 20) as store:
        namespace = store.open_namespace("demo", LAYOUT)
        prompt = list(range(64))
        chain = hash_chain(prompt, block_tokens=16, key=namespace.key)
        blocks = [np.full(LAYOUT.block_bytes, i, np.uint8) for i in range(len(chain))]
        print("stored:", store.put(namespace, chain, blocks, position=0).stored)

        longer = hash_chain([*prompt, *range(100, 148)], block_tokens=16, key=namespace.key)
        known = store.match(namespace, longer).count
        print("known of the longer prompt:", known, "of", len(longer), "blocks")

        targets = [np.empty(LAYOUT.block_bytes, np.uint8) for _ in range(known)]
        results = store.get_into(namespace, longer[:known], targets)
        whole = all(isinstance(result, Hit) for result in results)
        same = all(np.array_equal(a, b) for a, b in zip(targets, blocks, strict=True))
        print("got:", len(results), "all hits:", whole, "same bytes:", same)


if __name__ == "__main__":
    main()
