"""The `kvstore` command line: which subcommands there are, and how each ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer
from typer.exceptions import TyperException

from kvstore import __version__
from kvstore.errors import KVStoreError
from kvstore_client.cli import chain_commands, cluster_commands, commands, options, output, target
from kvstore_client.cli.output import Code

_EPILOG = (
    "Exit codes: 0 yes, 1 no (nothing matched, a check failed, a byte was wrong), 2 wrong usage or"
    " argument, 3 store unavailable, 4 deadline exceeded, 5 another error of the store, 130"
    " interrupted. Errors are one line on standard error; with --json an object."
)

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, epilog=_EPILOG
)
for command in (
    commands.ping,
    commands.info,
    commands.stat,
    chain_commands.match,
    chain_commands.explain,
    chain_commands.drop,
    commands.doctor,
    commands.bench,
):
    app.command()(command)
app.add_typer(cluster_commands.app, name="cluster")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"kvstore {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Asks a kvstore daemon, explains its answers, checks the host, measures."""


def run(arguments: Sequence[str], connect: target.Connect = target.connect) -> int:
    """Runs one command line; returns its exit code. Prints errors as `output` says."""
    as_json = "--json" in arguments
    try:
        code = app(
            list(arguments) or ["--help"],
            prog_name="kvstore",
            standalone_mode=False,
            obj=options.Environment(connect),
        )
    except KVStoreError as error:
        output.print_error(error, as_json=as_json)
        return output.code_of(error)
    except TyperException as error:
        output.print_usage_error(error.format_message(), as_json=as_json)
        return Code.USAGE
    except typer.Abort:
        return Code.INTERRUPTED
    return int(code)
