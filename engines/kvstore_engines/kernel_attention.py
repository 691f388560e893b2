"""Attention on a GPU: new tokens of running sequences by the decode kernels, prompts by torch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from kvstore_engines.attention import Batch, Span, TorchAttention
from kvstore_engines.ops import HeadNorms, LayerCache, RMSNorm
from kvstore_kernels.decode import DecodeWorkspace, Rules, decode_attention
from kvstore_kernels.errors import KernelArgumentError
from kvstore_kernels.fused import New, NewLatents, NewTokens
from kvstore_kernels.mla_reference import RANK

_Form = tuple[object, ...]
# Flex would be compiled for minutes.
_READY = ("gqa_decode", "gqa_ring", "mla_decode", "mla_gluon", "mla_ring")
MOST_WORKSPACES = 4  # of sizes of a batch; of more the one that was used longest ago goes


def rows_for(sequences: int) -> int:
    """Rows that a step of so many sequences is planned for: as many up to 8, then one of four sizes
    to each doubling."""
    step = 1 << max((sequences - 1).bit_length() - 3, 0)
    return -(-sequences // step) * step


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """A batch, divided. rest: the same tokens, with the spans of several tokens alone. rows: (n,)
    int64, the tokens of the other spans in the batch, or None where they are all of it; table: (n,
    most pages) int32; lengths: (n,) int32."""

    batch: Batch
    rest: Batch
    rows: torch.Tensor | None
    table: torch.Tensor
    lengths: torch.Tensor

    @classmethod
    def of(cls, batch: Batch) -> DecodeStep:
        """Waits for nothing."""
        device = batch.positions.device
        single = [span for span in batch.spans if span.tokens == 1]
        rest = tuple(span for span in batch.spans if span.tokens > 1)
        rows = [span.start for span in single]
        lengths = torch.tensor(_lengths(single), dtype=torch.int32, device=device)
        if not rest:
            return cls.whole(batch, _table(single, device), lengths)
        return cls(
            batch=batch,
            rest=Batch(batch.positions, batch.pages, batch.offsets, rest),
            rows=torch.tensor(rows, dtype=torch.int64, device=device),
            table=_table(single, device),
            lengths=lengths,
        )

    @classmethod
    def whole(cls, batch: Batch, table: torch.Tensor, lengths: torch.Tensor) -> DecodeStep:
        """Of one token a span."""
        rest = Batch(batch.positions, batch.pages, batch.offsets, ())
        return cls(batch=batch, rest=rest, rows=None, table=table, lengths=lengths)


def _lengths(spans: Sequence[Span]) -> list[int]:
    return [span.context_len for span in spans]


def _table(spans: Sequence[Span], device: torch.device) -> torch.Tensor:
    if not spans:
        return torch.empty((0, 1), dtype=torch.int32, device=device)
    return pad_sequence([span.page_table for span in spans], batch_first=True).int()


class KernelAttention:
    """Plans each batch once, for all layers; not thread-safe.

    What no kernel takes (float32 for one) is left to torch.
    """

    def __init__(self) -> None:
        self._torch = TorchAttention()
        self._step: DecodeStep | None = None
        self._workspace: DecodeWorkspace | None = None
        self._workspaces: OrderedDict[int, DecodeWorkspace] = OrderedDict()
        self._fixed = False
        self._taken = set[_Form]()
        self._refused = set[_Form]()

    def grouped(
        self, q: torch.Tensor, layer_pages: torch.Tensor, batch: Batch, scale: float
    ) -> torch.Tensor:
        """See `AttentionBackend.grouped`."""
        step = self._step_of(batch)
        decoded = self._decode(q, layer_pages.unbind(2), step, scale)
        if decoded is None:
            return self._torch.grouped(q, layer_pages, batch, scale)
        if step.rows is None:
            return decoded
        out = self._torch.grouped(q, layer_pages, step.rest, scale)
        out[step.rows] = decoded
        return out

    def latent(
        self, q: torch.Tensor, layer_pages: torch.Tensor, batch: Batch, scale: float, rank: int
    ) -> torch.Tensor:
        """See `AttentionBackend.latent`."""
        step = self._step_of(batch)
        decoded = self._decode(q, (layer_pages,), step, scale)
        if decoded is None or decoded.shape[-1] != rank:
            return self._torch.latent(q, layer_pages, batch, scale, rank)
        if step.rows is None:
            return decoded
        out = self._torch.latent(q, layer_pages, step.rest, scale, rank)
        out[step.rows] = decoded
        return out

    def append_grouped(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        norms: HeadNorms | None,
        cache: LayerCache,
        *,
        scale: float,
    ) -> torch.Tensor | None:
        """See `AppendingAttention.append_grouped`; for steps of one token a sequence."""
        step = self._step_of(cache.batch)
        if step.rows is not None:
            return None
        new = NewTokens(
            k=k[:, None],
            v=v[:, None],
            cos=cache.cos,
            sin=cache.sin,
            page_ids=cache.batch.pages[:, None],
            offsets=cache.batch.offsets[:, None],
            q_norm=norms.q.weight if norms else None,
            k_norm=norms.k.weight if norms else None,
            eps=norms.q.eps if norms else 0.0,
        )
        return self._decode(q, cache.pages.unbind(2), step, scale, new)

    def append_latent(
        self,
        q: torch.Tensor,
        cached: torch.Tensor,
        key_up: torch.Tensor,
        norm: RMSNorm,
        cache: LayerCache,
        *,
        scale: float,
        interleaved: bool,
    ) -> torch.Tensor | None:
        """See `AppendingAttention.append_latent`; for steps of one token a sequence."""
        step = self._step_of(cache.batch)
        _, width, rank = key_up.shape
        if step.rows is not None or rank != RANK:
            return None
        folded = q.new_empty(*q.shape[:2], cached.shape[-1])
        torch.bmm(q[..., :width].transpose(0, 1), key_up, out=folded[..., :rank].transpose(0, 1))
        new = NewLatents(
            q_rope=q[:, None, :, width:],
            latents=cached[:, None],
            norm=norm.weight,
            cos=cache.cos,
            sin=cache.sin,
            page_ids=cache.batch.pages[:, None],
            offsets=cache.batch.offsets[:, None],
            eps=norm.eps,
            interleaved=interleaved,
        )
        return self._decode(folded, (cache.pages,), step, scale, new)

    @property
    def refuses(self) -> bool:
        """Whether there was a form of decode that no kernel took."""
        return bool(self._refused)

    @contextmanager
    def fixed(self, step: DecodeStep, workspace: DecodeWorkspace) -> Iterator[None]:
        """Inside, all batches are that step, on that workspace, which the caller plans for."""
        before = self._step, self._workspace
        self._step, self._workspace, self._fixed = step, workspace, True
        try:
            yield
        finally:
            (self._step, self._workspace), self._fixed = before, False

    def _step_of(self, batch: Batch) -> DecodeStep:
        if self._step is None or not (self._fixed or self._step.batch is batch):
            self._step = DecodeStep.of(batch)
            n = len(self._step.lengths)
            if n:
                self._workspace = self._workspace_for(n, batch.positions.device)
                self._workspace.step(_lengths([s for s in batch.spans if s.tokens == 1]))
        return self._step

    def _workspace_for(self, sequences: int, device: torch.device) -> DecodeWorkspace:
        """One that plans as a graph's does, so that sequences are cut in the same parts, and sums
        have the same bits, with graphs and without."""
        rows = rows_for(sequences)
        workspace = self._workspaces.pop(rows, None)
        if workspace is None:
            workspace = DecodeWorkspace(max_sequences=rows, device=device, graphs=True)
        self._workspaces[rows] = workspace
        if len(self._workspaces) > MOST_WORKSPACES:
            self._workspaces.popitem(last=False)
        return workspace

    def _decode(
        self,
        q: torch.Tensor,
        pages: Sequence[torch.Tensor],
        step: DecodeStep,
        scale: float,
        append: New | None = None,
    ) -> torch.Tensor | None:
        """(n, heads, dim of the values) of the new tokens; None where there are none, or no kernel
        for them. pages: of keys and values, or of latents. append: what is to be written first."""
        k, *values = pages
        form = (q.shape[1:], q.dtype, k.shape[1:], k.dtype, scale)
        if not len(step.lengths) or form in self._refused:
            return None
        assert self._workspace is not None
        new = q if step.rows is None else q[step.rows]
        v = values[0] if values else None
        arguments = (new[:, None], k, v, step.table, step.lengths, self._workspace)
        rules = Rules(scale=scale)
        if form not in self._taken:
            try:
                choice = decode_attention(*arguments, rules=rules, explain=True)
            except KernelArgumentError:
                choice = None
            (self._taken if choice and choice.kernel in _READY else self._refused).add(form)
            return self._decode(q, pages, step, scale, append)
        return decode_attention(*arguments, rules=rules, append=append)[:, 0]
