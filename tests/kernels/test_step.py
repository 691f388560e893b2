"""The decode step's small kernels in Triton's interpreter, beside float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from kvstore_kernels.errors import KernelArgumentError
from kvstore_kernels.step import add_rmsnorm, rmsnorm, rope_append, rope_append_latent, silu_mul
from kvstore_kernels.step_reference import (
    add_rmsnorm_reference,
    rmsnorm_reference,
    rotated_reference,
    silu_mul_reference,
)

# About twice what one rounding may do.
MAX_ERROR = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = list(MAX_ERROR)
TYPES = {tl.float32: torch.float32, tl.float16: torch.float16, tl.bfloat16: torch.bfloat16}
POISON = 77.0


def numbers(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def strided(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """With other elements before and after each row."""
    return numbers(*shape[:-1], shape[-1] + 5, dtype=dtype)[..., 2 : 2 + shape[-1]]


def near(got: torch.Tensor, want: torch.Tensor) -> bool:
    return torch.allclose(got.double(), want, rtol=MAX_ERROR[got.dtype], atol=MAX_ERROR[got.dtype])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(11)


@pytest.fixture(autouse=True)
def _rounding_as_a_gpu_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter loses carries when it rounds to few bits, so torch rounds in its place."""

    def convert(values: Any, source: Any, target: Any, _rounding: object) -> Any:
        converted = torch.from_numpy(values.copy()).view(TYPES[source]).to(TYPES[target])
        integer = torch.uint16 if converted.itemsize == 2 else torch.uint32
        return converted.view(integer).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "dim"), [(1, 64), (3, 1), (5, 576), (2, 1000)])
def test_norm_of_a_sum(tokens: int, dim: int, dtype: torch.dtype) -> None:
    x, delta = (strided(tokens, dim, dtype=dtype) for _ in range(2))
    weight = numbers(dim, dtype=dtype)
    total, out = (torch.full((tokens, dim), torch.nan, dtype=dtype) for _ in range(2))
    assert add_rmsnorm(x, delta, weight, 1e-5, total=total, out=out) == (total, out)
    assert torch.equal(total, x + delta)
    assert near(out, rmsnorm_reference(total, weight, 1e-5))
    assert near(rmsnorm(x, weight, 1e-5), rmsnorm_reference(x, weight, 1e-5))


