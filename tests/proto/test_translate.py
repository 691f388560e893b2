"""Values, errors and chunks survive the wire; what means nothing is refused by name."""

from __future__ import annotations

import grpc
import numpy as np
import pytest

from kvstore import BlockReport, ExplainStatus, Hint, HintKind, Layout, Matched, PutResult, Tier
from kvstore import errors as e
from kvstore_proto.v1 import kvstore_pb2 as pb
from kvstore_proto.v1 import translate as t
from kvstore_proto.v1.chunks import Assembly, cut
from kvstore_proto.v1.status import ERROR_KEY, abort, error_of

ERRORS = [
    (e.InvalidArgument("keys", "too many"), grpc.StatusCode.INVALID_ARGUMENT),
    (e.LayoutMismatch("cells", "not these"), grpc.StatusCode.INVALID_ARGUMENT),
    (e.ResourceExhausted("full", retry_after_ms=70), grpc.StatusCode.RESOURCE_EXHAUSTED),
    (e.StaleNamespace("gone"), grpc.StatusCode.FAILED_PRECONDITION),
    (e.PermissionDenied("not you"), grpc.StatusCode.PERMISSION_DENIED),
    (e.DeadlineExceeded("late"), grpc.StatusCode.DEADLINE_EXCEEDED),
    (e.Unavailable("away"), grpc.StatusCode.UNAVAILABLE),
    (e.Corrupted("flipped"), grpc.StatusCode.DATA_LOSS),
    (e.ProtocolError("garbage"), grpc.StatusCode.INTERNAL),
]


class Ended(grpc.RpcError):
    """A call that ended, as both of its sides see it."""

    def __init__(self, code: grpc.StatusCode | None = None, details: str = "") -> None:
        self._code, self._details = code, details
        self.metadata: tuple[tuple[str, bytes], ...] = ()

    def set_trailing_metadata(self, metadata: tuple[tuple[str, bytes], ...]) -> None:
        self.metadata = metadata

    def abort(self, code: grpc.StatusCode, details: str) -> None:
        self._code, self._details = code, details
        raise self

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        return self.metadata

    def code(self) -> grpc.StatusCode | None:
        return self._code

    def details(self) -> str:
        return self._details


@pytest.mark.parametrize(("error", "code"), ERRORS, ids=lambda x: type(x).__name__)
def test_an_error_arrives_as_it_was_raised(error: e.KVStoreError, code: grpc.StatusCode) -> None:
    call = Ended()
    with pytest.raises(Ended):
        abort(call, error)
    assert call.code() is code
    arrived = error_of(call)
    assert (type(arrived), str(arrived)) == (type(error), str(error))
    assert getattr(arrived, "field", None) == getattr(error, "field", None)
    assert getattr(arrived, "retry_after_ms", None) == getattr(error, "retry_after_ms", None)


@pytest.mark.parametrize(("error", "code"), ERRORS[:-1], ids=lambda x: type(x).__name__)
def test_a_code_alone_says_what_kind_of_error_it_is(
    error: e.KVStoreError, code: grpc.StatusCode
) -> None:
    assert isinstance(error, type(error_of(Ended(code, "no more than that"))))


@pytest.mark.parametrize("data", [b"", b"x", b"\xff" * 8, bytes(64)])
def test_a_garbled_error_is_a_protocol_error(data: bytes) -> None:
    call = Ended(grpc.StatusCode.UNAVAILABLE)
    call.set_trailing_metadata(((ERROR_KEY, data),))
    assert isinstance(error_of(call), e.ProtocolError)


def test_a_long_text_fits_into_the_metadata() -> None:
    call = Ended()
    with pytest.raises(Ended):
        abort(call, e.InvalidArgument("keys", "x" * 100_000))
    assert len(call.metadata[0][1]) + len(call.details()) < 4096


def test_keys_are_32_bytes_each_and_at_most_65536() -> None:
    assert t.keys_of(bytes(65_536 * 32)).shape == (65_536, 32)
    for wrong in (b"", bytes(31), bytes(33), bytes(65_537 * 32)):
        with pytest.raises(e.InvalidArgument, match="keys"):
            t.keys_of(wrong)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[]", b"x" * 5000])
def test_a_wrong_layout_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(e.InvalidArgument, match="layout"):
        t.layout_of(data)


