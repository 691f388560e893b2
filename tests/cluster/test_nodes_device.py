"""A client whose memory is a GPU's, with real nodes and real NIXL. There is no GPU here: memory of
the host stands in for its memory, and is registered as what it is. `tests/gpu` has the real one."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
from cluster.device_scene import assert_blocks_go_and_come, device_blocks
from cluster.nodes import LAYOUT, Nodes, blocks, chain, nodes

from kvstore import Layout
from kvstore.errors import InvalidArgument, LayoutMismatch, ResourceExhausted
from kvstore.streaming import hash_rows
from kvstore.transfer import nixl
from kvstore.transfer.base import Agent, DeviceBytes, Memory
from kvstore.transfer.either import EitherAgent
from kvstore_client.cluster import session as client
from kvstore_client.cluster.session import ClusterSession

TRANSFER = "auto"
RING_BYTES = 16 << 20


class Posing:
    """Memory of the host that says it is a GPU's. wrong: what is added to checksums."""

    def __init__(self) -> None:
        self.wrong = 0

    def allocate(self, nbytes: int) -> DeviceBytes:
        memory = np.zeros(nbytes + 64, np.uint8)
        return DeviceBytes(-(-memory.ctypes.data // 64) * 64, nbytes, 0, memory)

    def checksums(
        self, addresses: npt.NDArray[np.uint64], cells: npt.NDArray[np.uint64]
    ) -> npt.NDArray[np.uint64]:
        columns = [hash_rows(addresses + own, int(nbytes)) for _, own, nbytes in cells]
        return np.stack(columns, axis=1) + np.uint64(self.wrong)


class HostAgent(nixl.NixlAgent):
    """Registers what poses as a GPU's memory as the host's."""

    def register(self, memory: Memory) -> None:
        assert isinstance(memory, DeviceBytes)
        super().register(here(memory))


def here(block: DeviceBytes) -> npt.NDArray[np.uint8]:
    """The bytes of what poses as a GPU's memory."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * block.nbytes).from_address(block.address))


def write(block: DeviceBytes, data: npt.NDArray[np.uint8]) -> None:
    here(block)[:] = data


def read(block: DeviceBytes) -> npt.NDArray[np.uint8]:
    return here(block).copy()


def agent_of_device(transfer: str, *, over_tcp: bool) -> Agent:
    assert transfer == TRANSFER
    return EitherAgent([HostAgent("client", over_tcp=over_tcp)])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with nodes(tmp_path_factory.mktemp("device"), 2, "--transfer", TRANSFER) as running:
        running.wait_until_well()
        yield running


@pytest.fixture
def gpu() -> Posing:
    return Posing()


@pytest.fixture
def session(
    cluster: Nodes, gpu: Posing, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ClusterSession]:
    monkeypatch.setattr(client, "agent_of_device", agent_of_device)
    with cluster.client(device=gpu, device_over_tcp=True, ring_bytes=RING_BYTES) as one:
        yield one


def test_blocks_are_put_from_a_gpus_memory_and_got_there(session: ClusterSession) -> None:
    assert_blocks_go_and_come(session, write, read)


def test_a_block_that_lands_wrong_in_a_gpus_memory_is_a_miss(
    session: ClusterSession, gpu: Posing
) -> None:
    space = session.open_namespace("wrong", LAYOUT)
    keys, data = chain(4, 8), blocks(4, 8)
    with session.buffers(4, LAYOUT.block_bytes) as buffers:
        for source, block in zip(device_blocks(buffers), data, strict=True):
            write(source, block)
        session.put(space, keys, buffers.blocks)
    gpu.wrong = 1
    with session.view(space, keys) as view:
        assert not view.blocks
    gpu.wrong = 0
    with session.view(space, keys) as view:
        np.testing.assert_array_equal([read(block) for block in device_blocks(view)], data)


def test_what_would_copy_through_the_host_is_refused(session: ClusterSession) -> None:
    space = session.open_namespace("refused", LAYOUT)
    keys, data = chain(4, 9), blocks(4, 9)
    with pytest.raises(InvalidArgument, match="sources"):
        session.put(space, keys, list(data))
    elsewhere = Posing().allocate(4 * LAYOUT.block_bytes)
    cuts = [elsewhere.cut(i * LAYOUT.block_bytes, LAYOUT.block_bytes) for i in range(4)]
    with pytest.raises(InvalidArgument, match="buffers"):
        session.put(space, keys, cuts)  # type: ignore[arg-type]
    with session.buffers(4, LAYOUT.block_bytes - 64) as small, pytest.raises(LayoutMismatch):
        session.put(space, keys, small.blocks)
    with session.buffers(3, LAYOUT.block_bytes) as few, pytest.raises(InvalidArgument, match="4"):
        session.put(space, keys, few.blocks)
    with pytest.raises(InvalidArgument, match="view"):
        session.get_into(space, keys, list(data))
    assert session.match(space, keys).count == 0


def test_views_hold_half_of_a_ring_in_a_gpus_memory(session: ClusterSession) -> None:
    n = RING_BYTES // 2 // LAYOUT.block_bytes
    space = session.open_namespace("half", LAYOUT)
    keys = chain(1, 10)
    with session.buffers(n, LAYOUT.block_bytes) as buffers:
        session.put(space, keys, buffers.blocks[:1])
        with pytest.raises(ResourceExhausted, match="ring_bytes"):
            session.view(space, keys)
        with pytest.raises(ResourceExhausted, match="ring_bytes"):
            session.buffers(1, LAYOUT.block_bytes)
    with session.view(space, keys) as view:
        assert len(view.blocks) == 1


@pytest.mark.parametrize("block_bytes", [240, 1004])
def test_cells_that_a_gpu_does_not_hash_are_refused(
    session: ClusterSession, block_bytes: int
) -> None:
    layout = Layout.opaque(model="cluster-test", block_tokens=16, block_bytes=block_bytes)
    with pytest.raises(LayoutMismatch, match="GPU"):
        session.open_namespace("short", layout)


def test_a_gpus_memory_goes_by_nixl_alone(cluster: Nodes) -> None:
    with pytest.raises(InvalidArgument, match="nixl or auto"):
        cluster.client(transfer="grpc", device=Posing(), ring_bytes=RING_BYTES)


def test_a_client_of_the_hosts_memory_takes_no_blocks_of_a_gpus(cluster: Nodes) -> None:
    with cluster.client(arena_bytes=8 << 20, ring_bytes=16 << 20) as session:
        space = session.open_namespace("host", LAYOUT)
        block = Posing().allocate(LAYOUT.block_bytes)
        with pytest.raises(InvalidArgument, match="numpy"):
            session.put(space, chain(1, 11), [block])  # type: ignore[list-item]
