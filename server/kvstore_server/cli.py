"""`kvstore-server`: reads the settings, makes the memory, serves until SIGTERM."""

from __future__ import annotations

import os
import secrets
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from kvstore import __version__
from kvstore.embedded import default_max_blocks
from kvstore.errors import KVStoreError
from kvstore.memory import Arenas
from kvstore.store import Store
from kvstore_server.channel import ChannelServer, bind
from kvstore_server.settings import Settings

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def load_secret(folder: Path) -> bytes:
    """The 32-byte secret that keys all chains; made once, mode 0600, so keys survive restarts."""
    path = folder / "chain.key"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        secret = path.read_bytes()
        if len(secret) != 32:
            raise KVStoreError(f"{path} holds {len(secret)} bytes, not 32: restore it") from None
        return secret
    secret = secrets.token_bytes(32)
    with os.fdopen(fd, "wb") as file:
        file.write(secret)
        file.flush()
        os.fsync(file.fileno())
    return secret


def serve(settings: Settings) -> None:
    """Runs the daemon in this process until SIGTERM or SIGINT."""
    listener = bind(settings.socket)
    try:
        max_blocks = settings.max_blocks or default_max_blocks(settings.dram)
        arenas = Arenas.create(settings.dram, max_blocks)
        arenas.index.forbid_new_writers()
        arenas.generations.forbid_new_writers()
        instance = secrets.randbits(63)
        store = Store(
            arenas.store_memory(),
            secret=load_secret(settings.data_dir),
            instance_id=instance,
            max_blocks=max_blocks,
            policy=settings.eviction,
        )
        server = ChannelServer(store, arenas, listener, instance=instance)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: server.stop())
        print(
            f"kvstore-server {__version__}\n"
            f"  socket    unix://{settings.socket}\n"
            f"  dram      {settings.dram / (1 << 20):.0f} MiB, {settings.eviction} eviction\n"
            f"  blocks    at most {max_blocks}",
            flush=True,
        )
        server.run()
    finally:
        listener.close()
        settings.socket.unlink(missing_ok=True)


@app.command()
def run(
    socket: Annotated[Path | None, typer.Option(help="Unix socket to serve.")] = None,
    dram: Annotated[str | None, typer.Option(help="Pool size, as 8GiB.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder of the chain key.")] = None,
    eviction: Annotated[str | None, typer.Option(help="lru, arc or s3fifo.")] = None,
    max_blocks: Annotated[int | None, typer.Option(help="Size of the index.")] = None,
) -> None:
    """Serves a KV cache to the engines of this host."""
    flags: dict[str, Any] = {
        "socket": socket,
        "dram": dram,
        "data_dir": data_dir,
        "eviction": eviction,
        "max_blocks": max_blocks,
    }
    try:
        serve(Settings(**{name: value for name, value in flags.items() if value is not None}))
    except ValidationError as error:
        for problem in error.errors():
            print(f"kvstore-server: {problem['loc'][0]}: {problem['msg']}", file=sys.stderr)
        raise typer.Exit(2) from None
    except (KVStoreError, OSError) as error:
        print(f"kvstore-server: {error}", file=sys.stderr)
        raise typer.Exit(getattr(error, "code", 1)) from None


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
