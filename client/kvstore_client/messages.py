"""gRPC messages on one stream, sent and received by the thread that asks.

gRPC's own client hands a message on a stream from thread to thread, each woken for it, which is
most of a small round trip. Here the thread that asks waits on the socket itself; h2 speaks HTTP/2.
Only what gRPC makes of it (its "gRPC over HTTP2") is here: a message is five bytes
of prefix and the rest. Whatever else comes ends the stream: who wants to know why makes a call.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
import time
from collections.abc import Iterable
from urllib.parse import urlsplit

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    PingReceived,
    RemoteSettingsChanged,
    StreamEnded,
    StreamReset,
)
from h2.exceptions import H2Error
from h2.settings import SettingCodes, Settings

_PREFIX = struct.Struct(">BL")  # of a message: compressed?, its bytes
_STREAM = 1  # the only one
_FIRST_WINDOW = 65_535  # of a connection
_WINDOW = 1 << 20  # ours, of the stream and of the connection
_MOST_BYTES = _WINDOW // 2  # of an answer
_READ_BYTES = 64 << 10
_ENDING = (StreamEnded, StreamReset, ConnectionTerminated)
_ANSWERED = (PingReceived, RemoteSettingsChanged)  # by h2, at once


class MessageStream:
    """One stream on a connection of its own; one thread at a time, but for `shut`.

    Its errors are OSError: TimeoutError past a deadline, ConnectionError where the peer ended it or
    sent what is not understood here. After any of them, and after whatever else broke a call off,
    it is of no more use but to be closed.
    """

    def __init__(
        self,
        address: str,
        path: str,
        *,
        metadata: Iterable[tuple[str, str]],
        life_s: float,
        end_s: float,
    ) -> None:
        """Connects by `end_s` (of `time.monotonic`) and begins a call of `path`, `/service/method`.

        address: as `dialable` takes it. life_s: the call's deadline, for the server. OSError.
        """
        self._sock = _connected(address, end_s)
        self._message = bytearray()  # the beginning of an answer, with its prefix
        self._http = H2Connection(H2Configuration(client_side=True, header_encoding=None))
        own = {SettingCodes.ENABLE_PUSH: 0, SettingCodes.INITIAL_WINDOW_SIZE: _WINDOW}
        self._http.local_settings = Settings(client=True, initial_values=own)
        host = "localhost" if address.startswith("unix:") else address
        fields = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", host)]
        fields += [("te", "trailers"), ("content-type", "application/grpc")]
        fields += [("grpc-timeout", f"{round(1e3 * life_s)}m"), *metadata]
        # All of it goes with the first message.
        self._http.initiate_connection()
        self._http.increment_flow_control_window(_WINDOW - _FIRST_WINDOW)
        self._http.send_headers(_STREAM, fields)

    def exchange(self, message: bytes, end_s: float) -> bytes:
        """The answer to a message, which has to be there by `end_s` of `time.monotonic`."""
        try:
            self._send(_PREFIX.pack(0, len(message)) + message, end_s)
            while True:
                answer = self._answer()
                if answer is not None:
                    return answer
                self._receive(end_s)
        except H2Error as error:
            raise ConnectionError(f"the peer's HTTP/2: {error}") from error

    def shut(self) -> None:
        """Ends `exchange`, also in another thread; `close` follows."""
        with contextlib.suppress(OSError):  # the peer was first
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends the connection in this process alone: a child that was forked has it too."""
        self._sock.close()

    # -- inside ------------------------------------------------------------------------

    def _send(self, data: bytes, end_s: float) -> None:
        http, at = self._http, 0
        while at < len(data):
            room = min(http.local_flow_control_window(_STREAM), http.max_outbound_frame_size)
            if room:
                http.send_data(_STREAM, data[at : at + room])
                at += room
            else:
                self._say(end_s)
                self._receive(end_s)  # until there is room
        self._say(end_s)

    def _say(self, end_s: float) -> None:
        self._sock.settimeout(_left_s(end_s))
        self._sock.sendall(self._http.data_to_send())

    def _receive(self, end_s: float) -> None:
        """Waits for bytes, and takes in what is whole by then."""
        self._sock.settimeout(_left_s(end_s))
        received = self._sock.recv(_READ_BYTES)
        if not received:
            raise ConnectionError("the peer closed the connection")
        events = self._http.receive_data(received)
        for event in events:
            self._take(event)
        if any(isinstance(event, _ANSWERED) for event in events):
            self._say(end_s)

    def _take(self, event: Event) -> None:
        if isinstance(event, DataReceived):
            self._message += event.data
            # What that tells the peer goes with the next message.
            self._http.acknowledge_received_data(event.flow_controlled_length, _STREAM)
        elif isinstance(event, _ENDING):
            raise ConnectionError("the peer ended the stream")

    def _answer(self) -> bytes | None:
        """The answer, once it is whole."""
        message = self._message
        if len(message) < _PREFIX.size:
            return None
        compressed, nbytes = _PREFIX.unpack_from(message)
        whole = _PREFIX.size + nbytes
        if compressed or nbytes > _MOST_BYTES or len(message) > whole:
            raise ConnectionError("what came is not one answer")
        if len(message) < whole:
            return None
        self._message = bytearray()
        return bytes(message[_PREFIX.size :])


def dialable(address: str) -> bool:
    """Whether an address of gRPC's is `unix:/path` or NUMBERS:PORT: to look a name up may take
    longer than any deadline."""
    if address.startswith("unix:/"):
        return True
    try:
        url = urlsplit(f"//{address}")
        ipaddress.ip_address(url.hostname or "")
        return url.port is not None
    except ValueError:
        return False


def _connected(address: str, end_s: float) -> socket.socket:
    if address.startswith("unix:"):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(_left_s(end_s))
            sock.connect(address.removeprefix("unix:"))
        except BaseException:
            sock.close()
            raise
        return sock
    url = urlsplit(f"//{address}")
    sock = socket.create_connection((url.hostname or "", url.port or 0), _left_s(end_s))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _left_s(end_s: float) -> float:
    left_s = end_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("the deadline is over")
    return left_s
