"""What goes on in the namespaces of `test_nodes_network.py`: `python -m cluster.partitions WHAT
FOLDER TRANSFER`. It prints how it went as JSON."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from cluster.load import Load
from cluster.nodes import LAYOUT, all_well, blocks, chain, eventually, nodes
from cluster.test_nodes import FAILOVER_S, REPAIR_S, N, assert_quiet, names_of

from benchmarks.networks import Network
from kvstore.errors import KVStoreError
from kvstore_client.cluster.session import ClusterSession
from kvstore_proto.cluster.rpc import client_token

GUEST = "guest"
PUT_S = 4.0
GONE_S = 40.0  # by when a connection whose other end has vanished is over
_LOOKS = 20
_SMALL = {"arena_bytes": 1 << 20, "ring_bytes": 1 << 20}


def links(folder: Path, transfer: str) -> None:
    """One link after another fails and is healed, and a node dies: no get fails."""
    network = Network("abc")
    longest: dict[str, float] = {}

    def well() -> bool:
        return running.fewest_copies("links", load.keys()) >= 2

    with (
        nodes(folder, 3, "--transfer", transfer, network=network) as running,
        running.client(transfer=transfer, **_SMALL) as session,
    ):
        eventually(lambda: all_well(session), REPAIR_S, "all serve")
        with Load(running, "links", seed=1, most=16, transfer=transfer) as load:
            load.wait_for(puts=8, gets=20)
            longest["none"] = load.longest_get_s(0.0)
            faults = {
                "link of a down": lambda: network.down("a"),
                "link of b silent": lambda: network.silent("b"),
                "b does not reach c": lambda: network.lose("b", "c"),
            }
            for what, strike in faults.items():
                at_s = time.monotonic()
                strike()
                load.wait_for(gets=40, puts=2)
                longest[what] = load.longest_get_s(at_s)
                network.heal()
                eventually(lambda: all_well(session), REPAIR_S, f"healed: {what}")
                eventually(well, REPAIR_S, f"two copies after: {what}")
            at_s = time.monotonic()
            running.kill("c")
            load.wait_for(gets=40, puts=2)
            longest["c killed"] = load.longest_get_s(at_s)
            running.start(["c"])
            eventually(well, REPAIR_S, "two copies after c died")
            load.wait_for(gets=5)
            put_s = load.longest_put_s(0.0)
        assert_quiet(running)
        # Without a fault, too, a get may wait for a processor that another test has.
        assert max(longest.values()) < FAILOVER_S + longest["none"], longest
        # Not as long as a put may take: another node got it.
        assert put_s < PUT_S, put_s
    network.close()
    print(json.dumps({**longest, "longest put": put_s}))


def vanished(folder: Path, transfer: str) -> None:
    """A client's host is gone without a word, in the middle of its work: nodes forget it. Here is a
    client too, which only asks, and has no session for that."""
    network = Network([*"abc", GUEST])
    with (
        nodes(folder, 3, "--transfer", transfer, network=network) as running,
        running.client(transfer=transfer, **_SMALL) as session,
    ):
        eventually(lambda: all_well(session), REPAIR_S, "all serve")
        with network.inside(GUEST):
            guest = subprocess.Popen(
                [sys.executable, "-m", "cluster.partitions", GUEST, ",".join(running.seeds)],
                env={"PYTHONPATH": ":".join(sys.path), "KVSTORE_TRANSFER": transfer},
                stdin=subprocess.PIPE,
                text=True,
            )
        try:
            assert guest.stdin
            guest.stdin.write(client_token(running.secret) + "\n")
            guest.stdin.flush()
            seen = lambda: f"sessions of clients: {guests(session)}"  # noqa: E731
            eventually(lambda: all_have(session, 1), REPAIR_S, seen)
            at_s = time.monotonic()
            network.down(GUEST)
            eventually(lambda: all_have(session, 0), GONE_S, seen)
            took_s = time.monotonic() - at_s
            assert_quiet(running)
        finally:
            guest.kill()
            guest.communicate()
    network.close()
    print(json.dumps({"forgotten after": took_s}))


def guests(session: ClusterSession) -> list[int]:
    """How many clients are connected, at each node. Nodes' own sessions come with what they have
    to do with each other, and on a busy machine one may end as a host's that vanished does."""
    return [names_of(each)["client_sessions"] for each in session.status().values()]


def all_have(session: ClusterSession, n: int) -> bool:
    """Whether each node has so many clients, and not in passing."""
    return all(set(guests(session)) == {n} for _ in range(_LOOKS))


def work_for_ever(seeds: list[str], transfer: str) -> None:
    """A client without end, of so many segments that all nodes have to do with each other. Its
    token comes from standard input."""
    token = sys.stdin.readline().strip()
    session = ClusterSession(seeds, token=token, transfer=transfer, timeout_s=1.0, **_SMALL)
    space = session.open_namespace("guest", LAYOUT)
    for seed in itertools.count():
        keys, data = chain(N, seed), blocks(N, seed)
        with contextlib.suppress(KVStoreError):  # it is cut off in the end
            session.put(space, keys, list(data), position=0)
            session.get_into(space, keys, list(data))


def main() -> None:
    """The command."""
    what, where, *rest = sys.argv[1:]
    if what == GUEST:
        work_for_ever(where.split(","), os.environ["KVSTORE_TRANSFER"])
    else:
        {"links": links, "vanished": vanished}[what](Path(where), *rest)


if __name__ == "__main__":
    main()
