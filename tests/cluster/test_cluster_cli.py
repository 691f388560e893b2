"""`kvstore cluster` against real nodes, and what it says of nodes that are hard to have."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from cluster.etcd_rig import Etcd
from cluster.nodes import LAYOUT, Nodes, blocks, chain, eventually, nodes

from kvstore.cluster import messages as m
from kvstore.cluster.members import Member, MemberState, View, encode_view
from kvstore.errors import DeadlineExceeded, InvalidArgument, Unavailable
from kvstore_client.cli import cluster
from kvstore_client.cli.app import run
from kvstore_proto.cluster.rpc import client_token

LONG_S = 20.0


@dataclass(frozen=True)
class Answer:
    """How one command line ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which is one document, and standard error, which is empty."""
        assert self.err == ""
        return json.loads(self.out)


Cli = Callable[..., Answer]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, shared_etcd: Etcd) -> Iterator[Nodes]:
    """Three nodes that etcd knows."""
    folder = tmp_path_factory.mktemp("nodes")
    flags = ("--transfer", "grpc", "--cluster", "cli")
    with nodes(folder, 3, *flags, etcd=shared_etcd.endpoint) as found:
        yield found


@pytest.fixture
def cli(three: Nodes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs `kvstore cluster` against them."""
    monkeypatch.setenv("KVSTORE_TARGET", f"cluster://{','.join(three.seeds)}")
    monkeypatch.setenv("KVSTORE_CLUSTER_TOKEN", client_token(three.secret))

    def call(*arguments: str) -> Answer:
        return Answer(run(["cluster", *arguments]), *capsys.readouterr())

    return call


def until_all_up(cli: Cli) -> None:
    """Until all three members take blocks and answer for them."""

    def all_up() -> bool:
        found = cli("status", "--json").json["members"]
        return [each["state"] for each in found if each["serving"]] == ["up"] * 3

    eventually(all_up, LONG_S, "three members up")


def test_status_shows_each_member(three: Nodes, cli: Cli) -> None:
    until_all_up(cli)
    with three.client(transfer="grpc") as session:
        namespace = session.open_namespace("cli", LAYOUT)
        put = session.put(namespace, chain(8, 5), list(blocks(8, 5)), position=0)
        assert put.replicated == 8

    found = cli("status", "--json")
    assert found.code == 0
    assert found.json["replicas"] == 2
    members = found.json["members"]
    assert [each["name"] for each in members] == three.names
    assert [each["address"] for each in members] == three.seeds
    assert sum(each["blocks"] for each in members) == 16
    for each in members:
        assert (each["answers"], each["suspected_by"], each["weight"]) == (True, [], 1)
        assert 0 <= each["used_bytes"] <= each["total_bytes"] == 64 << 20
        assert each["epoch"] == found.json["epoch"]
        assert {"repair_left_blocks", "failed_transfers", "sent_blocks"} <= each["counters"].keys()

    text = cli("status")
    lines = text.out.splitlines()
    assert (text.code, text.err) == (0, "")
    assert lines[0] == f"epoch {found.json['epoch']}, 2 copies, 3 members"
    assert lines[1].split("  ")[0] == "name"
    assert [line.split()[:3:2] for line in lines[2:]] == [[name, "up"] for name in three.names]


def test_a_member_that_is_drained_is_out_and_its_blocks_are_elsewhere(
    three: Nodes, cli: Cli
) -> None:
    until_all_up(cli)
    with three.client(transfer="grpc") as session:
        namespace = session.open_namespace("drain", LAYOUT)
        keys, data = chain(64, 6), blocks(64, 6)
        session.put(namespace, keys, list(data), position=0)
        before = cli("status", "--json").json["epoch"]

        drained = cli("drain", "b", "--timeout", str(LONG_S), "--json")
        assert (drained.code, drained.json["name"], drained.json["state"]) == (0, "b", "out")
        assert drained.json["epoch"] > before
        assert cli("drain", "b").out.startswith("b is out, epoch")  # nothing is left to do
        three.daemons["b"].kill()
        out = np.zeros_like(data)
        session.get_into(namespace, keys, list(out))
        np.testing.assert_array_equal(out, data)

        silent = cli("status")
        if "NO ANSWER" in silent.out:  # until its lease is over
            assert silent.code == 1
        eventually(lambda: "2 members" in cli("status").out, LONG_S, "b has gone")
        assert cli("status").code == 0
        three.start(["b"])
        until_all_up(cli)


