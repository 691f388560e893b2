"""The `kvstore` command: asks a store, explains its answers, checks the host, measures."""

from __future__ import annotations

import gc
import logging
import sys

from kvstore.lasting import settle

_NEEDED = ("rich", "typer")


def main() -> int:
    """Entry point; returns the exit code (see `output.Code`)."""
    gc.disable()
    try:
        from kvstore_client.cli.app import run
    except ModuleNotFoundError as error:
        if error.name not in _NEEDED:
            raise
        print(f"kvstore: needs {error.name}: pip install 'kvstore-llm[cli]'", file=sys.stderr)
        return 2
    finally:
        settle()
    # What the libraries warn of goes to standard error, one line each, as errors do; with --json
    # there is nothing but the object of an error.
    level = logging.ERROR if "--json" in sys.argv else logging.WARNING
    logging.basicConfig(format="kvstore: %(message)s", level=level)
    return run(sys.argv[1:])
