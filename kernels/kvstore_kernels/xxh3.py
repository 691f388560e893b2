"""XXH3 with 64 bits of many rows of bytes in GPU memory, as checksums of blocks that lie there.

The hash is Y. Collet's (xxHash's specification of XXH3, BSD 2-clause), with seed 0, of rows of more
than 240 bytes: eight lanes of 64 bits take in stripes of 64 bytes, each with the secret 8 bytes
further on, and are mixed after each 16 stripes. Within those 16 only sums are made, so they are
taken in side by side; the KiBs of a row come one after the other.

Roofline: each byte is read once from memory (and once more from L1, where a lane takes in its
neighbour's word): 16 MiB in 4 us at 4.4 TB/s. One warp hashes a row; what bounds it is the wait
for a KiB's words, of which four KiB are on their way at a time. Rows of blocks are many: each cell
of a block is one.
"""

# ruff: noqa: PLR0917 - kernels are called by position
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from kvstore_kernels.checks import check_tensor, require
from kvstore_kernels.compiling import Variant

Tensor = torch.Tensor

LEAST_BYTES = 241  # up to 240 XXH3 is other functions
WORD_BYTES = 8
_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
    "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
    "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
    "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
_PRIMES = {
    "32_1": 0x9E3779B1,
    "32_2": 0x85EBCA77,
    "32_3": 0xC2B2AE3D,
    "64_1": 0x9E3779B185EBCA87,
    "64_2": 0xC2B2AE3D27D4EB4F,
    "64_3": 0x165667B19E3779F9,
    "64_4": 0x85EBCA77C2B2AE63,
    "64_5": 0x27D4EB2F165667C5,
}
_START = ("32_3", "64_1", "64_2", "64_3", "64_4", "32_2", "64_5", "32_1")
_STRIPE_BYTES = 64
_STRIPES = 16  # of a KiB, after which lanes are mixed
_MIX_AT = len(_SECRET) - _STRIPE_BYTES
_KEYS = len(_SECRET) // WORD_BYTES
# Where each part of the table of numbers begins.
_STARTS_AT, _MIX_KEYS_AT, _LAST_KEYS_AT, _FOLD_KEYS_AT = (_KEYS + 8 * i for i in range(4))
_TABLE = (_STARTS_AT, _MIX_KEYS_AT, _LAST_KEYS_AT, _FOLD_KEYS_AT)
_MASK = 1 << 64


def xxh3_rows(addresses: Tensor, nbytes: int) -> Tensor:
    """The hash of each of n rows of `nbytes` bytes.

    addresses: (n,) int64 on the GPU, where the rows begin in that GPU's memory, each a multiple of
    8. They are not checked: whoever calls owns what lies there. nbytes: the same for all, a
    multiple of 8 and more than 240. Returns (n,) int64, the hash's 64 bits as they are, on the
    same GPU, by one launch on the current stream. Raises KernelArgumentError.
    """
    check_tensor("addresses", addresses, shape=(None,), dtypes=(torch.int64,))
    words = nbytes % WORD_BYTES == 0
    require(words and nbytes >= LEAST_BYTES, "nbytes", "must be a multiple of 8, and over 240")
    require(nbytes < 1 << 34, "nbytes", "must be less than 16 GiB")
    hashes = torch.empty_like(addresses)
    if len(addresses):
        table = _table(addresses.device)
        xxh3_kernel[(len(addresses),)](addresses, table, hashes, nbytes, *_TABLE, num_warps=1)
    return hashes


@functools.cache
def _table(device: torch.device) -> Tensor:
    """The secret's words, then what lanes begin with, the keys of mixing, of the last stripe, and
    of folding, (KEYS + 32,) int64."""
    starts = [_PRIMES[name] for name in _START]
    mix = _words(_SECRET[_MIX_AT:])
    last = _words(_SECRET[_MIX_AT - 7 :][:_STRIPE_BYTES])
    fold = _words(_SECRET[11:][:_STRIPE_BYTES])
    numbers = [*_words(_SECRET), *starts, *mix, *last, *fold]
    signed = [number - _MASK if number >= _MASK // 2 else number for number in numbers]
    return torch.tensor(signed, dtype=torch.int64, device=device)


def _words(data: bytes) -> list[int]:
    return [int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), 8)]


