"""The store as a tier below vLLM's host memory, for its `OffloadingConnector`. Translates only.

--kv-transfer-config '{"kv_connector": "OffloadingConnector", "kv_role": "kv_both",
  "kv_connector_extra_config": {
    "spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": 8589934592,
    "secondary_tiers": [
      {"type": "KVStoreTier", "module_path": "kvstore_integrations.vllm.tier"}]}}'
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
from pydantic import Field
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadingEvent,
    OffloadingSpec,
    OffloadKey,
    OffloadPolicy,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)
from vllm.v1.kv_offload.tiering.backpressure import BackpressureDetector
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

from kvstore_integrations.identity import Identity, model_identity
from kvstore_integrations.options import RequestOptions
from kvstore_integrations.settings import ConfigurationError, StoreSettings
from kvstore_integrations.spaces import Spaces
from kvstore_integrations.vllm.chunks import ChunkCache, Copied, Found, Group, Request
from kvstore_integrations.vllm.facts import machine_facts

_RESULTS = {
    Found.HIT: LookupResult.HIT,
    Found.MISS: LookupResult.MISS,
    Found.LATER: LookupResult.RETRY,
}


class TierSettings(StoreSettings):
    """most_stores: jobs that may wait to be stored; the next are dropped. offer_again: also put
    what vLLM holds already, which costs a look-up and brings back what the store has lost.
    enable_kv_events: tell what was stored, where vLLM publishes events."""

    most_stores: int = Field(default=64, ge=1)
    offer_again: bool = True
    enable_kv_events: bool = False


class KVStoreTier(SecondaryTierManager):
    """A `SecondaryTierManager`: vLLM's rows of host memory are put and got as they lie.

    settings: see `TierSettings`. `ConfigurationError` says what to change where they cannot work.
    """

    medium: ClassVar[Medium] = Medium.CPU

    def __init__(
        self,
        offloading_spec: OffloadingSpec,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: BackpressureDetector | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        read = TierSettings.read(settings, f"secondary tier {tier_type}")
        self.locality = Locality.LOCAL
        self._tenant = read.tenant
        self._policy = OffloadPolicy.CHUNK_LEVEL
        if read.offer_again:
            self._policy = OffloadPolicy.REQUEST_LEVEL
        rows = np.asarray(primary_kv_view).view(np.uint8)
        identities = _identities(offloading_spec, read)
        self._client = read.connect()
        groups = {
            number: Group(
                Spaces(self._client, identity, block_bytes=rows.shape[1], block_tokens=tokens),
                tokens,
            )
            for number, (identity, tokens) in identities.items()
        }
        if read.required:
            for group in groups.values():
                group.spaces.open_now(read.tenant)
        self._cache = ChunkCache(self._client, groups, rows, most_stores=read.most_stores)
        publishes = offloading_spec.kv_events_config.enable_kv_cache_events
        self._events: list[OffloadingEvent] | None = (
            [] if read.enable_kv_events and publishes else None
        )

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """See `SecondaryTierManager`; reads what the request says of its blocks."""
        options = RequestOptions.read(req_context.kv_transfer_params, tenant=self._tenant)
        keys = req_context._offload_key_positions
        req_context.set_state(Request(options=options, keys=keys))
        return RequestOffloadingContext(self._policy)

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """See `SecondaryTierManager`."""
        return _RESULTS[self._cache.look_up(_request(req_context), key)]

    def submit_load(self, job_metadata: TransferJob) -> None:
        """See `SecondaryTierManager`."""
        job = job_metadata
        request = _request(job.req_context)
        self._cache.load(job.job_id, request, list(job.keys), np.asarray(job.chunk_ids))

    def submit_store(self, job_metadata: TransferJob) -> None:
        """See `SecondaryTierManager`."""
        job = job_metadata
        request = _request(job.req_context)
        self._cache.store(job.job_id, request, list(job.keys), np.asarray(job.chunk_ids))

    def get_finished_jobs(self) -> Iterable[JobResult]:
        """See `SecondaryTierManager`."""
        return [self._result(number, copied) for number, copied in self._cache.finished()]

    def take_events(self) -> Iterable[OffloadingEvent]:
        """See `SecondaryTierManager`."""
        events, self._events = self._events, None if self._events is None else []
        return events or ()

    def on_request_finished(self, req_context: ReqContext) -> None:
        """See `SecondaryTierManager`; tells the store what becomes of the request's blocks."""
        self._cache.end(_request(req_context))

    def on_schedule_end(self, context: ScheduleEndContext) -> None:  # noqa: ARG002
        """See `SecondaryTierManager`."""
        self._cache.next_step()

    def drain_jobs(self) -> None:
        """See `SecondaryTierManager`."""
        self._cache.drain()

    def shutdown(self) -> None:
        """See `SecondaryTierManager`."""
        self._cache.close()
        self._client.close()

    def _result(self, number: int, copied: Copied) -> JobResult:
        if self._events is not None and copied.stored:
            keys = [OffloadKey(key) for key in copied.keys]
            self._events.append(
                OffloadingEvent(
                    keys=keys,
                    medium=self.medium,
                    removed=False,
                    locality=self.locality,
                    ownership=self.tier_type,
                )
            )
        return JobResult(
            job_id=number,
            success=copied.complete,
            successful_keys=tuple(OffloadKey(key) for key in copied.keys) or None,
            transfer_time=copied.seconds,
            transfer_bytes=copied.nbytes,
        )


def _request(context: ReqContext) -> Request:
    """Our state of vLLM's request; one that was never announced is not cached."""
    return context.get_state(Request) or Request(options=None, keys={})


def _identities(spec: OffloadingSpec, settings: TierSettings) -> dict[int, tuple[Identity, int]]:
    """For each cache group what its chunks are chunks of, and their tokens."""
    config = spec.config
    model = model_identity(config.model.name, revision=settings.model_revision)
    parallel = config.parallel
    together = parallel.is_parallelism_agnostic or config.replicated_layout
    facts = {
        **machine_facts(),
        "dtype": config.model.dtype,
        "layout": config.kv_cache_layout,
        "canonical": config.canonical_layout,
        "tokens_per_hash": config.cache.tokens_per_hash,
        "blocks_per_chunk": config.cache.blocks_per_chunk,
        "row_bytes": spec.config.worker_kv_bytes_per_block,
        "parallel": []
        if together
        else [parallel.tp_size, parallel.pp_size, parallel.pcp_size, parallel.dcp_size],
        "replicated": config.replicated_layout,
    }
    made = {}
    for group in config.groups:
        if group.tokens_per_block % config.cache.tokens_per_hash:
            raise ConfigurationError(
                f"blocks of {group.tokens_per_block} tokens are hashed by "
                f"{config.cache.tokens_per_hash}: choose a block size that is a multiple of that"
            )
        tokens = group.tokens_per_block * config.cache.blocks_per_chunk
        more = {"group": group.group_id, "layers": list(group.layer_names), "tokens": tokens}
        made[group.group_id] = (Identity("vllm-tier", model, {**facts, **more}), tokens)
    return made
