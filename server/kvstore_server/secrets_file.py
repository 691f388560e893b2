"""The daemon's secret files: the key of all chains, the token of gRPC over TCP, a cluster's secret.

Each is made once, with mode 0600, and is whole or absent: a crash never leaves half of one.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path

from kvstore.errors import InvalidArgument, KVStoreError
from kvstore.keys import MAX_SECRET_BYTES, MIN_SECRET_BYTES

_SECRET_BYTES = 32
_MIN_TOKEN_CHARACTERS = 16


def load_secret(folder: Path) -> bytes:
    """The 32-byte secret that keys all chains, made on first use, so that keys survive restarts.

    `KVStoreError` for a file of another length, `InvalidArgument` for one that all users can
    read, or for a folder that cannot be written.
    """
    path = folder / "chain.key"
    secret = _read_or_make(path, secrets.token_bytes(_SECRET_BYTES))
    if len(secret) != _SECRET_BYTES:
        raise KVStoreError(f"{path} holds {len(secret)} bytes, not {_SECRET_BYTES}: restore it")
    return secret


def load_shared_secret(path: Path) -> bytes:
    """The secret that an administrator gave to all nodes of a cluster: 16 to 64 bytes.

    `InvalidArgument` for a file that cannot be read, or that all users can, or of another length.
    """
    try:
        secret = path.read_bytes()
        mode = path.stat().st_mode
    except OSError as error:
        reason = f"{path} cannot be read: {error.strerror}"
        raise InvalidArgument("cluster_secret", reason) from None
    if mode & 0o007:
        raise InvalidArgument("cluster_secret", f"all users can reach {path}: run chmod 600 on it")
    if not MIN_SECRET_BYTES <= len(secret) <= MAX_SECRET_BYTES:
        most = f"{MIN_SECRET_BYTES} to {MAX_SECRET_BYTES}"
        raise InvalidArgument("cluster_secret", f"{path} has {len(secret)} bytes, not {most}")
    return secret


def load_password(path: Path) -> str:
    """etcd's password, which an administrator gave to a node: all of the file but line ends at its
    end. `InvalidArgument` for a file that cannot be read, or that all users can, or is empty."""
    name = "etcd_password_file"
    try:
        password = path.read_text().rstrip("\r\n")
        mode = path.stat().st_mode
    except OSError as error:
        raise InvalidArgument(name, f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InvalidArgument(name, f"{path} is no text in UTF-8") from None
    if mode & 0o007:
        raise InvalidArgument(name, f"all users can reach {path}: run chmod 600 on it")
    if not password:
        raise InvalidArgument(name, f"{path} is empty: write the password into it")
    return password


def make_shared_secret(path: Path) -> None:
    """Makes a new secret for a cluster, of 32 random bytes, which goes to all of its nodes.

    `InvalidArgument` where there is such a file already, or none can be written there.
    """
    try:
        made = _publish(path, secrets.token_bytes(_SECRET_BYTES))
    except OSError as error:
        raise InvalidArgument("file", f"{path} cannot be written: {error.strerror}") from None
    if not made:
        raise InvalidArgument(
            "file",
            f"{path} is there already: with another secret, what is put"
            " under this one is never found again",
        )


def load_token_path(folder: Path) -> Path:
    """The file with the bearer token that gRPC over TCP asks for, made on first use.

    Raises as `load_secret` does, and `KVStoreError` for a token that is short or not ASCII.
    """
    path = folder / "grpc.token"
    token = _read_or_make(path, secrets.token_urlsafe(_SECRET_BYTES).encode() + b"\n").strip()
    if len(token) < _MIN_TOKEN_CHARACTERS or not token.isascii():
        raise KVStoreError(
            f"{path} holds no token of {_MIN_TOKEN_CHARACTERS} ASCII characters or more:"
            " remove it and a new one is made"
        )
    return path


def _read_or_make(path: Path, content: bytes) -> bytes:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not path.exists():
            _publish(path, content)
    except OSError as error:
        reason = f"{path.parent} cannot be written: {error.strerror}"
        raise InvalidArgument("data_dir", reason) from None
    # The group is let in: orchestrators hand volumes to a group of the pod's own.
    if path.stat().st_mode & 0o007:
        raise InvalidArgument("data_dir", f"all users can reach {path}: run chmod 600 on it")
    return path.read_bytes()


def _publish(path: Path, content: bytes) -> bool:
    """Writes the file whole under another name, then links it; False where there is one already,
    which is kept."""
    fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False  # another daemon was faster; its content counts
    finally:
        os.unlink(temporary)
    _sync_folder(path.parent)
    return True


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
