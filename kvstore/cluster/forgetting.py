"""How a node forgets: single blocks, and namespaces as a whole."""

from __future__ import annotations

import numpy as np

from kvstore import commands as c
from kvstore import limits
from kvstore.cluster.messages import Generations
from kvstore.cluster.site import Site, Space, mark_of


async def forget_keys(site: Site, space: Space, hashes: c.U8) -> int:
    """Drops blocks (their hashes, (n, 32)), and those that come by what is on its way; how many
    that were. At least 1 where something was on its way: it may have come to a node that has
    answered already, so all are asked once more."""
    blocks = await _drop(site, space, hashes)
    moves = site.moves.under_way(space.mark, hashes)
    if not moves:
        return blocks
    if await site.moves.over(moves, site.policy.call_ms):
        blocks += await _drop(site, space, hashes)
    return max(blocks, 1)


async def _drop(site: Site, space: Space, hashes: c.U8) -> int:
    drop = c.Drop(namespace=space.number, hashes=hashes)
    count: c.Count = await site.store.command(drop, site.policy.call_ms)
    return count.blocks


async def forget_all(site: Site, name: str, layout: bytes, generation: int) -> int:
    """Forgets a namespace up to a generation; how many blocks that were. The blocks first: a
    node that dies in between is asked again, because it never answered."""
    mark = mark_of(name, layout)
    if site.generation(mark) >= generation:
        return 0
    space = await site.open(name, layout)
    drop = c.Drop(namespace=space.number, hashes=np.empty((0, limits.KEY_BYTES), np.uint8))
    count: c.Count = await site.store.command(drop, 2 * limits.MAX_FORGET_MS)
    site.forget_space(space)
    site.forgotten[mark] = max(generation, site.generation(mark))
    site.save()
    return count.blocks


async def catch_up(site: Site, found: Generations) -> None:
    """Forgets what another node says that it has forgotten as a whole."""
    names = found.names.split("\n") if found.names else []
    layouts = found.layouts.split("\n") if found.layouts else []
    for name, layout, number in zip(names, layouts, found.numbers.tolist(), strict=True):
        await forget_all(site, name, layout.encode(), number)
