"""The cluster demo's verdict and its ways to fail; the whole of it is a long test."""

import io
from pathlib import Path

import pytest
from engines.test_demo import DIFFERENT, GOOD, UNMATCHED
from rich.console import Console
from typer.testing import CliRunner

from kvstore_engines import cluster_demo, etcd
from kvstore_engines.cluster_demo import KILL_BEFORE, Outcome, print_outcome
from kvstore_engines.demo import ServerError, Steps
from kvstore_engines.demo_report import Row
from kvstore_engines.etcd import EtcdServer, EtcdUnavailableError, find_etcd

pytestmark = pytest.mark.engines


def outcome(rows: list[Row]) -> Outcome:
    return Outcome(rows=rows, killed="b", sent_blocks=14)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([UNMATCHED, GOOD, GOOD, UNMATCHED], 0),
        ([GOOD, GOOD, UNMATCHED, UNMATCHED], 1),  # nothing came from those that were left
        ([UNMATCHED, UNMATCHED, UNMATCHED, UNMATCHED], 1),
        ([GOOD, GOOD, DIFFERENT, GOOD], 1),
    ],
)
def test_exits_non_zero_when_tokens_differ_or_nothing_matched_after_the_kill(
    rows: list[Row], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_demo, "measure", lambda steps: outcome(rows))
    assert CliRunner().invoke(cluster_demo.app).exit_code == expected


def test_the_kill_is_told_of() -> None:
    console = Console(width=200, file=io.StringIO(), record=True)
    assert print_outcome(console, outcome([GOOD, GOOD, UNMATCHED, GOOD]))
    text = " ".join(console.export_text().split())
    assert (
        f"kvstore-server b, which had sent 14 blocks, was killed before question {KILL_BEFORE + 1};"
        in text
    )
    assert "from then on 32 of 80 prompt tokens came from the other two." in text


@pytest.mark.parametrize(
    "error", [EtcdUnavailableError("install [it]"), ServerError("no [socket] here")]
)
def test_what_keeps_it_from_running_is_said_in_a_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(steps: Steps) -> Outcome:
        raise error

    monkeypatch.setattr(cluster_demo, "measure", fail)
    result = CliRunner().invoke(cluster_demo.app)
    assert result.exit_code == 1
    assert f"The demo cannot run. {error}" in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_servers_that_cannot_start_are_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_demo, "NAMES", ("a", "no name"))
    with (
        pytest.raises(ServerError, match=r"kvstore-server no name did not start:\n.*no name"),
        cluster_demo.running_cluster(tmp_path, "http://127.0.0.1:1"),
    ):
        pass


def test_without_a_network_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(command: list[str], folder: Path) -> None:
        raise EtcdUnavailableError("no route")

    monkeypatch.setattr(etcd, "_run", fail)
    monkeypatch.setattr(etcd.shutil, "which", lambda name: None)
    told: list[str] = []
    with pytest.raises(EtcdUnavailableError, match=r"install etcd-server \(no route\)"):
        find_etcd(tmp_path / "etcd", told.append)
    assert told == ["fetching the distribution's package etcd-server, 20 MB"]
    assert [each.name for each in (tmp_path / "etcd").iterdir()] == ["lock"]


def test_an_etcd_that_does_not_start_is_told_of(tmp_path: Path) -> None:
    program = tmp_path / "etcd"
    program.write_text("#!/bin/sh\necho no etcd at all >&2\n")
    program.chmod(0o755)
    with pytest.raises(EtcdUnavailableError, match="no etcd at all"):
        EtcdServer(program, tmp_path / "data").start()


@pytest.mark.long
def test_the_whole_of_it() -> None:
    result = CliRunner().invoke(cluster_demo.app)
    assert result.exit_code == 0, result.output
    assert "4 of 4 answers are equal" in result.output
