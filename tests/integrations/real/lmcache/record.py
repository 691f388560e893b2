"""What LMCache's storage manager calls of our adapter, for the tests that have no LMCache.

`python record.py <socket>` in LMCache's environment writes it anew, with a daemon at that target; a
test tells when that is due.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from integrations.real.lmcache.manager import Manager, chain, rows_of
from lmcache import __version__
from lmcache.v1.distributed.api import ObjectKey

from kvstore_integrations.lmcache.l2 import KVStoreL2Adapter

FILE = Path(__file__).parents[2] / "lmcache_calls.json"
Call = dict[str, Any]


class RecordingAdapter(KVStoreL2Adapter):
    """Our adapter, which writes down each call that says something."""

    calls: ClassVar[list[Call]] = []

    def submit_store_task(self, keys: Any, objects: Any) -> int:
        number = super().submit_store_task(keys, objects)
        self._note("store", number, keys, objects=[self._object(one) for one in objects])
        return number

    def pop_completed_store_tasks(self) -> Any:
        results = super().pop_completed_store_tasks()
        for number, result in results.items():
            self._note("stored", number, says=int(result))
        return results

    def submit_lookup_and_lock_task(self, keys: Any, group_layout_descs: Any) -> int:
        number = super().submit_lookup_and_lock_task(keys, group_layout_descs)
        layouts = {str(group): _layout(one) for group, one in group_layout_descs.items()}
        self._note("look up", number, keys, layouts=layouts)
        return number

    def query_lookup_and_lock_result(self, task_id: int) -> Any:
        return self._say("found", task_id, super().query_lookup_and_lock_result(task_id))

    def submit_unlock(self, keys: Any) -> None:
        super().submit_unlock(keys)
        self._note("unlock", 0, keys)

    def submit_load_task(self, keys: Any, objects: Any) -> int:
        number = super().submit_load_task(keys, objects)
        self._note("load", number, keys, objects=[self._object(one) for one in objects])
        return number

    def query_load_result(self, task_id: int) -> Any:
        return self._say("loaded", task_id, super().query_load_result(task_id))

    def _say(self, call: str, number: int, result: Any) -> Any:
        if result is not None:
            hits = result.get_indices_list()
            self._note(call, number, says=[i in hits for i in range(len(result))])
        return result

    def _object(self, one: Any) -> dict[str, Any]:
        shapes = [list(shape) for shape in one.get_shapes()]
        dtypes = [str(dtype) for dtype in one.get_dtypes()]
        return {"at": one.data_ptr - self._base, "shapes": shapes, "dtypes": dtypes}

    def _note(self, call: str, number: int, keys: Iterable[ObjectKey] = (), **more: Any) -> None:
        fields = [
            [k.chunk_hash.hex(), k.model_name, k.kv_rank, k.object_group_id, k.cache_salt]
            for k in keys
        ]
        self.calls.append({"call": call, "task": number, "keys": fields, **more})


def _layout(one: Any) -> dict[str, Any]:
    return {
        "shapes": [list(shape) for shape in one.shapes],
        "dtypes": [str(dtype) for dtype in one.dtypes],
    }


def record(target: str) -> list[Call]:
    """Two prompts, two ranks and two groups of layers: stored, evicted, asked for again."""
    RecordingAdapter.calls.clear()
    manager = Manager(
        {"module_path": __name__, "class_name": RecordingAdapter.__name__},
        l1_bytes=1 << 20,
        target=target,
        model_revision="r1",
    )
    for seed, salt in ((1, ""), (2, "user")):
        manager.write([key for row in rows_of(seed, 3, salt=salt) for key in row])
        manager.clear()
    manager.prefetch(*rows_of(1, 4))
    manager.clear()
    manager.prefetch(*rows_of(1, 4, salt="user"))
    manager.prefetch(*rows_of(2, 2, salt="user"))
    manager.clear()
    manager.write(chain(3, 2))
    manager.clear()
    manager.prefetch(chain(3, 2), policy="full")
    manager.close()
    return list(RecordingAdapter.calls)


def packed(calls: list[Call]) -> Mapping[str, Any]:
    """The calls with each key and each form of an object written once."""
    keys: dict[str, int] = {}
    forms: dict[str, int] = {}

    def number_of(known: dict[str, int], one: Any) -> int:
        return known.setdefault(json.dumps(one), len(known))

    small = []
    for call in calls:
        one = {**call, "keys": [number_of(keys, key) for key in call["keys"]]}
        if "objects" in call:
            one["objects"] = [
                [o["at"], number_of(forms, {"shapes": o["shapes"], "dtypes": o["dtypes"]})]
                for o in call["objects"]
            ]
        small.append(one)
    tables = {"keys": [json.loads(k) for k in keys], "forms": [json.loads(f) for f in forms]}
    return {"lmcache": __version__, **tables, "calls": small}


if __name__ == "__main__":
    FILE.write_text(json.dumps(packed(record(sys.argv[1])), separators=(",", ":")) + "\n")
