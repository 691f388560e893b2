"""The daemon's settings: flags over `KVSTORE_*` environment over defaults."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(value: object) -> int:
    """Bytes of "8GiB", "512MiB", "1G" or a plain number; ValueError otherwise."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", str(value), re.IGNORECASE)
    if not found:
        raise ValueError(f"{value!r} is no size: write 8GiB, 512MiB or a number of bytes")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def default_socket() -> Path:
    """`kvstore.sock` in the user's runtime folder, or in a folder of its own under /tmp."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(runtime) if runtime else Path(tempfile.gettempdir()) / f"kvstore-{os.getuid()}"
    return folder / "kvstore.sock"


def default_data_dir() -> Path:
    """Where the keys of the namespaces are kept between runs."""
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "kvstore"


class Settings(BaseSettings):
    """Everything that `kvstore-server` can be told."""

    model_config = SettingsConfigDict(env_prefix="KVSTORE_", extra="forbid")

    socket: Path = Field(default_factory=default_socket)
    dram: Annotated[int, BeforeValidator(parse_size)] = 1 << 30
    data_dir: Path = Field(default_factory=default_data_dir)
    eviction: str = "lru"
    max_blocks: int | None = Field(default=None, ge=1)
