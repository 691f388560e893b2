"""Fields of a checkpoint's JSON files, and the error that names the one at fault."""

import json
from pathlib import Path
from typing import Any

from kvstore.errors import InvalidArgument


class CheckpointError(InvalidArgument):
    """A checkpoint that cannot be used; `field` is the tensor, field or file at fault."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; CheckpointError names the file that is missing or no object."""
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(path.name, "file is missing from the checkpoint") from None
    except ValueError as error:
        raise CheckpointError(path.name, f"not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(path.name, "not a JSON object")
    return raw


def count(raw: dict[str, Any], name: str, default: int | None = None) -> int:
    """The positive integer called `name`, or `default` where it is missing or null.

    CheckpointError where it is anything else, or missing without a default.
    """
    value = required({**raw, name: default} if raw.get(name) is None else raw, name)
    if type(value) is not int or value < 1:  # a bool is an int too
        raise CheckpointError(name, f"{value!r} is not a positive integer")
    return value


def required(raw: dict[str, Any], name: str) -> Any:
    """The field called `name`; CheckpointError where it is missing or null."""
    if raw.get(name) is None:
        raise CheckpointError(name, "field is missing")
    return raw[name]
