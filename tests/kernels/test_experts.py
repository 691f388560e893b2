"""Routed experts beside float64, in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore_kernels.errors import KernelArgumentError
from kvstore_kernels.experts import (
    FEW,
    MANY,
    MAX_PAIRS,
    ExpertConfig,
    RouteForm,
    config_for,
    route,
    routed_experts,
)
from kvstore_kernels.experts_reference import experts_reference, route_reference

SMALL = ExpertConfig(rows=16, tile=16, depth=16)
V3 = RouteForm(
    experts=8,
    top_k=3,
    groups=4,
    top_groups=2,
    ranked_by=2,
    sigmoid=True,
    normalize=True,
    scaling=2.5,
)
FORMS = {
    "v3": V3,
    "all groups": replace(V3, top_groups=4),
    "greedy": RouteForm(experts=6, top_k=3, scaling=16.0),
    "groups by one": RouteForm(experts=12, top_k=2, groups=4, top_groups=3),
    "of odd sizes": RouteForm(experts=21, top_k=5, groups=7, top_groups=3, ranked_by=2),
    "one": RouteForm(experts=1, top_k=1, normalize=True),
    "wide": RouteForm(experts=256, top_k=8, groups=8, top_groups=4, ranked_by=2, sigmoid=True),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_best_are_chosen(name: str) -> None:
    form = FORMS[name]
    torch.manual_seed(3)
    logits = torch.randn(5, form.experts + 3)[:, : form.experts]
    correction = torch.randn(form.experts) if form.sigmoid else None
    weights, chosen = route(form, logits, correction)
    wanted, which = route_reference(form, logits, correction)
    assert torch.equal(chosen.long(), which)
    assert torch.allclose(weights.double(), wanted, rtol=1e-5, atol=1e-7)
    assert weights.dtype is torch.float32
    assert chosen.dtype is torch.int32


def test_of_equals_the_first_is_chosen() -> None:
    for form in (V3, FORMS["groups by one"]):
        _, chosen = route(form, torch.zeros(2, form.experts))
        assert chosen.tolist() == [list(range(form.top_k))] * 2


def test_what_is_no_number_stays_so_and_leads_nowhere() -> None:
    logits = torch.zeros(3, V3.experts)
    logits[1] = torch.nan
    logits[2, 3] = torch.nan
    weights, chosen = route(V3, logits)
    assert bool(((chosen >= 0) & (chosen < V3.experts)).all())
    assert bool(weights[1].isnan().all())
    assert 3 not in chosen[2].tolist()


def made(
    tokens: int,
    top_k: int,
    *,
    experts: int = 4,
    dim: int = 32,
    inner: int = 24,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """The arguments of a call; each token's experts differ."""
    torch.manual_seed(7)
    order = torch.rand(tokens, experts).argsort(-1)
    return {
        "x": torch.randn(tokens, dim + 5)[:, :dim].to(dtype),
        "gate_up": (torch.randn(experts, 2 * inner, dim) * dim**-0.5).to(dtype),
        "down": (torch.randn(experts, dim, inner) * inner**-0.5).to(dtype),
        "weights": torch.rand(tokens, top_k),
        "chosen": order[:, :top_k].int().contiguous(),
    }


@pytest.mark.parametrize(
    ("tokens", "top_k", "sizes", "config"),
    [
        (1, 1, {}, None),
        (3, 2, {}, SMALL),
        (20, 3, {"dim": 33, "inner": 17}, SMALL),
        (40, 2, {"experts": 3}, None),
        (2, 2, {"experts": 5, "dim": 130, "inner": 34}, FEW),
        (70, 1, {"experts": 2, "dim": 64, "inner": 64}, MANY),
    ],
)
def test_the_weighed_sum(tokens: int, top_k: int, sizes: Any, config: Any) -> None:
    call = made(tokens, top_k, **sizes)
    out = torch.full(call["x"].shape, torch.nan)
    assert routed_experts(**call, config=config, out=out) is out
    assert torch.allclose(out.double(), experts_reference(**call), rtol=1e-4, atol=1e-5)


