"""The session that outlives connections, against connections that end when the test says so."""

from __future__ import annotations

import logging
import queue
import threading
from typing import Any, cast

import numpy as np
import pytest

from kvstore import Layout, Miss, MissReason, NamespaceHandle
from kvstore.errors import (
    DeadlineExceeded,
    InvalidArgument,
    LayoutMismatch,
    ProtocolError,
    ResourceExhausted,
    StaleNamespace,
    Unavailable,
)
from kvstore.session.resilient import Connection, ResilientSession

LAYOUT = Layout.opaque(model="m", block_bytes=64, block_tokens=16)
NAMESPACE = NamespaceHandle(id=1, name="n", layout=LAYOUT, generation=0, key=b"k" * 32)
HASHES = np.zeros((2, 32), np.uint8)
BLOCKS = [np.zeros(64, np.uint8), np.zeros(64, np.uint8)]
WAIT_S = 10.0


class Line:
    """A connection whose calls raise `failure` while there is one; stands in for a daemon's."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.closed = threading.Event()
        self.failure: Exception | None = None
        self.calls = 0

    def watch(self) -> bool:
        assert self.over.wait(WAIT_S)
        return True

    def shut(self) -> None:
        self.over.set()

    def close(self) -> None:
        self.closed.set()

    def _call(self, *_: object, **__: object) -> Any:
        self.calls += 1
        if self.failure:
            raise self.failure
        return "answer"

    match = get_into = put = stats = drop = view = _call


class Exchange:
    """Hands out lines, or refuses while `away` is set."""

    def __init__(self) -> None:
        self.away = False
        self.lines: queue.Queue[Line] = queue.Queue()

    def __call__(self, timeout_s: float) -> Connection:
        assert timeout_s > 0
        if self.away:
            raise Unavailable("nobody is there")
        line = Line()
        self.lines.put(line)
        return cast(Connection, line)

    def next(self) -> Line:
        return self.lines.get(timeout=WAIT_S)


@pytest.fixture
def exchange() -> Exchange:
    return Exchange()


def test_calls_go_through_and_close_ends_the_connection(exchange: Exchange) -> None:
    with ResilientSession(exchange, timeout_s=1.0) as session:
        assert cast(Any, session.stats()) == "answer"
        line = exchange.next()
    assert line.closed.is_set()


def test_an_absent_store_is_an_error_at_once_unless_lazy(exchange: Exchange) -> None:
    exchange.away = True
    with pytest.raises(Unavailable, match="nobody is there"):
        ResilientSession(exchange, timeout_s=1.0)
    with ResilientSession(exchange, timeout_s=1.0, lazy=True) as session:
        assert session.match(NAMESPACE, HASHES).count == 0
        exchange.away = False
        assert cast(Any, session.stats(timeout_s=WAIT_S)) == "answer"


@pytest.mark.parametrize(
    "failure",
    [
        Unavailable("gone"),
        DeadlineExceeded("slow"),
        ResourceExhausted("full of namespaces", retry_after_ms=0),
        StaleNamespace("dropped while it was opened"),
        ProtocolError("not in its senses"),
        OSError(24, "no descriptor left to map it"),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_data_calls_miss_where_the_store_is_away(exchange: Exchange, failure: Exception) -> None:
    with ResilientSession(exchange, timeout_s=1.0) as session:
        line = exchange.next()
        line.failure = failure
        assert session.match(NAMESPACE, HASHES).count == 0
        missed = session.get_into(NAMESPACE, HASHES, BLOCKS)
        assert missed == [Miss(MissReason.UNAVAILABLE)] * 2
        assert session.put(NAMESPACE, HASHES, BLOCKS).not_stored == 2
        assert line.calls == 3


def test_a_full_store_is_a_put_that_was_not_stored(exchange: Exchange) -> None:
    with ResilientSession(exchange, timeout_s=1.0) as session:
        exchange.next().failure = ResourceExhausted("full", retry_after_ms=70)
        result = session.put(NAMESPACE, HASHES, BLOCKS)
        assert (result.not_stored, result.retry_after_ms) == (2, 70)


def test_bad_input_is_an_error_also_while_the_store_is_away(exchange: Exchange) -> None:
    with ResilientSession(exchange, timeout_s=1.0) as session:
        exchange.next().failure = Unavailable("gone")
        with pytest.raises(InvalidArgument, match="buffers"):
            session.get_into(NAMESPACE, HASHES, BLOCKS[:1])
        with pytest.raises(LayoutMismatch, match=r"sources\[0\]"):
            session.put(NAMESPACE, HASHES, [np.zeros(3, np.uint8)] * 2)


def test_a_lost_connection_is_made_again_and_the_call_goes_on(exchange: Exchange) -> None:
    with ResilientSession(exchange, timeout_s=WAIT_S) as session:
        first = exchange.next()
        first.failure = Unavailable("gone")
        assert cast(Any, session.stats()) == "answer"
        assert first.closed.wait(WAIT_S)
        assert exchange.next().calls == 1


def test_a_connection_lost_before_it_was_watched_is_closed(exchange: Exchange) -> None:
    """A caller may lose it in the moment in which it was made."""
    lost = queue.SimpleQueue[Connection]()
    with ResilientSession(exchange, timeout_s=WAIT_S) as session:

        class Loser(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                if record.getMessage() == "reached the store" and session._connection:
                    lost.put(session._connection)
                    session._lose(session._connection)

        logger = logging.getLogger("kvstore.session.resilient")
        handler, level = Loser(), logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            exchange.next().over.set()
            made = cast(Line, lost.get(timeout=WAIT_S))
            assert made.closed.wait(WAIT_S)
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)


def test_a_store_that_stays_away_is_an_error_at_the_deadline(exchange: Exchange) -> None:
    with ResilientSession(exchange, timeout_s=WAIT_S) as session:
        exchange.away = True
        exchange.next().failure = Unavailable("gone")
        with pytest.raises(Unavailable):
            session.stats(timeout_s=0.05)


def test_a_wrong_answer_is_raised_and_not_asked_again(exchange: Exchange) -> None:
    with ResilientSession(exchange, timeout_s=WAIT_S) as session:
        line = exchange.next()
        line.failure = InvalidArgument("hashes", "no")
        with pytest.raises(InvalidArgument):
            session.drop(NAMESPACE, HASHES)
        assert line.calls == 1


def test_a_closed_session_says_so(exchange: Exchange) -> None:
    session = ResilientSession(exchange, timeout_s=WAIT_S)
    session.close()
    session.close()
    with pytest.raises(Unavailable, match="closed"):
        session.stats()
    assert session.match(NAMESPACE, HASHES).count == 0
