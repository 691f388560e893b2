"""The documents' code runs as it stands, against an embedded store and a real daemon."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from daemon import daemon
from kvstore import Session
from kvstore.cluster.site import Counters
from kvstore.sizes import format_size
from kvstore_client import AsyncKVStoreClient, KVStoreClient
from kvstore_client.cli import cluster_commands
from kvstore_client.cli.app import app as cli
from kvstore_server.settings import Settings

ROOT = Path(__file__).parents[2]
API = ROOT / "docs" / "api.md"
EMBEDDED, CLIENT, ASYNCIO = "## In your own process", "## With a daemon", "## asyncio"


@pytest.fixture
def default_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A daemon where a client looks that was told nothing."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with daemon(tmp_path, "--dram", "256MiB"):
        yield


def code_of(path: Path, *, without: tuple[str, ...] = ()) -> str:
    """All Python of a page, less that of some sections, each line where it is in the file."""
    lines, section, inside = [], "", False
    for line in path.read_text().splitlines():
        if line.startswith("## ") and not inside:
            section = line
        fence = line.startswith("```")
        lines.append(line if inside and not fence and section not in without else "")
        if fence:
            inside = line == "```python"
    return "\n".join(lines)


def execute(path: Path, code: str, **names: Any) -> dict[str, Any]:
    """Runs the code; a failure shows the page and the line."""
    found = dict(names)
    exec(compile(code, str(path), "exec"), found)
    return found


def test_the_api_page_runs_in_one_process() -> None:
    code = code_of(API, without=(CLIENT, ASYNCIO))
    assert "KVStore(" in code
    check_api(execute(API, code))


@pytest.mark.usefixtures("default_daemon")
def test_the_api_page_runs_with_a_daemon(capsys: pytest.CaptureFixture[str]) -> None:
    check_api(execute(API, code_of(API, without=(EMBEDDED,))))
    assert capsys.readouterr().out.splitlines()[-1] == "4"


def check_api(names: dict[str, Any]) -> None:
    """What the page says comes out of it."""
    assert (names["matched"].count, names["hits"], names["skip"]) == (4, 4, 64)
    assert (names["first"].waiting, names["last"].stored) == (1, 1)
    np.testing.assert_array_equal(names["pages"], names["blocks"])


@pytest.mark.usefixtures("default_daemon")
@pytest.mark.parametrize("way", ["embedded", "daemon"])
def test_the_readme_s_code_runs(way: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = code_of(ROOT / "README.md")
    if way == "daemon":  # where the store is said to have the same methods
        code, opened = re.subn(r"\bKVStore\(.*?\)", "KVStoreClient()", code)
        assert opened == 1
    names = execute(ROOT / "README.md", code, KVStoreClient=KVStoreClient)
    for each in names.values():
        if isinstance(each, KVStoreClient):
            each.close()
    matched, got = capsys.readouterr().out.splitlines()
    assert matched == "4"
    assert got.count("Hit(") == 4
    np.testing.assert_array_equal(names["targets"], names["blocks"])


@pytest.mark.parametrize("kind", [Session, KVStoreClient, AsyncKVStoreClient])
def test_the_api_page_shows_every_method(kind: type) -> None:
    code = code_of(API)
    methods = {name for name in vars(kind) if not name.startswith("_")} - {"connect"}
    assert len(methods) == 13
    assert [name for name in sorted(methods) if f"store.{name}(" not in code] == []


def test_the_settings_page_has_each_setting_with_its_default() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    rows = re.findall(r"^\| (`.+?`) \| (.+?) \|", page, re.MULTILINE)
    shown = {name: default for names, default in rows for name in re.findall(r"`(\w+)`", names)}
    assert set(shown) == set(Settings.model_fields)
    for name, field in Settings.model_fields.items():
        default = field.default
        if isinstance(default, bool | str | int) and default != "":
            word = str(default).lower()
            if type(default) is int and default >= 1 << 20:
                word = format_size(default).replace(" ", "")
            assert shown[name] == f"`{word}`", name


def test_the_command_page_has_each_command() -> None:
    page = (ROOT / "docs" / "cli.md").read_text()
    rows = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    names = {command.callback.__name__ for command in cli.registered_commands if command.callback}
    names |= {str(group.name) for group in cli.registered_groups}
    assert names <= rows
    for command in cluster_commands.app.registered_commands:
        assert command.callback
        assert f"kvstore cluster {command.callback.__name__}" in page


def test_the_cluster_page_has_each_counter() -> None:
    page = (ROOT / "docs" / "cluster.md").read_text()
    rows = page[page.index("## Watching it") :]
    assert [name for name in Counters.__slots__ if f"`{name}`" not in rows] == []


def test_lines_of_code_are_short_and_links_lead_somewhere() -> None:
    for path in ROOT.glob("docs/*.md"):
        text = path.read_text()
        for target, _, anchor in (m.partition("#") for m in re.findall(r"\]\(([^)]+)\)", text)):
            if "://" in target:
                continue
            page = path.parent / target if target else path
            assert page.exists(), f"{path.name}: {target}"
            if not anchor:  # maybe a picture
                continue
            headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
            assert anchor in slugs, f"{path.name}: #{anchor}"
        assert max(map(len, code_of(path).splitlines())) <= 100, path.name
