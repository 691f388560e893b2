"""What vLLM asked of our tier in a real run, asked again of its core, without vLLM.

One call a line, as `real/vllm/recording.py` notes them: what each is given, and what it answered.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvstore_integrations.options import RequestOptions
from kvstore_integrations.vllm.chunks import ChunkCache, Found, Request

_NAMES = {Found.HIT: "HIT", Found.MISS: "MISS", Found.LATER: "RETRY"}


@dataclass
class Replayed:
    """What came of it: answers that differ from those of then, and what was found and loaded."""

    differ: list[str] = field(default_factory=list)
    hits: int = 0
    loaded: dict[bytes, int] = field(default_factory=dict)  # to the row
    stored: dict[bytes, int] = field(default_factory=dict)
    failed: int = 0


def replay(lines: Iterable[str], cache: ChunkCache) -> Replayed:
    """Makes the calls in their order. Each job is over before the next call, as a fast store's."""
    done = Replayed()
    requests: dict[str, Request] = {}
    for line in lines:
        kind, *rest = json.loads(line)
        if kind == "new":
            options = RequestOptions.read(rest[1], tenant="default")
            requests[rest[0]] = Request(options=options, keys={})
        elif kind == "keys":
            known: Any = requests[rest[0]].keys
            known.update((bytes.fromhex(key), end) for key, end in rest[1])
        elif kind == "look_up":
            found = _NAMES[cache.look_up(requests[rest[0]], bytes.fromhex(rest[1]))]
            done.hits += found == "HIT"
            if found != rest[2]:
                done.differ.append(f"{line.strip()}: {found}")
        elif kind in ("load", "store"):
            _run(cache, kind, requests, rest, done)
        elif kind == "end":
            cache.end(requests.pop(rest[0]))
        elif kind == "step":
            cache.next_step()
    return done


def _run(
    cache: ChunkCache, kind: str, requests: dict[str, Request], rest: list[Any], done: Replayed
) -> None:
    request, keys = requests[rest[0]], [bytes.fromhex(key) for key in rest[2]]
    rows = np.array(rest[3])
    getattr(cache, kind)(rest[1], request, keys, rows)
    cache.drain()
    ((_, copied),) = cache.finished()
    done.failed += not copied.complete
    of = done.loaded if kind == "load" else done.stored
    of.update((key, row) for key, row in zip(keys, rows.tolist(), strict=True))
