"""Where a daemon's sockets are, for daemon and clients alike."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def default_socket() -> Path:
    """`kvstore.sock` in the user's runtime folder, or in a folder of its own under /tmp."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(runtime) if runtime else Path(tempfile.gettempdir()) / f"kvstore-{os.getuid()}"
    return folder / "kvstore.sock"


def grpc_socket(socket: Path) -> Path:
    """The gateway's unix socket beside the channel's: `kvstore.sock` -> `kvstore.grpc.sock`."""
    return socket.with_name(f"{socket.stem}.grpc{socket.suffix}")
