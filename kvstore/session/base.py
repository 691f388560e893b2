"""The typed results of a client, and the port through which a session reaches its store."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Protocol

from kvstore import commands
from kvstore.layout import Layout


class Tier(enum.StrEnum):
    """Where a block was found."""

    HBM = "hbm"
    DRAM = "dram"
    NVME = "nvme"


class MissReason(enum.StrEnum):
    """Why a block was not got."""

    NOT_STORED = "not stored"
    OVERWRITTEN = "evicted while it was read"
    UNAVAILABLE = "store unavailable"


@dataclass(frozen=True, slots=True)
class Hit:
    """The block's bytes are in the destination."""

    tier: Tier


@dataclass(frozen=True, slots=True)
class Miss:
    """The destination's bytes mean nothing."""

    reason: MissReason


@dataclass(frozen=True, slots=True, kw_only=True)
class PutResult:
    """How many blocks of a put are stored now, were there before, wait for ranks, or are not."""

    stored: int
    existed: int
    waiting: int
    not_stored: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NamespaceHandle:
    """An open namespace: its id, the secret that keys its chains (not shown), its layout."""

    id: int
    name: str
    layout: Layout
    generation: int
    key: bytes

    def __repr__(self) -> str:
        return f"NamespaceHandle(id={self.id}, name={self.name!r}, generation={self.generation})"


class CommandPort(Protocol):
    """Carries one command to the store and its result back, within `timeout_s` seconds."""

    def call(self, command: commands.Command, timeout_s: float) -> commands.Result:
        """The result; a `KVStoreError` (never a `Failed`) where the store refused."""
