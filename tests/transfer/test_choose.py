"""Agents by name, and what NIXL is not used for."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket

import pytest

from kvstore.errors import InvalidArgument, Unavailable
from kvstore.transfer import nixl, ucxx
from kvstore.transfer.apart import make_safe_agent
from kvstore.transfer.choose import KINDS, available, make_agent

NIXL = any(map(importlib.util.find_spec, ("nixl_cu13", "nixl_cu12")))


def test_every_kind_that_is_usable_can_be_made() -> None:
    found = available()
    assert {each.kind for each in found} == set(KINDS)
    assert [each.kind for each in found[-2:] if each.usable] == ["grpc", "auto"]
    assert "shm, else" in found[-1].words
    assert "grpc" in found[-1].words
    for each in found:
        if each.usable:
            with contextlib.closing(make_safe_agent(each.kind, "test")) as made:
                assert made.kind == each.kind


def test_another_kind_is_refused() -> None:
    with pytest.raises(InvalidArgument):
        make_agent("pigeon", "test")


def test_a_missing_library_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    for load, wanted in ((nixl.load, "nixl-cu13"), (ucxx.load, "ucxx-cu13")):
        with pytest.raises(Unavailable, match=f"pip install {wanted}"):
            load()
    assert [each.kind for each in available() if each.usable] == ["shm", "grpc", "auto"]


def test_a_host_s_address_is_the_one_on_the_way_to_the_others() -> None:
    assert ucxx.address_towards(["127.0.0.1:7601"]) == "127.0.0.1"
    assert ucxx.address_towards(["without a port", "127.0.0.1:7601"]) == "127.0.0.1"
    assert ucxx.address_towards([]) == socket.gethostname()


@pytest.mark.skipif(nixl.has_rdma(), reason="has RDMA")
def test_nixl_is_not_used_over_tcp_as_that_can_abort_the_other_process() -> None:
    with pytest.raises(Unavailable, match=r"over TCP|no NIXL"):
        make_agent("nixl", "test")


@pytest.mark.skipif(not NIXL, reason="no NIXL is installed")
def test_nixl_leaves_the_environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "all")
    monkeypatch.delenv("UCX_LOG_LEVEL", raising=False)
    before = dict(os.environ)
    with contextlib.closing(make_agent("nixl", "test", over_tcp=True)) as made:
        made.describe()
        assert dict(os.environ) == before
