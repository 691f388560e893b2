"""Whether the store really stores: random bytes are put and got, again and again.

Ours: the canary, and what grpc.health.v1 says of it. Not ours: any call of a user.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable

import numpy as np
import structlog
from grpc_health.v1.health import HealthServicer
from grpc_health.v1.health_pb2 import HealthCheckResponse

from kvstore import limits
from kvstore.errors import Corrupted, Unavailable
from kvstore.layout import Layout
from kvstore.session.base import Hit, Session

SERVICES = ("", "kvstore.v1.KVStore")
NAMESPACE = "kvstore-health"
LAYOUT = Layout.opaque(model="kvstore-health", block_bytes=1024, block_tokens=1)
INTERVAL_S = 2.0
TIMEOUT_S = 2.0
_TTL_S = 60.0  # for the block of a gateway that dies between put and drop

log = structlog.get_logger()


class Canary:
    """One block that goes the way of all blocks.

    Where the store holds blocks, it is of the smallest layout there is, so that it fits a slot
    that others leave, instead of taking a slab of its own from them.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        # One key for good, so that the store's history of dropped blocks is not full of ours.
        self._hashes = [secrets.token_bytes(limits.KEY_BYTES)]

    def check(self) -> None:
        """Puts new random bytes and gets them; a `KVStoreError` says why that failed.

        A store that is full of blocks in use, and says so, is a store that serves.
        """
        layout = self._layout()
        opened = self._session.open_namespace(NAMESPACE, layout, timeout_s=TIMEOUT_S)
        self._session.drop(opened, self._hashes, timeout_s=TIMEOUT_S)
        sent = np.frombuffer(secrets.token_bytes(layout.block_bytes), np.uint8)
        put = self._session.put(opened, self._hashes, [sent], ttl_s=_TTL_S, timeout_s=TIMEOUT_S)
        if put.not_stored and put.retry_after_ms:
            return
        if not put.stored:
            raise Unavailable("the store does not take a block")
        got = np.zeros(layout.block_bytes, np.uint8)
        answer = self._session.get_into(opened, self._hashes, [got], timeout_s=TIMEOUT_S)[0]
        if not isinstance(answer, Hit):
            raise Unavailable(f"the store does not give its block back: {answer.reason}")
        if not np.array_equal(got, sent):
            raise Corrupted("the store gives other bytes than it took")
        self._session.drop(opened, self._hashes, timeout_s=TIMEOUT_S)

    def _layout(self) -> Layout:
        spaces = self._session.info(timeout_s=TIMEOUT_S).namespaces
        used = [space.layout for space in spaces if space.blocks]
        return min(used, key=lambda layout: layout.block_bytes, default=LAYOUT)


class Health:
    """Tells clients whether the store serves, by a canary that a thread sends every so often.

    on_first_pass: called once, by that thread, when the canary passed for the first time.
    """

    def __init__(
        self,
        session: Session,
        *,
        on_first_pass: Callable[[], None] = lambda: None,
        interval_s: float = INTERVAL_S,
    ) -> None:
        self.servicer = HealthServicer()
        self._canary = Canary(session)
        self._on_first_pass: Callable[[], None] | None = on_first_pass
        self._interval_s = interval_s
        self._wake = threading.Event()
        self._ended = False
        self._passed: bool | None = None
        self._tell(HealthCheckResponse.NOT_SERVING)
        self._thread = threading.Thread(target=self._watch, name="kvstore-health", daemon=True)

    def start(self) -> None:
        """Sends the first canary, in the thread."""
        self._thread.start()

    def doubt(self) -> None:
        """Some call found the store away: looks at once instead of in its time."""
        self._wake.set()

    def shut_down(self) -> None:
        """Tells everybody, for good, that nothing is served here any more."""
        self.servicer.enter_graceful_shutdown()

    def close(self) -> None:
        """Ends the thread; a canary under way ends by its deadline."""
        self._ended = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        while not self._ended:
            self._wake.clear()
            self._show(self._failure())
            self._wake.wait(self._interval_s)

    def _failure(self) -> Exception | None:
        try:
            self._canary.check()
        except Exception as error:  # whatever it is: "serves" must not stand
            return error
        return None

    def _show(self, failure: Exception | None) -> None:
        passed = failure is None
        if passed != self._passed:
            self._passed = passed
            self._tell(HealthCheckResponse.SERVING if passed else HealthCheckResponse.NOT_SERVING)
            log.info("serves") if passed else log.warning("does not serve", reason=str(failure))
        if passed and self._on_first_pass:
            on_first_pass, self._on_first_pass = self._on_first_pass, None
            on_first_pass()

    def _tell(self, status: int) -> None:
        for service in SERVICES:
            self.servicer.set(service, status)
