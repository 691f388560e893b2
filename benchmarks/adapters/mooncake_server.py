"""How Mooncake Store is installed and started."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.processes import free_port, server, wait_for_port

VERSION = "0.3.13.post1"
REQUIREMENTS: tuple[str, ...] = (f"mooncake-transfer-engine-non-cuda=={VERSION}", "numpy")
BUFFER_BYTES = 64 << 20  # its clients' own, for what it does not move in place


@contextlib.contextmanager
def start(
    folder: Path, environment: Path, pool_bytes: int, options: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    """Its master with the HTTP metadata server, and a client daemon that owns the segment."""
    package = next(environment.glob("lib/python3*/site-packages/mooncake"))
    for binary in ("mooncake_master", "mooncake_client"):
        (package / binary).chmod(0o755)
    rpc, web, metrics, port = (free_port() for _ in range(4))
    metadata = f"http://127.0.0.1:{web}/metadata"
    master: list[str | Path] = [
        *(package / "mooncake_master", "--rpc_address=127.0.0.1", f"--rpc_port={rpc}"),
        *("--enable_http_metadata_server=true", "--http_metadata_server_host=127.0.0.1"),
        *(f"--http_metadata_server_port={web}", f"--metrics_port={metrics}"),
    ]
    daemon: list[str | Path] = [
        *(package / "mooncake_client", "--host=127.0.0.1", f"--port={port}", "--threads=2"),
        *(f"--master_server_address=127.0.0.1:{rpc}", f"--metadata_server={metadata}"),
        f"--global_segment_size={-(-pool_bytes >> 30)} GB",
    ]
    env = {"LD_LIBRARY_PATH": str(package), **options}
    addresses = {"daemon": f"127.0.0.1:{port}", "master": f"127.0.0.1:{rpc}", "metadata": metadata}
    with contextlib.ExitStack() as stack:
        for name, command, listens in (("master", master, web), ("client", daemon, port)):
            log = folder / f"mooncake-{name}.log"
            process = stack.enter_context(server(command, log=log, env=env))
            wait_for_port(listens, process, log)
        yield {**addresses, "version": VERSION}
