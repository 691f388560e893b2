"""The client: `KVStoreClient("unix:///run/kvstore.sock")`, and `AsyncKVStoreClient` for asyncio."""

from typing import TYPE_CHECKING

from kvstore.later import later

if TYPE_CHECKING:
    from kvstore_client.aio import AsyncKVStoreClient
    from kvstore_client.client import KVStoreClient
    from kvstore_client.targets import DataPath
else:
    __getattr__ = later(
        __name__,
        {
            "kvstore_client.aio": ("AsyncKVStoreClient",),
            "kvstore_client.client": ("KVStoreClient",),
            "kvstore_client.targets": ("DataPath",),
        },
    )

__all__ = ["AsyncKVStoreClient", "DataPath", "KVStoreClient"]
