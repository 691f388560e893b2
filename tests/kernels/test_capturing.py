"""Captures of CUDA graphs, as far as they can be seen without a GPU."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch

from kvstore_engines.attention import TorchAttention
from kvstore_engines.kernel_attention import MOST_WORKSPACES, KernelAttention, rows_for
from kvstore_engines.kernel_graphs import MOST_GRAPHS, GraphedModel, graphed
from kvstore_engines.parallel import SingleRank
from kvstore_kernels.capturing import uncollected


def test_nothing_is_collected_inside_and_all_is_as_before_behind_it() -> None:
    with uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(KeyError), uncollected():
        raise KeyError
    assert gc.isenabled()
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_several_threads_keep_the_collector_out() -> None:
    """Until the last of them is through."""
    inside, out = threading.Event(), threading.Event()

    def other() -> None:
        with uncollected():
            inside.set()
            out.wait(60)

    thread = threading.Thread(target=other)
    with uncollected():
        thread.start()
        assert inside.wait(60)
    assert not gc.isenabled()
    out.set()
    thread.join(60)
    assert not thread.is_alive()
    assert gc.isenabled()


def test_what_cannot_be_captured_stays_as_it_is() -> None:
    model: Any = object()
    attention, alone = KernelAttention(), SingleRank()
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    two: Any = type("Two", (), {"size": 2})()
    assert graphed(model, attention, alone, cpu) is model
    assert graphed(model, attention, two, gpu) is model
    assert graphed(model, TorchAttention(), alone, gpu) is model
    assert isinstance(graphed(model, attention, alone, gpu), GraphedModel)


def test_many_sequences_have_few_graphs() -> None:
    assert [rows_for(n) for n in range(1, 9)] == list(range(1, 9))
    assert [rows_for(n) for n in (9, 10, 16, 17, 20, 33, 64, 65)] == [
        10,
        10,
        16,
        20,
        20,
        40,
        64,
        80,
    ]
    sizes = {rows_for(n) for n in range(1, 257)}
    assert len(sizes) <= MOST_GRAPHS
    assert all(n <= rows_for(n) <= max(n, n * 5 // 4) for n in range(1, 1000))


def test_steps_without_graphs_are_planned_as_those_with() -> None:
    attention, device = KernelAttention(), torch.device("cpu")
    workspaces = {n: attention._workspace_for(n, device) for n in (3, 9)}
    for n, workspace in workspaces.items():
        assert workspace.max_sequences == rows_for(n)
        assert workspace.graphs
    assert attention._workspace_for(10, device) is workspaces[9]
    for n in range(30, 30 + 8 * MOST_WORKSPACES, 8):
        attention._workspace_for(n, device)
    assert len(attention._workspaces) == MOST_WORKSPACES
    assert attention._workspace_for(9, device) is not workspaces[9]
