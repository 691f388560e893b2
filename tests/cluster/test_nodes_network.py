"""Nodes on hosts of their own, between which links fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.networks import run_alone, why_not
from kvstore.transfer.choose import available

USABLE = {each.kind for each in available() if each.usable}
FASTEST, *OTHERS = [kind for kind in ("nixl", "ucxx", "grpc") if kind in USABLE]
RUN_S = 150.0


@pytest.fixture(autouse=True)
def namespaces() -> None:
    reason = why_not()
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize(
    "transfer", [FASTEST, *(pytest.param(kind, marks=pytest.mark.long) for kind in OTHERS)]
)
def test_no_get_fails_while_links_and_hosts_do(tmp_path: Path, transfer: str) -> None:
    said = run_alone(["-m", "cluster.partitions", "links", str(tmp_path), transfer], RUN_S)
    print("longest gets, s:", json.loads(said.splitlines()[-1]))


def test_a_client_whose_host_vanished_is_forgotten(tmp_path: Path) -> None:
    said = run_alone(["-m", "cluster.partitions", "vanished", str(tmp_path), "grpc"], RUN_S)
    print(json.loads(said.splitlines()[-1]))
