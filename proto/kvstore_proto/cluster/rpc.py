"""Names, options and credentials of the service between nodes and clients of a cluster."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from pathlib import Path

import grpc

from kvstore import limits
from kvstore.errors import InvalidArgument

SERVICE = "kvstore.cluster.v1.Peer"
CALLS = "Calls"
ATTACH = "Attach"
AUTHORIZATION = "authorization"
_FRAME_ROOM = 1 << 16  # beside a frame's body
_SILENCE_MS = 5000  # until the other side is asked whether it is there, and for its answer
OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", limits.MAX_FRAME_BYTES + _FRAME_ROOM),
    ("grpc.max_receive_message_length", limits.MAX_FRAME_BYTES + _FRAME_ROOM),
    # A member that comes back is to be noticed soon.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
    # A host that vanished without a word must not keep sessions open, nor have what is sent to it
    # wait for TCP, which goes on trying for minutes, and in ever longer pauses.
    ("grpc.keepalive_time_ms", _SILENCE_MS),
    ("grpc.keepalive_timeout_ms", _SILENCE_MS),
    ("grpc.http2.max_pings_without_data", 0),
    # gRPC also pings to learn how much a connection holds, and the other side has taken these for
    # abuse and ended the connection of members that know each other.
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", _SILENCE_MS // 2),
    ("grpc.enable_retries", 0),
    ("grpc.so_reuseport", 0),
    ("grpc.enable_http_proxy", 0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """PEM files: the authority that signs all of a cluster's certificates, and one's own."""

    ca: Path
    certificate: Path
    key: Path

    def _read(self, path: Path, field: str) -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            raise InvalidArgument(field, f"{path} cannot be read: {error.strerror}") from None

    def server(self) -> grpc.ServerCredentials:
        """Of a node: whoever connects shows a certificate of the same authority."""
        pair = (self._read(self.key, "tls_key"), self._read(self.certificate, "tls_certificate"))
        return grpc.ssl_server_credentials(
            [pair], root_certificates=self._read(self.ca, "tls_ca"), require_client_auth=True
        )

    def channel(self) -> grpc.ChannelCredentials:
        """Of who connects."""
        return grpc.ssl_channel_credentials(
            root_certificates=self._read(self.ca, "tls_ca"),
            private_key=self._read(self.key, "tls_key"),
            certificate_chain=self._read(self.certificate, "tls_certificate"),
        )


def node_token(secret: bytes) -> str:
    """What nodes show each other: only who has the cluster's secret can."""
    return hmac.new(secret, b"kvstore-cluster-node-1", hashlib.sha256).hexdigest()


def client_token(secret: bytes) -> str:
    """What clients show to nodes. It opens no more than a client may do."""
    return hmac.new(secret, b"kvstore-cluster-client-1", hashlib.sha256).hexdigest()
