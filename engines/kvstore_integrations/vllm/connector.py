"""The store as a connector of vLLM's, from and to its KV memory. Translates only.

--kv-transfer-config '{"kv_connector": "KVStoreConnector", "kv_role": "kv_both",
  "kv_connector_module_path": "kvstore_integrations.vllm.connector",
  "kv_load_failure_policy": "recompute"}'
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import Field
from vllm.distributed.kv_transfer.kv_connector.v1 import (
    KVConnectorBase_V1,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvstore_integrations.identity import Identity
from kvstore_integrations.settings import StoreSettings
from kvstore_integrations.spaces import Spaces
from kvstore_integrations.vllm import description
from kvstore_integrations.vllm.adapters import Adapters
from kvstore_integrations.vllm.metrics import TransferMetrics, TransferStats
from kvstore_integrations.vllm.pages import Pages, mover_for
from kvstore_integrations.vllm.plans import Dropped, Plan
from kvstore_integrations.vllm.scheduling import Scheduling
from kvstore_integrations.vllm.worker import BlockWorker, Ended, Store


class ConnectorSettings(StoreSettings):
    """staging_bytes: host memory of each worker for blocks on their way; a quarter of it is for
    those that are loaded. save_decode: store what is generated too, not only prompts."""

    staging_bytes: int = Field(default=256 << 20, ge=1 << 20)
    save_decode: bool = True


@dataclass
class StepPlan(KVConnectorMetadata):
    """One step's work, on its way to the workers."""

    plan: Plan


@dataclass
class StepReport(KVConnectorWorkerMetadata):
    """What found no room, on its way to the scheduler."""

    dropped: Dropped

    def aggregate(self, other: KVConnectorWorkerMetadata) -> StepReport:
        """See `KVConnectorWorkerMetadata`."""
        return StepReport(self.dropped.and_of(other.dropped))


