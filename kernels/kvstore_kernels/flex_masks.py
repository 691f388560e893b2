"""Masks and scores for `flex`: causal, sliding window, documents; ALiBi, soft cap; put together.

They are written as torch's flex_attention has them, in *positions*: the place of a token in its
sequence, whatever page holds it.

    mask_mod(batch, head, query, key) -> whether the query sees the key
    score_mod(score, batch, head, query, key) -> the score that goes into the softmax

All arguments are integer tensors without dimensions, but for the score, which is a float32; both
positions are inside of the sequence. A mod is traced once and becomes part of the kernel, so it
may only compute: what varies from call to call has to be in a tensor that it holds.
"""

# ruff: noqa: ARG001 - mods are given more than most of them need
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from kvstore_kernels.checks import check_tensor, require

Tensor = torch.Tensor
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
_Mask = TypeVar("_Mask", bound=MaskMod)


@dataclass(frozen=True, slots=True)
class Band:
    """Which keys a mask may show to a query at position p: those from p - back to p + ahead.

    What is outside of the band is not read. back, ahead: tokens, None for no bound. exact: whether
    the mask shows all keys of the band.
    """

    back: int | None = None
    ahead: int | None = None
    exact: bool = False

    def __and__(self, other: Band) -> Band:
        """The band of a mask that shows what both of these show."""
        return Band(
            _nearer(self.back, other.back),
            _nearer(self.ahead, other.ahead),
            self.exact and other.exact,
        )


EVERYTHING = Band(exact=True)


def banded(band: Band) -> Callable[[_Mask], _Mask]:
    """Decorates a mask with its band; one without a band is taken to have no bounds."""

    def decorate(mask: _Mask) -> _Mask:
        setattr(mask, "band", band)  # noqa: B010 - a function has no such attribute by itself
        return mask

    return decorate


def band_of(mask: MaskMod | None) -> Band:
    """The band of a mask; no mask shows everything."""
    if mask is None:
        return EVERYTHING
    band = getattr(mask, "band", Band())
    require(isinstance(band, Band), "mask_mod", "must have a Band as its band, or none")
    return band


def needed_for_last(mask: MaskMod | None) -> MaskMod | None:
    """The mask, or None if it shows everything to the last token of a sequence."""
    band = band_of(mask)
    return None if band.exact and band.back is None else mask


@banded(Band(ahead=0, exact=True))
def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A query sees itself and what is before it."""
    return key <= query


def sliding_window(tokens: int) -> MaskMod:
    """A query sees the last so many tokens, itself included (Beltagy et al., 2020, Longformer)."""
    require(tokens >= 1, "tokens", "must be at least 1")

    @banded(Band(back=tokens - 1, ahead=0, exact=True))
    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query - key < tokens)

    return mask


def documents(ids: Tensor) -> MaskMod:
    """A query sees the tokens of its own document, before and after it.

    ids: (batch, positions) int32 or int64, the document of each token; at least as many positions
    as the longest sequence has tokens.
    """
    check_tensor("ids", ids, shape=(None, None), dtypes=(torch.int32, torch.int64))

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return ids[batch, query] == ids[batch, key]

    return mask


def every(*masks: MaskMod) -> MaskMod:
    """A query sees what all of the masks show it; at least one mask."""
    require(len(masks) > 0, "masks", "must be at least one")
    band = EVERYTHING
    for each in masks:
        band &= band_of(each)

    @banded(band)
    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        shown = masks[0](batch, head, query, key)
        for each in masks[1:]:
            shown = shown & each(batch, head, query, key)
        return shown

    return mask


def alibi(slopes: Tensor) -> ScoreMod:
    """Adds slope * (key - query) to the score (Press et al., 2022, ALiBi).

    slopes: (query heads,) float32; `alibi_slopes` has those of the paper.
    """
    check_tensor("slopes", slopes, shape=(None,), dtypes=(torch.float32,))

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + slopes[head] * (key - query)

    return score_mod


def alibi_slopes(heads: int, device: torch.device | str = "cpu") -> Tensor:
    """The slopes of the paper's section 3, (heads,) float32: 2^(-8/n), 2^(-16/n), ... for n heads
    where n is a power of two; for others the rest comes from every second of twice as many."""
    require(heads >= 1, "heads", "must be at least 1")
    whole = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * i / whole) for i in range(1, whole + 1)]
    slopes += [2.0 ** (-4 * i / whole) for i in range(1, 2 * (heads - whole), 2)]
    return torch.tensor(slopes, dtype=torch.float32, device=device)


def soft_cap(cap: float) -> ScoreMod:
    """Bends scores so that none leaves [-cap, cap]: cap * tanh(score / cap) (Gemma 2, 2024)."""
    require(cap > 0, "cap", "must be positive")

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        # The same as tanh, but half the instructions and no branch.
        return 2 * cap * torch.sigmoid(score * (2 / cap)) - cap

    return score_mod


def chained(*mods: ScoreMod) -> ScoreMod:
    """Changes scores by all of the mods, the first one first; at least one mod."""
    require(len(mods) > 0, "mods", "must be at least one")

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        for mod in mods:
            score = mod(score, batch, head, query, key)
        return score

    return score_mod


def _nearer(one: int | None, other: int | None) -> int | None:
    bounds = [bound for bound in (one, other) if bound is not None]
    return min(bounds, default=None)
