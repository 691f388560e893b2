"""Ways to spoil what a real daemon stores, so that it shows whether and how it is used."""

from pathlib import Path

import numpy as np
import torch

from kvstore import NamespaceHandle, hash_chain
from kvstore_client import KVStoreClient
from kvstore_engines.jobs import EngineSpec
from kvstore_engines.layouts import layout_of


def opened(client: KVStoreClient, engine: EngineSpec) -> NamespaceHandle:
    """The namespace in which the engine stores."""
    layout = layout_of(Path(engine.model), engine.block_tokens, getattr(torch, engine.dtype))
    return client.open_namespace(engine.namespace, layout)


def spoil(target: str, engine: EngineSpec, prompt: list[int]) -> None:
    """Puts zeros in the place of the prompt's blocks, with checksums of zeros."""
    with KVStoreClient(target) as client:
        namespace = opened(client, engine)
        hashes = hash_chain(prompt, block_tokens=engine.block_tokens, key=namespace.key)
        client.drop(namespace, hashes)
        zeros = [np.zeros(namespace.layout.block_bytes, np.uint8)] * len(hashes)
        assert client.put(namespace, hashes, zeros).stored == len(hashes)


def corrupt(target: str, engine: EngineSpec, prompt: list[int], *, block: int) -> None:
    """Turns bits in the second half of one block in the pool, behind the daemon's back."""
    with KVStoreClient(target) as client:
        namespace = opened(client, engine)
        hashes = hash_chain(prompt, block_tokens=engine.block_tokens, key=namespace.key)
        with client.view(namespace, hashes) as view:
            stored = view.blocks[block]
            stored.flags.writeable = True  # this user's clients have the pool mapped writable
            stored[len(stored) // 2 :] ^= 0x80
