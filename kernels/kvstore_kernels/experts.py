"""Routed experts (DeepSeek's mixture) in five launches, whatever is chosen, and without the host.

With torch the host reads which experts were chosen, and launches some ten kernels for each. Here:

    route            scores, groups, the best experts and their weights: a token a program
    routed_experts   sort      (token, expert) pairs by expert: an expert a program
                     gate, up  both products and the gated activation, for all experts
                     down      the third product, weighed
                     sum       each token's parts, in the order in which they were chosen

So a step with routed experts can be captured in a graph. The floor is bytes / memory rate: the
weights of each expert that was chosen, read once. A program has some columns of one expert for all
of its tokens, so that for some tens of tokens nothing is read twice; what a program of an expert
that nobody chose takes is two loads. With hundreds of tokens of each expert the products are the
limit, and this is not the fastest that can be.

Nothing is added by atomics: the same input gives the same bits.
"""

# ruff: noqa: PLR0917 - the tensors of one operation, in the order in which they are used

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from kvstore_kernels.checks import check_tensor, require
from kvstore_kernels.compiling import Variant
from kvstore_kernels.experts_kernels import (
    combine_kernel,
    expert_kernel,
    route_kernel,
    sort_kernel,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_EXPERTS = 4096  # of a router: one program holds the scores of all of them
MAX_TOP_K = 64
MAX_PAIRS = 8192  # of one turn; a larger batch takes several, so that its buffers stay small
_SORT_TILE = 1024
_SUM_TILE = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteForm:
    """How a router chooses. Raises KernelArgumentError.

    experts: of the router, in `groups` of equal size. top_k: experts of a token, all of them in its
    `top_groups` best groups, which are ranked by the sum of their `ranked_by` best experts.
    sigmoid: scores are sigmoids of the logits, else a softmax. normalize: a token's weights are
    divided by their sum. scaling: weights are multiplied by it.
    """

    experts: int
    top_k: int
    groups: int = 1
    top_groups: int = 1
    ranked_by: int = 1
    sigmoid: bool = False
    normalize: bool = False
    scaling: float = 1.0

    def __post_init__(self) -> None:
        require(1 <= self.experts <= MAX_EXPERTS, "experts", f"must be 1 to {MAX_EXPERTS}")
        even = self.groups >= 1 and self.experts % self.groups == 0
        require(even, "groups", f"must divide the {self.experts} experts, not {self.groups}")
        require(1 <= self.top_groups <= self.groups, "top_groups", f"must be 1 to {self.groups}")
        require(1 <= self.ranked_by <= self.size, "ranked_by", f"must be 1 to {self.size}")
        most = min(MAX_TOP_K, self.top_groups * self.size)
        require(1 <= self.top_k <= most, "top_k", f"must be 1 to {most}, not {self.top_k}")

    @property
    def size(self) -> int:
        """Experts of a group."""
        return self.experts // self.groups


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertConfig:
    """How the products are compiled: rows of a tile (pairs of one expert), columns of a program,
    depth of a step, and stages, one more than steps in flight."""

    rows: int
    tile: int
    depth: int
    num_warps: int = 4
    num_stages: int = 4


FEW = ExpertConfig(rows=16, tile=64, depth=128)
MANY = ExpertConfig(rows=64, tile=64, depth=64, num_stages=3)


def config_for(pairs: int, experts: int) -> ExpertConfig:
    """The configuration for so many pairs, if experts are chosen about equally often."""
    return FEW if pairs <= FEW.rows * experts else MANY


def route(
    form: RouteForm, logits: torch.Tensor, correction: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's experts and their weights, (tokens, top_k) float32 and int32.

    logits: (tokens, experts) float32, rows at any stride. correction: (experts,), added to scores
    for the choice alone. Experts come with the best first, and of equals the first. Of logits that
    are no numbers the weights are none either; the experts are of the router always. Raises
    KernelArgumentError.
    """
    check_tensor("logits", logits, shape=(None, form.experts), dtypes=(torch.float32,))
    if correction is not None:
        shape, device = (form.experts,), logits.device
        check_tensor("correction", correction, shape=shape, dtypes=DTYPES, device=device)
    tokens = len(logits)
    weights = torch.empty((tokens, form.top_k), dtype=torch.float32, device=logits.device)
    chosen = torch.empty((tokens, form.top_k), dtype=torch.int32, device=logits.device)
    if tokens:
        with _on(logits):
            route_kernel[(tokens,)](
                *(logits, correction, weights, chosen),
                form.scaling,
                logits.stride(0),
                **_route_constants(form),
                num_warps=_route_warps(form),
            )
    return weights, chosen


def routed_experts(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    weights: torch.Tensor,
    chosen: torch.Tensor,
    *,
    first: int = 0,
    config: ExpertConfig | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weighed sum of each token's experts, down(silu(gate(x)) * up(x)).

    x: (tokens, dim) in bfloat16, float16 or float32, rows at any stride. gate_up: (experts, 2 *
    inner, dim) of the same dtype, contiguous, the rows of gate first; down: (experts, dim, inner).
    weights: (tokens, top_k) float32, chosen: (tokens, top_k) int32, contiguous, as `route` gives
    them. first: the number of the first expert that is here; those of other numbers add nothing.
    config: default `config_for`. out: as x, not x itself. Raises KernelArgumentError.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    _check_experts(x, gate_up, down, out)
    _check_pairs(x, weights, chosen)
    each = max(1, MAX_PAIRS // chosen.shape[1])
    for at in range(0, len(x), each):
        turn = slice(at, at + each)
        with _on(x):
            _launch(x[turn], gate_up, down, weights[turn], chosen[turn], first, config, out[turn])
    return out


# --------------------------------------------------------------------------------- launching


def _launch(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    weights: torch.Tensor,
    chosen: torch.Tensor,
    first: int,
    config: ExpertConfig | None,
    out: torch.Tensor,
) -> None:
    experts, dim, inner = down.shape
    tokens, top_k = chosen.shape
    pairs, device = chosen.numel(), x.device
    config = config or config_for(pairs, experts)
    order = torch.empty(pairs, dtype=torch.int32, device=device)
    starts = torch.empty(experts + 1, dtype=torch.int32, device=device)
    made = torch.empty((pairs, inner), dtype=x.dtype, device=device)
    parts = torch.empty((pairs, dim), dtype=torch.float32, device=device)
    sort_kernel[(experts,)](chosen, order, starts, pairs, first, tile=_SORT_TILE)
    expert_kernel[(-(-inner // config.tile), experts)](
        *(x, gate_up, None, made, order, starts),
        x.stride(0),
        **_product_constants(config, x, columns=inner, width=dim, share=top_k, gated=True),
    )
    expert_kernel[(-(-dim // config.tile), experts)](
        *(made, down, weights, parts, order, starts),
        inner,
        **_product_constants(config, x, columns=dim, width=inner, share=1, gated=False),
    )
    combine_kernel[(tokens, -(-dim // _SUM_TILE))](
        *(parts, chosen, out, first, experts),
        out.stride(0),
        dim=dim,
        top_k=top_k,
        tile=_SUM_TILE,
    )


def _route_constants(form: RouteForm) -> Mapping[str, Any]:
    return {
        "groups": form.groups,
        "size": form.size,
        "groups_tile": _power_of_two(form.groups),
        "size_tile": _power_of_two(form.size),
        "top_k": form.top_k,
        "top_tile": _power_of_two(form.top_k),
        "top_groups": form.top_groups,
        "ranked_by": form.ranked_by,
        "sigmoid": form.sigmoid,
        "normalize": form.normalize,
    }


def _route_warps(form: RouteForm) -> int:
    """One for 512 scores."""
    return max(1, min(8, _power_of_two(form.groups) * _power_of_two(form.size) // 512))


def _product_constants(
    config: ExpertConfig, x: torch.Tensor, *, columns: int, width: int, share: int, gated: bool
) -> Mapping[str, Any]:
    return {
        "columns": columns,
        "width": width,
        "share": share,
        "gated": gated,
        "rows": config.rows,
        "tile": config.tile,
        # float32 takes twice the shared memory.
        "depth": config.depth * 2 // x.dtype.itemsize,
        "compute": _TYPES[x.dtype] if x.is_cuda else tl.float32,  # bfloat16 is not interpreted
        "exact": x.dtype is torch.float32,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def _on(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Launches go to the tensor's GPU, whichever is current."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _power_of_two(number: int) -> int:
    """The least that is not smaller."""
    return 1 << (number - 1).bit_length()


# ---------------------------------------------------------------------------------- checking


def _check_experts(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, out: torch.Tensor
) -> None:
    check_tensor("x", x, shape=(None, None), dtypes=DTYPES)
    dim, dtypes, device = x.shape[1], (x.dtype,), x.device
    require(dim >= 1, "x", "must have rows of at least one element")
    check_tensor("down", down, shape=(None, dim, None), dtypes=dtypes, device=device)
    experts, _, inner = down.shape
    require(1 <= experts <= MAX_EXPERTS, "down", f"must be of 1 to {MAX_EXPERTS} experts")
    require(inner >= 1, "down", "must have rows of at least one element")
    shape = (experts, 2 * inner, dim)
    check_tensor("gate_up", gate_up, shape=shape, dtypes=dtypes, device=device)
    require(2 * inner * dim < 2**31, "gate_up", "must have fewer than 2^31 elements an expert")
    for name, tensor in (("gate_up", gate_up), ("down", down)):
        require(tensor.is_contiguous(), name, "must be contiguous")
    check_tensor("out", out, shape=x.shape, dtypes=dtypes, device=device)
    require(out.data_ptr() != x.data_ptr() or not len(x), "out", "must not be x")


def _check_pairs(x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> None:
    check_tensor("chosen", chosen, shape=(len(x), None), dtypes=(torch.int32,), device=x.device)
    top_k = chosen.shape[1]
    require(1 <= top_k <= MAX_TOP_K, "chosen", f"must be 1 to {MAX_TOP_K} of each token")
    shape = chosen.shape
    check_tensor("weights", weights, shape=shape, dtypes=(torch.float32,), device=x.device)
    for name, tensor in (("weights", weights), ("chosen", chosen)):
        require(tensor.is_contiguous(), name, "must be contiguous")


# ---------------------------------------------------------------------------------- variants


def variants() -> Iterator[Variant]:
    """As DeepSeek-V3 has them, in bfloat16: 256 experts of 2048, 8 of each token."""
    form = RouteForm(
        experts=256, top_k=8, groups=8, top_groups=4, ranked_by=2, sigmoid=True, normalize=True
    )
    yield _variant("route_deepseek", route_kernel, _route_constants(form), _route_warps(form))
    yield _variant("experts_sort", sort_kernel, {"tile": _SORT_TILE}, 4)
    yield _variant("experts_sum", combine_kernel, {"dim": 7168, "top_k": 8, "tile": _SUM_TILE}, 4)
    x = torch.empty(0, dtype=torch.bfloat16, device="meta")
    for name, config in (("few", FEW), ("many", MANY)):
        for gated in (True, False):
            columns, width = (2048, 7168) if gated else (7168, 2048)
            yield _product_variant(name, config, x, columns=columns, width=width, gated=gated)


def _product_variant(
    name: str, config: ExpertConfig, x: torch.Tensor, *, columns: int, width: int, gated: bool
) -> Variant:
    constants = dict(
        _product_constants(
            config, x, columns=columns, width=width, share=8 if gated else 1, gated=gated
        ),
        compute=tl.bfloat16,
    )
    options = {option: constants.pop(option) for option in ("num_warps", "num_stages")}
    if gated:
        constants["pair_weights_ptr"] = None
    out = "*bf16" if gated else "*fp32"
    return _variant(
        f"experts_{'gate_up' if gated else 'down'}_{name}",
        expert_kernel,
        constants,
        options["num_warps"],
        num_stages=options["num_stages"],
        out_ptr=out,
    )


def _variant(
    name: str,
    kernel: Any,
    constants: Mapping[str, Any],
    num_warps: int,
    num_stages: int = 3,
    out_ptr: str = "*bf16",
) -> Variant:
    known = {
        **dict.fromkeys(("logits_ptr", "weights_ptr", "pair_weights_ptr", "parts_ptr"), "*fp32"),
        **dict.fromkeys(("chosen_ptr", "order_ptr", "starts_ptr"), "*i32"),
        **dict.fromkeys(("x_ptr", "weight_ptr", "correction_ptr"), "*bf16"),
        "out_ptr": out_ptr,
        "scaling": "fp32",
    }
    names = [n for n in kernel.arg_names if n not in constants]
    strides = ("logits_token", "x_row", "out_token")
    return Variant(
        name=name,
        kernel=kernel,
        signature={n: known.get(n, "i32") for n in names},
        constants=constants,
        aligned=tuple(n for n in names if n.endswith("_ptr") or n in strides),
        options={"num_warps": num_warps, "num_stages": num_stages},
        max_registers=168,
    )
