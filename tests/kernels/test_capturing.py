"""Captures of CUDA graphs, as far as they can be seen without a GPU."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from engines.wide import save_wide

from kvstore_engines.checkpoint import load_checkpoint
from kvstore_engines.kernel_attention import KernelAttention
from kvstore_engines.kernel_graphs import GraphedModel, graphed
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


def test_what_cannot_be_captured_stays_as_it_is(tmp_path: Any) -> None:
    config = load_checkpoint(save_wide(tmp_path), torch.float32, torch.device("cpu")).config
    model: Any = object()
    attention, alone = KernelAttention(), SingleRank()
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    routed = replace(config, moe=object())
    two: Any = type("Two", (), {"size": 2})()
    assert graphed(model, attention, config, alone, cpu) is model
    assert graphed(model, attention, routed, alone, gpu) is model
    assert graphed(model, attention, config, two, gpu) is model
    assert graphed(model, object(), config, alone, gpu) is model
    assert isinstance(graphed(model, attention, config, alone, gpu), GraphedModel)
