"""One SGLang engine in a process of its own, driven line by line: `python child.py`, JSON on stdin.

The first line holds the arguments of `sglang.Engine`; it answers when the engine is there, or with
the error. Each further line is a command, {"do": name, ...}, answered with what it came to.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

# SGLang's scheduler is another process, which imports this file too.
sys.path.insert(0, str(Path(__file__).parent))
import cpu_copies  # noqa: F401

_IDLE_S = 60.0  # until the engine has nothing to do any more


def run(engine: Any, prompts: list[list[int]], tokens: int, **request: Any) -> Any:
    sampling = {"temperature": 0.0, "max_new_tokens": tokens, "ignore_eos": True}
    outputs = engine.generate(input_ids=prompts, sampling_params=sampling, **request)
    return [
        {
            "tokens": one["output_ids"],
            "stored": (one["meta_info"].get("cached_tokens_details") or {}).get("storage", 0),
        }
        for one in outputs
    ]


def forget(engine: Any) -> Any:
    """Empties the engine's own caches: it knows no more than a fresh one."""
    flushed = engine.tokenizer_manager.flush_cache(timeout_s=_IDLE_S)
    return bool(engine.loop.run_until_complete(flushed).success)


def attach(engine: Any, config: dict[str, Any]) -> Any:
    """Another storage backend, as the HTTP server's admin calls do it."""
    manager, loop = engine.tokenizer_manager, engine.loop
    forget(engine)
    loop.run_until_complete(manager.detach_hicache_storage())
    done = loop.run_until_complete(
        manager.attach_hicache_storage(
            hicache_storage_backend="dynamic",
            hicache_storage_backend_extra_config_json=json.dumps(config),
        )
    )
    return {"success": done.success, "message": done.message}


def clear(engine: Any) -> Any:
    done = engine.loop.run_until_complete(engine.tokenizer_manager.clear_hicache_storage())
    return bool(done.success)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what SGLang prints goes to the log

    def answer(message: Any) -> None:
        print(json.dumps(message), file=answers, flush=True)

    import sglang

    engine = sglang.Engine(**json.loads(sys.stdin.readline()))
    answer({"ready": True})
    commands = {each.__name__: each for each in (run, forget, attach, clear)}
    for line in sys.stdin:
        command = json.loads(line)
        answer(commands[command.pop("do")](engine, **command))
    engine.shutdown()


if __name__ == "__main__":
    main()
