"""Who has which store: one trust domain for each user, with a pool and an index of its own."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import structlog

from kvstore.clock import Clock
from kvstore.errors import PermissionDenied, ResourceExhausted
from kvstore.limits import RETRY_AFTER_MS
from kvstore.memory import Arenas, HugePages, Placement
from kvstore.nvme.opening import Location, Opened, open_all
from kvstore.nvme.runner import Runner, Soon
from kvstore.store import NvmePolicy, Store

log = structlog.get_logger()


def _at_once(work: Callable[[], None]) -> None:
    work()


def _nobody(tenant: Tenant) -> None:
    del tenant


@dataclass(slots=True, eq=False)
class Tenant:
    """One user's store. `writable`: its clients write the pool themselves (`direct`). `runner`:
    of its disks, where it has any."""

    uid: int
    store: Store
    arenas: Arenas
    instance: int
    writable: bool
    runner: Runner | None = None

    def settle(self) -> None:
        """Begins what the store wants done since it was last asked."""
        if self.runner:
            self.runner.pump()


class Tenants:
    """The stores of the users of this daemon: the daemon's own at once, others' as they come."""

    def __init__(
        self,
        *,
        dram: int,
        max_blocks: int,
        eviction: str,
        tenants: int,
        trust: str,
        huge_pages: HugePages,
        numa_node: int | None,
        prefault: bool,
        secret: bytes,
        version: str,
        nvme: Sequence[Location] = (),
        nvme_policy: NvmePolicy | None = None,
        soon: Soon = _at_once,
    ) -> None:
        """dram: bytes of all pools together; max_blocks: of one. trust: "direct" or "copy-in",
        for the daemon's own user; others always copy in. nvme: volumes, each split among the
        users. soon: has something done by the thread that owns the stores. `InvalidArgument` for
        a placement that the machine cannot give."""
        self._pool_bytes, self._max_blocks = dram // tenants, max_blocks
        self._eviction, self._limit, self._trust = eviction, tenants, trust
        self._placement = Placement(huge_pages=huge_pages, numa_node=numa_node)
        self._prefault, self._secret, self._version = prefault, secret, version
        self._nvme = [location.share(tenants) for location in nvme]
        self._nvme_policy, self._soon = nvme_policy or NvmePolicy(), soon
        self._changed: Callable[[Tenant], None] = _nobody
        self._clock = Clock()
        self._by_uid: dict[int, Tenant] = {}
        self.for_uid(os.getuid())

    def for_uid(self, uid: int) -> Tenant:
        """The user's store, made if there is a pool left; `PermissionDenied` where only the
        daemon's user is served, `ResourceExhausted` where all pools are taken."""
        known = self._by_uid.get(uid)
        if known:
            return known
        if self._limit == 1 and self._by_uid:
            raise PermissionDenied(
                f"this daemon serves user {os.getuid()} only: start it with tenants above 1"
            )
        if len(self._by_uid) >= self._limit:
            raise ResourceExhausted(
                f"all {self._limit} users' pools are taken: raise tenants",
                retry_after_ms=RETRY_AFTER_MS,
            )
        tenant = self._by_uid[uid] = self._make(uid)
        if len(self._by_uid) > 1:
            log.info("new tenant", uid=uid, pools=len(self._by_uid))
        return tenant

    def on_change(self, changed: Callable[[Tenant], None]) -> None:
        """Whom to tell that a store has changed by itself: what it wants done has begun."""
        self._changed = changed

    def tick(self) -> None:
        """Lets the stores do what is due."""
        now_ms = self._clock.now_ms()
        for tenant in self._by_uid.values():
            due_ms = tenant.store.next_due_ms
            if due_ms is not None and due_ms <= now_ms:
                tenant.store.tick(now_ms)
                tenant.settle()

    def next_due_s(self) -> float | None:
        """Seconds until something is due in a store; None: nothing."""
        due_ms = [t.store.next_due_ms for t in self._by_uid.values()]
        known = [due for due in due_ms if due is not None]
        return max(0.0, (min(known) - self._clock.now_ms()) / 1e3) if known else None

    def now_ms(self) -> int:
        """Unix time in milliseconds, as the stores are told it."""
        return self._clock.now_ms()

    def describe(self) -> list[str]:
        """Lines for the banner."""
        node, pages = self._placement.numa_node, self._placement.huge_pages
        where = "" if node is None else f" on node {node}"
        return [f"  memory    huge pages {pages}{where}, {self._trust} clients"]

    def close(self) -> None:
        """Gives all memory back."""
        for tenant in self._by_uid.values():
            if tenant.runner:
                tenant.runner.close()
            tenant.arenas.close()

    def __iter__(self) -> Iterator[Tenant]:
        return iter(list(self._by_uid.values()))

    def _make(self, uid: int) -> Tenant:
        writable = uid == os.getuid() and self._trust == "direct"
        arenas = Arenas(self._pool_bytes, self._placement, pool_writable=writable)
        instance = secrets.randbits(63)
        opened = Opened()
        try:
            opened = open_all(self._nvme, name=f"blocks-{uid}.kvs")
            store = Store(
                arenas.store_memory(),
                secret=self._secret_of(uid),
                instance_id=instance,
                max_blocks=self._max_blocks,
                policy=self._eviction,
                now_ms=self._clock.now_ms(),
                version=self._version,
                volumes=opened.books(),
                nvme=replace(self._nvme_policy, broken=bool(opened.problems)),
            )
        except BaseException:
            opened.close()
            arenas.close()
            raise
        if self._prefault:
            arenas.prefault_in_background()
        tenant = Tenant(uid, store, arenas, instance, writable)
        if opened.volumes:
            tenant.runner = Runner(
                store,
                opened,
                arenas.pool.array,
                soon=self._soon,
                now_ms=self._clock.now_ms,
                after=lambda: self._settle(uid),
            )
            tenant.runner.start()
        return tenant

    def _settle(self, uid: int) -> None:
        tenant = self._by_uid[uid]
        tenant.settle()
        self._changed(tenant)

    def _secret_of(self, uid: int) -> bytes:
        """Users learn their namespaces' keys; those must say nothing of another user's."""
        if uid == os.getuid():
            return self._secret
        person = b"kvstore-user-1"
        return hashlib.blake2b(str(uid).encode(), key=self._secret[:64], person=person).digest()
