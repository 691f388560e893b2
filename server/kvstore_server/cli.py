"""`kvstore-server`: reads the settings and serves, or shows and checks them; a cluster's secret."""

from __future__ import annotations

import gc

if __name__ == "__main__":
    gc.disable()  # until `settle`

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import TyperException

from kvstore import __version__
from kvstore.errors import KVStoreError
from kvstore.lasting import settle
from kvstore.sizes import format_size
from kvstore_server.secrets_file import load_shared_secret, make_shared_secret
from kvstore_server.settings import Settings
from kvstore_server.settings_sources import Loaded, load

# Plain errors: a daemon's are read in logs, one line each.
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
config_app = typer.Typer(help="Shows and checks the settings; starts nothing.")
app.add_typer(config_app, name="config")

_SIZES = ("dram", "nvme_write_rate", "nvme_scrub_rate", "repair_rate")


def _help(field: str) -> str | None:
    return Settings.model_fields[field].description


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"kvstore-server {__version__}")
        raise typer.Exit


Config = Annotated[Path | None, typer.Option("--config", help="TOML file of settings.")]


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    *,
    config: Config = None,
    socket: Annotated[str | None, typer.Option(help=_help("socket"))] = None,
    dram: Annotated[str | None, typer.Option(help=_help("dram"))] = None,
    data_dir: Annotated[str | None, typer.Option(help=_help("data_dir"))] = None,
    nvme: Annotated[list[str] | None, typer.Option(help=_help("nvme"))] = None,
    nvme_engine: Annotated[str | None, typer.Option(help=_help("nvme_engine"))] = None,
    nvme_admission: Annotated[str | None, typer.Option(help=_help("nvme_admission"))] = None,
    nvme_write_rate: Annotated[str | None, typer.Option(help=_help("nvme_write_rate"))] = None,
    nvme_scrub_rate: Annotated[str | None, typer.Option(help=_help("nvme_scrub_rate"))] = None,
    eviction: Annotated[str | None, typer.Option(help=_help("eviction"))] = None,
    tenants: Annotated[str | None, typer.Option(help=_help("tenants"))] = None,
    max_blocks: Annotated[str | None, typer.Option(help=_help("max_blocks"))] = None,
    trust: Annotated[str | None, typer.Option(help=_help("trust"))] = None,
    huge_pages: Annotated[str | None, typer.Option(help=_help("huge_pages"))] = None,
    numa_node: Annotated[str | None, typer.Option(help=_help("numa_node"))] = None,
    prefault: Annotated[
        bool | None, typer.Option("--prefault/--no-prefault", help=_help("prefault"))
    ] = None,
    grpc: Annotated[bool | None, typer.Option("--grpc/--no-grpc", help=_help("grpc"))] = None,
    grpc_port: Annotated[str | None, typer.Option(help=_help("grpc_port"))] = None,
    node_name: Annotated[str | None, typer.Option(help=_help("node_name"))] = None,
    peer_listen: Annotated[str | None, typer.Option(help=_help("peer_listen"))] = None,
    peer_advertise: Annotated[str | None, typer.Option(help=_help("peer_advertise"))] = None,
    members: Annotated[str | None, typer.Option(help=_help("members"))] = None,
    etcd: Annotated[str | None, typer.Option(help=_help("etcd"))] = None,
    etcd_user: Annotated[str | None, typer.Option(help=_help("etcd_user"))] = None,
    etcd_password_file: Annotated[
        str | None, typer.Option(help=_help("etcd_password_file"))
    ] = None,
    etcd_ca: Annotated[str | None, typer.Option(help=_help("etcd_ca"))] = None,
    etcd_cert: Annotated[str | None, typer.Option(help=_help("etcd_cert"))] = None,
    etcd_key: Annotated[str | None, typer.Option(help=_help("etcd_key"))] = None,
    cluster: Annotated[str | None, typer.Option(help=_help("cluster"))] = None,
    replicas: Annotated[str | None, typer.Option(help=_help("replicas"))] = None,
    node_weight: Annotated[str | None, typer.Option(help=_help("node_weight"))] = None,
    transfer: Annotated[str | None, typer.Option(help=_help("transfer"))] = None,
    repair_rate: Annotated[str | None, typer.Option(help=_help("repair_rate"))] = None,
    cluster_secret: Annotated[str | None, typer.Option(help=_help("cluster_secret"))] = None,
    peer_tls_ca: Annotated[str | None, typer.Option(help=_help("peer_tls_ca"))] = None,
    peer_tls_certificate: Annotated[
        str | None, typer.Option(help=_help("peer_tls_certificate"))
    ] = None,
    peer_tls_key: Annotated[str | None, typer.Option(help=_help("peer_tls_key"))] = None,
    peer_insecure: Annotated[
        bool | None, typer.Option("--peer-insecure", help=_help("peer_insecure"))
    ] = None,
    node_metrics_port: Annotated[str | None, typer.Option(help=_help("node_metrics_port"))] = None,
    log_format: Annotated[str | None, typer.Option(help=_help("log_format"))] = None,
    log_level: Annotated[str | None, typer.Option(help=_help("log_level"))] = None,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Serves a KV cache to the engines of this host. Every flag may also be a variable,
    KVSTORE_DRAM for --dram, or a key of the settings file."""
    # All flags are text here, so that a bad one gets the same message wherever it was written.
    given = {name: value for name, value in locals().items() if name in Settings.model_fields}
    context.obj = {name: value for name, value in given.items() if value not in (None, [])}
    context.meta["config"] = config
    if context.invoked_subcommand is None:
        with _errors_as_exits():
            _serve(load(context.obj, config))


def _serve(loaded: Loaded) -> None:
    from kvstore_server.serve import serve  # showing settings must not need what serving needs

    settle()
    serve(loaded.settings)


@config_app.command()
def show(
    context: typer.Context,
    config: Config = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Prints every setting, its value, and where it came from."""
    with _errors_as_exits():
        loaded = load(context.obj, config or context.meta["config"])
    print(_as_json(loaded) if as_json else _as_table(loaded))


