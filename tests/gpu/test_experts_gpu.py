"""Routed experts on a GPU: beside float64, a hundred times, in a graph, and at full width."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvstore_kernels.experts import FEW, MANY, RouteForm, route, routed_experts
from kvstore_kernels.experts_reference import experts_reference, route_reference

# Of a norm. Two roundings to that dtype: of what is between the products, and of the sum.
MAX_ERROR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
REPEATS = 100
V3 = RouteForm(
    experts=256,
    top_k=8,
    groups=8,
    top_groups=4,
    ranked_by=2,
    sigmoid=True,
    normalize=True,
    scaling=2.5,
)
FORMS = {
    "v3": V3,
    "greedy": RouteForm(experts=64, top_k=6, scaling=16.0),
    "of odd sizes": RouteForm(experts=21, top_k=5, groups=7, top_groups=3, ranked_by=2),
    "many": RouteForm(experts=4096, top_k=64),
}


@pytest.fixture(autouse=True)
def _seed(gpu: torch.device) -> None:
    torch.manual_seed(17)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("tokens", [1, 16, 1000])
def test_the_best_are_chosen(name: str, tokens: int) -> None:
    form = FORMS[name]
    logits = torch.randn(tokens, form.experts, device="cuda")
    correction = torch.rand(form.experts, device="cuda") if form.sigmoid else None
    weights, chosen = route(form, logits, correction)
    wanted, which = route_reference(form, logits, correction)
    # Scores that float32 cannot tell apart may change places.
    same = (chosen == which).all(-1)
    assert float(same.double().mean()) > 0.99
    assert torch.allclose(weights[same].double(), wanted[same], rtol=1e-5, atol=1e-7)
    for _ in range(REPEATS):
        again = route(form, logits, correction)
        assert torch.equal(again[0], weights)
        assert torch.equal(again[1], chosen)


def made(
    tokens: int, experts: int, top_k: int, dim: int, inner: int, dtype: torch.dtype
) -> dict[str, Any]:
    """The arguments of a call; each token's experts differ."""

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, device="cuda") * shape[-1] ** -0.5).to(dtype)

    order = torch.rand(tokens, experts, device="cuda").argsort(-1)
    return {
        "x": torch.randn(tokens, dim + 8, device="cuda").to(dtype)[:, :dim],
        "gate_up": random(experts, 2 * inner, dim),
        "down": random(experts, dim, inner),
        "weights": torch.rand(tokens, top_k, device="cuda"),
        "chosen": order[:, :top_k].int().contiguous(),
    }


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "dim", "inner", "dtype"),
    [
        (1, 16, 4, 7168, 2048, torch.bfloat16),
        (16, 16, 4, 7168, 2048, torch.bfloat16),
        (16, 256, 8, 2048, 512, torch.bfloat16),
        (300, 16, 4, 2048, 1408, torch.bfloat16),
        (3000, 8, 6, 512, 256, torch.bfloat16),
        (33, 5, 2, 200, 72, torch.float16),
        (7, 3, 2, 131, 65, torch.bfloat16),
        (20, 4, 2, 256, 128, torch.float32),
        (700, 4, 2, 256, 128, torch.float32),
    ],
)
def test_the_weighed_sum(
    tokens: int, experts: int, top_k: int, dim: int, inner: int, dtype: torch.dtype
) -> None:
    call = made(tokens, experts, top_k, dim, inner, dtype)
    out = torch.full((tokens, dim), torch.nan, device="cuda", dtype=dtype)
    routed_experts(**call, out=out)
    wanted = experts_reference(**call)
    assert float((out.double() - wanted).norm() / wanted.norm()) < MAX_ERROR[dtype]
    differ = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(REPEATS):
        differ += (routed_experts(**call) != out).sum()
    assert int(differ) == 0


@pytest.mark.parametrize("config", [FEW, MANY])
def test_ranks_add_up(config: Any) -> None:
    call = made(40, 6, 3, 512, 256, torch.bfloat16)
    whole = routed_experts(**call, config=config).double()
    parts = torch.zeros_like(whole)
    for share in (slice(0, 2), slice(2, 6)):
        mine = {**call, "gate_up": call["gate_up"][share], "down": call["down"][share]}
        parts += routed_experts(**mine, first=share.start, config=config).double()
    assert float((parts - whole).norm() / whole.norm()) < 1e-2


def test_a_graph_routes_other_tokens() -> None:
    """What was chosen at capture does not matter at a replay."""
    call = made(16, 32, 4, 512, 256, torch.bfloat16)
    router = torch.randn(32, 512, device="cuda")
    form = RouteForm(experts=32, top_k=4, normalize=True)

    def step(x: torch.Tensor) -> torch.Tensor:
        weights, chosen = route(form, x.float() @ router.T)
        return routed_experts(x, call["gate_up"], call["down"], weights, chosen)

    x = call["x"].contiguous()
    step(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(x)
    for _ in range(REPEATS):
        x.copy_(torch.randn(x.shape, device="cuda"))
        graph.replay()
        assert torch.equal(out, step(x))


def test_weights_past_two_to_the_31_elements() -> None:
    """The last expert's are beyond; 6 GB."""
    experts, dim, inner = 80, 7168, 2048
    gate_up = torch.zeros(experts, 2 * inner, dim, device="cuda", dtype=torch.bfloat16)
    down = torch.zeros(experts, dim, inner, device="cuda", dtype=torch.bfloat16)
    few = made(3, 1, 1, dim, inner, torch.bfloat16)
    gate_up[-1], down[-1] = few["gate_up"][0], few["down"][0]
    chosen = torch.full((3, 1), experts - 1, dtype=torch.int32, device="cuda")
    got = routed_experts(few["x"], gate_up, down, few["weights"], chosen)
    assert torch.equal(got, routed_experts(**few))
