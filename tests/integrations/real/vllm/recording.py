"""Our tier, noting down all that vLLM asks of it: `{"type": "RecordingTier", ...}`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vllm.v1.kv_offload.base import LookupResult, OffloadKey, ReqContext, ScheduleEndContext
from vllm.v1.kv_offload.tiering.base import JobResult, TransferJob

from kvstore_integrations.vllm.tier import KVStoreTier


class RecordingTier(KVStoreTier):
    """record: the file that gets one line of JSON for each call, see `recorded.py`."""

    def __init__(self, *args: Any, record: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._file = Path(record).open("w")  # noqa: SIM115 - open as long as the tier is
        self._known: dict[str, int] = {}

    def on_new_request(self, req_context: ReqContext) -> Any:
        self._note("new", req_context.req_id, req_context.kv_transfer_params)
        return super().on_new_request(req_context)

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        result = super().lookup(key, req_context)
        self._keys(req_context)
        self._note("look_up", req_context.req_id, key.hex(), result.name)
        return result

    def submit_load(self, job_metadata: TransferJob) -> None:
        self._job("load", job_metadata)
        super().submit_load(job_metadata)

    def submit_store(self, job_metadata: TransferJob) -> None:
        self._job("store", job_metadata)
        super().submit_store(job_metadata)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        results = list(super().get_finished_jobs())
        for result in results:
            self._note("finished", result.job_id, result.success)
        return results

    def on_request_finished(self, req_context: ReqContext) -> None:
        self._note("end", req_context.req_id)
        super().on_request_finished(req_context)

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        self._note("step")
        super().on_schedule_end(context)

    def _job(self, kind: str, job: TransferJob) -> None:
        self._keys(job.req_context)
        keys = [key.hex() for key in job.keys]
        self._note(kind, job.req_context.req_id, job.job_id, keys, [int(i) for i in job.chunk_ids])

    def _keys(self, context: ReqContext) -> None:
        """The request's keys that are new since the last time."""
        items = list(context._offload_key_positions.items())
        new = items[self._known.get(context.req_id, 0) :]
        self._known[context.req_id] = len(items)
        if new:
            self._note("keys", context.req_id, [[key.hex(), end] for key, end in new])

    def _note(self, *call: Any) -> None:
        print(json.dumps(call), file=self._file, flush=True)
