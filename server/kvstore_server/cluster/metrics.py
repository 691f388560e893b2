"""The node's counters for Prometheus, on a loopback port of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvstore.cluster.messages import AskStatus
from kvstore.cluster.node import Node
from kvstore.errors import KVStoreError
from kvstore_server.cluster.transfers import AgentTransfers

_SCRAPE_S = 2.0


class _Counters(Collector):
    """Asks the node, on its own loop, each time that somebody scrapes."""

    def __init__(
        self, node: Node, transfers: AgentTransfers, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._node, self._transfers, self._loop = node, transfers, loop

    def collect(self) -> Iterator[Metric]:
        """See `Collector.collect`."""
        asking = asyncio.run_coroutine_threadsafe(
            self._node.handle(AskStatus(), is_node=True), self._loop
        )
        try:
            status = asking.result(_SCRAPE_S)
        except (KVStoreError, TimeoutError):
            asking.cancel()
            return
        site = self._node.site
        gauges = dict(zip(status.names.split("\n"), status.values.tolist(), strict=True))
        gauges["epoch"] = site.view.epoch
        gauges["members"] = len(site.view.members)
        gauges["suspected_members"] = len(site.health.names)
        gauges["serving"] = int(site.serving)
        for kind, nbytes in self._transfers.moved_bytes.items():
            gauges[f"moved_{kind}_bytes"] = nbytes
        for name, value in gauges.items():
            yield GaugeMetricFamily(
                f"kvstore_node_{name}", name.replace("_", " "), value=float(value)
            )


def serve_metrics(
    node: Node, transfers: AgentTransfers, port: int, loop: asyncio.AbstractEventLoop
) -> Callable[[], None]:
    """Serves them on 127.0.0.1; call what it returns to end that."""
    registry = CollectorRegistry()
    registry.register(_Counters(node, transfers, loop))
    server, thread = start_http_server(port, "127.0.0.1", registry)

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop
