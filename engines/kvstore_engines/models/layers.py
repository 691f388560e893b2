"""The parts both families share: linear maps and SwiGLU, whole or one rank's share."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - the name every torch program uses

from kvstore_engines.attention import Batch
from kvstore_engines.checkpoint import Weights
from kvstore_engines.ops import Expert, Joint, Linear, Ops
from kvstore_engines.parallel import Parallel, even_share


@dataclass(frozen=True)
class SwiGlu:
    """The gated feed-forward network."""

    ops: Ops
    gate_up: Joint
    down: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (tokens, hidden) -> the same shape."""
        return self.down(self.ops.silu_mul(*self.gate_up(x)))


@dataclass(frozen=True)
class SummedLinear:
    """One rank's columns of a linear map: the ranks' products are added up, then the bias.

    weight (out, this rank's part of in), bias (out,) or none (Megatron-LM's RowParallelLinear).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    parallel: Parallel

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., this rank's part of in) -> (..., out), the same on every rank."""
        out = self.parallel.all_reduce(F.linear(x, self.weight))
        return out if self.bias is None else out + self.bias


def linear(weights: Weights, name: str, bias: bool = False, rows: slice = slice(None)) -> Linear:
    """The linear map called `name`, or those of its output rows."""
    chosen = weights[f"{name}.bias"][rows] if bias else None
    return Linear(_owned(weights[f"{name}.weight"], rows, slice(None)), chosen)


def summed_linear(
    weights: Weights, name: str, parallel: Parallel, columns: slice, bias: bool = False
) -> SummedLinear:
    """This rank's input columns of the linear map called `name`."""
    weight = _owned(weights[f"{name}.weight"], slice(None), columns)
    return SummedLinear(weight, weights[f"{name}.bias"] if bias else None, parallel)


def expert(weights: Weights, name: str) -> Expert:
    """The routed expert called `name`."""
    gate, up, down = (linear(weights, f"{name}.{part}_proj") for part in ("gate", "up", "down"))
    return Expert(gate, up, down)


def split_swiglu(
    ops: Ops, weights: Weights, name: str, parallel: Parallel, bias: bool = False
) -> SwiGlu:
    """This rank's share of the inner width of the feed-forward network called `name`."""
    inner = even_share(len(weights[f"{name}.gate_proj.weight"]), parallel.rank, parallel.size)
    share = slice(inner.start, inner.stop)
    gate, up = (linear(weights, f"{name}.{part}_proj", bias, share) for part in ("gate", "up"))
    down = summed_linear(weights, f"{name}.down_proj", parallel, share, bias)
    return SwiGlu(ops, ops.joint(gate, up), down)


def _owned(weight: torch.Tensor, rows: slice, columns: slice) -> torch.Tensor:
    """A part with memory of its own, so that the rest of the weight can be given back."""
    part = weight[rows, columns]
    return part if part.shape == weight.shape else part.clone()


def last_rows(x: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The last token's row of each span, (sequences, hidden)."""
    if len(batch.spans) == len(x):  # a token each: choosing them would wait for the GPU
        return x
    return x[[span.start + span.tokens - 1 for span in batch.spans]]