@triton.jit
def _products(row, keys, stripe, lane, real):
    """(8,) uint64: what stripes (any, 1) of a row add to the lanes (1, 8)."""
    at = stripe * 8 + lane
    own = tl.load(row + at, mask=real, other=0)
    other = tl.load(row + stripe * 8 + (lane ^ 1), mask=real, other=0)
    keyed = own ^ keys
    added = (keyed & 0xFFFFFFFF) * (keyed >> 32) + other
    return tl.sum(tl.where(real, added, tl.zeros_like(added)), 0)


@triton.jit
def xxh3_kernel(
    addresses_ptr,  # (n,) int64
    table_ptr,  # see `_table`
    hashes_ptr,  # (n,) int64
    nbytes,
    starts_at: tl.constexpr,
    mix_keys_at: tl.constexpr,
    last_keys_at: tl.constexpr,
    fold_keys_at: tl.constexpr,
):
    """One program for each row."""
    which = tl.program_id(0)
    row = tl.load(addresses_ptr + which).to(tl.pointer_type(tl.uint64), bitcast=True)
    table = table_ptr.to(tl.pointer_type(tl.uint64), bitcast=True)
    words = (nbytes // 8).to(tl.int64)
    kibs = (words * 8 - 1) // 1024
    stripe = tl.arange(0, 16)[:, None]
    lane = tl.arange(0, 8)[None, :]
    one = tl.arange(0, 8)
    all_real = (stripe >= 0) & (lane >= 0)
    keys = tl.load(table + stripe + lane)
    mix_keys = tl.load(table + mix_keys_at + one)
    prime = tl.full((8,), 0x9E3779B1, tl.uint64)
    lanes = tl.load(table + starts_at + one)
    at = row
    for _kib in tl.range(0, kibs, loop_unroll_factor=4):
        lanes += _products(at, keys, stripe, lane, all_real)
        at += 128
        lanes = (lanes ^ (lanes >> 47) ^ mix_keys) * prime
    left = (words * 8 - 1 - kibs * 1024) // 64
    real = (stripe < left) & (lane >= 0)
    lanes += _products(at, keys, stripe, lane, real)
    last_keys = tl.load(table + last_keys_at + lane)
    first = tl.zeros((1, 1), tl.int32)
    lanes += _products(row + words - 8, last_keys, first, lane, (first == 0) & (lane >= 0))
    # Neighbouring lanes are multiplied to 128 bits, of which both halves are kept.
    even, odd = tl.split(tl.reshape(lanes ^ tl.load(table + fold_keys_at + one), (4, 2)))
    hashed = tl.sum((even * odd) ^ tl.umulhi(even, odd), 0)
    hashed += (words * 8).to(tl.uint64) * 0x9E3779B185EBCA87
    hashed ^= hashed >> 37
    hashed *= 0x165667919E3779F9
    hashed ^= hashed >> 32
    tl.store(hashes_ptr + which, hashed.to(tl.int64, bitcast=True))


def variants() -> list[Variant]:
    """What the launcher compiles: one for all sizes."""
    signature = dict.fromkeys(("addresses_ptr", "table_ptr", "hashes_ptr"), "*i64")
    names = ("starts_at", "mix_keys_at", "last_keys_at", "fold_keys_at")
    constants: dict[str, Any] = dict(zip(names, _TABLE, strict=True))
    return [
        Variant(
            name="xxh3",
            kernel=xxh3_kernel,
            signature=signature | {"nbytes": "i32"},
            constants=constants,
            aligned=("addresses_ptr", "table_ptr", "hashes_ptr"),
            options={"num_warps": 1},
            max_registers=128,
        )
    ]
