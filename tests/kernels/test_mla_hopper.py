"""What both launchers of latent attention in Gluon ask of their arguments."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from kvstore_kernels.errors import KernelArgumentError
from kvstore_kernels.fused import NewLatents
from kvstore_kernels.mla_gluon import MlaTilesForm, MlaTilesWorkspace, mla_decode_tiles
from kvstore_kernels.mla_hopper import described
from kvstore_kernels.mla_reference import RANK, WIDTH
from kvstore_kernels.mla_ring import MlaRingForm, MlaRingWorkspace, mla_decode_ring

SCALE = 192**-0.5


@dataclass
class Kernel:
    form: Any
    workspace: Any
    decode: Any
    planned: str  # the name of what `load` takes


KERNELS = [
    pytest.param(Kernel(MlaRingForm, MlaRingWorkspace, mla_decode_ring, "planned"), id="ring"),
    pytest.param(Kernel(MlaTilesForm, MlaTilesWorkspace, mla_decode_tiles, "schedule"), id="tiles"),
]
both = pytest.mark.parametrize("kernel", KERNELS)


def workspace_of(kernel):
    workspace = kernel.workspace(kernel.form(heads=64, scale=SCALE), max_sequences=2, device="cpu")
    workspace.load(workspace.plan([100, 64]))
    return workspace


def arguments(kernel, **changes):
    right = {
        "q": bf16(2, 1, 64, WIDTH),
        "pages": bf16(4, 64, WIDTH),
        "page_table": torch.zeros(2, 2, dtype=torch.int32),
        "workspace": workspace_of(kernel),
    }
    return {**right, **changes}


def bf16(*shape):
    return torch.zeros(*shape, dtype=torch.bfloat16)


def new_latents(**changes):
    """Somewhere else than in the page table's pages."""
    right = {
        "q_rope": bf16(2, 1, 64, WIDTH - RANK),
        "latents": bf16(2, 1, WIDTH),
        "norm": bf16(RANK),
        "cos": bf16(2, 1, 32),
        "sin": bf16(2, 1, 32),
        "page_ids": torch.full((2, 1), 3),
        "offsets": torch.tensor([[35], [63]]),
        "interleaved": True,
    }
    return NewLatents(**{**right, **changes})


@both
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"q": bf16(3, 1, 64, WIDTH)}, "q must have shape"),
        ({"q": torch.zeros(2, 1, 64, WIDTH)}, "q must be bfloat16"),
        ({"q": bf16(2, 1, 64, WIDTH + 4)[..., :WIDTH]}, "q must have its address and strides"),
        ({"pages": bf16(4, 32, WIDTH)}, "pages must have shape"),
        ({"pages": bf16(0, 64, WIDTH)}, "pages must not be empty"),
        ({"pages": bf16(4, 64, WIDTH + 1)[..., 1:]}, "pages must have its address and strides"),
        ({"pages": bf16(4, WIDTH, 64).mT}, "pages must have neighbouring elements"),
        ({"page_table": torch.zeros(2, 2)}, "page_table must be int32"),
        ({"page_table": torch.zeros(2, 1).int()}, "page_table must have pages for 100 tokens"),
        ({"page_table": torch.full((2, 2), 4).int(), "check": True}, "page_table must have pages"),
        ({"out": bf16(2, 1, 64, WIDTH)}, "out must have shape"),
        ({"out": bf16(2, 1, 64, 1024)[..., :512]}, "out must be contiguous"),
        ({}, "q must be on a CUDA device, not cpu"),
    ],
)
def test_wrong_arguments_are_named(kernel, wrong, message):
    with pytest.raises(KernelArgumentError, match=message):
        kernel.decode(**arguments(kernel, **wrong))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"append": new_latents(norm=bf16(64))}, "append.norm must have shape"),
        ({"append": new_latents(), "check": True}, "append.page_ids must have the page table's"),
    ],
)
def test_wrong_new_tokens_are_named(wrong, message):
    ring = KERNELS[0].values[0]
    with pytest.raises(KernelArgumentError, match=message):
        mla_decode_ring(**arguments(ring, **wrong))


@both
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"heads": 0}, "heads must be"),
        ({"scale": 0.0}, "scale must be"),
        ({"q_tokens": 5}, "q_tokens must be 1 to 4"),
        ({"page_tokens": 96}, "page_tokens must be a multiple of 64"),
    ],
)
def test_wrong_forms_are_named(kernel, wrong, message):
    with pytest.raises(KernelArgumentError, match=message):
        kernel.form(**{"heads": 64, "scale": SCALE, **wrong})


@both
def test_a_workspace_is_for_so_many_sequences(kernel):
    workspace = workspace_of(kernel)
    message = f"{kernel.planned} must be for at most 2 sequences"
    with pytest.raises(KernelArgumentError, match=message):
        workspace.load(workspace.plan([1, 2, 3]))
    with pytest.raises(KernelArgumentError, match="max_sequences must be at least 1"):
        kernel.workspace(workspace.form, max_sequences=0, device="cpu")


@pytest.mark.parametrize("height", [16, 64])
def test_a_layer_of_a_pool_past_2_to_the_31_elements(height):
    pool = torch.empty(1500, 61, 64, WIDTH, dtype=torch.bfloat16)  # never touched
    assert pool.numel() > 2**31
    map_of = described(pool[:, 60], height)
    assert list(map_of.shape) == [1500, 64, WIDTH]
    assert list(map_of.strides) == [61 * 64 * WIDTH, WIDTH, 1]
    assert map_of.base.data_ptr() == pool.data_ptr() + 60 * 64 * WIDTH * 2
