"""Our tier below LMCache's memory, and its own file tiers: `python -m benchmarks.lmcache_tiers`.

--python: of an environment with LMCache (`python tests/integrations/environment.py lmcache`). One
process has an adapter of each kind over one memory, and each round stores, finds and loads the same
objects with each of them, in turns, so that a drifting machine hurts all alike. A load is compared
with what was stored. The files lie where temporary files do, in the page cache: that is memory too,
so this compares ways to memory, not memory with disks.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import limits
from benchmarks.daemon import daemon

OBJECTS, SHAPE = 64, (2, 16, 256, 128)  # a round's; 2 MiB each in float16
NBYTES = 2 * 16 * 256 * 128 * 2
WAIT_MS = 60_000
Results = dict[str, dict[str, list[float]]]


def specs(folder: Path, target: str) -> dict[str, dict[str, Any]]:
    """Each adapter as LMCache's configuration names it."""
    return {
        "kvstore": {
            "type": "plugin",
            "module_path": "kvstore_integrations.lmcache.l2",
            "class_name": "KVStoreL2Adapter",
            "adapter_params": {"target": target, "model_revision": "1"},
        },
        "LMCache, fs": {"type": "fs", "base_path": str(folder / "fs")},
        "LMCache, fs_native": {"type": "fs_native", "base_path": str(folder / "native")},
    }


def work(folder: Path, target: str, rounds: int) -> Results:
    """In LMCache's environment: seconds of each operation of each adapter, a round each."""
    import torch
    from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
    from lmcache.v1.distributed.config import L1MemoryManagerConfig
    from lmcache.v1.distributed.l2_adapters import create_l2_adapter
    from lmcache.v1.distributed.l2_adapters.config import (
        add_l2_adapters_args,
        parse_args_to_l2_adapters_config,
    )
    from lmcache.v1.distributed.memory_manager import L1MemoryManager

    memory = L1MemoryManager(
        L1MemoryManagerConfig(3 * OBJECTS * NBYTES, use_lazy=False, shm_name="")
    )
    layout = MemoryLayoutDesc([torch.Size(SHAPE)], [torch.float16])
    _, objects = memory.allocate(layout, 2 * OBJECTS)
    sources, targets = objects[:OBJECTS], objects[OBJECTS:]
    asked = [f"--l2-adapter={json.dumps(spec)}" for spec in specs(folder, target).values()]
    parser = add_l2_adapters_args(argparse.ArgumentParser())
    configs = parse_args_to_l2_adapters_config(parser.parse_args(asked)).adapters
    names = list(specs(folder, target))
    adapters = {
        name: create_l2_adapter(config, l1_memory_desc=memory.get_l1_memory_desc())
        for name, config in zip(names, configs, strict=True)
    }
    seconds: Results = defaultdict(lambda: defaultdict(list))
    for number in range(rounds + 1):
        for one in sources:
            one.tensor.copy_(torch.randn(SHAPE))
        keys = [ObjectKey(os.urandom(32), "model", 0) for _ in sources]
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            for one in targets:
                one.tensor.zero_()
            spent = _round(adapters[name], keys, sources, targets, layout)
            same = all(
                torch.equal(a.tensor, b.tensor) for a, b in zip(sources, targets, strict=True)
            )
            assert same, name
            if number:  # the first warms up
                for operation, took in spent.items():
                    seconds[name][operation].append(took)
    for adapter in adapters.values():
        adapter.close()
    for one in objects:
        one.ref_count_down()
    return seconds


def _round(
    adapter: Any, keys: list[Any], sources: list[Any], targets: list[Any], layout: Any
) -> dict[str, float]:
    missed = _timed(
        adapter.get_lookup_and_lock_event_fd(),
        lambda: adapter.submit_lookup_and_lock_task(keys, {0: layout}),
        adapter.query_lookup_and_lock_result,
        lambda hits: hits.popcount() == 0,
    )
    stored = _timed(
        adapter.get_store_event_fd(),
        lambda: adapter.submit_store_task(keys, sources),
        lambda number: adapter.pop_completed_store_tasks().get(number),
        lambda result: result.is_successful(),
    )
    found = _timed(
        adapter.get_lookup_and_lock_event_fd(),
        lambda: adapter.submit_lookup_and_lock_task(keys, {0: layout}),
        adapter.query_lookup_and_lock_result,
        lambda hits: hits.popcount() == len(keys),
    )
    loaded = _timed(
        adapter.get_load_event_fd(),
        lambda: adapter.submit_load_task(keys, targets),
        adapter.query_load_result,
        lambda hits: hits.popcount() == len(keys),
    )
    adapter.submit_unlock(keys)
    return {"store": stored, "load": loaded, "find all": found, "find none": missed}


def _timed(
    fd: int, start: Callable[[], int], take: Callable[[int], Any], right: Callable[[Any], bool]
) -> float:
    """Seconds from the call until its result is taken, as LMCache's controllers wait for it."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    begin = time.perf_counter()
    number = start()
    while True:
        if not poller.poll(WAIT_MS):
            raise TimeoutError
        os.eventfd_read(fd)
        result = take(number)
        if result is not None:
            took = time.perf_counter() - begin
            assert right(result), result
            return took


def table(seconds: Results) -> str:
    """Markdown."""
    facts = limits.facts()
    nbytes = OBJECTS * NBYTES
    lines = [
        f"{OBJECTS} objects of {NBYTES >> 20} MiB in a task; medians, and from the least to the "
        f"most. {facts['processor']}, {facts['cores']} cores. Ours checks what it loads by its "
        "checksum, and leases what it finds; the others do neither.",
        "",
        "| | store, GB/s | load, GB/s | find all, ms | find none, ms |",
        "|---|---|---|---|---|",
    ]
    for name, by_operation in sorted(seconds.items()):
        cells = [
            _cell([nbytes / s / 1e9 for s in by_operation[operation]])
            for operation in ("store", "load")
        ]
        cells += [
            _cell([s * 1e3 for s in by_operation[operation]])
            for operation in ("find all", "find none")
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(numbers: list[float]) -> str:
    return f"{statistics.median(numbers):.2f} ({min(numbers):.2f} to {max(numbers):.2f})"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", type=Path, help="of an environment with LMCache")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        print(json.dumps(work(Path(options.work[0]), options.work[1], options.rounds)))
        return
    if not options.python:
        parser.error("--python is needed")
    with tempfile.TemporaryDirectory(prefix="kvstore-bench-") as name:
        folder = Path(name)
        pool = (options.rounds + 2) * OBJECTS * NBYTES * 2
        with daemon(folder / "daemon", pool, "--no-grpc") as server:
            server.connect().close()
            arguments = ["-m", "benchmarks.lmcache_tiers", f"--rounds={options.rounds}"]
            done = subprocess.run(
                [options.python, *arguments, "--work", name, server.target],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                env={
                    **os.environ,
                    "LMCACHE_TRACK_USAGE": "false",
                    "LMCACHE_LOG_LEVEL": "WARNING",
                },
            )
    seconds: Results = json.loads(done.stdout.splitlines()[-1])
    if options.json:
        options.json.write_text(json.dumps(seconds))
    print(table(seconds))


if __name__ == "__main__":
    main()
