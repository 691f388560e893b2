"""Names of blocks: a keyed hash chain over token blocks. Pure functions, no state.

A block's hash covers its own tokens and, through its parent's hash, every token before it; so
equal hashes mean equal prefixes. The key is secret to the store's owner: without it nobody can
find out by guessing which prompts are cached, nor build two prompts of one name.
"""

from __future__ import annotations

import enum
import hashlib
import struct
from collections.abc import Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
import xxhash

from kvstore import limits
from kvstore.errors import InvalidArgument

MIN_SECRET_BYTES = 16
MAX_SECRET_BYTES = 64  # the longest key that BLAKE2b takes
TOKEN_BYTES = 4

# BLAKE2b's personalisation (at most 16 bytes) keeps the uses of one key apart. Blocks of a chain
# use none, so that the loop over them stays short; nothing else does.
_PERSON_ROOT = b"kvstore-root-1"
_PERSON_XXH3 = b"kvstore-xxh3-1"
_PERSON_NAMESPACE = b"kvstore-nskey-1"


class HashScheme(enum.IntEnum):
    """How block hashes are made; the number is stored, so it never changes its meaning."""

    BLAKE2B = 1  # keyed, safe against chosen tokens; the default
    XXH3_128 = 2  # faster on long blocks; NOT safe against chosen tokens: trusted callers only
    ENGINE = 3  # the caller brings its own 32-byte hashes


def hash_chain(
    tokens: npt.ArrayLike,
    *,
    block_tokens: int,
    key: bytes,
    scheme: HashScheme = HashScheme.BLAKE2B,
    parent: bytes | None = None,
    extra_keys: Sequence[bytes] = (),
) -> npt.NDArray[np.uint8]:
    """Hash the full blocks of `tokens`; a last block that is not full gets no hash.

    tokens: 1-D integers in [0, 2**32). block_tokens: tokens per block, >= 1. key: 16..64 bytes.
    parent: the 32-byte hash of the block before `tokens`; None starts a chain. extra_keys: what
    else the blocks depend on (adapter, image hashes, salt); bound at the root, so it must be
    empty where `parent` is given.

    Returns (len(tokens) // block_tokens, 32) uint8, C-contiguous, read-only.
    Raises InvalidArgument.
    """
    words = _token_words(tokens)
    _check_block_tokens(block_tokens)
    _check_secret("key", key)
    if scheme not in (HashScheme.BLAKE2B, HashScheme.XXH3_128):
        raise InvalidArgument("scheme", f"no chain can be computed for scheme {scheme!r}")
    start = _start(key, parent, extra_keys)
    n_blocks = len(words) // block_tokens
    data = memoryview(words[: n_blocks * block_tokens].tobytes())
    step = block_tokens * TOKEN_BYTES
    chain = _chain_blake2b if scheme == HashScheme.BLAKE2B else _chain_xxh3
    joined = b"".join(chain(data, step, key, start))
    return np.frombuffer(joined, dtype=np.uint8).reshape(n_blocks, limits.KEY_BYTES)


def namespace_key(secret: bytes, *, layout_fingerprint: bytes, name: str) -> bytes:
    """Derive the 32-byte key of a namespace's hash chains.

    secret: 16..64 bytes. layout_fingerprint: 32 bytes, so that blocks of different layouts never
    share a name. name: at most limits.MAX_NAMESPACE_NAME_BYTES of UTF-8. Raises InvalidArgument.
    """
    _check_secret("secret", secret)
    if not isinstance(layout_fingerprint, bytes) or len(layout_fingerprint) != limits.KEY_BYTES:
        raise InvalidArgument("layout_fingerprint", f"must be {limits.KEY_BYTES} bytes")
    encoded = _encode_name(name)
    # The fingerprint has a fixed length, so the name after it needs no length of its own.
    return hashlib.blake2b(
        layout_fingerprint + encoded,
        digest_size=limits.KEY_BYTES,
        key=secret,
        person=_PERSON_NAMESPACE,
    ).digest()


