"""What the connector copied, in vLLM's statistics and as Prometheus metrics."""

from __future__ import annotations

from typing import Any

from prometheus_client import Counter
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from kvstore_integrations.vllm.worker import Counts

_PREFIX = "vllm:kvstore_"
_MEANINGS = {
    "loaded_blocks": "Blocks that were loaded from the store.",
    "loaded_bytes": "Bytes that were loaded from the store.",
    "load_seconds": "Time that loads took, on a thread of their own.",
    "lost_blocks": "Blocks that were promised and did not load; they are computed again.",
    "saved_blocks": "Blocks that were stored and were not there before.",
    "saved_bytes": "Bytes that were stored.",
    "save_seconds": "Time that stores took, on a thread of their own.",
    "refused_blocks": "Blocks that the store did not take: it is full, slow or away.",
    "dropped_blocks": "Saves that found no staging memory; they are tried again with the next.",
}


class TransferStats(KVConnectorStats):
    """Sums by the names of `Counts`."""

    @classmethod
    def of(cls, counts: Counts) -> TransferStats:
        """One interval's."""
        return cls(data={name: getattr(counts, name) for name in _MEANINGS})

    def reset(self) -> None:
        """See `KVConnectorStats`."""
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """See `KVConnectorStats`; adds the other's sums to these."""
        for name, value in other.data.items():
            self.data[name] = self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        """See `KVConnectorStats`."""
        return {f"kvstore {name}": round(value, 3) for name, value in self.data.items() if value}

    def is_empty(self) -> bool:
        """See `KVConnectorStats`."""
        return not any(self.data.values())


class TransferMetrics(KVConnectorPromMetrics):
    """The same sums as counters, one for each engine."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        make = metric_types[Counter]
        self._counters: dict[tuple[int, str], Any] = {}
        for name, meaning in _MEANINGS.items():
            counter = make(name=_PREFIX + name, documentation=meaning, labelnames=labelnames)
            for engine, values in per_engine_labelvalues.items():
                self._counters[engine, name] = counter.labels(*values)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """See `KVConnectorPromMetrics`."""
        for name, value in transfer_stats_data.items():
            counter = self._counters.get((engine_idx, name))
            if counter is not None and value:
                counter.inc(value)