@config_app.command()
def check(context: typer.Context, config: Config = None) -> None:
    """Says whether the daemon would accept the settings; the exit code is 2 if not."""
    with _errors_as_exits():
        loaded = load(context.obj, config or context.meta["config"])
    print(f"ok: {loaded.file or 'no settings file'}")


@app.command("new-secret")
def new_secret(file: Annotated[Path, typer.Argument(help="File to make, mode 0600.")]) -> None:
    """Makes the secret of a new cluster; the file goes to all of its nodes, and nowhere else."""
    with _errors_as_exits():
        make_shared_secret(file)


@app.command("cluster-token")
def cluster_token(
    context: typer.Context,
    config: Config = None,
    cluster_secret: Annotated[str | None, typer.Option(help=_help("cluster_secret"))] = None,
) -> None:
    """Prints the token that clients of a cluster show; who has it can read and write blocks."""
    from kvstore_proto.cluster.rpc import client_token

    with _errors_as_exits():
        named = {} if cluster_secret is None else {"cluster_secret": cluster_secret}
        given = {**context.obj, **named}
        settings = load(given, config or context.meta["config"]).settings
        print(client_token(load_shared_secret(settings.shared_secret)))


def _as_json(loaded: Loaded) -> str:
    values = loaded.settings.model_dump(mode="json")
    rows: Mapping[str, object] = {
        field: {"value": values[field], "origin": origin.kind, "name": origin.name or None}
        for field, origin in loaded.origins.items()
    }
    return json.dumps(rows, indent=2)


def _as_table(loaded: Loaded) -> str:
    rows = [
        (field, _as_words(getattr(loaded.settings, field), field), str(origin))
        for field, origin in loaded.origins.items()
    ]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{a:{widths[0]}}  {b:{widths[1]}}  {c}" for a, b, c in rows)


def _as_words(value: object, field: str) -> str:
    if field in _SIZES and isinstance(value, int):
        return format_size(value)
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(value)


@contextlib.contextmanager
def _errors_as_exits() -> Iterator[None]:
    """One line on standard error, and the exit code of the error's class."""
    try:
        yield
    except (KVStoreError, OSError) as error:
        print(f"kvstore-server: {error}", file=sys.stderr)
        raise typer.Exit(getattr(error, "code", 1)) from None


def main() -> None:
    """Entry point. A wrong flag is one line on standard error too, with exit code 2."""
    settle()
    try:
        code = app(standalone_mode=False)
    except TyperException as error:
        print(f"kvstore-server: {error.format_message()}", file=sys.stderr)
        sys.exit(2)
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
