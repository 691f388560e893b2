"""What all integrations share: settings, identities, options of a request, jobs, namespaces."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from daemon import daemon
from kvstore import Hint, HintKind, Layout
from kvstore.errors import Unavailable
from kvstore_client import KVStoreClient
from kvstore_integrations.identity import Identity, model_identity
from kvstore_integrations.jobs import Jobs
from kvstore_integrations.options import RequestOptions
from kvstore_integrations.settings import ConfigurationError, StoreSettings
from kvstore_integrations.spaces import Spaces

WAIT_S = 20.0


# -- settings --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"tagret": "unix:///x"}, r"where: tagret: Extra inputs.*Known are: target, token"),
        ({"tenant": "a/b"}, r"tenant: .*1 to 64 letters"),
        ({"timeout_s": 0}, r"timeout_s: .*greater than 0"),
    ],
)
def test_a_wrong_setting_is_named(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        StoreSettings.read(raw, "where")


def test_a_store_that_does_not_answer_is_an_error_at_start_unless_it_may_come_later(
    tmp_path: Path,
) -> None:
    target = f"unix://{tmp_path}/nothing.sock"
    with pytest.raises(ConfigurationError, match=r"nothing\.sock.*kvstore-server.*`required`"):
        StoreSettings(target=target, timeout_s=0.2).connect()
    StoreSettings(target=target, required=False).connect().close()


def test_a_target_of_no_known_form_is_an_error_at_start() -> None:
    with pytest.raises(ConfigurationError, match="target"):
        StoreSettings(target="http://x").connect()


def test_reads_are_verified_unless_that_is_switched_off() -> None:
    assert StoreSettings().verify_reads


# -- identity --------------------------------------------------------------------------


def checkpoint(folder: Path, weights: bytes) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}" + weights)
    return folder


def test_weights_are_told_apart_by_their_bytes_and_by_their_revision(tmp_path: Path) -> None:
    one, two = checkpoint(tmp_path / "a", b"1" * 9000), checkpoint(tmp_path / "b", b"2" * 9000)
    same = checkpoint(tmp_path / "c", b"1" * 9000)
    assert model_identity(str(one)).startswith("a@")
    assert model_identity(str(one))[2:] == model_identity(str(same))[2:]
    assert model_identity(str(one))[2:] != model_identity(str(two))[2:]
    assert model_identity(str(one), revision="r2") == "a@r2"
    assert model_identity("org/model", commit="abc") == "org/model@abc"


def test_weights_that_nothing_tells_apart_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"org/model.*`model_revision`"):
        model_identity("org/model")
    with pytest.raises(ConfigurationError, match=r"`model_revision`"):
        model_identity(str(tmp_path))


def test_every_fact_makes_another_namespace() -> None:
    base = {"dtype": "bfloat16", "rank": 0}
    made = [
        Identity("vllm", "m@1", base),
        Identity("sglang", "m@1", base),
        Identity("vllm", "m@2", base),
        Identity("vllm", "m@1", {**base, "dtype": "float16"}),
        Identity("vllm", "m@1", {**base, "rank": 1}),
        Identity("vllm", "m@1", {**base, "more": None}),
    ]
    names = {identity.namespace("t") for identity in made} | {made[0].namespace("u")}
    assert len(names) == len(made) + 1
    prints = {i.layout(block_bytes=4096, block_tokens=16).fingerprint() for i in made}
    assert len(prints) == len(made)
    assert Identity("vllm", "m@1", dict(reversed(base.items()))).namespace("t") in names


# -- options of a request --------------------------------------------------------------


def test_a_request_says_whose_it_is_and_what_comes_next() -> None:
    read = RequestOptions.read
    assert read(None, tenant="t") == RequestOptions(tenant="t")
    assert read({"do_remote_prefill": True}, tenant="t") == RequestOptions(tenant="t")
    assert read({"tenant": "a", "ttl_s": 60.0}, tenant="t") == RequestOptions(
        tenant="a", ttl_s=60.0
    )
    for said, hint in (
        ({"session_ends": True}, Hint(kind=HintKind.SESSION_ENDS)),
        ({"pin_s": 5.0}, Hint(kind=HintKind.PIN_UNTIL, for_s=5.0)),
        ({"next_turn_s": 9}, Hint(kind=HintKind.NEXT_TURN_BY, for_s=9.0)),
    ):
        options = read(said, tenant="t")
        assert options is not None
        assert options.hint == hint


def test_a_request_may_stay_out_of_the_store(caplog: pytest.LogCaptureFixture) -> None:
    assert RequestOptions.read({"cache": False, "tenant": "a"}, tenant="t") is None
    assert not caplog.records
    assert RequestOptions.read({"cache": True}, tenant="t") == RequestOptions(tenant="t")


@pytest.mark.parametrize(
    "said",
    [
        {"tenant": ""},
        {"tenant": 7},
        {"tenant": "a" * 65},
        {"tenant": "a b"},
        {"ttl_s": -1},
        {"cache": 0},
    ],
)
def test_a_request_whose_parameters_mean_nothing_is_not_cached(
    said: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert RequestOptions.read(said, tenant="t") is None
    assert "a request is not cached" in caplog.text


# -- jobs ------------------------------------------------------------------------------


def test_jobs_end_with_what_their_work_returned_or_with_their_failure(
    caplog: pytest.LogCaptureFixture,
) -> None:
    jobs: Jobs[str] = Jobs("test", most_stores=4)
    jobs.load(1, lambda: "loaded", failed="not")
    jobs.store(2, lambda: "stored", failed="not")
    jobs.load(3, lambda: str(1 // 0), failed="not")
    jobs.drain()
    assert sorted(jobs.finished()) == [(1, "loaded"), (2, "stored"), (3, "not")]
    assert jobs.finished() == []
    assert "count as missing" in caplog.text
    jobs.close()


def test_stores_beyond_the_limit_are_dropped_and_loads_pass_them() -> None:
    jobs: Jobs[str] = Jobs("test", most_stores=2)
    begun, go = threading.Event(), threading.Event()

    def hold() -> str:
        begun.set()
        assert go.wait(WAIT_S)
        return "stored"

    jobs.store(1, hold, failed="dropped")
    assert begun.wait(WAIT_S)
    for number in (2, 3, 4):
        jobs.store(number, lambda: "stored", failed="dropped")
    jobs.load(5, lambda: "loaded", failed="not")
    assert dict(_all(jobs, 2)) == {4: "dropped", 5: "loaded"}
    assert jobs.pending
    go.set()
    jobs.drain()
    assert not jobs.pending
    assert dict(jobs.finished()) == {1: "stored", 2: "stored", 3: "stored"}
    jobs.close()


def test_closing_waits_for_what_has_begun_and_drops_the_rest() -> None:
    jobs: Jobs[str] = Jobs("test", most_stores=4)
    begun, go = threading.Event(), threading.Event()

    def hold() -> str:
        begun.set()
        assert go.wait(WAIT_S)
        return "stored"

    jobs.store(1, hold, failed="dropped")
    jobs.store(2, lambda: "stored", failed="dropped")
    assert begun.wait(WAIT_S)
    closing = threading.Thread(target=jobs.close)
    closing.start()
    go.set()
    closing.join(WAIT_S)
    assert not closing.is_alive()
    assert (1, "stored") in jobs.finished()


def test_a_call_on_the_side_that_fails_is_a_line_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    jobs: Jobs[str] = Jobs("test", most_stores=1)

    def fail() -> None:
        raise Unavailable("gone")

    jobs.aside(fail)
    jobs.drain()
    assert "the store was not told: gone" in caplog.text
    jobs.close()


def _all(jobs: Jobs[str], n: int) -> list[tuple[int, str]]:
    """The first n results, however long the load takes."""
    results: list[tuple[int, str]] = []

    def there() -> bool:
        results.extend(jobs.finished())
        return len(results) >= n

    _until(there)
    return results


def _until(there: Callable[[], bool]) -> None:
    """Asks over and over, for a long time at most."""
    end = time.monotonic() + WAIT_S
    while not there():
        assert time.monotonic() < end


# -- namespaces ------------------------------------------------------------------------


class Away:
    """A store that is away, and comes back when it is told."""

    def __init__(self) -> None:
        self.asked, self.back = 0, False

    def open_namespace(self, name: str, layout: Layout, *, timeout_s: float | None = None) -> Any:
        self.asked += 1
        if not self.back:
            raise Unavailable("away")
        return (name, layout.block_bytes)


def test_a_namespace_that_does_not_open_is_tried_again_but_not_at_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("kvstore_integrations.spaces.monotonic", lambda: now[0])
    away = Away()
    spaces = Spaces(away, Identity("test", "m@1", {}), block_bytes=4096, block_tokens=16)
    with pytest.raises(Unavailable):
        spaces.open_now("t")
    for _ in range(5):
        assert spaces.get("t") is None
    assert away.asked == 1
    assert caplog.text.count("no blocks for tenant t") == 1
    away.back = True
    now[0] += 1.5
    assert spaces.get("t") is None
    _until(lambda: not spaces.is_opening("t"))
    assert spaces.get("t") == (Identity("test", "m@1", {}).namespace("t"), 4096)
    assert away.asked == 2
    spaces.close()


def test_blocks_that_no_store_takes_are_an_error_at_start(tmp_path: Path) -> None:
    identity = Identity("test", "m@1", {})
    with pytest.raises(ConfigurationError, match=r"take 1073741824 bytes.*Choose other blocks"):
        Spaces(Away(), identity, block_bytes=1 << 30, block_tokens=16)
    with (
        daemon(tmp_path, "--dram", "8MiB") as server,
        KVStoreClient(server.target) as client,
    ):
        spaces = Spaces(client, identity, block_bytes=32 << 20, block_tokens=16)
        with pytest.raises(ConfigurationError, match="--dram"):
            spaces.open_now("t")
        spaces.close()
