"""What one request may say of its blocks, in the parameters that engines hand through."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from kvstore import Hint, HintKind, limits
from kvstore_integrations.settings import is_tenant

log = logging.getLogger(__name__)


class _Said(BaseModel):
    """The parameters that are ours; those of others are none of our business."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    cache: bool = True
    tenant: str | None = None
    ttl_s: float | None = Field(default=None, gt=0, le=limits.MAX_TTL_MS / 1000)
    session_ends: bool = False
    next_turn_s: float | None = Field(default=None, gt=0, le=limits.MAX_HINT_MS / 1000)
    pin_s: float | None = Field(default=None, gt=0, le=limits.MAX_HINT_MS / 1000)

    @field_validator("tenant")
    @classmethod
    def _is_tenant(cls, value: str | None) -> str | None:
        if value is not None and not is_tenant(value):
            raise ValueError("1 to 64 letters, digits, dots, dashes or underscores")
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOptions:
    """Whose a request's blocks are, how long they live, and what will happen to them.

    hint: to be told when the request is over.
    """

    tenant: str
    ttl_s: float | None = None
    hint: Hint | None = None

    @classmethod
    def read(cls, said: Mapping[str, Any] | None, *, tenant: str) -> RequestOptions | None:
        """From a request's parameters; tenant: whose it is where it does not say.

        None for a request that is not to be looked up or stored, and for parameters that mean
        nothing: it might be another tenant's.
        """
        try:
            options = _Said.model_validate(said or {})
        except ValidationError as error:
            faults = "; ".join(
                f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()
            )
            log.warning("a request is not cached, its parameters are wrong: %s", faults)
            return None
        if not options.cache:
            return None
        return cls(tenant=options.tenant or tenant, ttl_s=options.ttl_s, hint=_hint(options))


def _hint(said: _Said) -> Hint | None:
    if said.session_ends:
        return Hint(kind=HintKind.SESSION_ENDS)
    if said.pin_s is not None:
        return Hint(kind=HintKind.PIN_UNTIL, for_s=said.pin_s)
    if said.next_turn_s is not None:
        return Hint(kind=HintKind.NEXT_TURN_BY, for_s=said.next_turn_s)
    return None
