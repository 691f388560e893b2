"""The client: `KVStoreClient("unix:///run/kvstore.sock")`."""

from kvstore_client.client import KVStoreClient

__all__ = ["KVStoreClient"]
