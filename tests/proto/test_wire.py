"""The public protocol on the wire: what was once published never changes its meaning."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "proto"))
from generate import SOURCES, generate

from kvstore_proto.v1 import kvstore_pb2 as pb

GOLDEN = Path(__file__).with_name("wire_v1.txt")


def published() -> Iterator[str]:
    """Every name and number that a peer may depend on, a line each."""
    for service in pb.DESCRIPTOR.services_by_name.values():
        for method in service.methods:
            streams = f"{'stream ' * method.client_streaming}in, "
            streams += f"{'stream ' * method.server_streaming}out"
            types = f"{method.input_type.name} -> {method.output_type.name}"
            yield f"rpc {service.full_name}/{method.name}: {types} ({streams})"
    for enum in pb.DESCRIPTOR.enum_types_by_name.values():
        for value in enum.values:
            yield f"enum {enum.name}.{value.name} = {value.number}"
    for message in pb.DESCRIPTOR.message_types_by_name.values():
        for field in message.fields:
            kind = f"type {field.type}{' repeated' * field.is_repeated}"
            yield f"field {message.name}.{field.name} = {field.number} ({kind})"


def test_names_and_numbers_are_those_that_were_published() -> None:
    assert sorted(published()) == GOLDEN.read_text().splitlines()


def test_a_message_of_an_older_peer_still_reads_the_same() -> None:
    put = pb.PutRequest.FromString(
        bytes.fromhex("0a1d0a040805102a12036162631a0178220201022a01793007386342020801")
    )
    assert (put.header.namespace.number, put.header.namespace.instance) == (5, 42)
    assert (put.header.keys, put.header.put_id, put.header.parent) == (b"abc", b"x", b"y")
    assert (list(put.header.cells), put.header.position, put.header.ttl_ms) == ([1, 2], 7, 99)
    assert put.header.hint.kind == pb.HINT_KIND_SESSION_ENDS
    chunk = pb.GetResponse.FromString(bytes.fromhex("0a0b080310041a017820012802"))
    assert (chunk.chunk.block, chunk.chunk.offset, chunk.chunk.data) == (3, 4, b"x")
    assert (chunk.chunk.last, chunk.chunk.tier) == (True, pb.TIER_NVME)


@pytest.mark.parametrize("suffix", ["_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi"])
def test_the_generated_code_is_that_of_the_source(suffix: str, generated: Path) -> None:
    path = Path("kvstore_proto/v1") / f"kvstore{suffix}"
    assert (generated / path).read_bytes() == (SOURCES / path).read_bytes(), "run `make proto`"


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generated")
    assert generate(folder) == 0
    return folder
