"""The subcommands about blocks of one namespace: match, explain, drop."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from kvstore.errors import InvalidArgument
from kvstore_client.cli import answers, output
from kvstore_client.cli.options import (
    AsJson,
    ExtraKeys,
    HashesFile,
    HashValues,
    Namespace,
    NamespaceId,
    SchemeChoice,
    Target,
    Timeout,
    Tokens,
    session_of,
)
from kvstore_client.cli.output import Code
from kvstore_client.cli.selection import (
    Scheme,
    Selectors,
    check_selectors,
    open_namespace,
    select,
)


def match(
    context: typer.Context,
    *,
    namespace: Namespace,
    namespace_id: NamespaceId = None,
    hashes: HashValues = None,
    hashes_file: HashesFile = None,
    tokens: Tokens = None,
    extra_keys: ExtraKeys = None,
    scheme: SchemeChoice = Scheme.BLAKE2B,
    target: Target = None,
    timeout_s: Timeout = 5.0,
    as_json: AsJson = False,
) -> Code:
    """Says how many leading blocks of a chain are stored. Exit code 1: none."""
    selectors = _selectors(hashes, hashes_file, tokens, extra_keys, scheme)
    with session_of(context, target, timeout_s) as session:
        found = answers.match(session, select(session, namespace, namespace_id, selectors))
    if as_json:
        output.print_json(found.as_json())
    else:
        print(found.as_text())
    return Code.OK if found.matched else Code.NEGATIVE


def explain(
    context: typer.Context,
    *,
    namespace: Namespace,
    namespace_id: NamespaceId = None,
    hashes: HashValues = None,
    hashes_file: HashesFile = None,
    tokens: Tokens = None,
    extra_keys: ExtraKeys = None,
    scheme: SchemeChoice = Scheme.BLAKE2B,
    target: Target = None,
    timeout_s: Timeout = 5.0,
    as_json: AsJson = False,
) -> Code:
    """Says why each block of a chain is found or not."""
    selectors = _selectors(hashes, hashes_file, tokens, extra_keys, scheme)
    with session_of(context, target, timeout_s) as session:
        runs = answers.explain(session, select(session, namespace, namespace_id, selectors))
    if as_json:
        output.print_json({"namespace": namespace, "runs": [run.as_json() for run in runs]})
    else:
        answers.show_runs(runs)
    return Code.OK


def drop(
    context: typer.Context,
    *,
    namespace: Namespace,
    namespace_id: NamespaceId = None,
    hashes: HashValues = None,
    hashes_file: HashesFile = None,
    tokens: Tokens = None,
    extra_keys: ExtraKeys = None,
    scheme: SchemeChoice = Scheme.BLAKE2B,
    everything: Annotated[bool, typer.Option("--all", help="All blocks of the namespace.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before --all.")] = False,
    target: Target = None,
    timeout_s: Timeout = 5.0,
    as_json: AsJson = False,
) -> Code:
    """Forgets blocks, or with --all a whole namespace, after asking. Exit code 1: you said no.

    Counts the blocks that were there. One that a view still holds cannot be found any more, and
    gives its memory back when the view is released.
    """
    selectors = _selectors(hashes, hashes_file, tokens, extra_keys, scheme, everything=everything)
    with session_of(context, target, timeout_s) as session:
        if everything:
            handle = open_namespace(session, namespace, namespace_id)
            agreed = yes or _agreed(namespace)
            dropped = session.drop_namespace(handle) if agreed else 0
        else:
            agreed = True
            dropped = answers.drop(session, select(session, namespace, namespace_id, selectors))
    if as_json:
        output.print_json({"namespace": namespace, "dropped_blocks": dropped})
    else:
        print(f"dropped {output.count(dropped, 'block')}")
    return Code.OK if agreed else Code.NEGATIVE


def _selectors(
    hashes: list[str] | None,
    hashes_file: HashesFile,
    tokens: Tokens,
    extra_keys: list[str] | None,
    scheme: Scheme,
    *,
    everything: bool = False,
) -> Selectors:
    """The selectors, checked before the store is asked anything. Raises `InvalidArgument`."""
    selectors = Selectors(
        hashes=tuple(hashes or ()),
        hashes_file=hashes_file,
        tokens=tokens,
        extra_keys=tuple(extra_keys or ()),
        scheme=scheme,
    )
    if everything:
        if selectors.sources:
            raise InvalidArgument("all", "drops everything: name no blocks beside it")
    else:
        check_selectors(selectors)
    return selectors


def _agreed(namespace: str) -> bool:
    """Asks on the terminal; `InvalidArgument` where there is none."""
    if not sys.stdin.isatty():
        raise InvalidArgument("yes", "there is no terminal to ask on: give --yes")
    name = output.printable(namespace)
    return typer.confirm(f"Forget all blocks of namespace {name}?", err=True)
