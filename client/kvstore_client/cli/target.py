"""Which store a command asks, and how it gets a session with it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from kvstore.errors import InvalidArgument, PermissionDenied
from kvstore.session.base import Session
from kvstore_client import targets
from kvstore_client.client import KVStoreClient
from kvstore_client.cluster.access import TOKEN_FILE as CLUSTER_TOKEN_FILE
from kvstore_client.cluster.session import ClusterSession
from kvstore_client.targets import CLUSTER_SCHEME, default_target

TARGET_VARIABLE = "KVSTORE_TARGET"
TOKEN_VARIABLE = "KVSTORE_TOKEN_FILE"
_TCP = "grpc://"

Connect = Callable[[str, float], AbstractContextManager[Session]]


def target_of(option: str | None) -> str:
    """The option's target, else $KVSTORE_TARGET, else this user's daemon."""
    return option or os.environ.get(TARGET_VARIABLE) or default_target()


def connect(target: str, timeout_s: float) -> AbstractContextManager[Session]:
    """A session with the store at `target`, closed at the end of the `with`.

    Raises `InvalidArgument`, `Unavailable`, `DeadlineExceeded` and `PermissionDenied`.
    """
    token = read_token(target)
    with _advice(target):
        return contextlib.closing(KVStoreClient(target, timeout_s=timeout_s, token=token))


def connect_to_ask(target: str, timeout_s: float) -> ClusterSession:
    """A session with the cluster at `target` for questions about it. Raises as `connect` does."""
    with _advice(target):
        return targets.connect_to_ask(target, timeout_s=timeout_s)


@contextlib.contextmanager
def _advice(target: str) -> Iterator[None]:
    """Says where the token that was refused, or was not there, is to be named."""
    try:
        yield
    except PermissionDenied as error:
        if target.startswith(_TCP):
            advice = f"let ${TOKEN_VARIABLE} name the grpc.token in the daemon's data folder"
        elif target.startswith(CLUSTER_SCHEME):
            advice = f"let ${CLUSTER_TOKEN_FILE} name a file with what kvstore-server cluster-token"
            advice += " prints"
        else:
            raise
        raise PermissionDenied(f"{error}: {advice}") from None


def read_token(target: str) -> str | None:
    """The token in the file that $KVSTORE_TOKEN_FILE names; None for targets that need none.

    A file, since command lines and environments can be read by others. Raises `InvalidArgument`.
    """
    path = os.environ.get(TOKEN_VARIABLE)
    if not path or not target.startswith(_TCP):
        return None
    try:
        return Path(path).read_text("ascii").strip()
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise InvalidArgument(TOKEN_VARIABLE, f"{path} holds no token: {why}") from None
