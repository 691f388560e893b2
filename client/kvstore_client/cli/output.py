"""How the command speaks: plain text or JSON, one line for an error, and the exit codes.

Names and messages may come from other users of a store, so nothing reaches a terminal that could
move its cursor or colour it.
"""

from __future__ import annotations

import enum
import json
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvstore.errors import DeadlineExceeded, InvalidArgument, KVStoreError, Unavailable

_NOT_A_TERMINAL_COLUMNS = 500  # a pipe has no edge at which a table would have to be cut
_AGE_UNITS = ((86_400, "d"), (3_600, "h"), (60, "min"))

Json = Mapping[str, object]


class Code(enum.IntEnum):
    """The exit codes."""

    OK = 0
    NEGATIVE = 1  # the question was answered, with no
    USAGE = 2
    UNAVAILABLE = 3
    DEADLINE_EXCEEDED = 4
    OTHER = 5
    INTERRUPTED = 130  # what shells report for a process that SIGINT ended


def code_of(error: KVStoreError) -> Code:
    """The exit code of an error."""
    by_class: tuple[tuple[type[KVStoreError], Code], ...] = (
        (InvalidArgument, Code.USAGE),
        (Unavailable, Code.UNAVAILABLE),
        (DeadlineExceeded, Code.DEADLINE_EXCEEDED),
    )
    return next((code for kind, code in by_class if isinstance(error, kind)), Code.OTHER)


def print_error(error: KVStoreError, *, as_json: bool) -> None:
    """One line on standard error, or one JSON object with `error.{code, field, message}`."""
    if as_json:
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(error).__name__).lower()
        field = getattr(error, "field", None)
        message = getattr(error, "message", str(error))
        content = {"error": {"code": name, "field": field, "message": message}}
        print(json.dumps(content), file=sys.stderr)
    else:
        print(f"kvstore: {printable(str(error))}", file=sys.stderr)


def print_usage_error(message: str, *, as_json: bool) -> None:
    """As `print_error`, for a command line that could not be read."""
    if as_json:
        content = {"error": {"code": "usage", "field": None, "message": message}}
        print(json.dumps(content), file=sys.stderr)
    else:
        print(f"kvstore: {printable(message)}", file=sys.stderr)


def print_json(document: Json) -> None:
    """One JSON document on one line, written out at once."""
    print(json.dumps(document), flush=True)


def printable(text: str) -> str:
    """`text` on one line, with what a terminal would obey written as escapes."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def count(number: int, noun: str) -> str:
    """ "1 block", "1,024 blocks": a number as people read it."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def table(columns: Sequence[str], rows: Iterable[Sequence[str | Text]]) -> Table:
    """Columns under their names, without lines; a name that starts with ">" is right-aligned."""
    found = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        right = name.startswith(">")
        found.add_column(
            name.lstrip(">"), justify="right" if right else "left", overflow="fold", no_wrap=False
        )
    for row in rows:
        found.add_row(*(Text(printable(cell)) if isinstance(cell, str) else cell for cell in row))
    return found


def show(content: Table) -> None:
    """Prints a table to standard output; colours only on a terminal."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, emoji=False, width=_NOT_A_TERMINAL_COLUMNS)
    with console.capture() as capture:
        console.print(content)
    # Cells are padded to their column's width, the last one of a line as well.
    print("\n".join(line.rstrip() for line in capture.get().splitlines()), flush=True)


def local_time(when: float) -> str:
    """A Unix time in seconds as local time with its offset."""
    return datetime.fromtimestamp(when).astimezone().isoformat(sep=" ", timespec="seconds")


def age(when: float, *, now: float | None = None) -> str:
    """How long ago a Unix time in seconds was: "3 min ago"; clocks that differ give "now"."""
    seconds = (time.time() if now is None else now) - when
    for unit_s, name in _AGE_UNITS:
        if seconds >= unit_s:
            return f"{int(seconds // unit_s)} {name} ago"
    return f"{int(seconds)} s ago" if seconds >= 1 else "now"
