"""What an engine's blocks are blocks of. Two engines share blocks where all of it is equal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from kvstore import Layout
from kvstore_engines.fields import CheckpointError
from kvstore_engines.weights import fingerprint
from kvstore_integrations.settings import ConfigurationError

_DIGEST_BYTES = 16
_NAME_CHARACTERS = 64  # of the model's name, for whoever reads a list of namespaces


class Identity:
    """The engine, the weights, and everything else that decides what a block's bytes mean.

    model: see `model_identity`. facts: whatever must be equal, as JSON has it: dtypes, the tag
    of the engine's layout, the rank where the bytes depend on it.
    """

    def __init__(self, engine: str, model: str, facts: Mapping[str, object]) -> None:
        self.engine, self.model, self.facts = engine, model, dict(facts)

    def __repr__(self) -> str:
        return f"Identity({self.engine!r}, {self.model!r}, {self.facts!r})"

    def namespace(self, tenant: str) -> str:
        """The name of the tenant's namespace of such blocks."""
        return f"{self.engine}/{tenant}/{self._digest()}"

    def layout(self, *, block_bytes: int, block_tokens: int) -> Layout:
        """The layout of blocks whose bytes only the engine understands.

        Errors: those of `Layout`, for sizes that no store takes.
        """
        return Layout.opaque(
            model=self.model, block_bytes=block_bytes, block_tokens=block_tokens, tag=self._digest()
        )

    def _digest(self) -> str:
        facts = {"engine": self.engine, "model": self.model, "facts": self.facts}
        text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).hexdigest()


def model_identity(model: str, *, revision: str = "", commit: str = "") -> str:
    """The weights' name and what tells them from any other of that name.

    model: a checkpoint's folder, or a name on a hub. revision: as the user gave it; commit: what
    the engine knows of it. A folder is told by its content, unless a revision is given.
    `ConfigurationError` where nothing tells which weights they are.
    """
    folder = Path(model)
    name = (folder.name if folder.is_dir() else model)[-_NAME_CHARACTERS:]
    if revision:
        return f"{name}@{revision}"
    if folder.is_dir():
        try:
            return f"{name}@{fingerprint(folder)}"
        except (CheckpointError, OSError) as error:
            raise ConfigurationError(
                f"cannot tell the weights in {model}: {error}. Set `model_revision` to a name that "
                "changes with them."
            ) from error
    if commit:
        return f"{name}@{commit}"
    raise ConfigurationError(
        f"cannot tell which revision of {model} this is. Set `model_revision` to a name that "
        "changes with the weights."
    )
