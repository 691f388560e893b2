"""What a user may set in SGLang's `--hicache-storage-backend-extra-config`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field

from kvstore import limits
from kvstore_integrations.settings import ConfigurationError, StoreSettings

WHERE = "--hicache-storage-backend-extra-config"
# SGLang reads these itself, and hands them on; what else it reads it takes out before.
_OF_SGLANG = ("backend_name", "module_path", "class_name", "allocator", "file_storage_path")


class PageSettings(StoreSettings):
    """ttl_s: seconds after which a page that nobody asks for is forgotten; None for never."""

    ttl_s: float | None = Field(default=None, gt=0, le=limits.MAX_TTL_MS / 1000)

    @classmethod
    def of_backend(cls, extra_config: Mapping[str, Any] | None) -> Self:
        """The settings in the extra configuration that SGLang hands to a backend.

        `ConfigurationError` names the field at fault.
        """
        raw = dict(extra_config or {})
        if not raw.pop("interface_v1", 0):
            raise ConfigurationError(
                f'{WHERE}: add "interface_v1": 1. Without it SGLang copies each page twice more, '
                "by calls that this backend does not answer."
            )
        return cls.read({k: v for k, v in raw.items() if k not in _OF_SGLANG}, WHERE)
