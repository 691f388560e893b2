"""Options that several subcommands share, and how they reach a store."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from kvstore import limits
from kvstore.errors import InvalidArgument
from kvstore.session.base import Session
from kvstore_client.cli.selection import Scheme
from kvstore_client.cli.target import TARGET_VARIABLE, Connect, target_of


@dataclass(frozen=True, slots=True)
class Environment:
    """What the commands stand on; tests give a `connect` of their own."""

    connect: Connect


def environment_of(context: typer.Context) -> Environment:
    """What the command was started with."""
    found = context.obj
    assert isinstance(found, Environment)
    return found


def session_of(
    context: typer.Context, target: str | None, timeout_s: float
) -> AbstractContextManager[Session]:
    """A session with the wanted store. Raises `Unavailable`, `InvalidArgument`."""
    return environment_of(context).connect(target_of(target), timeout_s)


Target = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help=f"The store. [default: ${TARGET_VARIABLE}, else this user's daemon]",
        show_default=False,
    ),
]


def _checked_timeout(seconds: float) -> float:
    most = limits.MAX_DEADLINE_MS // 1000
    if not 0 < seconds <= most:
        raise InvalidArgument("timeout", f"must be over 0 and at most {most} seconds")
    return seconds


Timeout = Annotated[
    float,
    typer.Option(
        "--timeout", metavar="SECONDS", help="Deadline of each call.", callback=_checked_timeout
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Answer in JSON.")]
Namespace = Annotated[str, typer.Option(help="Name of the namespace.")]
NamespaceId = Annotated[
    int | None,
    typer.Option(help="Its id, where the name has several layouts.", show_default=False),
]
HashValues = Annotated[
    list[str] | None,
    typer.Option("--hash", metavar="HEX", help="A block's hash, 64 hex digits; may be repeated."),
]
HashesFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="File of hashes: hex, one a line, or raw 32-byte records. -: stdin."
    ),
]
Tokens = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="File of token ids, as a JSON list or between blanks, to be hashed with the"
        " namespace's key. -: stdin.",
    ),
]
ExtraKeys = Annotated[
    list[str] | None,
    typer.Option(
        "--extra-key",
        metavar="TEXT",
        help="What else the chain of --tokens depends on, UTF-8, or hex:DIGITS; may be repeated.",
    ),
]
SchemeChoice = Annotated[Scheme, typer.Option(help="Hash of --tokens.")]
