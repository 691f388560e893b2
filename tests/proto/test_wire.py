"""The public protocol on the wire: what was once published never changes its meaning."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto

sys.path.insert(0, str(Path(__file__).parents[2] / "proto"))
from generate import SOURCES, generate

from kvstore import limits
from kvstore_proto.v1 import kvstore_pb2 as pb
from kvstore_proto.v1.translate import CHUNK_BYTES, MAX_MESSAGE_BYTES

SOURCE = SOURCES / "kvstore_proto/v1/kvstore.proto"
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


def retired(text: str) -> Iterator[str]:
    """The published fields and enum values that are gone from the protocol: `Message.name = 1`."""
    now = set(published())
    for line in text.splitlines():
        if line not in now:
            kind, _, rest = line.partition(" ")
            assert kind in ("field", "enum"), f"a call that peers make is gone: {line}"
            yield rest.partition(" (")[0]


def reserved(name: str, of: FileDescriptorProto) -> set[str]:
    """What a message or an enum keeps from being used again: its numbers and names, as text."""
    (found,) = [each for each in (*of.message_type, *of.enum_type) if each.name == name]
    # The end of a range counts in an enum, and not in a message.
    last = 1 if found in of.enum_type else 0
    numbers = [n for span in found.reserved_range for n in range(span.start, span.end + last)]
    return {*map(str, numbers), *found.reserved_name}


@pytest.fixture(scope="module")
def protocol() -> FileDescriptorProto:
    """The protocol as the compiler understood it."""
    return FileDescriptorProto.FromString(pb.DESCRIPTOR.serialized_pb)


def test_all_that_there_is_was_published() -> None:
    """A new line belongs into the golden file; a line of that file stays for ever."""
    lines = GOLDEN.read_text().splitlines()
    assert lines == sorted(lines)
    assert sorted(set(published()) - set(lines)) == []


def test_what_was_retired_is_reserved(protocol: FileDescriptorProto) -> None:
    for line in retired(GOLDEN.read_text()):
        path, _, number = line.partition(" = ")
        owner, _, name = path.partition(".")
        kept = reserved(owner, protocol)
        assert {number, name} <= kept, f"write into {owner}: reserved {number}, {name};"


def test_a_line_that_is_gone_is_noticed(protocol: FileDescriptorProto) -> None:
    golden = GOLDEN.read_text()
    assert list(retired(golden + "field GetRequest.gone = 9 (type 12)\n")) == [
        "GetRequest.gone = 9"
    ]
    with pytest.raises(AssertionError, match="peers make"):
        list(retired("rpc kvstore.v1.KVStore/Gone: A -> B (in, out)"))
    assert reserved("GetRequest", protocol) == set()
    (message,) = [each for each in protocol.message_type if each.name == "GetRequest"]
    (enum,) = [each for each in protocol.enum_type if each.name == "Tier"]
    changed = FileDescriptorProto(message_type=[message], enum_type=[enum])
    changed.message_type[0].reserved_range.add(start=9, end=11)
    changed.message_type[0].reserved_name.append("gone")
    changed.enum_type[0].reserved_range.add(start=9, end=9)
    assert reserved("GetRequest", changed) == {"9", "10", "gone"}
    assert reserved("Tier", changed) == {"9"}


def test_the_limits_in_the_source_s_words_are_those_of_the_store() -> None:
    words = " ".join(line.strip("/ ") for line in SOURCE.read_text().splitlines())
    for number in (
        *(limits.MAX_KEYS_PER_CALL, limits.MAX_CELLS, limits.MAX_LAYOUT_BYTES),
        *(limits.MAX_NAMESPACE_NAME_BYTES, limits.MAX_NAMESPACES, limits.MAX_POSITION),
        *(limits.MAX_TTL_MS, limits.MAX_HINT_MS, CHUNK_BYTES),
    ):
        assert re.search(rf"\b{number:,}\b", words), number
    assert f"at most {limits.MAX_BLOCK_BYTES >> 20} MiB" in words
    assert f"a message is at most {MAX_MESSAGE_BYTES >> 20} MiB" in words
    assert limits.MAX_DEADLINE_MS == 3_600_000
    assert "deadline is at most one hour" in words
    assert limits.MAX_PINNED_SHARE == 0.5
    assert "at most half of a pool's bytes can be pinned" in words


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
