"""Damage to a volume, by seed: where it is, and what became of the bytes there."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from nvme.sim_disk import PIECE_BYTES, SECTOR_BYTES, SimDisk

from kvstore.nvme.format import HEADER_GRANULES, LOG_HALVES, SUPERBLOCKS, head_granules
from kvstore.nvme.volume import Use, Volume

ZONES = ("superblock", "log", "header", "head", "block header", "payload", "footer", "anywhere")
KINDS = ("bit", "byte", "zeros", "torn", "misdirected", "lost")


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes of the disk, in whole sectors."""

    start: int
    stop: int


def zone(volume: Volume, name: str, rng: random.Random) -> Range:
    """One of the places of that name; anything where the volume has none."""
    geometry = volume.geometry
    uses = [use for use in volume.uses.values() if use.live]
    if name == "superblock":
        return _granules(0, SUPERBLOCKS)
    if name == "log":
        return _granules(SUPERBLOCKS, LOG_HALVES * geometry.log_granules)
    if name == "anywhere" or not uses:
        return Range(0, geometry.nbytes)
    use = rng.choice(uses)
    at, n = _in_segment(volume, use, name, rng)
    return _granules(volume.offset(use, at) // SECTOR_BYTES, n)


def _in_segment(volume: Volume, use: Use, name: str, rng: random.Random) -> tuple[int, int]:
    """A granule of the segment and how many."""
    places = use.members()[1].tolist()
    slot = use.slot_granules
    match name:
        case "header":
            return 0, HEADER_GRANULES
        case "footer":
            end = volume.geometry.footer_granule(slot)
            return end, volume.geometry.segment_granules - end
        case "head":
            # In front of each slot that no other slot is in front of.
            heads = [place - 1 for place in places if place - slot not in places]
            return rng.choice(heads) - head_granules(1) + 1, 1
        case "block header":
            return rng.choice(places), 1
        case _:
            return rng.choice(places), slot


def _granules(first: int, n: int) -> Range:
    return Range(first * SECTOR_BYTES, (first + n) * SECTOR_BYTES)


def damage(sim: SimDisk, where: Range, kind: str, seed: int) -> None:
    """Does it."""
    rng = np.random.default_rng(seed)
    sector = int(rng.integers(where.start // SECTOR_BYTES, where.stop // SECTOR_BYTES))
    at = sector * SECTOR_BYTES
    match kind:
        case "bit":
            sim.flip_bit(rng, where.start, where.stop)
        case "byte":
            byte = at + int(rng.integers(300))  # where most of what means something is
            sim._spoil(byte, rng.integers(0, 256, 1, np.uint8))
        case "zeros":
            sim.zero_sector(rng, where.start, where.stop)
        case "torn":
            part = int(rng.integers(1, SECTOR_BYTES // PIECE_BYTES)) * PIECE_BYTES
            sim._spoil(at + part, sim._before[at + part : at + SECTOR_BYTES].copy())
        case "misdirected":
            other = int(rng.integers(sim.nbytes // SECTOR_BYTES)) * SECTOR_BYTES
            sim._spoil(at, sim._content[other : other + SECTOR_BYTES].copy())
        case "lost":
            sim.undo_write(where.start, min(where.stop, sim.nbytes) - where.start)
        case _:
            raise AssertionError(kind)