def as_hashes(value: Sequence[bytes] | bytes | npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Bring hashes to one form: (n, 32) uint8, C-contiguous.

    value: a sequence of 32-byte strings, their concatenation, or an (n, 32) uint8 array. An array
    already of this form is returned itself; results from bytes are read-only.
    Raises InvalidArgument, also for n > limits.MAX_KEYS_PER_CALL.
    """
    if isinstance(value, np.ndarray):
        hashes = _hashes_of_array(value)
    elif isinstance(value, bytes):
        hashes = _hashes_of_bytes(value)
    elif isinstance(value, Sequence) and not _is_one_string(value):
        hashes = _hashes_of_sequence(cast("Sequence[bytes]", value))
    else:
        raise InvalidArgument("keys", f"cannot be a {type(value).__name__}")
    return hashes


def _chain_blake2b(data: memoryview, step: int, key: bytes, start: bytes) -> list[bytes]:
    out: list[bytes] = []
    append = out.append
    blake2b = hashlib.blake2b
    size = limits.KEY_BYTES
    previous = start
    for at in range(0, len(data), step):
        previous = blake2b(previous + data[at : at + step], digest_size=size, key=key).digest()
        append(previous)
    return out


def _chain_xxh3(data: memoryview, step: int, key: bytes, start: bytes) -> list[bytes]:
    out: list[bytes] = []
    append = out.append
    digest = xxhash.xxh3_128_digest
    seeds = hashlib.blake2b(digest_size=16, key=key, person=_PERSON_XXH3).digest()
    low, high = struct.unpack("<QQ", seeds)
    previous = start
    for at in range(0, len(data), step):
        message = previous + data[at : at + step]
        previous = digest(message, low) + digest(message, high)
        append(previous)
    return out


def _start(key: bytes, parent: bytes | None, extra_keys: Sequence[bytes]) -> bytes:
    if not isinstance(extra_keys, Sequence) or _is_one_string(extra_keys):
        raise InvalidArgument("extra_keys", "must be a sequence of bytes, not one string")
    if parent is None:
        return _root(key, extra_keys)
    if not isinstance(parent, bytes) or len(parent) != limits.KEY_BYTES:
        raise InvalidArgument("parent", f"must be {limits.KEY_BYTES} bytes")
    if len(extra_keys):
        raise InvalidArgument("extra_keys", "are bound at the root; give none with a parent")
    return parent


def _is_one_string(value: object) -> bool:
    """Whether `value` is a sequence only of its own letters or bytes."""
    return isinstance(value, str | bytes | bytearray | memoryview)


def _root(key: bytes, extra_keys: Sequence[bytes]) -> bytes:
    state = hashlib.blake2b(digest_size=limits.KEY_BYTES, key=key, person=_PERSON_ROOT)
    for extra in extra_keys:
        if not isinstance(extra, bytes):
            raise InvalidArgument("extra_keys", "each must be bytes")
        # The length in front makes ["ab"] and ["a", "b"] differ.
        state.update(struct.pack("<Q", len(extra)))
        state.update(extra)
    return state.digest()


def _token_words(tokens: npt.ArrayLike) -> npt.NDArray[np.uint32]:
    """Tokens as 1-D little-endian uint32; InvalidArgument for any that does not fit."""
    try:
        array = np.asarray(tokens)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidArgument("tokens", f"are no array: {error}") from error
    if array.ndim != 1:
        raise InvalidArgument("tokens", f"must be 1-D, not {array.ndim}-D")
    if array.size == 0:  # an empty list has no integer dtype of its own
        return np.empty(0, dtype="<u4")
    if array.dtype.kind not in "iu":
        raise InvalidArgument("tokens", f"must be integers, not {array.dtype}")
    if int(array.min()) < 0 or int(array.max()) >= 1 << 32:
        raise InvalidArgument("tokens", "must be in [0, 2**32)")
    return np.ascontiguousarray(array, dtype="<u4")


def _check_block_tokens(block_tokens: int) -> None:
    if type(block_tokens) is not int or block_tokens < 1:
        raise InvalidArgument("block_tokens", f"must be an integer >= 1, not {block_tokens!r}")


def _check_secret(field: str, secret: bytes) -> None:
    if not isinstance(secret, bytes):
        raise InvalidArgument(field, "must be bytes")
    if not MIN_SECRET_BYTES <= len(secret) <= MAX_SECRET_BYTES:
        raise InvalidArgument(
            field, f"must have {MIN_SECRET_BYTES}..{MAX_SECRET_BYTES} bytes, not {len(secret)}"
        )


def _encode_name(name: str) -> bytes:
    if not isinstance(name, str):
        raise InvalidArgument("name", "must be a string")
    try:
        encoded = name.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument("name", "is not valid Unicode") from error
    if len(encoded) > limits.MAX_NAMESPACE_NAME_BYTES:
        raise InvalidArgument("name", f"is over {limits.MAX_NAMESPACE_NAME_BYTES} bytes of UTF-8")
    return encoded


def _check_count(count: int) -> None:
    if count > limits.MAX_KEYS_PER_CALL:
        raise InvalidArgument("keys", f"{count} are over {limits.MAX_KEYS_PER_CALL} per call")


def _hashes_of_array(value: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    if value.dtype != np.uint8 or value.ndim != 2 or value.shape[1] != limits.KEY_BYTES:
        raise InvalidArgument(
            "keys", f"must be (n, {limits.KEY_BYTES}) uint8, not {value.shape} {value.dtype}"
        )
    _check_count(value.shape[0])
    return np.ascontiguousarray(value)


def _hashes_of_bytes(value: bytes) -> npt.NDArray[np.uint8]:
    if len(value) % limits.KEY_BYTES:
        raise InvalidArgument("keys", f"{len(value)} bytes are no multiple of {limits.KEY_BYTES}")
    _check_count(len(value) // limits.KEY_BYTES)
    return np.frombuffer(value, dtype=np.uint8).reshape(-1, limits.KEY_BYTES)


def _hashes_of_sequence(value: Sequence[bytes]) -> npt.NDArray[np.uint8]:
    _check_count(len(value))
    for item in value:
        if not isinstance(item, bytes) or len(item) != limits.KEY_BYTES:
            raise InvalidArgument("keys", f"each must be {limits.KEY_BYTES} bytes")
    return np.frombuffer(b"".join(value), dtype=np.uint8).reshape(-1, limits.KEY_BYTES)