@dataclass(frozen=True)
class RankBlocks(KVConnectorHandshakeMetadata):
    """What one worker's blocks are and their bytes, by cache group, on its way to the scheduler."""

    groups: tuple[tuple[Identity, int] | None, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Equal for workers whose bytes are equal."""
        return tuple(group[0].namespace("") if group else "" for group in self.groups)


class KVStoreConnector(KVConnectorBase_V1, SupportsHMA):
    """A `KVConnectorBase_V1`: one of the scheduler's and one of each worker's, by role.

    `ConfigurationError` says what to change where the settings (see `ConnectorSettings`) or vLLM's
    own cannot work.
    """

    _cache_hit_source = CacheHitSource.HOST

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        self._settings = ConnectorSettings.read(
            transfer.kv_connector_extra_config, "kv_connector_extra_config"
        )
        description.check(vllm_config, kv_cache_config)
        self._groups, hash_tokens = description.groups_of(vllm_config, kv_cache_config)
        self._client = self._settings.connect()
        self._worker: BlockWorker | None = None
        self._blocks: RankBlocks | None = None
        self._ended = Ended()
        self._scheduling: Scheduling | None = None
        self._adapters = Adapters()
        if role is KVConnectorRole.SCHEDULER:
            drafts = vllm_config.speculative_config
            self._scheduling = Scheduling(
                self._client,
                self._groups,
                hash_tokens=hash_tokens,
                tenant=self._settings.tenant,
                reads=transfer.is_kv_consumer,
                writes=transfer.is_kv_producer,
                save_decode=self._settings.save_decode,
                # A draft's part of a block depends on the token behind it, which its hash lacks.
                drop_last=bool(drafts and drafts.use_eagle_block_drop()),
            )

    @property
    def requires_kv_delivery(self) -> bool:
        """See `KVConnectorBase_V1`: a save that is lost is a miss some day."""
        return False

    def shutdown(self) -> None:
        """See `KVConnectorBase_V1`; what is being saved is saved, unless the store is slow."""
        if self._worker:
            self._worker.close()
        if self._scheduling:
            self._scheduling.close()
        self._client.close()

    # -- the scheduler's ---------------------------------------------------------------

    @property
    def _books(self) -> Scheduling:
        assert self._scheduling is not None
        return self._scheduling

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: Mapping[tuple[int, int], RankBlocks]
    ) -> None:
        """See `KVConnectorBase_V1`: the workers tell what their blocks are."""
        ranks = []
        for blocks in {one.names: one for one in metadata.values()}.values():
            spaces = [
                Spaces(self._client, group[0], block_bytes=group[1], block_tokens=form.block_tokens)
                if group
                else None
                for group, form in zip(blocks.groups, self._groups, strict=True)
            ]
            ranks.append(spaces)
        self._books.use(ranks)
        if self._settings.required:
            for space in (space for spaces in ranks for space in spaces if space):
                space.open_now(self._settings.tenant)

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """See `KVConnectorBase_V1`."""
        self._books.null_block = gpu_block_pool.null_block.block_id

    def on_new_request(self, request: Any) -> None:
        """See `KVConnectorBase_V1`; reads what the request says of its blocks."""
        adapter: str | None = ""
        if lora := request.lora_request:
            adapter = self._adapters.digest(
                lora.lora_name, lora.lora_int_id, lora.lora_path, again=lora.load_inplace
            )
        if adapter is not None:
            self._books.add(request, request.kv_transfer_params, adapter)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """See `KVConnectorBase_V1`; all loads are asynchronous."""
        count = self._books.match(request.request_id, num_computed_tokens)
        return count, bool(count)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """See `KVConnectorBase_V1`."""
        self._books.allocated(request.request_id, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StepPlan:
        """See `KVConnectorBase_V1`."""
        blocks_of = scheduler_output.kv_connector_block_state.get_block_ids
        return StepPlan(self._books.step(scheduler_output.num_scheduled_tokens, blocks_of))

    def update_connector_output(self, connector_output: Any) -> None:
        """See `KVConnectorBase_V1`."""
        report = connector_output.kv_connector_worker_meta
        self._books.note(
            finished=connector_output.finished_recving or (),
            failed=connector_output.failed_recving or (),
            lost_blocks=connector_output.invalid_block_ids or (),
            dropped=report.dropped if report else None,
        )

    def request_finished(
        self,
        request: Any,
        block_ids: list[int],  # noqa: ARG002
    ) -> tuple[bool, dict[str, Any] | None]:
        """See `KVConnectorBase_V1`: its blocks are free at once, they were copied in their step."""
        self._books.end(request.request_id)
        return False, None

    def request_finished_all_groups(
        self,
        request: Any,
        block_ids: tuple[list[int], ...],  # noqa: ARG002
    ) -> tuple[bool, dict[str, Any] | None]:
        """See `SupportsHMA`."""
        self._books.end(request.request_id)
        return False, None

    def reset_cache(self) -> bool:
        """See `KVConnectorBase_V1`: this engine finds nothing any more that was stored before."""
        self._books.reset()
        return True

    # -- a worker's --------------------------------------------------------------------

    @property
    def _copies(self) -> BlockWorker:
        assert self._worker is not None
        return self._worker

    @property
    def _plan(self) -> Plan:
        bound: StepPlan = self._get_connector_metadata()
        return bound.plan

    def register_kv_caches(self, kv_caches: Mapping[str, Any]) -> None:
        """See `KVConnectorBase_V1`."""
        config = self._kv_cache_config
        identities = description.identities(self._vllm_config, config, self._settings)
        stores: list[Store | None] = []
        for identity, group, form in zip(
            identities, config.kv_cache_groups, self._groups, strict=True
        ):
            if identity is None:
                stores.append(None)
                continue
            pages = Pages([kv_caches[name] for name in group.layer_names], config.num_blocks)
            stores.append(Store.of(identity, pages, form.block_tokens))
        self._worker = BlockWorker(
            self._client,
            stores,
            mover_for([store.pages for store in stores if store]),
            staging_bytes=self._settings.staging_bytes,
            writes=description.is_writer(config),
        )
        self._blocks = RankBlocks(
            tuple((store.identity, store.pages.block_bytes) if store else None for store in stores)
        )

    def get_handshake_metadata(self) -> RankBlocks | None:
        """See `KVConnectorBase_V1`."""
        return self._blocks

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """See `KVConnectorBase_V1`."""
        self._copies.begin_loads(self._plan.loads)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """See `KVConnectorBase_V1`; no request runs before all its layers are loaded."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """See `KVConnectorBase_V1`; all layers are taken at once, in `wait_for_save`."""

    def wait_for_save(self) -> None:
        """See `KVConnectorBase_V1`. The blocks are taken out here, so whoever gets them next may
        write them: neither preemption nor the end of a request needs to wait."""
        self._copies.save(self._plan.saves)
        self._copies.end(self._plan)

    def get_transfer_results(
        self,
        finished_req_ids: set[str],  # noqa: ARG002
    ) -> KVConnectorTransferResults:
        """See `KVConnectorBase_V1`. With several cache groups vLLM takes a failed load as a whole
        only; with one it keeps the blocks before the first that was lost."""
        self._ended = self._copies.ended(idle=self._plan.idle)
        return KVConnectorTransferResults(
            finished_recving=self._ended.requests,
            failed_recving=self._ended.failed if len(self._groups) > 1 else set(),
        )

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """See `KVConnectorBase_V1`."""
        return None, self.get_transfer_results(finished_req_ids).finished_recving

    def get_block_ids_with_load_errors(self) -> set[int]:
        """See `KVConnectorBase_V1`."""
        return self._ended.lost_blocks if len(self._groups) == 1 else set()

    def build_connector_worker_meta(self) -> StepReport | None:
        """See `KVConnectorBase_V1`."""
        dropped = self._copies.dropped()
        return StepReport(dropped) if dropped else None

    # -- statistics --------------------------------------------------------------------

    def get_kv_connector_stats(self) -> TransferStats | None:
        """See `KVConnectorBase_V1`."""
        counts = self._worker.counts() if self._worker else None
        return TransferStats.of(counts) if counts else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> TransferStats:
        """See `KVConnectorBase_V1`."""
        return TransferStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> TransferMetrics:
        """See `KVConnectorBase_V1`."""
        return TransferMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)
