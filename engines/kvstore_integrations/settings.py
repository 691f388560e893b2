"""What a user may set of the store in an engine's own configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from kvstore.errors import DeadlineExceeded, KVStoreError, PermissionDenied, Unavailable
from kvstore_client import KVStoreClient

_TENANT = re.compile(r"[A-Za-z0-9._-]{1,64}")


class ConfigurationError(ValueError):
    """The engine's configuration cannot work; the message says what to change."""


class StoreSettings(BaseModel):
    """The settings that all integrations share; each adds its own.

    target: where the store is, as `KVStoreClient` takes it; empty for this user's daemon. token:
    for TCP. tenant: whose blocks these are, where a request names nobody. model_revision: of the
    weights, for a model that is no folder and whose revision the engine does not tell. timeout_s:
    the deadline of a call. verify_reads: check what was read against its checksum. required: refuse
    to start where no store answers; else begin without one, and use it as soon as it is there.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: str = ""
    token: str | None = Field(default=None, repr=False)
    tenant: str = "default"
    model_revision: str = ""
    timeout_s: float = Field(default=2.0, gt=0, le=3600)
    verify_reads: bool = True
    required: bool = True

    @field_validator("tenant")
    @classmethod
    def _is_tenant(cls, value: str) -> str:
        if not is_tenant(value):
            raise ValueError("1 to 64 letters, digits, dots, dashes or underscores")
        return value

    @classmethod
    def read(cls, raw: Mapping[str, Any], where: str) -> Self:
        """Settings from an engine's configuration; `ConfigurationError` names the field at fault.

        where: how the user knows the place that `raw` comes from.
        """
        try:
            return cls.model_validate(dict(raw))
        except ValidationError as error:
            known = ", ".join(cls.model_fields)
            faults = "; ".join(
                f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()
            )
            raise ConfigurationError(f"{where}: {faults}. Known are: {known}.") from error

    def connect(self) -> KVStoreClient:
        """A client of the store; `ConfigurationError` where it is required and does not answer."""
        try:
            return KVStoreClient(
                self.target or None,
                timeout_s=self.timeout_s,
                token=self.token,
                verify_reads=self.verify_reads,
                lazy=not self.required,
            )
        except (Unavailable, DeadlineExceeded) as error:
            raise ConfigurationError(
                f"no store answers at {self.target or 'the default socket'}: {error}. Start one "
                "with `kvstore-server`, or set `target` to where it is, or `required` to false to "
                "begin without."
            ) from error
        except PermissionDenied as error:
            raise ConfigurationError(f"the store refuses this user: {error}") from error
        except KVStoreError as error:
            raise ConfigurationError(f"target: {error}") from error


def is_tenant(name: object) -> bool:
    """Whether this can be the name of a tenant."""
    return isinstance(name, str) and bool(_TENANT.fullmatch(name))
