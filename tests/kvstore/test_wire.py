"""Records of the same-host channel: what goes in comes out, and garbage is a typed error."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from kvstore import commands as c
from kvstore import errors, limits
from kvstore.channel import wire
from kvstore.store import failed


def example(kind: type, rng: np.random.Generator) -> object:
    """A record with something in each of its fields."""
    values: dict[str, object] = {}
    for field in dataclasses.fields(kind):
        name, of = field.name, str(field.type).removeprefix("commands.")
        if of == "int":
            values[name] = int(rng.integers(-(1 << 62), 1 << 62))
        elif of == "str":
            values[name] = "Grüße"
        elif of == "bytes":
            values[name] = rng.bytes(5)
        else:
            dtype = {"U8": np.uint8, "U32": np.uint32, "U64": np.uint64}[of]
            shape = (3, 4) if name in ("hashes", "checksums", "put_ids") else (12,)
            values[name] = rng.integers(0, 200, shape).astype(dtype)
    return kind(**values)


def parts(frame: bytes) -> tuple[bytes, bytes]:
    return frame[: wire.FRAME.size], frame[wire.FRAME.size :]


@pytest.mark.parametrize("kind", wire._TYPES.values(), ids=lambda kind: kind.__name__)
def test_every_record_comes_back_as_it_went(kind: type) -> None:
    record = example(kind, np.random.default_rng(1))
    back = wire.decode(*parts(wire.encode(record)))
    for field in dataclasses.fields(kind):
        np.testing.assert_array_equal(getattr(back, field.name), getattr(record, field.name))


@pytest.mark.parametrize("kind", wire._TYPES.values(), ids=lambda kind: kind.__name__)
def test_a_cut_or_lengthened_record_is_refused(kind: type) -> None:
    head, body = parts(wire.encode(example(kind, np.random.default_rng(2))))
    for other in [body[:-1], body + b"x"] if body else [b"x"]:
        with pytest.raises(errors.ProtocolError):
            wire.decode(head, other)


@pytest.mark.parametrize("shape", [(12,), (1, 1)])
def test_an_array_of_other_dimensions_is_refused(shape: tuple[int, ...]) -> None:
    """The store measures and indexes what comes in, and would stumble over it."""
    right = c.Touch(
        granules=np.zeros(12, np.uint32),
        generations=np.zeros(12, np.uint64),
        lookups=12,
        hits=12,
        cold_hits=0,
    )
    wrong = {"granules": np.zeros((1, 1), np.uint32), "generations": np.zeros((2, 6), np.uint64)}
    for field, array in wrong.items():
        with pytest.raises(errors.ProtocolError, match="dimensions"):
            wire.decode(*parts(wire.encode(dataclasses.replace(right, **{field: array}))))
    lease = c.Lease(namespace=1, hashes=np.zeros(shape[:1], np.uint8))
    with pytest.raises(errors.ProtocolError, match="dimensions"):
        wire.decode(*parts(wire.encode(lease)))


@pytest.mark.parametrize(
    ("record", "field"),
    [
        (c.Release(lease=1 << 63), "lease"),
        (c.OpenNamespace(name="\ud800", layout=b""), "name"),
    ],
)
def test_what_has_no_place_in_a_frame_is_named(record: object, field: str) -> None:
    with pytest.raises(errors.InvalidArgument, match=field):
        wire.encode(record)


def test_random_changes_are_refused_or_decoded_but_never_crash() -> None:
    rng = np.random.default_rng(3)
    kinds = list(wire._TYPES.values())
    for _ in range(4_000):
        frame = bytearray(wire.encode(example(kinds[rng.integers(len(kinds))], rng)))
        for at in rng.integers(0, len(frame), 3):
            frame[at] = rng.integers(0, 256)
        head, body = parts(bytes(frame))
        try:
            wire.decode(head, body)
        except errors.ProtocolError:
            continue


@pytest.mark.parametrize(
    "head",
    [
        wire.FRAME.pack(0, 9999, wire.WIRE_VERSION),
        wire.FRAME.pack(0, 1, wire.WIRE_VERSION + 1),
        wire.FRAME.pack(limits.MAX_FRAME_BYTES + 1, 1, wire.WIRE_VERSION),
    ],
)
def test_an_unknown_type_version_or_length_is_refused(head: bytes) -> None:
    with pytest.raises(errors.ProtocolError):
        wire.body_length(head)


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidArgument("field", "text"),
        errors.LayoutMismatch("field", "text"),
        errors.ResourceExhausted("text", retry_after_ms=7),
        errors.StaleNamespace("text"),
        errors.PermissionDenied("text"),
        errors.DeadlineExceeded("text"),
        errors.Unavailable("text"),
        errors.ProtocolError("text"),
        errors.Corrupted("text"),
        errors.KVStoreError("text"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_error_comes_back_as_itself(error: errors.KVStoreError) -> None:
    record = wire.decode(*parts(wire.encode(failed(error))))
    assert isinstance(record, c.Failed)
    with pytest.raises(type(error)) as caught:
        wire.raise_if_failed(record)
    assert type(caught.value) is type(error)
    assert str(caught.value) == str(error)
    assert vars(caught.value) == vars(error)


def test_the_numbers_of_the_records_never_change() -> None:
    named = {number: kind.__name__ for number, kind in wire._TYPES.items()}
    assert list(named) == list(range(1, len(named) + 1))
    assert [named[i] for i in (1, 3, 5, 8, 18, 19, 20, 26)] == [
        "OpenNamespace",
        "Reserve",
        "Seal",
        "Lease",
        "Failed",
        "Welcome",
        "Hint",
        "SealStaged",
    ]
