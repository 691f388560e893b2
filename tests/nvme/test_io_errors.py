"""Every single I/O of a small life fails, once and for good: nothing wrong is served, nothing
leaks, and nothing counts as durable that is not."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
from nvme.rig import Plan, Rig, formatted, small_limits, tight
from nvme.script import AGAIN, PLAN, SCRIPT, play
from nvme.sim_disk import Io

from kvstore.nvme.volume import Health

CHECK_EACH = 25
ERRORS: dict[str, tuple[int | str, ...]] = {
    "read": (errno.EIO, "short"),
    "write": (errno.EIO, errno.ENOSPC, "short"),
    "sync": (errno.EIO, errno.ENOSPC),
}
TWO_VOLUMES = replace(PLAN, geometries=(tight(17, 4, 3), tight(13, 4, 3)))


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    with small_limits():
        yield


@dataclass(frozen=True, slots=True)
class Fault:
    """The I/O that fails, of what kind, on which disk. times: None for good, with all behind it."""

    n: int
    kind: str
    error: int | str
    times: int | None
    disk: int = 0


def ios(seed: int, plan: Plan) -> list[list[Io]]:
    """Those of an undisturbed run, by disk."""
    sims = [formatted(geometry, i) for i, geometry in enumerate(plan.geometries)]
    for sim in sims:
        sim.trace = []
    rig = play(Rig(seed, plan, sims=sims))
    assert all(len(sim.trace or ()) == sim.ios for sim in rig.sims)
    return [list(sim.trace or ()) for sim in rig.sims]


def fail(seed: int, plan: Plan, fault: Fault) -> Rig:
    """Plays the script with one fault; then pulls the plug, and looks what is still there."""
    # No block is lost by a write that failed once: it is in memory still.
    excused = fault.kind == "read" or fault.times is None
    rig = Rig(seed, replace(plan, excused=excused, check_each=CHECK_EACH))
    rig.sims[fault.disk].fail_at(fault.n, fault.error, times=fault.times)
    rig = play(rig)
    after = rig.crash(seed)
    # Reads may have cost blocks; those that were not given up meanwhile are there.
    after.get_musts()
    after.get_all()
    # In memory it goes on whatever became of the disk. A write that is under way would hold its
    # block, and with that a slab, which in so small a pool may be all of it.
    rig.finish_ops()
    for space in (0, 1):
        assert rig.put(space, 40, 2) == 2
        assert rig.get(space, 40, 2) == 2
    rig.finish()
    return rig


def errors_of(io: Io, n: int, *, all_of_them: bool) -> tuple[int | str, ...]:
    errors = ERRORS[io.kind]
    return errors if all_of_them else (errors[n % len(errors)],)


def fail_each(seed: int, plan: Plan, *, all_errors: bool = False) -> dict[Health, int]:
    """Each I/O fails in a run of its own; returns what the volumes were in the end."""
    ends = dict.fromkeys(Health, 0)
    for disk, trace in enumerate(ios(seed, plan)):
        for n, io in enumerate(trace, 1):
            for error in errors_of(io, n, all_of_them=all_errors):
                for times in (1, None):
                    rig = fail(seed, plan, Fault(n, io.kind, error, times, disk))
                    ends[rig.volumes[disk].health] += 1
    return ends


def test_any_io_may_fail() -> None:
    ends = fail_each(seed=1, plan=PLAN)
    # Writes and syncs that failed have stopped the writing, reads that fail for good all use.
    assert all(count > 10 for count in ends.values()), ends


def test_the_script_passes_where_no_io_fails() -> None:
    last = len(ios(1, PLAN)[0])
    rig = fail(1, PLAN, Fault(last + 10_000, "read", errno.EIO, None))
    assert rig.volumes[0].health is Health.OK
    assert len(SCRIPT.split("\n")) + len(AGAIN.split("\n")) > 60


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("plan", [PLAN, TWO_VOLUMES], ids=["one volume", "two volumes"])
def test_any_io_may_fail_in_any_way(seed: int, plan: Plan) -> None:
    fail_each(seed=seed, plan=plan, all_errors=True)
