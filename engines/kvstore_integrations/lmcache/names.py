"""What LMCache's objects are called in the store, and what kinds of them there are.

Reads the fields of LMCache's keys and layouts, but needs none of its classes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from kvstore import limits

_PERSON = b"kvstore-lmcache1"
_FEWEST_HASH_BYTES = 16  # of a chunk; with fewer, two prompts may come to have one hash
_TOKENS_AT = 2  # of an object's shape [k and v, layer, token, width]


class DType(Protocol):
    """What this needs of a dtype; its name is what `str` gives."""

    @property
    def itemsize(self) -> int: ...


class ObjectKey(Protocol):
    """What this needs of LMCache's `ObjectKey`."""

    @property
    def chunk_hash(self) -> bytes: ...
    @property
    def model_name(self) -> str: ...
    @property
    def kv_rank(self) -> int: ...
    @property
    def object_group_id(self) -> int: ...
    @property
    def cache_salt(self) -> str: ...


class ChunkKey(Protocol):
    """What this needs of LMCache's `CacheEngineKey`, which is older."""

    @property
    def world_size(self) -> int: ...
    @property
    def worker_id(self) -> int: ...
    @property
    def chunk_hash(self) -> int | bytes: ...
    @property
    def dtype(self) -> DType: ...
    @property
    def tags(self) -> tuple[tuple[str, object], ...] | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Objects of one model and one form; each kind has a namespace of its own.

    model: LMCache's name of it. dtypes and shapes: of the tensors in an object, one after another.
    tokens: in an object. nbytes: of one. form: what else is in the meaning of the bytes.
    """

    model: str
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    tokens: int
    nbytes: int
    form: str = ""

    @property
    def is_serialized(self) -> bool:
        """Whether these are packed bytes: how many there are, no look-up can tell."""
        return self.dtypes == ("uint8",) and len(self.shapes[0]) == 1


class Line(NamedTuple):
    """What the objects of one chain have in common."""

    rank: int
    group: int
    salt: str


@dataclass(frozen=True, slots=True)
class Item:
    """One object."""

    kind: Kind
    line: Line
    name: bytes


def kind_of(
    model: str, shapes: Iterable[Iterable[int]], dtypes: Sequence[DType], form: str = ""
) -> Kind:
    """The kind of objects that hold tensors of these shapes and dtypes."""
    sizes = tuple(tuple(int(n) for n in shape) for shape in shapes)
    return Kind(
        model=model,
        dtypes=tuple(str(dtype).removeprefix("torch.") for dtype in dtypes),
        shapes=sizes,
        tokens=sizes[0][_TOKENS_AT] if len(sizes[0]) > _TOKENS_AT else 1,
        nbytes=sum(math.prod(s) * d.itemsize for s, d in zip(sizes, dtypes, strict=True)),
        form=form,
    )


def item_of(key: ObjectKey, kind: Kind) -> Item:
    """An object of LMCache's server."""
    return Item(kind, line_of(key), object_name(key))


def line_of(key: ObjectKey) -> Line:
    """The chain that the object belongs to."""
    return Line(key.kv_rank, key.object_group_id, key.cache_salt)


def object_name(key: ObjectKey) -> bytes:
    """The object's name, but for its model and form; ranks, groups and salts share none.

    Empty where the chunk's hash is too short to tell it from all others.
    """
    if len(key.chunk_hash) < _FEWEST_HASH_BYTES:
        return b""
    return digest("object", key.chunk_hash, *line_of(key))


def chunk_name(key: ChunkKey) -> bytes:
    """The name of an engine's chunk, but for its model and form."""
    tags = [part for name, value in key.tags or () for part in (name, repr(value))]
    dtype = str(key.dtype).removeprefix("torch.")
    return digest("chunk", key.world_size, key.worker_id, key.chunk_hash, dtype, *tags)


def digest(*parts: bytes | str | int) -> bytes:
    """32 bytes that differ where any part differs, in value or in type, or their number."""
    made = hashlib.blake2b(digest_size=limits.KEY_BYTES, person=_PERSON)
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        made.update(f"{type(part).__name__}{len(data)}:".encode() + data)
    return made.digest()
