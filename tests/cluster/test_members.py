"""Who is a member: what is refused, and that nothing changes on its way through text and bytes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore import limits
from kvstore.cluster.members import (
    Member,
    MemberState,
    View,
    decode_member,
    decode_view,
    encode_member,
    encode_view,
    parse_members,
)
from kvstore.errors import InvalidArgument, ProtocolError

A = Member(name="a", address="10.0.0.1:7000", run=1)
B = Member(name="b", address="10.0.0.2:7000", weight=3)

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", fullmatch=True)
hosts = st.sampled_from(["localhost", "10.0.0.1", "[::1]", "node-1.example.org"])
addresses = st.builds(lambda host, port: f"{host}:{port}", hosts, st.integers(1, 65_535))
weights = st.integers(1, limits.MAX_MEMBER_WEIGHT)
members = st.builds(
    Member,
    name=names,
    address=addresses,
    weight=weights,
    run=st.integers(0, (1 << 63) - 1),
    state=st.sampled_from(MemberState),
)
several = st.lists(members, max_size=8, unique_by=(lambda m: m.name, lambda m: m.address))
views = st.builds(
    View,
    epoch=st.integers(0, 1 << 62),
    replicas=st.integers(1, limits.MAX_REPLICAS),
    members=several.map(tuple),
)


# -- a member -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "-a", ".a", "a b", "a/b", "a=b", "a\n", "ä", "a" * 64])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^name: "):
        Member(name=name, address="h:1")


@pytest.mark.parametrize(
    "address", ["", "h", ":1", "h:", "h:0", "h:65536", "h:-1", "h:1.5", "h:http", "h:1 "]
)
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^address: .* is not HOST:PORT$"):
        Member(name="a", address=address)


@pytest.mark.parametrize("weight", [-1, 0, limits.MAX_MEMBER_WEIGHT + 1])
def test_weights_that_are_none(weight: int) -> None:
    with pytest.raises(InvalidArgument, match=r"^weight: "):
        Member(name="a", address="h:1", weight=weight)


# -- a view ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (Member(name="a", address="10.0.0.9:7000"), "two members have the name a"),
        (Member(name="b", address=A.address), r"two members have the address 10\.0\.0\.1:7000"),
    ],
)
def test_no_two_members_are_mistaken_for_each_other(second: Member, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        View(epoch=1, replicas=1, members=(A, second))


@pytest.mark.parametrize(("epoch", "replicas"), [(-1, 1), (1, 0), (1, limits.MAX_REPLICAS + 1)])
def test_views_that_are_none(epoch: int, replicas: int) -> None:
    with pytest.raises(InvalidArgument):
        View(epoch=epoch, replicas=replicas, members=())


def test_a_view_has_a_limit() -> None:
    at_limit = [Member(name=f"n{i}", address=f"h{i}:1") for i in range(limits.MAX_MEMBERS)]
    view = View(epoch=1, replicas=1, members=tuple(at_limit))
    with pytest.raises(InvalidArgument, match=f"at most {limits.MAX_MEMBERS}"):
        view.with_members([A])


@given(views)
@settings(derandomize=True)
def test_members_are_in_order_of_their_names_and_found_by_them(view: View) -> None:
    assert [m.name for m in view.members] == sorted(m.name for m in view.members)
    assert all(view.find(m.name) is m for m in view.members)
    assert view.find("nobody of that name") is None


@given(views, members)
@settings(derandomize=True)
def test_the_next_view_differs_only_in_who_is_named(view: View, other: Member) -> None:
    for member in view.members:
        less = view.without(member.name)
        assert less.epoch == view.epoch + 1
        assert set(less.members) == set(view.members) - {member}
        assert less.with_members([member]).members == view.members
    if all(member.address != other.address for member in view.members):
        more = view.with_members([other])
        assert (more.epoch, more.replicas) == (view.epoch + 1, view.replicas)
        assert more.find(other.name) == other
        assert more.without(other.name).members == view.without(other.name).members


@pytest.mark.parametrize(
    ("state", "settled"),
    [
        (MemberState.UP, True),
        (MemberState.OUT, True),
        (MemberState.JOINING, False),
        (MemberState.DRAINING, False),
    ],
)
def test_a_view_is_settled_when_nobody_joins_or_drains(state: MemberState, settled: bool) -> None:
    view = View(epoch=1, replicas=1, members=(B, Member(name="a", address="h:1", state=state)))
    assert view.settled == settled


# -- as bytes -------------------------------------------------------------------------------------


@given(views)
@settings(derandomize=True)
def test_a_view_is_the_same_after_its_way_through_bytes(view: View) -> None:
    assert decode_view(encode_view(view)) == view


@given(members)
@settings(derandomize=True)
def test_a_member_is_the_same_after_its_way_through_bytes(member: Member) -> None:
    assert decode_member(encode_member(member)) == member


@given(st.lists(members, min_size=2, max_size=5, unique_by=(lambda m: m.name, lambda m: m.address)))
@settings(derandomize=True)
def test_the_same_view_is_always_the_same_bytes(some: list[Member]) -> None:
    there, back = (View(epoch=1, replicas=1, members=tuple(m)) for m in (some, some[::-1]))
    assert encode_view(there) == encode_view(back)


def test_the_form_is_the_one_that_other_releases_read() -> None:
    view = View(epoch=7, replicas=2, members=(A, B))
    assert encode_view(view) == (
        b'{"epoch":7,"members":['
        b'{"address":"10.0.0.1:7000","joined":0,"name":"a","run":1,"state":"up","weight":1},'
        b'{"address":"10.0.0.2:7000","joined":0,"name":"b","run":0,"state":"up","weight":3}'
        b'],"replicas":2,"version":1}'
    )
    assert encode_member(A) == (
        b'{"address":"10.0.0.1:7000","name":"a","run":1,"state":"up","version":1,"weight":1}'
    )


DECODERS: list[tuple[Callable[[bytes], object], bytes]] = [
    (decode_view, encode_view(View(epoch=1, replicas=1, members=(A,)))),
    (decode_member, encode_member(A)),
]


@pytest.mark.parametrize(("decode", "good"), DECODERS)
def test_another_version_is_named(decode: Callable[[bytes], object], good: bytes) -> None:
    newer = json.dumps({**json.loads(good), "version": 2}).encode()
    with pytest.raises(ProtocolError, match="of version 2; this release knows 1"):
        decode(newer)


@pytest.mark.parametrize(("decode", "good"), DECODERS)
def test_what_is_cut_or_lacks_a_field_is_refused(
    decode: Callable[[bytes], object], good: bytes
) -> None:
    for n in range(len(good)):
        with pytest.raises(ProtocolError):
            decode(good[:n])
    fields = json.loads(good)
    for name in fields:
        less = {key: value for key, value in fields.items() if key != name}
        with pytest.raises(ProtocolError):
            decode(json.dumps(less).encode())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@given(st.data())
@settings(derandomize=True, max_examples=200)
def test_any_other_bytes_are_refused_or_mean_a_value(data: st.DataObject) -> None:
    decode, good = data.draw(st.sampled_from(DECODERS))
    fields: dict[str, Any] = json.loads(good)
    fields[data.draw(st.sampled_from(sorted(fields)))] = data.draw(json_values)
    noise = data.draw(st.binary(max_size=64) | st.just(json.dumps(fields).encode()))
    with contextlib.suppress(ProtocolError):
        decode(noise)


# -- as text --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ()),
        (" , ", ()),
        ("a=10.0.0.1:7000", (Member(name="a", address="10.0.0.1:7000"),)),
        (" b = h:2 * 3,a=h:1, ", None),
        ("b=h:2*3,\n a=h:1", "sorted"),
        ("a=[::1]:7000*1024", (Member(name="a", address="[::1]:7000", weight=1024),)),
    ],
)
def test_members_as_a_user_writes_them(text: str, expected: object) -> None:
    if expected is None:  # a weight has no spaces in front
        with pytest.raises(InvalidArgument):
            parse_members(text)
        return
    if expected == "sorted":
        expected = (Member(name="a", address="h:1"), Member(name="b", address="h:2", weight=3))
    assert parse_members(text) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a", "members: 'a' is not NAME=HOST:PORT"),
        ("a:1", "members: 'a:1' is not NAME=HOST:PORT"),
        ("=h:1", "name: '': "),
        ("a=h", "address: 'h' of a is not HOST:PORT"),
        ("a=h:99999", "address: 'h:99999' of a is not HOST:PORT"),
        ("a=h:1*", "'a=h:1*': the weight is no whole number"),
        ("a=h:1*-2", "'a=h:1*-2': the weight is no whole number"),
        ("a=h:1*1.5", "'a=h:1*1.5': the weight is no whole number"),
        ("a=h:1*0", "weight: 0 of a"),
        ("a=h:1*1025", "weight: 1025 of a"),
        ("a=h:1,a=h:2", "two members have the name a"),
        ("a=h:1,b=h:1", "two members have the address h:1"),
    ],
)
def test_what_is_wrong_in_a_list_is_said(text: str, words: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_members(text)
    assert words in str(caught.value)


@given(several)
@settings(derandomize=True)
def test_members_are_the_same_after_their_way_through_text(some: list[Member]) -> None:
    text = ", ".join(f"{m.name}={m.address}*{m.weight}" for m in some)
    expected = [Member(name=m.name, address=m.address, weight=m.weight) for m in some]
    assert parse_members(text) == tuple(sorted(expected))
