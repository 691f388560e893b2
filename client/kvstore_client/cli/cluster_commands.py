"""The subcommands of `kvstore cluster`: status, drain, join."""

from __future__ import annotations

import contextlib
from typing import Annotated

import typer

from kvstore.cluster.messages import Drain, Join
from kvstore.errors import InvalidArgument
from kvstore_client.cli import cluster, output
from kvstore_client.cli.options import AsJson, Target, Timeout
from kvstore_client.cli.output import Code
from kvstore_client.cli.target import connect_to_ask, target_of

_CALL_S = 5.0  # of each question while a drain is waited for
_LONGEST_S = 7 * 86_400.0

app = typer.Typer(help="Shows the members of a cluster, and lets them leave and join.")

Name = Annotated[str, typer.Argument(help="Of the member.")]


def _checked_wait(seconds: float) -> float:
    if not 0 < seconds <= _LONGEST_S:
        raise InvalidArgument("timeout", f"must be over 0 and at most {_LONGEST_S:.0f} seconds")
    return seconds


Wait = Annotated[
    float,
    typer.Option("--timeout", metavar="SECONDS", help="How long to wait.", callback=_checked_wait),
]


@app.command()
def status(*, target: Target = None, timeout_s: Timeout = 5.0, as_json: AsJson = False) -> Code:
    """Shows what each member says of itself and of the others. Exit code 1: one does not answer."""
    with contextlib.closing(connect_to_ask(target_of(target), timeout_s)) as session:
        found = cluster.report(session, timeout_s)
    if as_json:
        output.print_json(found.as_json())
    else:
        found.show()
    return Code.OK if found.all_answer else Code.NEGATIVE


@app.command()
def drain(
    name: Name,
    *,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Wait until it has nothing left to give.")
    ] = True,
    timeout_s: Wait = 3600.0,
    target: Target = None,
    as_json: AsJson = False,
) -> Code:
    """Takes the blocks of a member away; when it is out, it can be stopped."""
    call_s = min(_CALL_S, timeout_s)
    with contextlib.closing(connect_to_ask(target_of(target), call_s)) as session:
        found = cluster.change(session, Drain(name=name), call_s)
        if wait:
            found = cluster.wait_until_out(session, name, wait_s=timeout_s, call_s=call_s)
    _say(found, name, as_json=as_json)
    return Code.OK


@app.command()
def join(
    name: Name, *, target: Target = None, timeout_s: Timeout = 5.0, as_json: AsJson = False
) -> Code:
    """Lets a member that was drained take blocks again."""
    with contextlib.closing(connect_to_ask(target_of(target), timeout_s)) as session:
        found = cluster.change(session, Join(name=name), timeout_s)
    _say(found, name, as_json=as_json)
    return Code.OK


def _say(found: cluster.Report, name: str, *, as_json: bool) -> None:
    state = found.state_of(name)
    if as_json:
        output.print_json({"name": name, "state": state, "epoch": found.view.epoch})
    else:
        print(output.printable(f"{name} is {state}, epoch {found.view.epoch}"))
