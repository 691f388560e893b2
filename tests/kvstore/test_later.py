"""Packages import what is asked of them, and processes no more than they have a use for."""

from __future__ import annotations

import ast
import gc
import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import kvstore
from kvstore.lasting import settle
from kvstore.later import later

PACKAGES = ("kvstore", "kvstore.index", "kvstore.session", "kvstore.store", "kvstore_client")


def imported_by(program: str) -> set[str]:
    """All modules of a new process once it has run this."""
    said = subprocess.run(
        [sys.executable, "-c", f"{program}\nimport sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(said.stdout.split())


@pytest.mark.parametrize("name", PACKAGES)
def test_every_public_name_is_there_and_is_what_type_checkers_read(name: str) -> None:
    package = importlib.import_module(name)
    assert package.__file__
    (read,) = [
        node
        for node in ast.parse(Path(package.__file__).read_text()).body
        if isinstance(node, ast.If)
    ]
    said = {
        each.name: importlib.import_module(node.module)
        for node in read.body
        if isinstance(node, ast.ImportFrom) and node.module
        for each in node.names
    }
    assert said.keys() == set(package.__all__) - {"__version__"}
    for each, module in said.items():
        assert getattr(package, each) is getattr(module, each)


def test_modules_are_there_without_being_imported_and_others_are_not() -> None:
    assert isinstance(kvstore.errors, ModuleType)  # type: ignore[attr-defined]
    for name in ("no_such", "__wrapped__"):
        with pytest.raises(AttributeError, match=f"module 'kvstore' has no attribute '{name}'"):
            getattr(kvstore, name)


def test_a_module_that_cannot_be_imported_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "later_package").mkdir()
    (tmp_path / "later_package" / "broken.py").write_text("import no_such_module_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
        later("later_package", {})("broken")


@pytest.mark.parametrize(
    ("program", "without"),
    [
        ("import kvstore, kvstore.errors, kvstore.cluster.members", {"numba", "grpc"}),
        ("import kvstore.transfer.apart", {"numba", "grpc"}),
        ("from kvstore_client import KVStoreClient", {"grpc", "kvstore.store.store"}),
        ("import kvstore_server.serve", {"grpc", "kvstore.session.local"}),
    ],
)
def test_a_process_imports_only_what_it_has_a_use_for(program: str, without: set[str]) -> None:
    assert not imported_by(program) & without


def test_what_was_imported_is_not_gone_over_again() -> None:
    before = gc.get_freeze_count()
    gc.disable()
    settle()
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before > 0  # by the tests' own start
    made = [[] for _ in range(3)]
    gc.collect()
    assert gc.is_tracked(made)
