"""SGLang engines for tests, each in processes of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_START_S, _ANSWER_S = 240.0, 120.0
_ENV = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "SGLANG_DISABLE_TELEMETRY": "1",
}
PAGE = 16
ARGUMENTS: dict[str, Any] = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "disable_cuda_graph": True,
    "disable_overlap_schedule": True,
    "skip_tokenizer_init": True,
    "dtype": "float32",
    "page_size": PAGE,
    "max_total_tokens": 8192,
    "random_seed": 0,
    "log_level": "info",
}
HICACHE: dict[str, Any] = {
    "enable_hierarchical_cache": True,
    "hicache_io_backend": "direct",  # the other needs a GPU
    "hicache_mem_layout": "page_first_direct",
    "hicache_write_policy": "write_through",
    "hicache_storage_prefetch_policy": "wait_complete",
    "hicache_storage_backend": "dynamic",
}


def backend(target: str, **settings: Any) -> dict[str, Any]:
    """The extra configuration that a user writes; prompts of tests are short."""
    return {
        "backend_name": "kvstore",
        "module_path": "kvstore_integrations.sglang.storage",
        "class_name": "KVStoreHiCache",
        "interface_v1": 1,
        "hicache_storage_pass_prefix_keys": True,
        "prefetch_threshold": PAGE,
        "target": target,
        **settings,
    }


def hicache(target: str, *, layout: str = "page_first_direct", **settings: Any) -> dict[str, Any]:
    """Arguments of an engine whose pages go to the store at `target`."""
    extra = json.dumps(backend(target, **settings))
    return {
        **HICACHE,
        "hicache_mem_layout": layout,
        "hicache_storage_backend_extra_config": extra,
    }


class EngineError(RuntimeError):
    """The engine did not start, or ended."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A request's tokens, and how many of its prompt's came from the storage backend."""

    tokens: list[int]
    stored: int


class Engine:
    """One SGLang that generates greedily."""

    def __init__(self, log: Path, *, env: Mapping[str, str] | None = None, **arguments: Any):
        """arguments: of `sglang.Engine`, beside ARGUMENTS. `EngineError` with what it said."""
        self._log = log
        self._output = log.open("w")
        # SGLang ends by ending all its processes, so these are a group of their own.
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("child.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._output,
            text=True,
            start_new_session=True,
            env={**os.environ, **_ENV, **(env or {})},
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

    def begin(self, *prompts: list[int], tokens: int = 16) -> None:
        """Hands requests over; `finish` waits for them."""
        self._say({"do": "run", "prompts": prompts, "tokens": tokens})

    def finish(self) -> list[Answer]:
        """The answers to what was begun."""
        return [Answer(one["tokens"], one["stored"]) for one in self._hear(_ANSWER_S)]

    def run(self, *prompts: list[int], tokens: int = 16) -> list[Answer]:
        """Serves the prompts together."""
        self.begin(*prompts, tokens=tokens)
        return self.finish()

    def forget(self) -> None:
        """Empties the engine's own caches, after which it knows no more than a fresh one."""
        self._say({"do": "forget"})
        assert self._hear(_ANSWER_S)

    def attach(self, config: dict[str, Any]) -> str:
        """Another storage backend, with an empty cache; returns what is wrong with it."""
        self._say({"do": "attach", "config": config})
        done = self._hear(_ANSWER_S)
        return "" if done["success"] else str(done["message"])

    def clear(self) -> bool:
        """Has the storage backend forget its pages."""
        self._say({"do": "clear"})
        return bool(self._hear(_ANSWER_S))

    def close(self) -> None:
        """Ends it, by itself if it can."""
        assert self._process.stdin
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(30.0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
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
        if not line:
            raise EngineError(f"it ended: {self.log[-6000:]}")
        return json.loads(line)


@contextlib.contextmanager
def engine(log: Path, **arguments: Any) -> Iterator[Engine]:
    """An engine for the length of a `with`."""
    made = Engine(log, **arguments)
    try:
        yield made
    finally:
        made.close()
