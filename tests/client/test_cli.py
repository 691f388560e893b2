"""The `kvstore` command: what each subcommand answers, and how it ends."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from client.scripted import LAYOUT, OTHER_LAYOUT, ScriptedStore, stats

from daemon import daemon
from kvstore import HashScheme, hash_chain, limits
from kvstore.commands import ExplainStatus
from kvstore.errors import (
    Corrupted,
    DeadlineExceeded,
    InvalidArgument,
    KVStoreError,
    ResourceExhausted,
    Unavailable,
)
from kvstore.session.base import BlockReport, Tier
from kvstore_client import KVStoreClient
from kvstore_client.cli import output, target
from kvstore_client.cli.app import run

HASHES = np.random.default_rng(7).integers(0, 256, (6, 32), np.uint8)
END_S = 30.0
TOKENS = list(range(100, 100 + 3 * LAYOUT.block_tokens + 5))


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


@pytest.fixture
def store() -> ScriptedStore:
    """A store with four of six blocks of a chain, all but the fourth and the last."""
    made = ScriptedStore()
    namespace = made.open_namespace("chat", LAYOUT)
    made.hold(namespace, HASHES[[0, 1, 2, 4]])
    return made


@pytest.fixture
def cli(store: ScriptedStore, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs a command line against `store`."""

    def call(*arguments: str, error: BaseException | None = None) -> Answer:
        @contextlib.contextmanager
        def connect(target: str, timeout_s: float) -> Iterator[ScriptedStore]:
            if error:
                raise error
            yield store

        code = run(arguments, connect)
        return Answer(code, *capsys.readouterr())

    return call


