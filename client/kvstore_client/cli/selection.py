"""Which namespace and which blocks a command is about, from names, hex digits, files, tokens."""

from __future__ import annotations

import enum
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from kvstore import limits
from kvstore.errors import InvalidArgument
from kvstore.keys import HashScheme, hash_chain
from kvstore.session.base import NamespaceHandle, NamespaceInfo, Session

Hashes2D = npt.NDArray[np.uint8]

MAX_FILE_BYTES = 256 << 20
_HEX_HASH = re.compile(rf"[0-9a-fA-F]{{{2 * limits.KEY_BYTES}}}")
_HEX_PREFIX = "hex:"


class Scheme(enum.StrEnum):
    """The hash schemes that can be computed from tokens."""

    BLAKE2B = "blake2b"
    XXH3_128 = "xxh3-128"


_SCHEMES = {Scheme.BLAKE2B: HashScheme.BLAKE2B, Scheme.XXH3_128: HashScheme.XXH3_128}


@dataclass(frozen=True, slots=True, kw_only=True)
class Selectors:
    """The options that name blocks, as they were given; see `read_hashes`."""

    hashes: tuple[str, ...] = ()
    hashes_file: Path | None = None
    tokens: Path | None = None
    extra_keys: tuple[str, ...] = ()
    scheme: Scheme = Scheme.BLAKE2B

    @property
    def sources(self) -> int:
        """How many ways of naming blocks were used."""
        return sum((bool(self.hashes), self.hashes_file is not None, self.tokens is not None))


@dataclass(frozen=True, slots=True, eq=False)
class Selected:
    """An open namespace and the hashes, uint8 (n, 32), n > 0."""

    namespace: NamespaceHandle
    hashes: Hashes2D


def find_namespace(session: Session, name: str, number: int | None) -> NamespaceInfo:
    """The namespace of that name, and of that id where one is given; `InvalidArgument` if none."""
    namespaces = session.info().namespaces
    named = [each for each in namespaces if each.name == name]
    if not named:
        known = ", ".join(sorted({each.name for each in namespaces})) or "none at all"
        raise InvalidArgument("namespace", f"{name!r} is not in the store; it has {known}")
    chosen = [each for each in named if number is None or each.id == number]
    if len(chosen) != 1:
        ids = ", ".join(str(each.id) for each in named)
        raise InvalidArgument("namespace_id", f"choose a layout of {name!r} by its id: {ids}")
    return chosen[0]


def open_namespace(session: Session, name: str, number: int | None) -> NamespaceHandle:
    """Opens a namespace that is there already; creates none. Raises `InvalidArgument`."""
    found = find_namespace(session, name, number)
    return session.open_namespace(name, found.layout)


def select(session: Session, name: str, number: int | None, selectors: Selectors) -> Selected:
    """The open namespace, and the hashes that the selectors name. Raises `InvalidArgument`."""
    check_selectors(selectors)
    namespace = open_namespace(session, name, number)
    return Selected(namespace, read_hashes(selectors, namespace))


def check_selectors(selectors: Selectors) -> None:
    """`InvalidArgument` unless blocks are named in one way."""
    if selectors.sources != 1:
        raise InvalidArgument("hash", "name the blocks by --hash, --hashes-file or --tokens")
    if selectors.extra_keys and selectors.tokens is None:
        raise InvalidArgument("extra_key", "is for --tokens; hashes have it in them already")


def read_hashes(selectors: Selectors, namespace: NamespaceHandle) -> Hashes2D:
    """The hashes that checked selectors name, uint8 (n, 32), n > 0. Raises `InvalidArgument`."""
    if selectors.tokens is not None:
        return _hash_tokens(selectors, selectors.tokens, namespace)
    if selectors.hashes_file is not None:
        return parse_hashes("hashes_file", _read_file("hashes_file", selectors.hashes_file))
    return _from_hex("hash", list(selectors.hashes))


def batches(hashes: Hashes2D) -> Iterator[Hashes2D]:
    """The hashes in pieces that one call may carry."""
    for at in range(0, len(hashes), limits.MAX_KEYS_PER_CALL):
        yield hashes[at : at + limits.MAX_KEYS_PER_CALL]


def parse_hashes(field: str, data: bytes) -> Hashes2D:
    """Hashes as hex between blanks or as raw records; `InvalidArgument` with the field's name.

    Bytes that are all ASCII are taken for text: raw hashes hardly ever are.
    """
    if data.isascii():
        return _from_hex(field, data.decode().split())
    if len(data) % limits.KEY_BYTES:
        raise InvalidArgument(
            field, f"{len(data)} bytes are neither hex nor {limits.KEY_BYTES}-byte records"
        )
    return np.frombuffer(data, np.uint8).reshape(-1, limits.KEY_BYTES)


def parse_tokens(data: bytes) -> list[int]:
    """Token ids as a JSON list or between blanks. Raises `InvalidArgument`."""
    try:
        text = data.decode("ascii").strip()
        if not text.startswith("["):
            return [_token(at, word) for at, word in enumerate(text.split())]
        tokens = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument("tokens", f"are no list of token ids: {error}") from None
    if not all(type(token) is int for token in tokens):
        raise InvalidArgument("tokens", "must all be integers")
    return list(tokens)


def _token(at: int, word: str) -> int:
    if not word.isdecimal():
        raise InvalidArgument("tokens", f"number {at + 1}, {word[:80]!r}, is no token id")
    return int(word)


def _from_hex(field: str, words: list[str]) -> Hashes2D:
    if not words:
        raise InvalidArgument(field, "holds no hash")
    for at, word in enumerate(words):
        if not _HEX_HASH.fullmatch(word):
            raise InvalidArgument(field, f"number {at + 1}, {word[:80]!r}, is not 64 hex digits")
    joined = bytes.fromhex("".join(words))
    return np.frombuffer(joined, np.uint8).reshape(-1, limits.KEY_BYTES)


def _hash_tokens(selectors: Selectors, path: Path, namespace: NamespaceHandle) -> Hashes2D:
    tokens = parse_tokens(_read_file("tokens", path))
    block_tokens = namespace.layout.block_tokens
    if len(tokens) < block_tokens:
        raise InvalidArgument("tokens", f"{len(tokens)} do not fill a block of {block_tokens}")
    return hash_chain(
        tokens,
        block_tokens=block_tokens,
        key=namespace.key,
        scheme=_SCHEMES[selectors.scheme],
        extra_keys=[_extra_key(text) for text in selectors.extra_keys],
    )


def _extra_key(text: str) -> bytes:
    if not text.startswith(_HEX_PREFIX):
        return text.encode("utf-8", "surrogateescape")
    try:
        return bytes.fromhex(text.removeprefix(_HEX_PREFIX))
    except ValueError:
        raise InvalidArgument("extra_key", f"{text!r} is no hex after {_HEX_PREFIX}") from None


def _read_file(field: str, path: Path) -> bytes:
    try:
        if str(path) == "-":
            return _read_limited(field, sys.stdin.buffer)
        with path.open("rb") as file:
            return _read_limited(field, file)
    except OSError as error:
        raise InvalidArgument(field, f"{path}: {error.strerror or error}") from None


def _read_limited(field: str, file: BinaryIO) -> bytes:
    data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise InvalidArgument(field, f"is over {MAX_FILE_BYTES} bytes")
    return data
