"""Our connector, noting down all that vLLM asks of its scheduler's side in the file that the
variable RECORD names; each copy is over before the next call, as a fast store's would be."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole

from kvstore_integrations.vllm.connector import KVStoreConnector
from kvstore_integrations.vllm.plans import Dropped, Plan
from kvstore_integrations.vllm.scheduling import Blocks, EngineRequest, Scheduling


class RecordingConnector(KVStoreConnector):
    """`KVStoreConnector`, recorded."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        if role is KVConnectorRole.SCHEDULER:
            self._scheduling = Recorder(self._books, Path(os.environ["RECORD"]))

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        super().start_load_kv(forward_context, **kwargs)
        self._copies.drain()

    def wait_for_save(self) -> None:
        super().wait_for_save()
        self._copies.drain()


class Recorder(Scheduling):
    """Stands before the real one, and writes a line of JSON for each call."""

    def __init__(self, real: Scheduling, file: Path) -> None:
        self._real, self._file = real, file.open("w")
        self._requests: dict[str, EngineRequest] = {}
        self._known: dict[str, int] = {}
        self._names: dict[str, str] = {}  # vLLM's have a part that is new in each run

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("_") or name in ("add", "match", "allocated", "step", "note", "end"):
            return object.__getattribute__(self, name)
        return getattr(self._real, name)

    def add(self, engine: EngineRequest, said: Mapping[str, Any] | None, adapter: str = "") -> None:
        self._requests[engine.request_id] = engine
        name = self._names[engine.request_id] = f"r{len(self._names)}"
        self._line("add", name, engine.num_prompt_tokens, said, adapter)
        self._real.add(engine, said, adapter)

    def match(self, request_id: str, local: int) -> int | None:
        self._state(request_id)
        found = self._real.match(request_id, local)
        self._line("match", self._names[request_id], local, found)
        return found

    def allocated(self, request_id: str, blocks: Blocks, tokens: int) -> None:
        self._line("allocated", self._names[request_id], [list(one) for one in blocks], tokens)
        self._real.allocated(request_id, blocks, tokens)

    def step(self, scheduled: Mapping[str, int], blocks_of: Callable[[str], Blocks | None]) -> Plan:
        for request_id in scheduled:
            self._state(request_id)
        asked = {}

        def noting(request_id: str) -> Blocks | None:
            blocks = asked[self._names[request_id]] = blocks_of(request_id)
            return blocks

        plan = self._real.step(scheduled, noting)
        copies = [
            [
                [self._names[one.request], part.group, part.position, list(part.blocks)]
                for one in those
                for part in one.parts
            ]
            for those in (plan.loads, plan.saves)
        ]
        counts = {self._names[request_id]: count for request_id, count in scheduled.items()}
        self._line("step", counts, asked, *copies)
        return plan

    def note(
        self,
        *,
        finished: Collection[str] = (),
        failed: Collection[str] = (),
        lost_blocks: Collection[int] = (),
        dropped: Dropped | None = None,
    ) -> None:
        assert not dropped
        if finished or failed or lost_blocks:
            over, lost = (sorted(self._names[one] for one in those) for those in (finished, failed))
            self._line("note", over, lost, sorted(lost_blocks))
        self._real.note(finished=finished, failed=failed, lost_blocks=lost_blocks)

    def end(self, request_id: str) -> None:
        self._line("end", self._names[request_id])
        self._real.end(request_id)

    def _state(self, request_id: str) -> None:
        """What the engine's request is by now; of its hashes, those that are new."""
        request = self._requests[request_id]
        known = self._known.get(request_id, 0)
        self._known[request_id] = len(request.block_hashes)
        new = [digest.hex() for digest in request.block_hashes[known:]]
        self._line(
            "state", self._names[request_id], request.num_tokens, request.num_computed_tokens, new
        )

    def _line(self, *call: Any) -> None:
        print(json.dumps(call, separators=(",", ":")), file=self._file, flush=True)