@pytest.fixture
def feed(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Makes bytes what standard input holds; it is no terminal."""

    def replace(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    return replace


def hex_options(hashes: np.ndarray) -> list[str]:
    """`--hash` and its value for each of them."""
    return [word for row in hashes for word in ("--hash", row.tobytes().hex())]


# -- the command itself ---------------------------------------------------------------


def test_help_names_all_commands_and_the_exit_codes(cli: Cli) -> None:
    for arguments in ([], ["--help"]):
        answer = cli(*arguments)
        assert answer.code == 0
        for name in ("ping", "info", "stat", "match", "explain", "drop", "doctor", "bench"):
            assert re.search(rf"^  {name} ", answer.out, re.MULTILINE)
        # What a command does is said in full.
        assert not re.search(r"^  .*\.\.\.$", answer.out, re.MULTILINE)
        words = " ".join(answer.out.split())
        assert "3 store unavailable, 4 deadline exceeded, 5 another error" in words


def test_version(cli: Cli) -> None:
    from kvstore import __version__

    assert cli("--version") == Answer(0, f"kvstore {__version__}\n", "")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidArgument("target", "is none"), 2),
        (Unavailable("nobody there"), 3),
        (DeadlineExceeded("too slow"), 4),
        (ResourceExhausted("full", retry_after_ms=50), 5),
        (Corrupted("bad bytes"), 5),
    ],
)
def test_each_error_has_its_exit_code_and_one_line(
    cli: Cli, error: KVStoreError, code: int
) -> None:
    assert cli("ping", error=error) == Answer(code, "", f"kvstore: {error}\n")


def test_errors_in_json(cli: Cli) -> None:
    answer = cli("ping", "--json", error=InvalidArgument("target", "is none"))
    assert (answer.code, answer.out) == (2, "")
    assert json.loads(answer.err) == {
        "error": {"code": "invalid_argument", "field": "target", "message": "is none"}
    }
    answer = cli("ping", "--json", error=DeadlineExceeded("too slow"))
    assert json.loads(answer.err) == {
        "error": {"code": "deadline_exceeded", "field": None, "message": "too slow"}
    }


def test_errors_cannot_move_the_cursor(cli: Cli) -> None:
    answer = cli("ping", error=Unavailable("a\x1b[2Jb\nc"))
    assert answer.err == "kvstore: a\\x1b[2Jb\\nc\n"


@pytest.mark.parametrize("arguments", [["ping", "--frob"], ["frob"], ["match"], ["ping", "extra"]])
def test_wrong_usage_is_one_line_and_exit_code_2(cli: Cli, arguments: list[str]) -> None:
    answer = cli(*arguments)
    assert (answer.code, answer.out) == (2, "")
    assert re.fullmatch(r"kvstore: .+\n", answer.err)
    answer = cli(*arguments, "--json")
    assert json.loads(answer.err)["error"]["code"] == "usage"


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "3601"])
def test_a_deadline_that_is_none_is_refused_by_the_flag_s_name(cli: Cli, seconds: str) -> None:
    for command in ("ping", "info", "stat", "doctor", "bench"):
        answer = cli(command, "--timeout", seconds, "--json")
        assert (answer.code, answer.out) == (2, "")
        assert json.loads(answer.err)["error"] == {
            "code": "invalid_argument",
            "field": "timeout",
            "message": "must be over 0 and at most 3600 seconds",
        }


def test_interrupt_has_an_exit_code_of_its_own(cli: Cli) -> None:
    assert cli("ping", error=KeyboardInterrupt()).code == 130


def test_target_is_the_option_else_the_variable_else_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KVSTORE_TARGET", "unix:///from/variable")
    assert target.target_of("unix:///from/option") == "unix:///from/option"
    assert target.target_of(None) == "unix:///from/variable"
    monkeypatch.delenv("KVSTORE_TARGET")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert target.target_of(None) == "unix:///run/user/7/kvstore.sock"


def test_token_is_read_for_tcp_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "grpc.token"
    file.write_text("correct-horse\n")
    monkeypatch.setenv("KVSTORE_TOKEN_FILE", str(file))
    assert target.read_token("grpc://127.0.0.1:50051") == "correct-horse"
    assert target.read_token("unix:///x.sock") is None
    file.unlink()
    with pytest.raises(InvalidArgument, match="KVSTORE_TOKEN_FILE"):
        target.read_token("grpc://127.0.0.1:50051")


def test_a_missing_token_is_told_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("KVSTORE_TOKEN_FILE", raising=False)
    with daemon(tmp_path, "--dram", "8MiB", "--grpc-port", "0", grpc=True) as running:
        (port,) = re.findall(r"127\.0\.0\.1:(\d+)", " ".join(running.banner))
        url = f"grpc://127.0.0.1:{port}"
        assert run(["ping", "--target", url]) == 5
        assert "let $KVSTORE_TOKEN_FILE name the grpc.token" in capsys.readouterr().err
        assert run(["doctor", "--target", url, "--json"]) == 1
        first = json.loads(capsys.readouterr().out)["checks"][0]
        assert (first["name"], first["level"]) == ("daemon", "fail")
        assert "grpc.token" in first["fix"]
        monkeypatch.setenv("KVSTORE_TOKEN_FILE", str(running.data_dir / "grpc.token"))
        assert run(["ping", "--target", url]) == 0


# -- ping, info, stat -----------------------------------------------------------------


def test_ping(cli: Cli) -> None:
    found = cli("ping", "--count", "4", "--target", "unix:///x.sock", "--json").json
    assert found["target"] == "unix:///x.sock"
    assert found["count"] == len(found["round_trips_ms"]) == 4
    assert 0 < found["min_ms"] <= found["median_ms"] <= found["max_ms"]
    assert re.search(r"4 round trips, min [\d.]+ ms, median", cli("ping", "--count", "4").out)


def test_info(cli: Cli, store: ScriptedStore) -> None:
    store.open_namespace("evil\x1b[2J", OTHER_LAYOUT)
    answer = cli("info")
    assert answer.code == 0
    assert "\x1b" not in answer.out
    rows = answer.out.splitlines()
    assert rows[-3].split() == ["id", "name", "blocks", "generation", "layout"]
    short = "demo: gqa 2x3x16 float32, 16 tokens, 12 KiB, 3 cells"
    assert re.fullmatch(rf" *1  chat +4 +0  {short}", rows[-2])
    assert "evil\\x1b[2J" in rows[-1]
    assert "memory          0 bytes of 32 MiB used" in rows
    assert "blocks          4 of at most 64" in rows


def test_info_in_json(cli: Cli) -> None:
    found = cli("info", "--json").json
    assert (found["version"], found["policy"], found["max_blocks"]) == ("9.9", "lru", 64)
    assert (found["used_bytes"], found["total_bytes"], found["blocks"]) == (0, 32 << 20, 4)
    assert found["instance"] == "1"  # as text: it has more bits than a float
    (namespace,) = found["namespaces"]
    assert (namespace["name"], namespace["blocks"]) == ("chat", 4)
    assert namespace["block_bytes"] == LAYOUT.block_bytes
    assert namespace["fingerprint"] == LAYOUT.fingerprint().hex()


def test_stat_counts_each_interval(cli: Cli, store: ScriptedStore) -> None:
    store.script = [
        stats(lookups=100, hits=80, stored=10, blocks=10, connections=1),
        stats(lookups=110, hits=85, stored=13, evicted=2, blocks=11, connections=1),
        stats(lookups=110, hits=85, stored=13, evicted=2, blocks=11, connections=1),
        stats(lookups=4, hits=1, stored=2, blocks=2, connections=1),  # a restart
    ]
    answer = cli("stat", "--count", "4", "--interval", "0.001", "--json")
    lines = [json.loads(line) for line in answer.out.splitlines()]
    assert answer.code == 0
    assert [line["hit_rate"] for line in lines] == [0.8, 0.5, None, 0.25]
    assert [line["puts"] for line in lines] == [10, 3, 0, 2]
    assert [line["evicted"] for line in lines] == [0, 2, 0, 0]
    assert [line["interval_s"] is None for line in lines] == [True, False, False, True]
    assert lines[1]["since_start"]["lookups"] == 110


def test_stat_in_text(cli: Cli, store: ScriptedStore) -> None:
    store.script = [stats(lookups=3, hits=2, used_bytes=3 << 20, total_bytes=32 << 20), stats()]
    first, second, third = cli("stat", "--count", "2", "--interval", "0.001").out.splitlines()
    assert first.split()[:4] == ["blocks", "used", "total", "hit%"]
    assert second.split()[:6] == ["0", "3", "MiB", "32", "MiB", "66.7"]
    assert "-" in third.split()


def test_stat_ends_well_on_ctrl_c(cli: Cli, store: ScriptedStore) -> None:
    store.script = [stats(), stats(), KeyboardInterrupt()]
    answer = cli("stat", "--interval", "0.001", "--json")
    assert (answer.code, len(answer.out.splitlines())) == (0, 2)


def test_stat_says_when_the_store_goes_away(cli: Cli, store: ScriptedStore) -> None:
    store.script = [stats(), Unavailable("gone")]
    answer = cli("stat", "--interval", "0.001")
    assert (answer.code, answer.err) == (3, "kvstore: gone\n")


@pytest.mark.parametrize("interval", ["0", "-1", "nan", "inf"])
def test_stat_refuses_an_interval_that_is_none(cli: Cli, interval: str) -> None:
    answer = cli("stat", "--interval", interval)
    assert (answer.code, answer.out) == (2, "")
    assert "interval" in answer.err


# -- match: how blocks are named ------------------------------------------------------


def test_match_says_how_many_leading_blocks_there_are(cli: Cli) -> None:
    assert cli("match", "--namespace", "chat", *hex_options(HASHES), "--json").json == {
        "namespace": "chat",
        "namespace_id": 1,
        "blocks": 6,
        "matched_blocks": 3,
        "matched_tokens": 48,
        "tiers": {"dram": 3},
    }
    answer = cli("match", "--namespace", "chat", *hex_options(HASHES))
    assert answer == Answer(0, "3 of 6 blocks (48 tokens), 3 in dram\n", "")


def test_match_of_nothing_is_exit_code_1(cli: Cli) -> None:
    answer = cli("match", "--namespace", "chat", *hex_options(HASHES[3:]))
    assert answer == Answer(1, "0 of 3 blocks (0 tokens)\n", "")


@pytest.mark.parametrize(
    "content",
    [
        HASHES.tobytes(),
        "\n".join(row.tobytes().hex() for row in HASHES).encode(),
        " ".join(row.tobytes().hex().upper() for row in HASHES).encode() + b"\r\n",
    ],
    ids=["raw", "lines", "blanks"],
)
def test_hashes_from_a_file_or_from_standard_input(
    cli: Cli, tmp_path: Path, feed: Callable[[bytes], None], content: bytes
) -> None:
    file = tmp_path / "hashes"
    file.write_bytes(content)
    feed(content)
    for name in (str(file), "-"):
        found = cli("match", "--namespace", "chat", "--hashes-file", name, "--json").json
        assert (found["blocks"], found["matched_blocks"]) == (6, 3)


@pytest.mark.parametrize("content", [json.dumps(TOKENS), "\n".join(map(str, TOKENS)) + "\n"])
@pytest.mark.parametrize("scheme", ["blake2b", "xxh3-128"])
def test_tokens_are_hashed_with_the_namespace_s_key(
    cli: Cli,
    store: ScriptedStore,
    feed: Callable[[bytes], None],
    content: str,
    scheme: str,
) -> None:
    namespace = store.open_namespace("chat", LAYOUT)
    numbers = {"blake2b": HashScheme.BLAKE2B, "xxh3-128": HashScheme.XXH3_128}
    chain = hash_chain(
        TOKENS,
        block_tokens=LAYOUT.block_tokens,
        key=namespace.key,
        scheme=numbers[scheme],
        extra_keys=[b"adapter", b"\x00\xff"],
    )
    store.hold(namespace, chain[:2])
    options = ["--namespace", "chat", "--tokens", "-", "--scheme", scheme, "--json"]
    feed(content.encode())
    found = cli("match", *options, "--extra-key", "adapter", "--extra-key", "hex:00ff").json
    assert (found["blocks"], found["matched_tokens"]) == (3, 32)
    feed(content.encode())
    answer = cli("match", *options)
    assert (answer.code, answer.json["matched_blocks"]) == (1, 0)


def test_a_chain_longer_than_a_call_is_asked_in_parts(
    cli: Cli, store: ScriptedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_KEYS_PER_CALL", 2)
    found = cli("match", "--namespace", "chat", *hex_options(HASHES), "--json").json
    assert (found["blocks"], found["matched_blocks"]) == (6, 3)
    runs = cli("explain", "--namespace", "chat", *hex_options(HASHES), "--json").json["runs"]
    assert [(run["first"], run["last"]) for run in runs] == [(0, 2), (3, 3), (4, 4), (5, 5)]
    assert cli("drop", "--namespace", "chat", *hex_options(HASHES)).out == "dropped 4 blocks\n"


def test_a_name_with_several_layouts_needs_the_id(cli: Cli, store: ScriptedStore) -> None:
    other = store.open_namespace("chat", OTHER_LAYOUT)
    store.hold(other, HASHES[:1])
    answer = cli("match", "--namespace", "chat", *hex_options(HASHES))
    assert answer.code == 2
    assert answer.err == "kvstore: namespace_id: choose a layout of 'chat' by its id: 1, 2\n"
    options = ["--namespace", "chat", "--namespace-id", "2", *hex_options(HASHES), "--json"]
    assert cli("match", *options).json["matched_blocks"] == 1


ONE = ["--hash", "ab" * 32]
BAD_SELECTORS = {
    "nothing": ([], "hash"),
    "two ways": ([*ONE, "--hashes-file", "x"], "hash"),
    "short hex": (["--hash", "abcd"], "hash"),
    "no hex": (["--hash", "zz" * 32], "hash"),
    "no file": (["--hashes-file", "/nonexistent"], "hashes_file"),
    "a folder": (["--tokens", "/"], "tokens"),
    "extra key of hashes": ([*ONE, "--extra-key", "x"], "extra_key"),
    "bad extra key": (["--tokens", "-", "--extra-key", "hex:0"], "extra_key"),
    "unknown name": (["--namespace", "frob", *ONE], "namespace"),
    "unknown id": (["--namespace-id", "7", *ONE], "namespace_id"),
}


@pytest.mark.parametrize("command", ["match", "explain", "drop"])
@pytest.mark.parametrize("case", BAD_SELECTORS)
def test_bad_selectors_name_the_field_and_change_nothing(
    cli: Cli, store: ScriptedStore, feed: Callable[[bytes], None], command: str, case: str
) -> None:
    options, field = BAD_SELECTORS[case]
    before = store.content()
    feed(" ".join(map(str, TOKENS)).encode())
    answer = cli(command, "--namespace", "chat", *options, "--json")
    assert (answer.code, answer.out) == (2, "")
    assert json.loads(answer.err)["error"]["field"] == field
    assert store.content() == before


BAD_TOKENS = [
    *(b"", b"1 2 x", b"[1, 2", b"[true]", b"[1.5]", b'{"a": 1}', b"\xff\xfe", b"1 2 3", b"[-1]"),
    *(b"1" * 5000, b"-1 " * 16, b"4294967296 " * 16, b"[[" * 100_000),
]


@pytest.mark.parametrize("content", BAD_TOKENS)
def test_bad_tokens_are_refused(cli: Cli, feed: Callable[[bytes], None], content: bytes) -> None:
    feed(content)
    answer = cli("match", "--namespace", "chat", "--tokens", "-", "--json")
    assert answer.code == 2
    assert json.loads(answer.err)["error"]["field"] == "tokens"


@pytest.mark.parametrize("content", [b"", b"\xff" * 33, b"ab" * 31, b" \n"])
def test_bad_hash_files_are_refused(
    cli: Cli, feed: Callable[[bytes], None], content: bytes
) -> None:
    feed(content)
    answer = cli("match", "--namespace", "chat", "--hashes-file", "-", "--json")
    assert answer.code == 2
    assert json.loads(answer.err)["error"]["field"] == "hashes_file"


# -- explain --------------------------------------------------------------------------


def test_explain_has_a_row_for_each_run_of_one_status(cli: Cli, store: ScriptedStore) -> None:
    stored = BlockReport(status=ExplainStatus.STORED, tier=Tier.DRAM)
    slower = BlockReport(status=ExplainStatus.STORED, tier=Tier.NVME)
    evicted = [BlockReport(status=ExplainStatus.EVICTED, when=when) for when in (200.0, 100.0)]
    store.reports = [stored, stored, slower, *evicted, stored]
    runs = cli("explain", "--namespace", "chat", *hex_options(HASHES), "--json").json["runs"]
    assert [(run["first"], run["last"], run["status"], run["tier"]) for run in runs] == [
        (0, 1, "stored", "dram"),
        (2, 2, "stored", "nvme"),
        (3, 4, "evicted", None),
        (5, 5, "stored", "dram"),
    ]
    assert (runs[2]["when_first"], runs[2]["when_last"]) == (100.0, 200.0)
    assert runs[0]["when_first"] is None

    rows = cli("explain", "--namespace", "chat", *hex_options(HASHES)).out.splitlines()
    assert len(rows) == 5
    assert rows[1].split() == ["0-1", "2", "dram", "stored", "-"]
    assert re.match(r" *3-4 +2 +- +evicted: the pool was full +\d{4}-\d\d-\d\d ", rows[3])
    assert output.local_time(200.0) in rows[3]
    assert f"(first: {output.local_time(100.0)})" in rows[3]


@pytest.mark.parametrize("status", list(ExplainStatus))
def test_each_status_has_its_reason(cli: Cli, store: ScriptedStore, status: ExplainStatus) -> None:
    store.reports = [BlockReport(status=status)]
    (run,) = cli("explain", "--namespace", "chat", *hex_options(HASHES[:1]), "--json").json["runs"]
    assert run["status"] == status.name.lower()
    assert run["reason"]


AGES = {
    -5: "now",
    0.4: "now",
    59: "59 s ago",
    61: "1 min ago",
    7300: "2 h ago",
    200_000: "2 d ago",
}


@pytest.mark.parametrize("seconds", AGES)
def test_age(seconds: float) -> None:
    assert output.age(1e9, now=1e9 + seconds) == AGES[seconds]


# -- drop -----------------------------------------------------------------------------


def test_drop_forgets_the_named_blocks(cli: Cli, store: ScriptedStore) -> None:
    options = ["--namespace", "chat", *hex_options(HASHES[2:4])]
    first = ["--namespace", "chat", *hex_options(HASHES[:1])]
    assert cli("drop", *first) == Answer(0, "dropped 1 block\n", "")
    store.hold(store.open_namespace("chat", LAYOUT), HASHES[:1])
    assert cli("drop", *options, "--json").json == {"namespace": "chat", "dropped_blocks": 1}
    assert cli("drop", *options) == Answer(0, "dropped 0 blocks\n", "")
    assert len(store.content()) == 3


def test_drop_all_needs_yes_where_nobody_can_be_asked(
    cli: Cli, store: ScriptedStore, feed: Callable[[bytes], None]
) -> None:
    feed(b"y\n")
    answer = cli("drop", "--namespace", "chat", "--all")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err == "kvstore: yes: there is no terminal to ask on: give --yes\n"
    assert len(store.content()) == 4
    answer = cli("drop", "--namespace", "chat", "--all", "--yes")
    assert answer == Answer(0, "dropped 4 blocks\n", "")
    assert not store.content()


def test_drop_all_takes_no_blocks_beside_it(cli: Cli, store: ScriptedStore) -> None:
    answer = cli("drop", "--namespace", "chat", "--all", "--yes", *hex_options(HASHES))
    assert (answer.code, len(store.content())) == (2, 4)


@pytest.mark.parametrize(
    ("typed", "code", "left"), [(b"y\n", 0, 0), (b"n\n", 1, 4), (b"\n", 1, 4), (b"\x04", 130, 4)]
)
def test_drop_all_asks_on_a_terminal(
    cli: Cli,
    store: ScriptedStore,
    monkeypatch: pytest.MonkeyPatch,
    typed: bytes,
    code: int,
    left: int,
) -> None:
    keyboard, terminal = os.openpty()
    with open(keyboard, "wb", buffering=0) as keys, open(terminal) as lines:
        keys.write(typed)
        monkeypatch.setattr(sys, "stdin", lines)
        answer = cli("drop", "--namespace", "chat", "--all")
    assert (answer.code, len(store.content())) == (code, left)
    assert "Forget all blocks of namespace chat?" in answer.err


# -- the command as a process, and a real daemon --------------------------------------


def command(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    """Starts `kvstore` with pipes."""
    return subprocess.Popen(
        [sys.executable, "-m", "kvstore_client.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_every_command_with_a_real_daemon(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*arguments: str) -> Answer:
        return Answer(run([*arguments, "--json"]), *capsys.readouterr())

    with daemon(tmp_path, "--dram", "32MiB") as running, KVStoreClient(running.target) as session:
        namespace = session.open_namespace("chat", LAYOUT)
        tokens = tmp_path / "tokens.json"
        tokens.write_text(json.dumps(TOKENS))
        chain = hash_chain(TOKENS, block_tokens=LAYOUT.block_tokens, key=namespace.key)
        session.put(namespace, chain, [np.zeros(LAYOUT.block_bytes, np.uint8)] * 3)

        monkeypatch.setenv("KVSTORE_TARGET", running.target)
        selectors = ["--namespace", "chat", "--tokens", str(tokens)]
        assert ask("ping").json["target"] == running.target
        blocks = {each["name"]: each["blocks"] for each in ask("info").json["namespaces"]}
        assert blocks["chat"] == 3
        assert ask("stat", "--count", "1").json["since_start"]["blocks"] == 3
        assert ask("match", *selectors).json["matched_tokens"] == 48
        (row,) = ask("explain", *selectors).json["runs"]
        assert (row["first"], row["last"], row["status"], row["tier"]) == (0, 2, "stored", "dram")
        last = ["--namespace", "chat", *hex_options(chain[2:])]
        assert ask("drop", *last).json["dropped_blocks"] == 1
        stored, dropped = ask("explain", *selectors).json["runs"]
        assert (stored["last"], dropped["first"], dropped["status"]) == (1, 2, "dropped")
        assert abs(dropped["when_last"] - time.time()) < 60
        assert ask("drop", "--namespace", "chat", "--all", "--yes").json["dropped_blocks"] == 2
        assert ask("match", *selectors).code == 1
    answer = ask("match", *selectors)
    assert (answer.code, json.loads(answer.err)["error"]["code"]) == (3, "unavailable")


def test_stat_of_a_real_daemon_ends_on_sigint_between_two_lines(tmp_path: Path) -> None:
    with daemon(tmp_path, "--dram", "32MiB") as running:
        options = ["--target", running.target, "--interval", "0.05", "--json"]
        with command("stat", *options) as process:
            try:
                assert process.stdout is not None
                json.loads(process.stdout.readline())
                second = json.loads(process.stdout.readline())
                process.send_signal(signal.SIGINT)
                out, err = process.communicate(timeout=END_S)
            finally:
                process.kill()
    assert second["interval_s"] == pytest.approx(0.05, abs=1.0)
    assert all(isinstance(json.loads(line), dict) for line in out.splitlines())
    assert (process.returncode, err) == (0, "")


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["text", "json"])
def test_a_daemon_that_dies_is_told_in_the_form_that_was_asked_for(
    tmp_path: Path, options: list[str]
) -> None:
    with daemon(tmp_path, "--dram", "8MiB") as running:
        target = ["--target", running.target, "--timeout", "1"]
        with command("stat", *target, "--interval", "0.01", *options) as process:
            try:
                assert process.stdout is not None
                process.stdout.readline()
                running.kill()
                _, err = process.communicate(timeout=END_S)
            finally:
                process.kill()
    assert process.returncode == 3
    lines = err.splitlines()
    if options:
        assert [json.loads(line)["error"]["code"] for line in lines] == ["unavailable"]
    else:
        assert all(line.startswith("kvstore: ") for line in lines)


def test_a_reader_that_goes_away_is_no_traceback(tmp_path: Path) -> None:
    with (
        daemon(tmp_path, "--dram", "32MiB") as running,
        command("stat", "--target", running.target, "--interval", "0.01") as process,
    ):
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.readline()
            process.stdout.close()
            assert process.stderr.read() == ""
            assert process.wait(END_S) == 1
        finally:
            process.kill()


def test_without_its_packages_the_command_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError(name='typer')")
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    with command("ping", env={**os.environ, "PYTHONPATH": paths}) as process:
        _, err = process.communicate(timeout=END_S)
    assert err == "kvstore: needs typer: pip install 'kvstore-llm[cli]'\n"
    assert process.returncode == 2
