"""Thousands of damaged bytes, at rest and while the store runs: none is ever served."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from nvme.damage import KINDS, ZONES, damage, zone
from nvme.judge import SPACES, chain
from nvme.rig import Plan, Rig, small_limits, tight
from nvme.sim_disk import SECTOR_BYTES

from kvstore import commands as c
from kvstore.errors import Corrupted, ProtocolError
from kvstore.nvme.superblock import read_superblock
from kvstore.store import NvmePolicy

AT_REST, RUNNING = 750, 750
LONG = 5000
EACH_LIFE = 3  # damages that are found at once
PLAN = Plan(
    geometries=(tight(segment_granules=17, n_segments=8, log_granules=4),),
    check_each=50,
    nesting=0.0,
    excused=True,
    honest=False,
)
SCRUBBED = replace(PLAN, nvme=NvmePolicy(every=True, scrub_bytes_per_s=1 << 30))


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    with small_limits():
        yield


def filled(seed: int, plan: Plan) -> Rig:
    """A store with blocks of both spaces on disk, some of them written over older ones, some
    dropped."""
    rig = Rig(seed, plan)
    for first in range(0, 28, 4):
        rig.put(0, first, 4)
        rig.persist(0, first, 4)
        if first < 12:
            rig.put(1, first, 3)
            rig.persist(1, first, 3)
        rig.settle()
    rig.drop(0, 22, 1)
    rig.drop(1, 5, 1)
    rig.settle()
    rig.demote_all()
    return rig


def on_disk(rig: Rig) -> list[tuple[int, int]]:
    """The keys that lie there."""
    return [name for name in sorted(rig.judge.known) if rig._uses_of(name)]


_GONE = (
    c.ExplainStatus.CORRUPTED,
    c.ExplainStatus.DROPPED,
    c.ExplainStatus.EVICTED,
    c.ExplainStatus.NEVER_STORED,
)


def explain(rig: Rig, name: tuple[int, int]) -> int:
    command = c.Explain(namespace=rig.ids[name[0]], hashes=chain(*name, 1))
    return int(rig.do(command).status[0])


def look_at_all(rig: Rig, known: list[tuple[int, int]]) -> Counter[str]:
    """Gets all keys; those that are gone though the store knew them were found to be damaged."""
    found: Counter[str] = Counter()
    for name in known:
        before, knew = rig.store.stats().corrupted, rig._block(name) >= 0
        if rig.get(*name):
            found["whole"] += 1
        elif knew:
            assert rig.store.stats().corrupted == before + 1, "a miss that nobody counted"
            assert explain(rig, name) == c.ExplainStatus.CORRUPTED
            found["damaged"] += 1
        else:
            # Its segment has made room, or nobody knows that it was there.
            assert explain(rig, name) in _GONE
            found["lost"] += 1
    return found


def damaged_at_rest(count: int, seed: int) -> Counter[str]:
    """So many damages, found by restarts; returns what became of the blocks."""
    rng = random.Random(seed)
    full = filled(seed, PLAN)
    known, volume = on_disk(full), full.volumes[0]
    assert len(known) > 20
    found: Counter[str] = Counter()
    for life in range(count // EACH_LIFE):
        after = full.killed(seed * 100_000 + life, recovers=False)
        after.judge.forgive()  # of a log that is damaged, dropped blocks may come back
        sim = after.sims[0]
        for _ in range(EACH_LIFE):
            name, kind = rng.choice(ZONES), rng.choice(KINDS)
            damage(sim, zone(volume, name, rng), kind, rng.getrandbits(32))
        try:
            superblock = read_superblock(sim)
        except (Corrupted, ProtocolError):
            superblock = None
        if superblock is None:
            # The volume is refused; or both copies are lost, so that it is formatted anew.
            found["refused"] += 1
            continue
        assert superblock.volume_id == volume.id
        after.recover()
        found += look_at_all(after, known)
        if life % 20 == 0:
            assert after.put(0, 40, 2) == 2
            after.finish()
    return found


def damaged_while_running(count: int, seed: int, *, scrubs: bool) -> Counter[str]:
    """So many damages to blocks on disk, found by reads, or by the scrubber before them."""
    rng = random.Random(seed)
    rig = filled(seed, SCRUBBED if scrubs else PLAN)
    volume, found = rig.volumes[0], Counter[str]()
    rig.pass_ms(60_000)  # it found nothing to scrub at first, and looks again then
    for n in range(count // EACH_LIFE):
        known = on_disk(rig)
        before = rig.store.stats().corrupted
        for _ in range(EACH_LIFE):
            name, kind = rng.choice(("block header", "payload")), rng.choice(KINDS)
            damage(rig.sims[0], zone(volume, name, rng), kind, rng.getrandbits(32))
        if scrubs and n % 4 == 0:
            for _ in range(40):
                rig.pass_ms(50)
                rig.finish_ops()
            found["scrubbed"] += rig.store.stats().corrupted - before
        found += look_at_all(rig, known)
        rig.demote_all()
        if n % 3 == 0:  # what is gone is put anew
            for space, first in ((0, 0), (0, 14), (1, 0)):
                rig.put(space, first, 14 if not space else 10)
                rig.persist(space, first, 14 if not space else 10)
                rig.settle()
            rig.demote_all()
    rig.judge.forgive()
    rig.finish()
    return found


def test_damage_at_rest_is_never_served() -> None:
    found = damaged_at_rest(AT_REST, seed=1)
    assert found["whole"] > 1000
    assert found["damaged"] > 50
    assert found["lost"] > 50
    assert found["refused"]


@pytest.mark.parametrize("scrubs", [False, True], ids=["read", "scrubbed"])
def test_damage_while_it_runs_is_never_served(scrubs: bool) -> None:
    found = damaged_while_running(RUNNING // 2, seed=2, scrubs=scrubs)
    assert found["damaged"] > 50
    assert found["whole"] > 1000
    assert bool(found["scrubbed"]) == scrubs


def test_lost_writes_are_never_served() -> None:
    served = 0
    for seed in range(12):
        rng = random.Random(seed)
        rig = Rig(seed, PLAN)
        for _ in range(12):
            rig.sims[0].lie_at(rng.randrange(1, 120))
        for first in range(0, 24, 4):
            rig.put(0, first, 4)
            rig.put(1, first // 2, 2)
            rig.pass_ms(150)
            rig.finish_ops()
            rig.demote_all()
            rig.get_all()
        after = rig.restart()
        after.get_all()
        served += after.judge.served
    assert served > 1000


def test_a_volume_that_was_cut_off_is_refused() -> None:
    full = filled(3, PLAN)
    for cut in range(1, full.sims[0].nbytes // SECTOR_BYTES, 5):
        after = full.killed(cut, recovers=False)
        after.sims[0].truncate(after.sims[0].nbytes - cut * SECTOR_BYTES)
        with pytest.raises(Corrupted, match="its disk only"):
            read_superblock(after.sims[0])


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_volume_that_is_cut_off_while_it_runs_serves_nothing_wrong(cut: int) -> None:
    rig = filled(4, PLAN)
    rig.sims[0].truncate(rig.sims[0].nbytes - cut * SECTOR_BYTES)
    for _ in range(3):
        rig.get_all()
        rig.put(0, 40, 3)
        rig.pass_ms(200)
        rig.finish_ops()
        rig.demote_all()
    rig.finish()


def test_all_payloads_differ() -> None:
    """Else bytes of another version would pass for the right ones."""
    rng = np.random.default_rng(0)
    assert all(layout.block_bytes > 4000 for _, layout in SPACES)
    assert len({tuple(row[:8]) for row in rng.permutation(chain(0, 0, 40))}) == 40


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 105))
def test_damage_at_rest_is_never_served_at_length(seed: int) -> None:
    damaged_at_rest(LONG // 5, seed)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(200, 205))
@pytest.mark.parametrize("scrubs", [False, True], ids=["read", "scrubbed"])
def test_damage_while_it_runs_is_never_served_at_length(seed: int, scrubs: bool) -> None:
    damaged_while_running(LONG // 10, seed, scrubs=scrubs)