def test_a_member_joins_again(cli: Cli) -> None:
    until_all_up(cli)
    begun = cli("drain", "c", "--no-wait", "--json").json
    assert begun["state"] in ("draining", "out")
    joined = cli("join", "c")
    assert (joined.code, joined.out[:5]) == (0, "c is ")
    until_all_up(cli)


def test_what_cannot_be_done_is_said_on_one_line(
    three: Nodes, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = cli("drain", "z")
    assert (answer.code, answer.out) == (2, "")
    assert "name: 'z' is no member; members are a, b, c" in answer.err
    assert cli("drain", "a", "--timeout", "0").code == 2
    monkeypatch.setenv("KVSTORE_CLUSTER_TOKEN", "wrong")
    answer = cli("status")
    assert (answer.code, answer.out) == (5, "")
    assert "let $KVSTORE_CLUSTER_TOKEN_FILE name a file" in answer.err
    monkeypatch.setenv("KVSTORE_TARGET", "unix:///k.sock")
    assert "is no cluster" in cli("status").err
    monkeypatch.setenv("KVSTORE_TARGET", "cluster://127.0.0.1:1")
    assert cli("status").code == 3


# -- what is hard to have -------------------------------------------------------------


class Told:
    """A cluster whose members say what a test wants, one answer a question."""

    def __init__(self, *answers: Mapping[str, m.Status | None]) -> None:
        self.answers = list(answers)
        self.changes: list[m.Drain | m.Join] = []

    def status(self, *, timeout_s: float | None = None) -> Mapping[str, m.Status | None]:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    def change(self, message: m.Drain | m.Join, *, timeout_s: float | None = None) -> None:
        self.changes.append(message)


def view(epoch: int, **states: str) -> View:
    members = [
        Member(name=name, address=f"{name}:1", state=MemberState(state))
        for name, state in states.items()
    ]
    return View(epoch=epoch, replicas=1, members=tuple(members))


def status(name: str, of: View, *, suspects: str = "", left: int = 0) -> m.Status:
    pong = m.Pong(
        name=name,
        run=1,
        epoch=of.epoch,
        serving=0,
        settled=-1,
        used_bytes=1,
        total_bytes=2,
        blocks=3,
    )
    return m.Status(
        pong=m.CODEC.encode(pong),
        view=encode_view(of),
        suspects=suspects,
        names="repair_left_blocks\nfailed_transfers",
        values=np.array([left, 7], np.uint64),
    )


def words(text: str) -> list[str]:
    return text.split()


def test_the_latest_view_counts_and_who_is_silent_is_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    old, new = view(3, a="up", b="up", z="up"), view(4, a="up", b="up", c="joining")
    told = {"a": status("a", old), "b": status("b", new, suspects="c", left=1234), "z": None}
    found = cluster.report(Told(told), 1.0)
    assert (found.view, found.all_answer) == (new, False)
    found.show()
    first, _head, a, b, c = capsys.readouterr().out.splitlines()
    assert first == "epoch 4, 1 copy, 3 members"
    assert words(a) == words("a a:1 up not yet - 3 1 bytes 2 bytes 3 - 0 7")
    assert words(b) == words("b b:1 up not yet - 3 1 bytes 2 bytes 4 - 1,234 7")
    assert words(c) == words("c c:1 joining NO ANSWER b - - - - - - -")
    row = found.as_json()["members"][2]
    assert (row["answers"], row["serving"], row["blocks"]) == (False, None, None)
    assert row["suspected_by"] == ["b"]
    with pytest.raises(Unavailable, match="no node"):
        cluster.report(Told({"a": None}), 1.0)


@pytest.mark.parametrize(
    ("states", "error"),
    [
        ([{"a": "draining"}, {"a": "out"}], None),
        ([{"a": "draining"}], DeadlineExceeded("a is still draining")),
        ([{"a": "draining"}, {"a": "joining"}], InvalidArgument("name", "a is joining again")),
        ([{"a": "draining"}, {"b": "up"}], Unavailable("a left the cluster before")),
    ],
)
def test_a_drain_is_waited_for(states: list[dict[str, str]], error: Exception | None) -> None:
    views = [view(number, **{"b": "up", **each}) for number, each in enumerate(states)]
    told = Told(*({"b": status("b", each)} for each in views))
    if error is None:
        found = cluster.wait_until_out(told, "a", wait_s=LONG_S, call_s=1.0)
        assert found.state_of("a") == MemberState.OUT
        return
    with pytest.raises(type(error), match=str(error)):
        cluster.wait_until_out(told, "a", wait_s=0.7, call_s=1.0)