def test_hints_survive_and_unknown_ones_are_refused() -> None:
    for kind in HintKind:
        message = t.hint_to_wire(Hint(kind=kind, for_s=1.5))
        assert message is not None
        assert t.hint_of(message) == Hint(kind=kind, for_s=1.5)
    with pytest.raises(e.InvalidArgument, match=r"hint\.kind"):
        t.hint_of(pb.BlockHint(kind=99))
    with pytest.raises(e.InvalidArgument, match="for_s"):
        t.hint_to_wire(Hint(kind=HintKind.PIN_UNTIL, for_s=-1.0))


def test_reports_survive() -> None:
    reports = [BlockReport(status=status) for status in ExplainStatus]
    reports.append(BlockReport(status=ExplainStatus.STORED, tier=Tier.NVME))
    reports.append(BlockReport(status=ExplainStatus.EVICTED, when=1234.567))
    assert t.reports_of(t.reports_to_wire(reports), len(reports)) == reports
    with pytest.raises(e.ProtocolError):
        t.reports_of(t.reports_to_wire(reports), len(reports) - 1)


def test_a_match_survives_and_a_wrong_one_is_refused() -> None:
    matched = Matched(3, np.array([1, 2, 3], np.uint8))
    arrived = t.matched_of(t.matched_to_wire(matched), 3)
    assert arrived.tiers == [Tier.DRAM, Tier.NVME, Tier.HBM]
    for asked, count, tiers in ((2, 3, b"\1\1\1"), (3, 2, b"\1"), (3, 1, b"\0")):
        with pytest.raises(e.ProtocolError):
            t.matched_of(pb.MatchResponse(count=count, tiers=tiers), asked)


def test_the_counts_of_a_put_add_up() -> None:
    result = PutResult(stored=1, existed=2, waiting=3, not_stored=4, retry_after_ms=50)
    assert t.put_of(t.put_to_wire(result), 10) == result
    with pytest.raises(e.ProtocolError):
        t.put_of(t.put_to_wire(result), 11)


def test_cells_are_checked_against_the_layout() -> None:
    layout = Layout.opaque(model="m", block_bytes=64, block_tokens=1)
    assert t.part_of_cells(layout, ()).nbytes == 64
    for wrong in ([1], [0, 0], [-1]):
        with pytest.raises(e.LayoutMismatch, match="cells"):
            t.part_of_cells(layout, wrong)


@pytest.mark.parametrize("nbytes", [1, t.CHUNK_BYTES - 1, t.CHUNK_BYTES, 3 * t.CHUNK_BYTES + 5])
def test_a_cut_block_comes_together_again(nbytes: int) -> None:
    block = np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8)
    arrived, parts = Assembly(1, nbytes), []
    for offset, data in cut(block):
        assert 0 < len(data) <= t.CHUNK_BYTES
        arrived.accept(pb.PutChunk(block=0, offset=offset, data=data))
        parts.append(data)
    assert arrived.done
    assert b"".join(parts) == block.tobytes()


@pytest.mark.parametrize(
    ("field", "chunk"),
    [
        ("chunk.block", pb.PutChunk(block=0, offset=0, data=b"x")),
        ("chunk.block", pb.PutChunk(block=2, offset=4, data=b"x")),
        ("chunk.offset", pb.PutChunk(block=1, offset=0, data=b"x")),
        ("chunk.offset", pb.PutChunk(block=1, offset=5, data=b"x")),
        ("chunk.data", pb.PutChunk(block=1, offset=4, data=b"")),
        ("chunk.data", pb.PutChunk(block=1, offset=4, data=bytes(7))),
        ("chunk.data", pb.PutChunk(block=1, offset=4, data=bytes(t.CHUNK_BYTES + 1))),
    ],
)
def test_a_chunk_out_of_place_is_refused_by_name(field: str, chunk: pb.PutChunk) -> None:
    arrived = Assembly(2, 10)
    assert arrived.accept(pb.PutChunk(block=0, offset=0, data=bytes(10)))
    assert not arrived.accept(pb.PutChunk(block=1, offset=0, data=bytes(4)))
    with pytest.raises(e.InvalidArgument) as caught:
        arrived.accept(chunk)
    assert caught.value.field == field
    assert arrived.accept(pb.PutChunk(block=1, offset=4, data=bytes(6)))  # nothing had changed


def test_no_chunk_follows_the_last_block() -> None:
    arrived = Assembly(1, 1)
    assert arrived.accept(pb.PutChunk(block=0, offset=0, data=b"x"))
    with pytest.raises(e.InvalidArgument, match="no more"):
        arrived.accept(pb.PutChunk(block=1, offset=0, data=b"x"))
