"""What describes an agent to another: a head of magic, kind, version and checksum, then a body."""

from __future__ import annotations

import struct

import xxhash

from kvstore import limits
from kvstore.errors import ProtocolError
from kvstore.transfer.base import TransferFailed

_HEAD = struct.Struct("<4s8sHHIQ")  # magic, kind, version, 0, bytes of the body, their xxh3
_MAGIC = b"KVTA"
VERSION = 2


def pack(kind: str, body: bytes) -> bytes:
    """The description of an agent; `TransferFailed` where it is too long."""
    total = _HEAD.size + len(body)
    if total > limits.MAX_AGENT_BYTES:
        raise TransferFailed(
            f"the agent's description has {total} bytes, {limits.MAX_AGENT_BYTES} are allowed:"
            " register fewer memories"
        )
    checksum = xxhash.xxh3_64_intdigest(body)
    return _HEAD.pack(_MAGIC, kind.encode(), VERSION, 0, len(body), checksum) + body


def unpack(kind: str, description: bytes) -> bytes:
    """The body; `ProtocolError` for what is no description of an agent of this kind."""
    if not _HEAD.size <= len(description) <= limits.MAX_AGENT_BYTES:
        raise ProtocolError(f"{len(description)} bytes are no agent's description")
    magic, name, version, spare, nbytes, checksum = _HEAD.unpack_from(description)
    body = description[_HEAD.size :]
    if magic != _MAGIC:
        raise ProtocolError("no agent's description")
    if name != kind.encode().ljust(8, b"\0"):
        raise ProtocolError(f"the other agent's kind is {name!r}, not {kind!r}")
    if version != VERSION or spare:
        raise ProtocolError(f"an agent's description of version {version}, not {VERSION}")
    if len(body) != nbytes or xxhash.xxh3_64_intdigest(body) != checksum:
        raise ProtocolError("an agent's description is damaged")
    return body
