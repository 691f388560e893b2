"""Where settings come from, which layer wins, and what a wrong one is told."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvstore import __version__
from kvstore.errors import InvalidArgument, KVStoreError
from kvstore_proto.cluster.rpc import client_token, node_token
from kvstore_server.cli import app
from kvstore_server.secrets_file import load_secret, load_token_path
from kvstore_server.settings import Settings
from kvstore_server.settings_sources import Kind, Loaded, load


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without settings of its own."""
    for name in [name for name in os.environ if name.startswith("KVSTORE_")]:
        monkeypatch.delenv(name)
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path


def file(folder: Path, text: str) -> Path:
    path = folder / "given.toml"
    path.write_text(text)
    return path


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


def test_without_any_setting_the_defaults_hold(home: Path) -> None:
    loaded = load({})
    assert loaded.file is None
    assert {origin.kind for origin in loaded.origins.values()} == {Kind.DEFAULT}
    assert loaded.settings.socket == home / "XDG_RUNTIME_DIR" / "kvstore.sock"
    assert loaded.settings.data_dir == home / "XDG_STATE_HOME" / "kvstore"
    assert (loaded.settings.dram, loaded.settings.grpc_port) == (1 << 30, None)


def test_each_layer_wins_over_the_one_before(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = file(home, 'dram = "2GiB"\neviction = "arc"\ntenants = 2\n')
    monkeypatch.setenv("KVSTORE_EVICTION", "s3fifo")
    monkeypatch.setenv("KVSTORE_TENANTS", "3")
    loaded = load({"tenants": "4"}, config)
    settings, origins = loaded.settings, loaded.origins
    assert (settings.dram, settings.eviction, settings.tenants) == (2 << 30, "s3fifo", 4)
    assert str(origins["dram"]) == f"file {config}"
    assert str(origins["eviction"]) == "environment KVSTORE_EVICTION"
    assert str(origins["tenants"]) == "flag --tenants"
    assert str(origins["socket"]) == "default"


def test_the_file_is_found_by_flag_then_variable_then_user(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = home / "XDG_CONFIG_HOME" / "kvstore" / "server.toml"
    own.parent.mkdir(parents=True)
    own.write_text("tenants = 2")
    assert load({}).file == own
    named = home / "named.toml"
    named.write_text("tenants = 3")
    monkeypatch.setenv("KVSTORE_CONFIG", str(named))
    assert load({}).settings.tenants == 3
    assert load({}, file(home, "tenants = 4")).settings.tenants == 4


ALONE = {
    "socket": "/s/k.sock",
    "dram": "8GiB",
    "data_dir": "/d",
    "nvme": "/n/1:64MiB,/n/2:1GiB",
    "nvme_engine": "nixl",
    "nvme_admission": "every",
    "nvme_write_rate": "100MiB",
    "nvme_scrub_rate": "0",
    "eviction": "arc",
    "tenants": "2",
    "max_blocks": "99",
    "trust": "copy-in",
    "huge_pages": "require",
    "numa_node": "1",
    "prefault": "false",
    "grpc": "false",
    "grpc_port": "0",
    "log_format": "json",
    "log_level": "debug",
}
LISTED = {
    "node_name": "a",
    "peer_listen": "0.0.0.0:7000",
    "peer_advertise": "10.0.0.1:7000",
    "members": "a=10.0.0.1:7000*2,b=10.0.0.2:7000,c=10.0.0.3:7000",
    "replicas": "3",
    "node_weight": "2",
    "transfer": "grpc",
    "repair_rate": "1MiB",
    "cluster_secret": "/s/secret",
    "peer_tls_ca": "/s/ca.pem",
    "peer_tls_certificate": "/s/a.pem",
    "peer_tls_key": "/s/a.key",
    "node_metrics_port": "0",
}
KEPT_BY_ETCD = {
    "node_name": "a",
    "peer_listen": "10.0.0.1:7000",
    "etcd": "https://10.0.0.9:2379",
    "etcd_user": "node",
    "etcd_password_file": "/s/password",
    "etcd_ca": "/s/etcd-ca.pem",
    "etcd_cert": "/s/etcd.pem",
    "etcd_key": "/s/etcd.key",
    "cluster": "blue",
    "peer_insecure": "true",
}
SWITCHES = ("prefault", "grpc", "peer_insecure")


def flags_of(values: dict[str, str]) -> list[str]:
    found = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if name in SWITCHES:
            found.append(f"--{flag}" if value == "true" else f"--no-{flag}")
        else:
            found += [f"--{flag}", value]
    return found


@pytest.mark.parametrize("values", [ALONE, LISTED, KEPT_BY_ETCD])
def test_every_setting_can_be_a_variable_and_a_flag(
    values: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {*ALONE, *LISTED, *KEPT_BY_ETCD} == set(Settings.model_fields)
    for name, value in values.items():
        monkeypatch.setenv(f"KVSTORE_{name.upper()}", value)
    from_environment = load({}).settings
    for name in values:
        monkeypatch.delenv(f"KVSTORE_{name.upper()}")
    status, out, _ = run(*flags_of(values), "config", "show", "--json")
    assert status == 0
    shown = {name: row["value"] for name, row in json.loads(out).items()}
    assert shown == from_environment.model_dump(mode="json")
    defaults = load({}).settings.model_dump(mode="json")
    assert all(shown[name] != defaults[name] for name in values)


def test_sizes_and_volumes_are_read() -> None:
    settings = load(ALONE).settings
    assert settings.dram == 8 << 30
    assert [(str(each.path), each.nbytes) for each in settings.nvme] == [
        ("/n/1", 64 << 20),
        ("/n/2", 1 << 30),
    ]
    assert [each.engine for each in settings.volumes] == ["nixl", "nixl"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({}, "either members or etcd, and not both"),
        ({"members": "a=h:1,b=h:2", "etcd": "http://h:1"}, "either members or etcd"),
        ({"members": "a=h:1"}, "2 replicas cannot be on 1 nodes"),
        ({"members": "a=h"}, "'h' of a is not HOST:PORT"),
        ({"etcd": "http://h", "trust": "copy-in"}, "trust must be direct"),
        ({"etcd": "http://h", "peer_listen": "0.0.0.0:7000"}, "or say peer_insecure"),
        ({"etcd": "http://h", "peer_tls_ca": "/ca"}, "peer_tls_key go together"),
        ({"etcd": "http://h", "node_name": "a b"}, "1 to 63 letters"),
        ({"etcd": "http://h", "etcd_user": "u"}, "etcd_password_file go together"),
        ({"etcd": "https://h", "etcd_key": "/key"}, "etcd_cert and etcd_key go together"),
        ({"etcd": "http://h", "etcd_ca": "/ca"}, "for endpoints with https://"),
        ({"members": "a=h:1,b=h:2", "etcd_ca": "/ca"}, "need etcd"),
    ],
)
def test_settings_of_a_node_that_do_not_fit_together_are_refused(
    flags: dict[str, str], words: str
) -> None:
    with pytest.raises(InvalidArgument, match=words) as caught:
        load({"node_name": "a", **flags})
    assert caught.value.field == "flag --node-name"


def test_the_file_s_node_can_be_taken_back(home: Path) -> None:
    config = file(home, 'node_name = "a"\netcd = "http://h"\ncluster_secret = "~/s"\n')
    assert load({}, config).settings.cluster_secret == home / "HOME" / "s"
    alone = load({"node_name": "none", "cluster_secret": "none"}, config).settings
    assert (alone.node_name, alone.cluster_secret) == (None, None)


def test_a_flag_may_come_again_for_each_volume() -> None:
    status, out, _ = run("--nvme", "/a:64MiB", "--nvme", "/b:1GiB", "config", "show")
    assert status == 0
    assert "/a:64 MiB,/b:1 GiB" in out


def test_an_optional_number_can_be_taken_back(home: Path) -> None:
    config = file(home, "grpc_port = 50051\nnuma_node = 0\n")
    loaded = load({"grpc_port": "none", "numa_node": "none"}, config)
    assert (loaded.settings.grpc_port, loaded.settings.numa_node) == (None, None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dram = \n", "line 1"),
        ("tenants = 1\ndramm = 3\n", "did you mean dram?"),
        ("grpc-port = 1\n", "did you mean grpc_port?"),
        ("zzz = 1\n", "there are socket, dram"),
        ('dram = "much"\n', "dram = 'much': 'much' is no size"),
        ("dram = true\n", "is no size"),
        ('dram = "4KiB"\n', "dram = '4KiB': should be 1 MiB or more"),
        ("tenants = true\n", "whole number"),
        ('nvme = "/a"\n', "is not DIR:SIZE"),
        ('nvme = "/a:1MiB"\n', "a volume needs at least 64 MiB"),
        ('nvme = ["/a:much"]\n', "'much' is no size"),
        ("nvme = 3\n", "expected DIR:SIZE"),
        ("nvme_write_rate = -1\n", "greater than or equal to 0"),
        ('nvme_engine = "uring"\n', "should be 'pread' or 'nixl'"),
        ('nvme_admission = "some"\n', "should be 'read' or 'every'"),
        ("tenants = 0\n", "tenants = 0"),
        ('dram = "8MiB"\ntenants = 9\n', "raise dram or lower tenants"),
        ('dram = "1MiB"\nmax_blocks = 257\n', "holds at most 256"),
        ("max_blocks = 2.5\n", "valid integer"),
        ('eviction = "fifo"\n', "should be 'lru', 'arc' or 's3fifo'"),
        ("grpc_port = 70000\n", "grpc_port = 70000"),
        ("[grpc]\nport = 1\n", "should be a valid boolean"),
        ('log_level = "loud"\n', "'warning' or 'error'"),
        (f'socket = "/{"x" * 110}"\n', "choose a shorter one"),
        ("socket = 5\n", "socket = 5"),
    ],
)
def test_a_wrong_file_is_named_with_its_key(home: Path, text: str, words: str) -> None:
    config = file(home, text)
    with pytest.raises(InvalidArgument) as caught:
        load({}, config)
    assert caught.value.field == f"file {config}"
    assert words in caught.value.message
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_text_is_refused(home: Path) -> None:
    path = home / "given.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidArgument, match="UTF-8"):
        load({}, path)


def test_a_file_that_is_not_there_is_named_with_who_asked_for_it(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidArgument, match=r"--config: .*none.toml is no file"):
        load({}, home / "none.toml")
    monkeypatch.setenv("KVSTORE_CONFIG", str(home))  # a folder
    with pytest.raises(InvalidArgument, match="KVSTORE_CONFIG: "):
        load({})


def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSTORE_TENANTS", "many")
    with pytest.raises(InvalidArgument, match=r"environment KVSTORE_TENANTS: tenants = 'many'"):
        load({})


def test_a_mistyped_variable_is_refused_and_a_stranger_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KVSTORE_SERVICE_HOST", "10.0.0.1")  # set by an orchestrator
    monkeypatch.setenv("KVSTORE_PORT", "tcp://10.0.0.1:1")
    monkeypatch.setenv("KVSTORE_CLUSTER_TLS_CERTIFICATE", "/client.pem")  # its client's
    assert load({}).settings.tenants == 1
    monkeypatch.setenv("KVSTORE_TENNANTS", "2")
    with pytest.raises(InvalidArgument, match="KVSTORE_TENNANTS: write KVSTORE_TENANTS"):
        load({})


def test_all_problems_are_said_at_once_on_one_line(home: Path) -> None:
    config = file(home, 'eviction = "fifo"\n')
    status, out, err = run("--config", str(config), "--dram", "much")
    assert (status, out) == (2, "")
    assert err.startswith("kvstore-server: flag --dram: dram = 'much'")
    assert f"; file {config}: eviction = 'fifo'" in err
    assert err.count("\n") == 1


def test_a_refused_start_creates_nothing(home: Path) -> None:
    before = sorted(home.rglob("*"))
    assert run("--tenants", "0")[0] == 2
    assert run("--dram", "9999TiB")[0] == 2
    assert sorted(home.rglob("*")) == before


def test_a_pool_larger_than_the_memory_is_refused_with_both_figures() -> None:
    status, _, err = run("--dram", "9999TiB")
    assert status == 2
    assert err.startswith("kvstore-server: dram: a pool of 9999 TiB does not fit into the ")
    assert "GiB of memory available" in err


def test_config_show_says_where_each_value_came_from(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = file(home, 'dram = "2GiB"\n')
    monkeypatch.setenv("KVSTORE_TENANTS", "2")
    status, out, _ = run("--grpc-port", "0", "config", "show", "--config", str(config))
    assert status == 0
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert set(rows) == set(Settings.model_fields)
    assert rows["dram"].split(None, 3)[1:] == ["2", "GiB", f"file {config}"]
    assert rows["tenants"].endswith("environment KVSTORE_TENANTS")
    assert rows["grpc_port"].endswith("flag --grpc-port")
    assert rows["eviction"].endswith("default")


def test_config_show_as_json(home: Path) -> None:
    config = file(home, 'dram = "2GiB"\n')
    _, out, _ = run("--config", str(config), "config", "show", "--json")
    rows = json.loads(out)
    assert rows["dram"] == {"value": 2 << 30, "origin": "file", "name": str(config)}
    assert rows["numa_node"] == {"value": None, "origin": "default", "name": None}


def test_config_check(home: Path) -> None:
    assert run("config", "check") == (0, "ok: no settings file\n", "")
    status, out, err = run("config", "check", "--config", str(file(home, "tenants = 0\n")))
    assert (status, out) == (2, "")
    assert "tenants = 0" in err


def test_version_and_unknown_flags() -> None:
    assert run("--version") == (0, f"kvstore-server {__version__}\n", "")
    status, _, err = run("--drem", "1GiB")
    assert status == 2
    assert "--drem" in err


def test_paths_do_not_depend_on_the_working_folder(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    loaded: Loaded = load({"socket": "here/k.sock", "data_dir": "~/state"})
    assert loaded.settings.socket == home / "here" / "k.sock"
    assert loaded.settings.data_dir == home / "HOME" / "state"


def test_the_secret_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    secret = load_secret(folder)
    assert len(secret) == 32
    assert load_secret(folder) == secret
    assert (folder / "chain.key").stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in folder.iterdir()] == ["chain.key"]


def test_the_token_is_made_once_and_fits_a_header(tmp_path: Path) -> None:
    path = load_token_path(tmp_path)
    token = path.read_text()
    assert load_token_path(tmp_path).read_text() == token
    assert len(token.strip()) >= 43
    assert token.strip().isascii()
    assert path.stat().st_mode & 0o777 == 0o600


def test_damaged_or_open_secrets_are_refused(tmp_path: Path) -> None:
    (tmp_path / "chain.key").write_bytes(b"short")
    (tmp_path / "chain.key").chmod(0o600)
    with pytest.raises(KVStoreError, match="holds 5 bytes, not 32"):
        load_secret(tmp_path)
    (tmp_path / "grpc.token").write_text("x")
    (tmp_path / "grpc.token").chmod(0o600)
    with pytest.raises(KVStoreError, match="holds no token"):
        load_token_path(tmp_path)
    (tmp_path / "grpc.token").chmod(0o604)
    with pytest.raises(InvalidArgument, match="chmod 600"):
        load_token_path(tmp_path)


def test_a_cluster_s_secret_is_made_once_and_its_token_shown(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    assert run("new-secret", str(path)) == (0, "", "")
    secret = path.read_bytes()
    assert (len(secret), path.stat().st_mode & 0o777) == (32, 0o600)
    status, _, err = run("new-secret", str(path))
    assert status == 2
    assert f"{path} is there already" in err
    assert path.read_bytes() == secret
    status, _, err = run("new-secret", str(tmp_path / "none" / "secret"))
    assert status == 2
    assert "cannot be written: No such file" in err

    shown = (0, client_token(secret) + "\n", "")
    assert run("cluster-token", "--cluster-secret", str(path)) == shown
    assert run("--cluster-secret", str(path), "cluster-token") == shown
    assert client_token(secret) != node_token(secret)


def test_a_cluster_without_a_secret_of_its_own_goes_by_the_daemon_s(tmp_path: Path) -> None:
    secret = load_secret(tmp_path)
    assert run("--data-dir", str(tmp_path), "cluster-token")[1] == client_token(secret) + "\n"


def test_a_secret_that_is_none_shows_no_token(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"x" * 65)
    for mode, words in ((0o604, "chmod 600"), (0o600, "has 65 bytes, not 16 to 64")):
        path.chmod(mode)
        status, out, err = run("cluster-token", "--cluster-secret", str(path))
        assert (status, out) == (2, "")
        assert words in err
