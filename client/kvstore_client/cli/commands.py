"""The subcommands about a store or its host as a whole: ping, info, stat, doctor, bench."""

from __future__ import annotations

import contextlib
import secrets
import sys
import threading
from typing import Annotated

import typer

from kvstore.errors import InvalidArgument
from kvstore_client.cli import answers, facts, output
from kvstore_client.cli import bench as benchmark
from kvstore_client.cli import doctor as findings
from kvstore_client.cli import stat as vmstat
from kvstore_client.cli.bench_plan import (
    DEFAULT_BATCHES,
    DEFAULT_CLIENTS,
    DEFAULT_SIZES,
    fit,
    parse_grid,
)
from kvstore_client.cli.options import (
    AsJson,
    Target,
    Timeout,
    environment_of,
    session_of,
)
from kvstore_client.cli.output import Code
from kvstore_client.cli.target import target_of

_MAX_SECONDS = 60  # every call's latency is kept


def ping(
    context: typer.Context,
    *,
    count: Annotated[int, typer.Option(min=1, max=1_000_000, help="Round trips.")] = 10,
    target: Target = None,
    timeout_s: Timeout = 5.0,
    as_json: AsJson = False,
) -> Code:
    """Times round trips, one after another."""
    with session_of(context, target, timeout_s) as session:
        taken_ms = answers.round_trips(session, count)
    if as_json:
        output.print_json(answers.ping_json(target_of(target), taken_ms))
    else:
        print(answers.ping_text(target_of(target), taken_ms))
    return Code.OK


def info(
    context: typer.Context,
    *,
    target: Target = None,
    timeout_s: Timeout = 5.0,
    as_json: AsJson = False,
) -> Code:
    """Says what the store is, and lists its namespaces."""
    with session_of(context, target, timeout_s) as session:
        found, stats = session.info(), session.stats()
    if as_json:
        output.print_json(answers.info_json(found, stats))
    else:
        answers.show_info(found, stats)
    return Code.OK


def stat(
    context: typer.Context,
    *,
    interval: Annotated[float, typer.Option(metavar="SECONDS", help="Between two lines.")] = 1.0,
    count: Annotated[
        int | None, typer.Option(min=1, help="Lines. [default: until Ctrl-C]", show_default=False)
    ] = None,
    target: Target = None,
    timeout_s: Timeout = 5.0,
    as_json: AsJson = False,
) -> Code:
    """Prints the store's counters, a line an interval.

    The first line comes at once and counts from the store's start. hit%, puts, evicted and, where
    there is NVMe, from%, came and went are of the interval; the other columns are of the moment.
    """
    stop = threading.Event()
    # Ctrl-C is how one ends this: it is no failure.
    with session_of(context, target, timeout_s) as session, contextlib.suppress(KeyboardInterrupt):
        watched = vmstat.watch(session, interval_s=interval, count=count, stop=stop)
        for number, sample in enumerate(watched):
            if as_json:
                output.print_json(sample.as_json())
                continue
            if number == 0 or (number % vmstat.LINES_PER_HEADER == 0 and sys.stdout.isatty()):
                print(sample.header)
            print(sample.as_text(), flush=True)
    return Code.OK


def doctor(
    context: typer.Context,
    *,
    target: Target = None,
    timeout_s: Timeout = 2.0,
    as_json: AsJson = False,
) -> Code:
    """Checks daemon and host, and says how to mend what it finds. Exit code 1: something fails."""
    connect = environment_of(context).connect
    checks = findings.examine(facts.gather(connect, target_of(target), timeout_s))
    if as_json:
        output.print_json(findings.checks_json(checks))
    else:
        findings.show_checks(checks)
    return Code.NEGATIVE if findings.failed(checks) else Code.OK


def bench(
    context: typer.Context,
    *,
    size: Annotated[
        str | None, typer.Option(help=f"Block sizes. [default: {DEFAULT_SIZES}]")
    ] = None,
    batch: Annotated[
        str | None, typer.Option(help=f"Blocks a call. [default: {DEFAULT_BATCHES}]")
    ] = None,
    clients: Annotated[
        str | None, typer.Option(help=f"Client processes. [default: {DEFAULT_CLIENTS}]")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Per phase.")] = 2.0,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of bytes and hashes.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Let it evict others' blocks.")] = False,
    target: Target = None,
    timeout_s: Timeout = 10.0,
    as_json: AsJson = False,
) -> Code:
    """Measures put, match, get and view, and checks the bytes. Exit code 1: a byte was wrong.

    Works in a namespace of its own, dropped at the end; run one at a time. Defaults for which the
    pool has no room are left out; values that you give and that do not fit are refused.
    """
    cases = parse_grid(size, batch, clients)
    if not 0 < seconds <= _MAX_SECONDS:
        raise InvalidArgument("seconds", f"must be over 0 and at most {_MAX_SECONDS}")
    with session_of(context, target, timeout_s) as session:
        chosen = any((size, batch, clients))
        most = session.info().max_blocks
        grid = fit(cases, session.stats(), most, force=force, chosen=chosen)
        wanted = benchmark.Bench(
            target=target_of(target),
            timeout_s=timeout_s,
            seconds=seconds,
            seed=secrets.randbits(32) if seed is None else seed,
            grid=grid,
        )
        with contextlib.closing(benchmark.run(session, wanted)) as rows:
            done = benchmark.show(rows, wanted, as_json=as_json)
    return Code.NEGATIVE if any(row.wrong for row in done) else Code.OK