def test_what_is_normed_is_the_rounded_sum() -> None:
    x, delta = torch.full((1, 4), 2048.0).half(), torch.full((1, 4), 1.0).half()
    total, out = add_rmsnorm(x, delta, torch.ones(4).half(), 1e-5)
    want = add_rmsnorm_reference(x, delta, torch.ones(4).half(), 1e-5)
    assert torch.equal(total, want[0])
    assert near(out, want[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_activation_of_a_merged_projection(dtype: torch.dtype) -> None:
    gate, up = numbers(3, 2 * 1100, dtype=dtype).mul(4).split(1100, dim=-1)
    out = torch.full((3, 1100), torch.nan, dtype=dtype)
    silu_mul(gate, up, out=out)
    assert near(out, silu_mul_reference(gate, up))


def test_gated_activation_far_from_zero() -> None:
    gate = torch.tensor([[-1e4, -90.0, 0.0, 90.0, 1e4]])
    out = silu_mul(gate, torch.ones(1, 5))[0]
    assert near(out, torch.tensor([0.0, 0.0, 0.0, 90.0, 1e4]).double())


class Grouped:
    """Random tokens, and a pool that is one layer of three, poisoned."""

    def __init__(
        self, tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype
    ) -> None:
        self.sizes = [heads, kv_heads, kv_heads]
        merged = numbers(tokens, sum(self.sizes) * dim, dtype=dtype).unflatten(-1, (-1, dim))
        self.q, self.k, self.v = merged.split(self.sizes, dim=1)
        self.cos, self.sin = (numbers(tokens, dim // 2, dtype=dtype) for _ in range(2))
        self.storage = torch.full((7, kv_heads, 3, 2, 4, dim), POISON, dtype=dtype)
        self.k_pages, self.v_pages = self.storage.select(2, 1).unbind(2)
        places = torch.randperm(7 * 4)[:tokens]
        self.page_ids, self.offsets = places // 4, places % 4
        self.norms: dict[str, torch.Tensor] = {}

    def run(self, **options: object) -> torch.Tensor:
        out = torch.full(self.q.shape, torch.nan, dtype=self.q.dtype)
        return rope_append(
            self.q,
            self.k,
            self.v,
            self.cos,
            self.sin,
            self.k_pages,
            self.v_pages,
            self.page_ids,
            self.offsets,
            **{"out": out, "eps": 1e-6, **self.norms, **options},  # type: ignore[arg-type]
        )

    def rotated(self, x: torch.Tensor, norm: str, *, interleaved: bool) -> torch.Tensor:
        if self.norms:
            x = rmsnorm_reference(x, self.norms[norm], 1e-6)
        return rotated_reference(x, self.cos, self.sin, interleaved=interleaved)

    def elsewhere(self, tokens: slice = slice(None)) -> torch.Tensor:
        """The whole storage, but for what these tokens write."""
        rest = self.storage.clone()
        for pages in rest.select(2, 1).unbind(2):
            pages[self.page_ids[tokens], :, self.offsets[tokens]] = POISON
        return rest


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(8, 2, 16), (5, 5, 12)], ids=["groups", "odd"]
)
def test_rotation_and_writing_to_pages(
    heads: int, kv_heads: int, dim: int, normed: bool, interleaved: bool, dtype: torch.dtype
) -> None:
    case = Grouped(5, heads, kv_heads, dim, dtype)
    if normed:
        case.norms = {n: numbers(dim, dtype=dtype) for n in ("q_norm", "k_norm")}
    out = case.run(interleaved=interleaved, check=True)
    assert near(out, case.rotated(case.q, "q_norm", interleaved=interleaved))
    k = case.k_pages[case.page_ids, :, case.offsets]
    assert near(k, case.rotated(case.k, "k_norm", interleaved=interleaved))
    assert torch.equal(case.v_pages[case.page_ids, :, case.offsets], case.v)
    assert (case.elsewhere() == POISON).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_latents_and_their_keys(interleaved: bool, dtype: torch.dtype) -> None:
    tokens, heads, nope, rank, rope = 4, 6, 8, 20, 12
    q = numbers(tokens, heads, nope + rope, dtype=dtype)[..., nope:]
    cached = strided(tokens, rank + rope, dtype=dtype)
    cos, sin = (numbers(tokens, rope // 2, dtype=dtype) for _ in range(2))
    storage = torch.full((3, 2, 4, rank + rope), POISON, dtype=dtype)
    page_ids, offsets = torch.tensor([2, 0, 2, 1], dtype=torch.int32), torch.tensor([3, 0, 1, 2])
    norm = numbers(rank, dtype=dtype)
    wide = torch.full((tokens, heads, rank + rope), POISON, dtype=dtype)
    options = {"norm": norm, "eps": 1e-6, "interleaved": interleaved, "out": wide[..., rank:]}
    pool = storage[:, 1]
    rope_append_latent(q, cached, cos, sin, pool, page_ids, offsets, **options, check=True)
    assert near(wide[..., rank:], rotated_reference(q, cos, sin, interleaved=interleaved))
    assert (wide[..., :rank] == POISON).all()
    written = pool[page_ids.long(), offsets]
    assert near(written[:, :rank], rmsnorm_reference(cached[:, :rank], norm, 1e-6))
    key = rotated_reference(cached[:, None, rank:], cos, sin, interleaved=interleaved)[:, 0]
    assert near(written[:, rank:], key)
    pool[page_ids.long(), offsets] = POISON
    assert (storage == POISON).all()


@pytest.mark.parametrize("page", [-1, 7, 2**31 - 1, -(2**63), 2**40])
def test_a_place_outside_of_the_pool_is_written_nowhere(page: int) -> None:
    case = Grouped(3, 4, 2, 16, torch.float32)
    case.page_ids[1] = page
    with pytest.raises(KernelArgumentError, match="page_ids must be 0 to 6; token 1 has another"):
        case.run(check=True)
    assert (case.storage == POISON).all()
    assert near(case.run(), case.rotated(case.q, "", interleaved=False))
    assert (case.elsewhere(slice(0, 3, 2)) == POISON).all()
    assert torch.equal(case.v_pages[case.page_ids[2], :, case.offsets[2]], case.v[2])


@pytest.mark.parametrize("offset", [-1, 4])
def test_an_offset_outside_of_its_page_is_written_nowhere(offset: int) -> None:
    case = Grouped(2, 4, 2, 16, torch.float32)
    case.offsets[0] = offset
    with pytest.raises(KernelArgumentError, match="offsets must be 0 to 3; token 0 has another"):
        case.run(check=True)
    case.run()
    assert (case.elsewhere(slice(1, None)) == POISON).all()


def test_a_pool_past_two_to_the_31_elements() -> None:
    """Only the pages that are written are ever touched."""
    case = Grouped(2, 2, 1, 8, torch.float16)
    pool = torch.empty((2, 1, 4, 1 << 29), dtype=torch.float16)  # 8 GiB, of which 64 bytes exist
    case.k_pages = case.v_pages = pool[..., :8]
    case.v_pages = pool[..., 16:24]
    case.page_ids, case.offsets = torch.tensor([1, 0]), torch.tensor([3, 3])
    case.run()
    assert near(case.k_pages[[1, 0], :, 3], case.rotated(case.k, "", interleaved=False))
    assert torch.equal(case.v_pages[[1, 0], :, 3], case.v)


def test_no_tokens() -> None:
    case = Grouped(0, 4, 2, 16, torch.float32)
    assert case.run().shape == (0, 4, 16)
    assert rmsnorm(torch.empty(0, 8), torch.ones(8), 1e-6).shape == (0, 8)
    assert silu_mul(torch.empty(0, 8), torch.empty(0, 8)).shape == (0, 8)


@pytest.mark.parametrize(
    ("argument", "changed", "problem"),
    [
        ("q", lambda c: c.q.double(), "q must be bfloat16, float16, float32"),
        ("q", lambda c: c.q[..., :15], "q must have heads of an even size, not 15"),
        ("k", lambda c: c.k[:2], "k must have shape"),
        ("k", lambda c: c.k[:, :0], "k must have a number of heads that divides 4, not 0"),
        ("v", lambda c: c.v.half(), "v must be float32"),
        ("cos", lambda c: c.cos[:, :4], "cos must have shape"),
        ("sin", lambda c: c.sin.t().contiguous().t(), "sin must have neighbouring elements"),
        ("k_pages", lambda c: c.k_pages[:, :1], "k_pages must have shape"),
        ("v_pages", lambda c: c.v_pages.transpose(2, 3), "v_pages must have shape"),
        ("page_ids", lambda c: c.page_ids.float(), "page_ids must be int64, int32"),
        ("offsets", lambda c: c.offsets[1:], "offsets must have shape"),
        ("page_ids", lambda c: c.page_ids.to("meta"), "page_ids must be on cpu, not meta"),
        ("norms", lambda _: {"q_norm": torch.ones(16)}, "k_norm must be there where q_norm is"),
        ("norms", lambda c: {"out": c.q}, "out must not be q"),
    ],
)
def test_wrong_arguments_are_named(argument, changed, problem) -> None:
    case = Grouped(3, 4, 2, 16, torch.float32)
    setattr(case, argument, changed(case))
    with pytest.raises(KernelArgumentError, match=problem):
        case.run()
    assert (case.storage == POISON).all()


def test_wrong_rows_are_named() -> None:
    x = torch.ones(2, 8)
    for call, problem in (
        (lambda: add_rmsnorm(x, x[:1], x[0], 1e-6), "delta must have shape"),
        (lambda: add_rmsnorm(x, x.half(), x[0], 1e-6), "delta must be float32"),
        (lambda: rmsnorm(x, x[0, :7], 1e-6), "weight must have shape"),
        (lambda: rmsnorm(x[:, :0], x[0, :0], 1e-6), "x must have rows of 1 to 32768"),
        (lambda: rmsnorm(x.t(), x[:, 0], 1e-6), "x must have neighbouring"),
        (lambda: silu_mul(x, x[:, :7]), "up must have shape"),
        (lambda: silu_mul(x.int(), x), "gate must be bfloat16"),
    ):
        with pytest.raises(KernelArgumentError, match=problem):
            call()


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"cached": torch.ones(2, 19)}, "cached must have shape"),
        ({"pool": torch.ones(3, 4, 19)}, "pool must have shape"),
        ({"norm": torch.ones(0)}, "norm must have 1 to 32768 elements"),
        ({"offsets": torch.tensor([0, 4]), "check": True}, "offsets must be 0 to 3; token 1"),
    ],
)
def test_wrong_latents_are_named(changed, problem) -> None:
    arguments = {
        "q": torch.ones(2, 3, 8),
        "cached": torch.ones(2, 20),
        "cos": torch.ones(2, 4),
        "sin": torch.ones(2, 4),
        "pool": torch.ones(3, 4, 20),
        "page_ids": torch.tensor([0, 1]),
        "offsets": torch.tensor([0, 1]),
        "norm": torch.ones(12),
        "eps": 1e-6,
    }
    rope_append_latent(**arguments)
    with pytest.raises(KernelArgumentError, match=problem):
        rope_append_latent(**{**arguments, **changed})
