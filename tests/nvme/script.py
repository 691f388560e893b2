"""One small life of a store, and how it is played: sixty calls that come by everything it does."""

from __future__ import annotations

from nvme.rig import PATIENT_MS, Plan, Rig, tight

from kvstore import commands as c
from kvstore.store import NvmePolicy

# Space, first key, count. A reclaim comes with the puts once the segments are used up, and what
# was read before is written again then; the log, of two sectors a half, is compacted all the time.
SCRIPT = """
put a 0 4
persist a 0 4
put b 0 3
get a 0 4
settle
persist b 0 3
put a 4 4
put b 3 2
wait 100
finish
demote
get a 0 3
get b 0 2
drop a 6 1
put a 10 3
persist a 10 3
settle
view a 10 2
put a 6 1
drop b 4 1
wait 100
settle
demote
get a 4 4
persist a 4 4
put b 5 3
drop a 7 1
settle
let_go
put a 13 4
put b 8 2
persist b 5 4
demote
get b 0 3
get a 13 4
finish
put a 17 4
persist a 17 4
settle
pin a 0 2
demote
get a 0 4
drop a 11 2
put b 10 3
settle
wait 100
finish
restart
get a 0 4
get a 13 3
get b 5 3
put a 21 3
persist a 21 3
drop a 15 3
drop b 6 1
settle
forget b
put b 0 3
put a 24 2
persist b 0 3
persist a 24 2
settle
demote
get b 0 3
kill
get a 21 3
put b 14 2
persist b 14 2
settle
"""
AGAIN = """
get a 0 3
put a 30 3
persist a 30 3
put b 20 2
drop a 10 2
settle
demote
get a 30 3
get b 0 4
wait 100
finish
"""
PLAN = Plan(
    geometries=(tight(segment_granules=17, n_segments=6, log_granules=4),),
    nvme=NvmePolicy(every=True, scrub_bytes_per_s=1 << 20),
    check_each=4,
)
_SPACES = {"a": 0, "b": 1}


def play(rig: Rig, script: str = SCRIPT) -> Rig:
    """Does it all; returns the last life."""
    for line in script.split("\n"):
        if line:
            rig = _step(rig, *line.split())
            for _ in range(rig.rng.randrange(3)):
                rig.step()
    return rig


def _step(rig: Rig, what: str, *args: str) -> Rig:
    match what, args:
        case "put", (space, first, n):
            rig.put(_SPACES[space], int(first), int(n), by_parts=rig.rng.random() < 0.3)
        case "get", (space, first, n):
            rig.get(_SPACES[space], int(first), int(n))
        case "persist", (space, first, n):
            rig.persist(_SPACES[space], int(first), int(n), wait_ms=PATIENT_MS)
        case "drop", (space, first, n):
            rig.drop(_SPACES[space], int(first), int(n))
        case "forget", (space,):
            rig.drop_namespace(_SPACES[space])
        case "view", (space, first, n):
            rig.view(_SPACES[space], int(first), int(n))
        case "pin", (space, first, n):
            rig.hint(c.HintKind.PIN_UNTIL, _SPACES[space], int(first), int(n), 1000)
        case "let_go", ():
            rig.let_go()
        case "wait", (ms,):
            rig.pass_ms(int(ms))
        case "settle", ():
            rig.settle()
        case "finish", ():
            rig.finish_ops()
        case "demote", ():
            rig.demote_all()
        case "restart", ():
            return rig.restart()
        case "kill", ():
            return rig.restart(clean=False)
        case _:
            raise AssertionError(f"{what} {args} is no step")
    return rig
