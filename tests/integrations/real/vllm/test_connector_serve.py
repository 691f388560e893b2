"""`vllm serve` with our connector and a real model: concurrent requests over HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from integrations.real.vllm.test_connector import BLOCK, connector

from daemon import Daemon, daemon

ROOT = Path(__file__).parents[4]
START_S, ANSWER_S = 300.0, 120.0
ENV = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_SERVER_DEV_MODE": "1",  # shows /reset_prefix_cache
}
RULES = (
    "You answer for the town library. It opens at nine and closes at six, but on Saturdays it "
    "closes at one, and on Sundays it stays closed. A card costs nothing for those who live in the "
    "town; others pay twelve a year. Books may be kept for three weeks, films for one, and both "
    "may be kept once more as long, unless somebody else waits for them. Who brings them back late "
    "pays ten cents a day. The reading room on the second floor has eleven desks and a printer. "
    "Children under ten come with a grown-up. Dogs wait outside. "
)
QUESTIONS = (
    "On Saturdays, the library",
    "A card for somebody from the next village costs",
    "The printer is on",
    "My dog",
)


@dataclass(frozen=True)
class Said:
    text: str
    cached: int
    prompt: int


class Server:
    """A `vllm serve` process."""

    def __init__(self, model: Path, folder: Path, target: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        transfer = connector(target)["kv_transfer_config"]
        command = [
            *(str(Path(sys.executable).with_name("vllm")), "serve", str(model)),
            *("--port", self.url.rsplit(":", 1)[1], "--host", "127.0.0.1"),
            *("--served-model-name", "model", "--dtype", "float32", "--enforce-eager"),
            *("--max-model-len", "1024", "--block-size", str(BLOCK)),
            *("--no-enable-prefix-caching", "--prefix-caching-hash-algo", "sha256_cbor"),
            *("--enable-prompt-tokens-details", "--kv-transfer-config", json.dumps(transfer)),
        ]
        self.log = folder / "serve.log"
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                env={**os.environ, **ENV},
                start_new_session=True,
            )

    def wait_ready(self) -> None:
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            try:
                self.get("/health")
            except (urllib.error.URLError, ConnectionError):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(0.5)
                continue
            return
        raise RuntimeError(self.log.read_text(errors="replace")[-3000:])

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=ANSWER_S) as answer:
            return str(answer.read().decode())

    def post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
            return json.loads(answer.read() or "null")

    def say(self, question: str, **params: Any) -> Said:
        body: dict[str, Any] = {
            "model": "model",
            "prompt": RULES + question,
            "max_tokens": 12,
            "temperature": 0,
        }
        if params:
            body["kv_transfer_params"] = params
        answer = self.post("/v1/completions", body)
        usage = answer["usage"]
        details = usage["prompt_tokens_details"] or {}
        return Said(
            answer["choices"][0]["text"], details.get("cached_tokens", 0), usage["prompt_tokens"]
        )

    def say_all(self, **params: Any) -> list[Said]:
        """All questions at once."""
        with ThreadPoolExecutor(len(QUESTIONS)) as pool:
            return list(pool.map(lambda question: self.say(question, **params), QUESTIONS))

    def metric(self, name: str) -> float:
        """A counter's sum."""
        lines = [line for line in self.get("/metrics").splitlines() if line.startswith(name)]
        assert lines, name
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def close(self) -> None:
        """Ends it, and all its processes, by their group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(60.0)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="module")
def model() -> Path:
    """SmolLM2, converted in the project's own environment, which has what that needs."""
    code = "from kvstore_engines.smollm2 import ensure_smollm2; print(ensure_smollm2())"
    done = subprocess.run(
        [os.environ.get("SERVER_PYTHON", sys.executable), "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return ROOT / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(scope="module")
def store(folder: Path) -> Iterator[Daemon]:
    with daemon(folder, "--dram", "512MiB") as running:
        yield running


@pytest.fixture(scope="module")
def server(model: Path, folder: Path, store: Daemon) -> Iterator[Server]:
    made = Server(model, folder, store.target)
    try:
        made.wait_ready()
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def right(server: Server) -> list[str]:
    """Each answer as it is when all is computed, one after another, and nothing is stored."""
    answers = [server.say(question, tenant="no/tenant") for question in QUESTIONS]
    assert not any(answer.cached for answer in answers)
    return [answer.text for answer in answers]


def test_answers_over_http_are_the_same_from_the_store_and_metrics_tell(
    server: Server, right: list[str]
) -> None:
    first = server.say_all()
    assert [answer.text for answer in first] == right
    second = server.say_all()
    assert [answer.text for answer in second] == right
    assert all(answer.cached == (answer.prompt - 1) // BLOCK * BLOCK for answer in second)
    cached = sum(answer.cached for answer in first + second)
    assert server.metric("vllm:external_prefix_cache_hits_total") == cached
    server.say(QUESTIONS[0])  # one more step, with which the last sums travel
    assert server.metric("vllm:kvstore_loaded_blocks_total") >= cached // BLOCK
    for name in ("loaded_bytes", "load_seconds", "saved_blocks", "saved_bytes", "save_seconds"):
        assert server.metric(f"vllm:kvstore_{name}_total") > 0
    for name in ("lost_blocks", "refused_blocks", "dropped_blocks"):
        assert server.metric(f"vllm:kvstore_{name}_total") == 0


def test_a_tenant_in_the_body_has_blocks_of_its_own(server: Server, right: list[str]) -> None:
    server.say_all()
    first = [server.say(question, tenant="b") for question in QUESTIONS]
    assert first[0].cached == 0
    assert [answer.text for answer in first] == right
    second = server.say_all(tenant="b")
    assert all(answer.cached for answer in second)
    assert [answer.text for answer in second] == right


def test_a_reset_finds_nothing_any_more(server: Server, right: list[str]) -> None:
    server.say_all()
    assert server.say(QUESTIONS[0]).cached > 0
    server.post("/reset_prefix_cache?reset_external=true", {})
    assert server.say(QUESTIONS[0]) == Said(right[0], 0, server.say(QUESTIONS[0]).prompt)


def test_the_daemons_end_changes_no_answer(server: Server, store: Daemon, right: list[str]) -> None:
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.say_all)
        store.kill()
        assert [answer.text for answer in asked.result()] == right
    answers = server.say_all()
    assert [answer.text for answer in answers] == right
    assert not any(answer.cached for answer in answers)
