"""The client: `KVStoreClient("unix:///run/kvstore.sock")`, and `AsyncKVStoreClient` for asyncio."""

from kvstore_client.aio import AsyncKVStoreClient
from kvstore_client.client import KVStoreClient
from kvstore_client.targets import DataPath

__all__ = ["AsyncKVStoreClient", "DataPath", "KVStoreClient"]
