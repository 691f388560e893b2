"""Ranks that are processes of one host, joined by torch.distributed's gloo over loopback."""

import os
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist

from kvstore.errors import InvalidArgument
from kvstore_engines.parallel import share_of_heads


class GlooGroup:
    """This process as one of `size` ranks; used from one thread, once per process.

    rendezvous: a file that does not exist yet, in a folder that all ranks share and nobody else
    can write. Joining and every collective call raise RuntimeError after `timeout_s` seconds, or
    at once when another rank has died.
    """

    def __init__(self, rank: int, size: int, rendezvous: Path, *, timeout_s: float = 60.0) -> None:
        if not 0 <= rank < size:
            raise InvalidArgument("rank", f"must be in 0..{size - 1}, not {rank}")
        # Gloo would otherwise bind the address that the host's name stands for.
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        timeout = timedelta(seconds=timeout_s)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=size,
            timeout=timeout,
        )
        self.rank, self.size = rank, size

    def close(self) -> None:
        """Leaves the group; safe to call twice."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()


class GlooParallel:
    """A `Parallel` over a group, with `split[i]` key/value heads on rank i."""

    def __init__(self, group: GlooGroup, split: tuple[int, ...]) -> None:
        if len(split) != group.size:
            raise InvalidArgument("split", f"{split} is not for {group.size} ranks")
        self.rank, self.size = group.rank, group.size
        self._split = split

    def kv_heads(self, total: int) -> range:
        """See `Parallel.kv_heads`."""
        return share_of_heads(self._split, self.rank, total)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """See `Parallel.all_reduce`; the sum is taken in float32."""
        total = x.float()
        dist.all_reduce(total)
        return total.to(x.dtype)

    def broadcast_bytes(self, data: bytes) -> bytes:
        """See `Parallel.broadcast_bytes`."""
        shared = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        dist.broadcast(shared, src=0)
        return shared.numpy().tobytes()

    def agree_min(self, value: int) -> int:
        """See `Parallel.agree_min`."""
        least = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        return int(least.item())
