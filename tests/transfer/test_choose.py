"""Agents by name, and what NIXL is not used for."""

from __future__ import annotations

import contextlib
import importlib

import numpy as np
import pytest
from transfer.peer import TIMEOUT_S, everything, peer

from kvstore.errors import InvalidArgument, Unavailable
from kvstore.transfer import nixl, ucxx
from kvstore.transfer.base import TransferFailed
from kvstore.transfer.choose import KINDS, available, make_agent


def test_every_kind_that_is_usable_can_be_made() -> None:
    found = available()
    assert {each.kind for each in found} == set(KINDS)
    assert found[-1].kind == "grpc"
    assert found[-1].usable
    for each in found:
        if each.usable:
            with contextlib.closing(make_agent(each.kind, "test")) as made:
                assert made.kind == each.kind


def test_another_kind_is_refused() -> None:
    with pytest.raises(InvalidArgument):
        make_agent("pigeon", "test")


def test_a_missing_library_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    for load, wanted in ((nixl.load, "nixl-cu13"), (ucxx.load, "ucxx-cu12")):
        with pytest.raises(Unavailable, match=f"pip install {wanted}"):
            load()
    assert [each.kind for each in available() if each.usable] == ["grpc"]


@pytest.mark.skipif(not available()[0].usable or nixl.has_rdma(), reason="no NIXL, or has RDMA")
def test_nixl_does_not_read_over_tcp_as_that_can_abort_the_other_process() -> None:
    memory = np.zeros(1 << 20, np.uint8)
    with (
        peer("passive", "nixl", memory.nbytes) as other,
        contextlib.closing(make_agent("nixl", "test")) as own,
    ):
        own.register(memory)
        remote = own.connect(other.description, TIMEOUT_S)
        with pytest.raises(TransferFailed, match="abort"):
            remote.read(everything(memory, other.address), TIMEOUT_S)
        remote.write(everything(memory, other.address), TIMEOUT_S)
