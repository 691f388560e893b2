"""What a client shows to a cluster: its token and certificates, and where the environment has them.

Whoever starts engines can set variables for them where no argument reaches.
"""

from __future__ import annotations

import os
from pathlib import Path

from kvstore.errors import InvalidArgument
from kvstore_proto.cluster.rpc import Tls

TOKEN = "KVSTORE_CLUSTER_TOKEN"
TOKEN_FILE = "KVSTORE_CLUSTER_TOKEN_FILE"
TLS_CA = "KVSTORE_CLUSTER_TLS_CA"
TLS_CERTIFICATE = "KVSTORE_CLUSTER_TLS_CERTIFICATE"
TLS_KEY = "KVSTORE_CLUSTER_TLS_KEY"


def find_token(given: str | None) -> str:
    """The token that was given, else `$KVSTORE_CLUSTER_TOKEN`, else the text of the file that
    `$KVSTORE_CLUSTER_TOKEN_FILE` names. `InvalidArgument` where there is none."""
    token = given or os.environ.get(TOKEN)
    if token:
        return _checked(token.strip(), "token" if given else TOKEN)
    path = os.environ.get(TOKEN_FILE)
    if not path:
        raise InvalidArgument(
            "token",
            "a cluster asks for what `kvstore-server cluster-token` prints: pass it as token, or"
            f" set {TOKEN}, or let {TOKEN_FILE} name a file with it",
        )
    try:
        return _checked(Path(path).read_text("ascii").strip(), TOKEN_FILE)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise InvalidArgument(TOKEN_FILE, f"{path} holds no token: {why}") from None


def find_tls() -> Tls | None:
    """The PEM files that `$KVSTORE_CLUSTER_TLS_CA`, `_CERTIFICATE` and `_KEY` name; None where
    none is named, `InvalidArgument` where only some are."""
    paths = {name: os.environ.get(name) for name in (TLS_CA, TLS_CERTIFICATE, TLS_KEY)}
    missing = [name for name, path in paths.items() if not path]
    if len(missing) == len(paths):
        return None
    if missing:
        raise InvalidArgument(missing[0], f"{', '.join(paths)} go together")
    ca, certificate, key = (Path(str(path)) for path in paths.values())
    return Tls(ca=ca, certificate=certificate, key=key)


def _checked(token: str, field: str) -> str:
    # It travels in a header; a line break in one would be an error of gRPC's that nobody explains.
    if not token or not token.isascii() or not token.isprintable():
        raise InvalidArgument(field, "holds no token: expected one line of ASCII")
    return token
