"""Prints which seed catches each planted bug first, of those that are tried:
`PYTHONPATH=tests python -m cluster.sim.seeds [FIRST:COUNT] [PART OF A NAME ...]`."""

from __future__ import annotations

import sys
import time

from cluster.sim.plants import PLANTS, catching_seed


def main(arguments: list[str]) -> None:
    """See above; 0:500 and all bugs where nothing is said."""
    seeds = range(500)
    if arguments and ":" in arguments[0]:
        first, count = map(int, arguments.pop(0).split(":"))
        seeds = range(first, first + count)
    for plant in PLANTS:
        if not arguments or any(part in plant.name for part in arguments):
            began_s = time.monotonic()
            seed = catching_seed(plant, seeds)
            took_s = time.monotonic() - began_s
            print(f"{seed!s:>5} {took_s:6.1f} s {plant.plan:9} {plant.name}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
