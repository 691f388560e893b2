"""Calls that LMCache 0.5.6 made of our adapter in a real run, made again of its core."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from integrations.lmcache_rig import Key, Layout, Server, bytes_of, result_of, wait_until

from daemon import daemon
from kvstore_integrations.lmcache.names import Item, item_of, object_name
from kvstore_integrations.lmcache.objects import Stored

RECORDED = json.loads((Path(__file__).parent / "lmcache_calls.json").read_text())
KEYS = [
    Key(bytes.fromhex(digest), model, rank, group, salt)
    for digest, model, rank, group, salt in RECORDED["keys"]
]


def layout_of(form: dict[str, Any]) -> Layout:
    return Layout(
        tuple(tuple(shape) for shape in form["shapes"]),
        tuple(np.dtype(dtype.removeprefix("torch.")) for dtype in form["dtypes"]),
    )


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with daemon(tmp_path, "--dram", "64MiB") as running:
        made = Server(running.target)
        yield made
        made.close()


def test_every_answer_is_the_one_that_lmcache_got_and_every_byte_the_one_it_wrote(
    server: Server,
) -> None:
    tasks: dict[tuple[str, int], int] = {}
    done: dict[int, Stored] = {}

    def take(number: int) -> Stored | None:
        done.update(server.tier.stored())
        return done.pop(number, None)

    loading: dict[int, list[tuple[Key, Layout, np.ndarray]]] = {}
    for call in RECORDED["calls"]:
        keys = [KEYS[i] for i in call["keys"]]
        match call["call"]:
            case "store" | "load" as kind:
                forms = [layout_of(RECORDED["forms"][form]) for _, form in call["objects"]]
                rows = [
                    server.memory[at : at + form.kind("m").nbytes]
                    for (at, _), form in zip(call["objects"], forms, strict=True)
                ]
                items = [item_of(k, f.kind(k.model_name)) for k, f in zip(keys, forms, strict=True)]
                objects = list(zip(keys, forms, rows, strict=True))
                for key, form, row in objects:
                    row[:] = bytes_of(key, form) if kind == "store" else 0
                loading[call["task"]] = objects
                start = server.tier.store if kind == "store" else server.tier.load
                tasks[kind, call["task"]] = start(items, rows)
            case "look up":
                layouts = {int(group): layout_of(form) for group, form in call["layouts"].items()}
                tasks["look up", call["task"]] = server.tier.look_up(asked(keys, layouts))
            case "stored":
                stored = result_of(lambda n=tasks["store", call["task"]]: take(n))
                assert stored.complete
                sizes = [len(row) for _, _, row in loading[call["task"]]]
                assert sum(sizes[i] for i in stored.new) == call["says"]
            case "found":
                number = tasks["look up", call["task"]]
                assert result_of(lambda n=number: server.tier.found(n)) == call["says"]
            case "loaded":
                number = tasks["load", call["task"]]
                assert result_of(lambda n=number: server.tier.loaded(n)) == call["says"]
                for key, form, row in loading[call["task"]]:
                    assert np.array_equal(row, bytes_of(key, form))
            case "unlock":
                server.tier.unlock([object_name(key) for key in keys])
    wait_until(lambda: server.tier.locked == 0)


def asked(keys: list[Key], layouts: dict[int, Layout]) -> list[Item]:
    return [item_of(key, layouts[key.object_group_id].kind(key.model_name)) for key in keys]
