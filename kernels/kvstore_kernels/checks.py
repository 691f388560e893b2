"""What every launcher asks of its arguments. None of it waits for the GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvstore_kernels.errors import KernelArgumentError


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    *,
    shape: Sequence[int | None],
    dtypes: Sequence[torch.dtype],
    device: torch.device | None = None,
    last_contiguous: bool = True,
) -> None:
    """Raises KernelArgumentError unless the tensor is as described.

    shape: None for a dimension of any size. last_contiguous: whether elements of the last
    dimension have to be neighbours.
    """
    if not isinstance(tensor, torch.Tensor):
        raise KernelArgumentError(name, f"must be a tensor, not {type(tensor).__name__}")
    if tensor.dim() != len(shape) or any(
        want is not None and size != want for size, want in zip(tensor.shape, shape, strict=True)
    ):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise KernelArgumentError(name, f"must have shape ({wanted}), not {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise KernelArgumentError(name, f"must be {names}, not {tensor.dtype}")
    if device is not None and tensor.device != device:
        raise KernelArgumentError(name, f"must be on {device}, not {tensor.device}")
    if last_contiguous and tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise KernelArgumentError(name, "must have neighbouring elements in its last dimension")


def require(condition: bool, name: str, problem: str) -> None:
    """Raises KernelArgumentError unless the condition holds; a value on the host."""
    if not condition:
        raise KernelArgumentError(name, problem)