def test_float16() -> None:
    call = made(5, 2, dtype=torch.float16)
    out = routed_experts(**call)
    assert out.dtype is torch.float16
    assert torch.allclose(out.double(), experts_reference(**call), rtol=1e-2, atol=1e-3)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(
    chosen=st.lists(st.lists(st.integers(-3, 9), min_size=2, max_size=2), min_size=1, max_size=9),
    first=st.integers(0, 5),
)
def test_experts_that_are_elsewhere_add_nothing(chosen: list[list[int]], first: int) -> None:
    """Shares of several ranks add up, and numbers of no expert do no harm."""
    call = made(len(chosen), 2, dim=16, inner=16)
    call["chosen"] = torch.tensor(chosen, dtype=torch.int32)
    got = routed_experts(**call, first=first, config=SMALL)
    wanted = experts_reference(**call, first=first)
    assert torch.allclose(got.double(), wanted, rtol=1e-4, atol=1e-5)


def test_a_large_batch_takes_several_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    call = made(9, 2)
    whole = routed_experts(**call, config=SMALL)
    monkeypatch.setattr("kvstore_kernels.experts.MAX_PAIRS", 5)
    assert torch.equal(routed_experts(**call, config=SMALL), whole)


def test_no_tokens() -> None:
    assert routed_experts(**made(0, 2)).shape == (0, 32)
    weights, chosen = route(V3, torch.empty(0, 8))
    assert weights.shape == chosen.shape == (0, 3)


def test_more_pairs_of_each_expert_take_larger_tiles() -> None:
    assert config_for(128, 16) is FEW
    assert config_for(MAX_PAIRS, 16) is MANY


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"x": torch.ones(3, 32, dtype=torch.float64)}, "x must be bfloat16"),
        ({"x": torch.ones(3, 0)}, "x must have rows of at least one"),
        ({"gate_up": torch.ones(4, 47, 32)}, "gate_up must have shape"),
        ({"gate_up": torch.ones(4, 32, 48).transpose(1, 2)}, "gate_up must have neighbouring"),
        ({"gate_up": torch.ones(4, 96, 32)[:, ::2]}, "gate_up must be contiguous"),
        ({"down": torch.ones(4, 31, 24)}, "down must have shape"),
        ({"down": torch.ones(0, 32, 24)}, "down must be of 1 to 4096 experts"),
        ({"down": torch.ones(4, 32, 24).half()}, "down must be float32"),
        ({"weights": torch.ones(3, 1)}, "weights must have shape"),
        ({"weights": torch.ones(3, 4)[:, :2]}, "weights must be contiguous"),
        ({"chosen": torch.ones(3, 2).long()}, "chosen must be int32"),
        ({"chosen": torch.ones(2, 2).int()}, "chosen must have shape"),
        ({"chosen": torch.ones(3, 65).int()}, "chosen must be 1 to 64 of each token"),
        ({"out": torch.ones(3, 31)}, "out must have shape"),
        ({"chosen": torch.ones(3, 2).int().to("meta")}, "chosen must be on cpu"),
    ],
)
def test_wrong_arguments_are_named(changed: Any, problem: str) -> None:
    with pytest.raises(KernelArgumentError, match=problem):
        routed_experts(**{**made(3, 2), **changed})


def test_x_is_not_written() -> None:
    call = made(3, 2)
    with pytest.raises(KernelArgumentError, match="out must not be x"):
        routed_experts(**call, out=call["x"])


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"experts": 0}, "experts must be 1 to 4096"),
        ({"groups": 3}, "groups must divide the 8 experts, not 3"),
        ({"top_groups": 5}, "top_groups must be 1 to 4"),
        ({"ranked_by": 3}, "ranked_by must be 1 to 2"),
        ({"top_k": 5}, "top_k must be 1 to 4, not 5"),
    ],
)
def test_wrong_forms_are_named(changed: Any, problem: str) -> None:
    with pytest.raises(KernelArgumentError, match=problem):
        replace(V3, **changed)


def test_wrong_logits_are_named() -> None:
    with pytest.raises(KernelArgumentError, match="logits must have shape"):
        route(V3, torch.ones(2, 7))
    with pytest.raises(KernelArgumentError, match="logits must be float32"):
        route(V3, torch.ones(2, 8).half())
    with pytest.raises(KernelArgumentError, match="correction must have shape"):
        route(V3, torch.ones(2, 8), torch.ones(7))
