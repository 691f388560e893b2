"""gRPC messages on a connection of their own, beside peers that say what the tests want."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hpack import Decoder

from kvstore_client.messages import MessageStream, dialable

DATA, HEADERS, RST, SETTINGS, PUSH, PING, GOAWAY, WINDOW = 0, 1, 3, 4, 5, 6, 7, 8
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FIRST_WINDOW = 65_535
Frame = tuple[int, int, int, bytes]  # kind, flags, stream, payload


def frame(kind: int, payload: bytes = b"", *, flags: int = 0, stream: int = 1) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def setting(name: int, value: int) -> bytes:
    return frame(SETTINGS, struct.pack(">HI", name, value), stream=0)


def more_room(nbytes: int, *, stream: int) -> bytes:
    return frame(WINDOW, struct.pack(">I", nbytes), stream=stream)


def answer(payload: bytes) -> bytes:
    return b"\0" + struct.pack(">I", len(payload)) + payload


class Peer:
    """The other end, which says things beforehand, and hears afterwards what it was sent."""

    def __init__(self, path: Path) -> None:
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen()
        self.stream = MessageStream(
            f"unix:{path}",
            "/service/method",
            metadata=(("authorization", "x" * 300),),
            life_s=60.0,
            end_s=time.monotonic() + 30.0,
        )
        self._sock, _ = self._listening.accept()
        self._sock.setblocking(False)
        self.say(frame(HEADERS, b"\x88", flags=4))  # 200, as every answer begins

    def say(self, *frames: bytes) -> None:
        self._sock.sendall(b"".join(frames))

    def ask(self, message: bytes = b"?", *, within_s: float = 30.0) -> bytes:
        return self.stream.exchange(message, time.monotonic() + within_s)

    def ask_much(self, message: bytes) -> tuple[bytes | None, list[Frame]]:
        """The answer, None for a ConnectionError, and all frames that were heard meanwhile: more
        than a socket takes in. Nothing can be asked afterwards."""
        data = bytearray()

        def hear() -> None:
            while received := self._sock.recv(1 << 20):
                data.extend(received)

        self._sock.setblocking(True)
        hearing = threading.Thread(target=hear)
        hearing.start()
        found = None
        with contextlib.suppress(ConnectionError):
            found = self.ask(message)
        self.stream.shut()
        hearing.join()
        return found, self._frames(bytes(data))

    def heard(self) -> list[Frame]:
        """All frames since the last time."""
        data = b""
        with contextlib.suppress(BlockingIOError):
            while received := self._sock.recv(1 << 20):
                data += received
        return self._frames(data)

    @staticmethod
    def _frames(data: bytes) -> list[Frame]:
        data, frames = data.removeprefix(PREFACE), []
        while data:
            nbytes = int.from_bytes(data[:3], "big")
            kind, flags, stream = struct.unpack_from(">BBI", data, 3)
            frames.append((kind, flags, stream, data[9 : 9 + nbytes]))
            data = data[9 + nbytes :]
        return frames

    def say_last(self, *frames: bytes) -> None:
        """Nothing comes behind these, but what is sent is heard."""
        self.say(*frames)
        self._sock.shutdown(socket.SHUT_WR)

    def hang_up(self) -> None:
        self._sock.close()

    def close(self) -> None:
        self.stream.close()
        self._sock.close()
        self._listening.close()


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    made = Peer(tmp_path / "peer.sock")
    with contextlib.closing(made):
        yield made


def sent_data(frames: list[Frame]) -> bytes:
    return b"".join(payload for kind, _, _, payload in frames if kind == DATA)


def test_the_call_begins_with_the_first_message(peer: Peer) -> None:
    assert not peer.heard()
    peer.say(frame(DATA, answer(b"!")))
    assert peer.ask(b"what?") == b"!"
    settings, window, headers, data = peer.heard()
    assert settings[:3] == (SETTINGS, 0, 0)
    assert window[:3] == (WINDOW, 0, 0)
    assert headers[:3] == (HEADERS, 4, 1)
    fields = dict(Decoder().decode(headers[3]))
    assert (fields[":path"], fields["grpc-timeout"]) == ("/service/method", "60000m")
    assert fields["authorization"] == "x" * 300
    assert data == (DATA, 0, 1, answer(b"what?"))


def test_answers_in_pieces(peer: Peer) -> None:
    peer.say(*(frame(DATA, answer(b"in pieces")[i : i + 1]) for i in range(14)))
    assert peer.ask() == b"in pieces"
    peer.say(frame(DATA, answer(b"")))
    assert peer.ask() == b""


@pytest.mark.parametrize("nbytes", [1, 12])
def test_frames_that_come_in_many_reads(
    peer: Peer, monkeypatch: pytest.MonkeyPatch, nbytes: int
) -> None:
    real = socket.socket.recv
    monkeypatch.setattr(socket.socket, "recv", lambda sock, _: real(sock, nbytes))
    peer.say(frame(PING, b"12345678", stream=0), frame(DATA, answer(b"!")))
    assert peer.ask() == b"!"
    monkeypatch.undo()
    assert (PING, 1, 0, b"12345678") in peer.heard()


def test_settings_and_pings_are_answered(peer: Peer) -> None:
    ping = frame(PING, b"abcdefgh", stream=0)
    peer.say(setting(3, 100), ping, frame(SETTINGS, flags=1, stream=0))
    peer.say(frame(PING, b"notasked", flags=1, stream=0), frame(DATA, answer(b"!")))
    assert peer.ask() == b"!"
    assert peer.heard()[-2:] == [(SETTINGS, 1, 0, b""), (PING, 1, 0, b"abcdefgh")]


def test_what_is_not_known_is_passed_over(peer: Peer) -> None:
    peer.say(frame(0x42, b"later"), setting(0x99, 7), frame(DATA, answer(b"!")))
    assert peer.ask() == b"!"


@pytest.mark.parametrize(("stream", "connection"), [(1 << 20, 1), (1, 1 << 20), (1, 1)])
def test_no_more_is_sent_than_the_peer_has_room_for(
    peer: Peer, stream: int, connection: int
) -> None:
    message = bytes(range(256)) * 400
    peer.say_last(more_room(stream, stream=1), more_room(connection, stream=0))
    found, frames = peer.ask_much(message)
    assert found is None
    assert sent_data(frames) == answer(message)[: FIRST_WINDOW + 1]


def test_the_rest_goes_once_there_is_room(peer: Peer) -> None:
    message = bytes(range(256)) * 400
    peer.say(setting(4, FIRST_WINDOW + 10), more_room(10, stream=0))
    peer.say(more_room(1 << 20, stream=1), more_room(1 << 20, stream=0))
    peer.say(frame(DATA, answer(b"!")))
    found, frames = peer.ask_much(message)
    assert found == b"!"
    assert sent_data(frames) == answer(message)
    assert max(len(payload) for _, _, _, payload in frames) == 16_384


def test_a_smaller_window_is_kept_and_larger_frames_are_used(peer: Peer) -> None:
    peer.say(setting(4, 100), setting(5, 1 << 15), frame(DATA, answer(b"!")))
    assert peer.ask() == b"!"
    peer.heard()
    peer.say(more_room(1 << 20, stream=1), more_room(1 << 20, stream=0), frame(DATA, answer(b"!")))
    found, frames = peer.ask_much(bytes(200_000))
    assert found == b"!"
    sizes = [len(payload) for kind, _, _, payload in frames if kind == DATA]
    assert sizes[0] == 100 - len(answer(b"?"))
    assert max(sizes) == 1 << 15
    assert sum(sizes) == 200_005


def test_what_was_taken_is_given_back(peer: Peer) -> None:
    taken = 0
    for _ in range(17):
        peer.say(frame(DATA, answer(bytes(10_000))), frame(DATA, b""))
        assert len(peer.ask()) == 10_000
        taken += len(answer(bytes(10_000)))
    peer.heard()
    for _ in range(40):
        peer.say(frame(DATA, answer(bytes(10_000))))
        peer.ask()
        taken += len(answer(bytes(10_000)))
    given = [(f[2], int.from_bytes(f[3], "big")) for f in peer.heard() if f[0] == WINDOW]
    assert [stream for stream, _ in given] == [0, 1]
    assert given[0][1] == given[1][1] == 53 * len(answer(bytes(10_000)))
    assert taken > given[0][1] > 1 << 19


@pytest.mark.parametrize(
    "last",
    [
        frame(RST, bytes(4)),
        frame(GOAWAY, bytes(8), stream=0),
        frame(PUSH, bytes(4)),
        frame(HEADERS, b"\x88", flags=5),
        frame(DATA, answer(b"!"), flags=1),
        frame(DATA, b"\1" + answer(b"!")[1:]),
        frame(DATA, answer(b"!") + answer(b"!")),
        frame(DATA, b"\0" + struct.pack(">I", 1 << 20)),
        frame(DATA, bytes(16_385)),
        frame(WINDOW, b""),
        frame(WINDOW, b"abc"),
        frame(SETTINGS, b"abc", stream=0),
        setting(5, 0),
        setting(5, 1 << 24),
    ],
)
def test_anything_else_ends_it(peer: Peer, last: bytes) -> None:
    peer.say(last)
    with pytest.raises(ConnectionError):
        peer.ask()


def test_a_peer_of_another_protocol_is_waited_for_no_longer_than_others(peer: Peer) -> None:
    """Its words look like the beginning of a frame."""
    peer.say(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    with pytest.raises(TimeoutError):
        peer.ask(within_s=0.1)


def test_a_peer_that_hangs_up(peer: Peer) -> None:
    peer.hang_up()
    with pytest.raises(ConnectionError):
        peer.ask()


def test_shut_ends_it(peer: Peer) -> None:
    peer.stream.shut()
    with pytest.raises(ConnectionError):
        peer.ask()
    peer.stream.shut()
    peer.stream.close()
    peer.stream.shut()


def test_time_that_is_over_sends_nothing(peer: Peer) -> None:
    with pytest.raises(TimeoutError):
        peer.ask(within_s=-1.0)
    assert not peer.heard()


def test_a_peer_that_says_little_by_little_gets_no_more_time(
    peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, real = [0.0], socket.socket.recv

    def recv(sock: socket.socket, nbytes: int) -> bytes:
        now[0] += 0.3
        return real(sock, 1)

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(socket.socket, "recv", recv)
    peer.say(frame(DATA, answer(b"a long answer")))
    with pytest.raises(TimeoutError):
        peer.stream.exchange(b"?", 1.0)
    assert 1.0 <= now[0] < 1.3


def test_nobody_there(tmp_path: Path) -> None:
    for address in (f"unix:{tmp_path}/nobody.sock", "127.0.0.1:1"):
        with pytest.raises(OSError):
            MessageStream(address, "/s/m", metadata=(), life_s=1.0, end_s=time.monotonic() + 5.0)


@pytest.mark.parametrize(
    ("address", "yes"),
    [
        ("unix:/run/x.sock", True),
        ("127.0.0.1:80", True),
        ("[::1]:80", True),
        ("localhost:80", False),
        ("example.org:80", False),
        ("127.0.0.1", False),
        ("127.0.0.1:x", False),
        ("dns:///127.0.0.1:80", False),
        ("unix:relative", False),
        ("[::1:80", False),
    ],
)
def test_addresses_without_names_can_be_dialled(address: str, yes: bool) -> None:
    assert dialable(address) is yes
