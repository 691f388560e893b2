"""Our backend, and what SGLang calls of it, one JSON object a line, in the file $SGLANG_CALLS.

`tests/integrations/sglang_calls.json` is made of it: see `test_calls.py`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from sglang.srt.runtime_context import get_server_args

from kvstore_integrations.sglang.facts import ARGUMENTS, POOL_ATTRIBUTES
from kvstore_integrations.sglang.storage import KVStoreHiCache

_FILE = Path(os.environ["SGLANG_CALLS"])


class Recorder(KVStoreHiCache):
    """Addresses are noted as distances from the start of the pool's memory."""

    def __init__(self, storage_config: Any, kwargs: Any) -> None:
        arguments = get_server_args().resolved_dict()
        _note(
            "__init__",
            config=dataclasses.asdict(storage_config),
            kwargs=kwargs,
            arguments={name: arguments[name] for name in ARGUMENTS},
        )
        super().__init__(storage_config, kwargs)

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        pool = mem_pool_host
        said = {name: getattr(pool, name, None) for name in POOL_ATTRIBUTES}
        _note("register_mem_pool_host", pool={**said, "dtype": str(pool.dtype), "size": pool.size})
        super().register_mem_pool_host(pool)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: str) -> None:
        assert host_pool is self.mem_pool_host
        _note("register_mem_host_pool_v2", name=str(host_pool_name))
        super().register_mem_host_pool_v2(host_pool, host_pool_name)

    def on_host_pools_registered(self) -> None:
        _note("on_host_pools_registered")
        super().on_host_pools_registered()

    def batch_exists(self, keys: Any, extra_info: Any = None) -> int:
        answer = super().batch_exists(keys, extra_info)
        _note("batch_exists", keys=keys, prefix=extra_info.prefix_keys, answer=answer)
        return answer

    def batch_get_v1(self, keys: Any, host_indices: Any, extra_info: Any = None) -> list[bool]:
        answer = super().batch_get_v1(keys, host_indices, extra_info)
        self._note_copies("batch_get_v1", keys, host_indices, extra_info, answer)
        return answer

    def batch_set_v1(self, keys: Any, host_indices: Any, extra_info: Any = None) -> list[bool]:
        answer = super().batch_set_v1(keys, host_indices, extra_info)
        self._note_copies("batch_set_v1", keys, host_indices, extra_info, answer)
        return answer

    def _note_copies(self, call: str, keys: Any, indices: Any, extra: Any, answer: Any) -> None:
        addresses, sizes = self.mem_pool_host.get_page_buffer_meta(indices)
        start = self.mem_pool_host.kv_buffer.data_ptr()
        pages = indices.view(-1, self.mem_pool_host.page_size)
        assert (pages == pages[:, :1] + indices.new_tensor(range(pages.shape[1]))).all()
        _note(
            call,
            keys=keys,
            prefix=extra.prefix_keys,
            pages=(pages[:, 0] // pages.shape[1]).tolist(),
            pieces=sizes[: len(sizes) // len(keys)],
            distances=[address - start for address in addresses],
            answer=answer,
        )


def _note(call: str, **said: Any) -> None:
    with _FILE.open("a") as stream:
        print(json.dumps({"call": call, **said}), file=stream)
