"""vLLM engines for tests, each in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_START_S, _ANSWER_S = 240.0, 120.0
_ENV = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
ARGUMENTS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 1024,
    "block_size": 32,
    "enable_prefix_caching": False,
    "skip_tokenizer_init": True,
    "seed": 0,
    "prefix_caching_hash_algo": "sha256_cbor",
}


class EngineError(RuntimeError):
    """The engine did not start, or ended."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A request's tokens, and how many of its prompt's came from a cache."""

    tokens: list[int]
    cached: int


class Engine:
    """One vLLM that generates greedily."""

    def __init__(self, log: Path, **arguments: Any) -> None:
        """arguments: of `vllm.LLM`, beside ARGUMENTS. `EngineError` with what it said."""
        self._log = log
        self._output = log.open("w")
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("child.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._output,
            text=True,
            env={**os.environ, **_ENV},
        )
        try:
            self._say({**ARGUMENTS, **arguments})
            self._hear(_START_S)
        except BaseException:
            self.close()
            raise

    @property
    def log(self) -> str:
        """All it has logged so far."""
        return self._log.read_text(errors="replace")

    def begin(self, *prompts: list[int], tokens: int = 16, **params: Any) -> None:
        """Hands requests over; `finish` waits for them."""
        self._say([{"prompt": one, "tokens": tokens, "params": params} for one in prompts])

    def finish(self) -> list[Answer]:
        """The answers to what was begun."""
        return [Answer(one["tokens"], one["cached"]) for one in self._hear(_ANSWER_S)]

    def run(self, *prompts: list[int], tokens: int = 16, **params: Any) -> list[Answer]:
        """Serves the prompts together; params: their kv_transfer_params."""
        self.begin(*prompts, tokens=tokens, **params)
        return self.finish()

    def metrics(self) -> dict[str, float]:
        """vLLM's counters and gauges (with `disable_log_stats=False`)."""
        self._say("metrics")
        found: dict[str, float] = self._hear(_ANSWER_S)
        return found

    def close(self) -> None:
        """Ends it, by itself if it can."""
        assert self._process.stdin
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(30.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout
        self._process.stdout.close()
        self._output.close()

    def _say(self, message: Any) -> None:
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(message), file=self._process.stdin, flush=True)

    def _hear(self, seconds: float) -> Any:
        assert self._process.stdout
        watch = threading.Timer(seconds, self._process.kill)
        watch.start()
        try:
            line = self._process.stdout.readline()
        finally:
            watch.cancel()
        answer = json.loads(line) if line else {"error": f"it ended: {self.log[-2000:]}"}
        if isinstance(answer, dict) and isinstance(answer.get("error"), str):
            raise EngineError(answer["error"])
        return answer


@contextlib.contextmanager
def engine(log: Path, **arguments: Any) -> Iterator[Engine]:
    """An engine for the length of a `with`."""
    made = Engine(log, **arguments)
    try:
        yield made
    finally:
        made.close()
