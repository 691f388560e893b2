"""What a user may set of the store in LMCache's configuration."""

from __future__ import annotations

import hashlib

from pydantic import Field

from kvstore_integrations.identity import model_identity
from kvstore_integrations.settings import ConfigurationError, StoreSettings

# LMCache has no better ones; Python's own is made up to build collisions, and others than these
# begin anew in each process.
_SAFE_HASHES = ("sha256", "sha256_cbor", "sha256_cbor_64bit")


class LMCacheSettings(StoreSettings):
    """model_revisions: of the weights, by LMCache's name of the model, where one process serves
    several; `model_revision` is for those that are not named."""

    model_revisions: dict[str, str] = Field(default_factory=dict)

    def identify(self, model: str) -> str:
        """What tells the weights from all others; reads some bytes of a checkpoint's folder.

        `ConfigurationError` where nothing tells.
        """
        revision = self.model_revisions.get(model, self.model_revision)
        identity = model_identity(model, revision=revision)
        if not revision:
            return identity
        # A revision says which weights of that name, and of a folder the name is all of its path.
        return f"{identity}#{hashlib.blake2b(model.encode(), digest_size=8).hexdigest()}"


class L2Settings(LMCacheSettings):
    """most_stores: tasks that may wait to be stored; the next ones fail at once."""

    most_stores: int = Field(default=64, ge=1)


def check_engine(
    *, hash_algorithm: str, has_vllm: bool, serde: str | None, layerwise: bool
) -> None:
    """`ConfigurationError` for what an engine's LMCache cannot have with the store.

    has_vllm: whether LMCache finds vLLM's hash functions.
    """
    if hash_algorithm not in _SAFE_HASHES:
        raise ConfigurationError(
            f"chunks are named by {hash_algorithm!r}, with which two prompts may have one name, or "
            "one prompt two. Set `pre_caching_hash_algorithm` to sha256_cbor."
        )
    if not has_vllm:
        raise ConfigurationError(
            f"LMCache takes {hash_algorithm} from vLLM, which is not installed here, and names "
            "chunks by Python's own hash instead. Run LMCache's server, with "
            "kvstore_integrations.lmcache.l2."
        )
    if serde not in (None, "naive"):
        raise ConfigurationError(
            f"chunks packed by {serde!r} have a size of their own each, which the store does not "
            "take. Set `remote_serde` to naive."
        )
    if layerwise:
        raise ConfigurationError(
            "chunks are stored whole, not by layer. Set `use_layerwise` to false."
        )
