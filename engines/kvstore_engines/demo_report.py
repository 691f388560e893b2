"""The demo's table, its totals and its verdict."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from kvstore_engines.jobs import Result

COLUMNS = (
    "prompt tokens",
    "tokens matched",
    "tier",
    "TTFT with",
    "TTFT without",
    "tokens equal",
)
ANSWER_CHARACTERS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One question answered with the store and without one; `text` is the answer."""

    with_store: Result
    without: Result
    text: str

    @property
    def equal(self) -> bool:
        """Whether both answers have the same tokens."""
        return self.with_store.token_ids == self.without.token_ids


def print_report(console: Console, rows: Sequence[Row]) -> bool:
    """Prints the table and what follows from it; whether every token is equal and any matched."""
    console.print(_table(rows))
    matched = sum(row.with_store.matched_tokens for row in rows)
    prompts = sum(row.with_store.prompt_tokens for row in rows)
    equal = sum(row.equal for row in rows)
    console.print(f"{matched} of {prompts} prompt tokens came from the store.")
    console.print(f"{equal} of {len(rows)} answers are equal to the token to those without it.")
    if not matched:
        console.print("[bold red]Nothing was matched.[/]")
    if equal < len(rows):
        console.print("[bold red]Tokens differ.[/]")
    return equal == len(rows) and matched > 0


def _table(rows: Sequence[Row]) -> Table:
    table = Table(title="SmolLM2-135M-Instruct through kvstore", show_footer=True)
    for name, total in zip(COLUMNS, _totals(rows), strict=True):
        table.add_column(name, total, justify="right")
    table.add_column("answer", "total", no_wrap=True, overflow="ellipsis")
    for row in rows:
        table.add_row(*_cells(row), row.text.strip()[:ANSWER_CHARACTERS])
    return table


def _cells(row: Row) -> tuple[str, ...]:
    return (
        str(row.with_store.prompt_tokens),
        str(row.with_store.matched_tokens),
        row.with_store.tier or "-",
        _milliseconds(row.with_store.time_to_first_token_s),
        _milliseconds(row.without.time_to_first_token_s),
        "yes" if row.equal else "NO",
    )


def _totals(rows: Sequence[Row]) -> tuple[str, ...]:
    return (
        str(sum(row.with_store.prompt_tokens for row in rows)),
        str(sum(row.with_store.matched_tokens for row in rows)),
        "",
        _milliseconds(sum(row.with_store.time_to_first_token_s for row in rows)),
        _milliseconds(sum(row.without.time_to_first_token_s for row in rows)),
        f"{sum(row.equal for row in rows)} of {len(rows)}",
    )


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms"
