"""How LMCache's server is installed, started and told of blocks."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.processes import free_port, server, wait_for_port

VERSION = "0.5.6"
# Its metadata asks for CUDA packages, which its CPU paths do without.
WITHOUT_DEPENDENCIES: tuple[str, ...] = (f"lmcache=={VERSION}",)
REQUIREMENTS: tuple[str, ...] = (
    *("torch==2.13.0", "numpy", "aiofile", "aiofiles", "aiohttp", "blake3", "cachetools"),
    *("cryptography", "fastapi", "httptools", "httpx", "msgspec", "numba", "nvtx", "psutil"),
    *("opentelemetry-exporter-otlp==1.40.0", "opentelemetry-exporter-prometheus==0.61b0"),
    *("prometheus_client<0.25", "py-cpuinfo", "pyyaml", "pyzmq", "sortedcontainers", "uvicorn"),
)
# It reports nothing to its makers, and does not log each request.
QUIET = {"LMCACHE_TRACK_USAGE": "false", "LMCACHE_LOG_LEVEL": "WARNING"}
CHUNK_TOKENS = 16
TIMEOUT_S = 60.0
_THREADS = 4  # one for each client


@contextlib.contextmanager
def start(folder: Path, environment: Path, pool_bytes: int) -> Iterator[dict[str, Any]]:
    """Its server, with its pool pre-faulted like ours."""
    port, web, log = free_port(), free_port(), folder / "lmcache.log"
    command: list[str | Path] = [
        *(environment / "bin/lmcache", "server", "--transport=zmq", "--host=127.0.0.1"),
        *(f"--port={port}", f"--http-port={web}", f"--max-workers={_THREADS}"),
        *("--supported-transfer-mode=engine_driven", f"--shm-name={port}"),
        *(f"--l1-size-gb={pool_bytes / (1 << 30)}", "--no-l1-use-lazy", "--eviction-policy=LRU"),
        f"--chunk-size={CHUNK_TOKENS}",
        "--periodic-notifier-interval-ms=1",  # by default look-ups take 4 ms longer
    ]
    pool = Path(f"/dev/shm/lmcache_l1_pool_{port}")
    try:
        with server(command, log=log, env=QUIET) as process:
            wait_for_port(web, process, log)
            with pool.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, pool.stat().st_size)
            yield {"url": f"tcp://127.0.0.1:{port}", "web": web, "version": VERSION}
    finally:
        pool.unlink(missing_ok=True)  # it is left behind where the server had to be killed


def part(name: str) -> Any:
    """One of its multiprocess modules; only its own environment has them."""
    return importlib.import_module(f"lmcache.v1.multiprocess.{name}")


def register(rpc: Any, nbytes: int) -> tuple[Any, int]:
    """Makes blocks of this size known, by a model named after it; its context and instance id."""
    import torch

    instance = os.getpid() << 32 | nbytes
    worker = part("transfer_context.worker_transfer")
    transfer = worker.EngineDrivenTransferContext(instance, rpc)
    pages = torch.zeros((1, CHUNK_TOKENS, nbytes // CHUNK_TOKENS), dtype=torch.uint8)
    transfer.register({"layer": pages}, str(nbytes), 1, 1, TIMEOUT_S)
    return transfer.engine_driven_context, instance


def delete(web: int, chain: Any) -> None:
    """Deletes a chain's chunks, locked or not."""
    hasher = part("token_hasher").TokenHasher(CHUNK_TOKENS)
    resolve = part("cache_control.key_resolver").resolve_object_keys
    chunks, _ = resolve(hasher, chain.model_name, 1, list(chain.token_ids), "")
    keys = [dataclasses.asdict(chunk.to_encoded_object_key()) for chunk in chunks]
    body = json.dumps({"keys": keys, "tier": "l1", "force": True})
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", web)) as connection:
        connection.request("DELETE", "/cache/objects", body, {"Content-Type": "application/json"})
        connection.getresponse().read()
