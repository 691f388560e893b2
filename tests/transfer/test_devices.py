"""Memory of GPUs among what agents register. `tests/gpu` moves bytes there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvstore import limits
from kvstore.errors import InvalidArgument, ProtocolError
from kvstore.transfer import nixl
from kvstore.transfer.base import HOST, DeviceBytes, Pieces, TransferFailed
from kvstore.transfer.registered import Region, Regions, Registered

HERE, THERE = Region(4096, 4096), Region(1 << 40, 4096, 3)


def u64(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.uint64)


def described(*regions: Region) -> bytes:
    """The body of a NIXL agent's description, with metadata of a byte."""
    table = np.array(list(regions), nixl._REGION).tobytes()
    return nixl._BODY.pack(False, len(regions), 0, 64) + table + b"m"


def test_regions_know_whose_memory_they_are() -> None:
    regions = Regions([THERE, HERE])
    found = regions.find(u64(4096, 8000), u64(8, 8))
    assert found is not None
    assert regions.device_of(found) == HOST
    found = regions.find(u64(1 << 40), u64(4096))
    assert found is not None
    assert regions.device_of(found) == 3
    found = regions.find(u64(4096, 1 << 40), u64(8, 8))
    assert found is not None
    assert regions.device_of(found) is None


def test_a_piece_that_leaves_a_gpus_memory_is_found_nowhere() -> None:
    regions = Regions([THERE, HERE])
    assert regions.find(u64((1 << 40) + 4090), u64(8)) is None


def test_a_gpus_memory_is_registered_where_it_can_be_reached_alone() -> None:
    memory = DeviceBytes(1 << 40, 4096, 3, None)
    with pytest.raises(InvalidArgument, match="nixl"):
        Registered().add(memory)
    registered = Registered(devices=True)
    registered.add(memory)
    assert registered.regions.ranges == [THERE]
    with pytest.raises(InvalidArgument, match="overlaps"):
        registered.add(memory.cut(64, 64))


@pytest.mark.parametrize(
    "memory", [DeviceBytes(1 << 40, 0, 0, None), DeviceBytes(1 << 40, 8, HOST, None)]
)
def test_what_is_no_memory_of_a_gpu_is_refused(memory: DeviceBytes) -> None:
    with pytest.raises(InvalidArgument, match="GPU"):
        Registered(devices=True).add(memory)


@pytest.mark.parametrize(("at", "nbytes"), [(-1, 4), (0, 101), (100, 1), (4, -1)])
def test_a_cut_stays_within(at: int, nbytes: int) -> None:
    with pytest.raises(InvalidArgument, match="100"):
        DeviceBytes(4096, 100, 0, None).cut(at, nbytes)


def test_a_description_says_whose_memory_it_is() -> None:
    _rdma, _probe, regions, _metadata = nixl._opened(described(HERE, THERE))
    assert regions.ranges == [HERE, THERE]


@pytest.mark.parametrize("device", [-2, 1024, 1 << 40])
def test_a_description_with_a_device_that_is_none_is_refused(device: int) -> None:
    with pytest.raises(ProtocolError, match="device"):
        nixl._opened(described(HERE, Region(1 << 40, 4096, device)))


def test_a_description_with_fewer_regions_than_it_says_is_refused() -> None:
    with pytest.raises(ProtocolError, match="short"):
        nixl._opened(described(HERE, THERE)[:-20])
    most = nixl._BODY.pack(False, limits.MAX_AGENT_REGIONS + 1, 0, 64)
    with pytest.raises(ProtocolError, match="short"):
        nixl._opened(most + bytes(1 << 20))


@pytest.mark.parametrize("read", [True, False])
def test_one_transfer_is_of_one_memory_on_each_side(read: bool) -> None:
    engine: Any = None  # nothing is asked of it
    one, both = Regions([HERE]), Regions([HERE, THERE])
    same, mixed, nbytes = u64(4096, 4104), u64(4096, 1 << 40), u64(8, 8)
    for local, there, pieces, error in (
        (one, both, Pieces(same, mixed, nbytes), TransferFailed),
        (both, one, Pieces(mixed, same, nbytes), InvalidArgument),
    ):
        remote = nixl.NixlRemote(engine, local, there)
        with pytest.raises(error, match="several GPUs"):
            remote.read(pieces, 1.0) if read else remote.write(pieces, 1.0)
