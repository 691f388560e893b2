"""NIXL over UCX: reads and writes of another process's memory over RDMA.

What NIXL 1.5.1 and its UCX were seen to do decides how they are used here:

- A transfer that is released, and whose remote is removed, goes on: bytes land until the agent is
  destroyed. So every remote has a NIXL agent of its own.
- Between processes of one host, UCX writes to the other's memory through the kernel (cma), which
  the other cannot refuse, whatever it destroys. Through a queue in shared memory, destroying an
  agent waits for a peer that is stopped. So neither is used: only RDMA and TCP are.
- It takes a GPU's memory like the host's: over RDMA the network card reads and writes it by itself,
  over TCP UCX copies it through the host's.
- Over TCP a process that is read from or written to may abort when the other one disappears: always
  where it was stopped meanwhile and was being read from, else seldom. There a living agent also
  takes writes to any address, registered or not. So TCP is only used where that is asked for.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import secrets
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import cast

import numpy as np

from kvstore import limits
from kvstore.errors import DeadlineExceeded, InvalidArgument, ProtocolError, Unavailable
from kvstore.nixl_binding import Bindings, Native
from kvstore.transfer import description as descriptions
from kvstore.transfer.base import HOST, U64, Arrived, Memory, Pieces, TransferFailed
from kvstore.transfer.registered import Region, Regions, Registered, checked, merged, portions

KIND = "nixl"
NO_RDMA = "no RDMA device is here, and over TCP NIXL can abort the other process: use grpc"
_WHEELS = ("nixl_cu13", "nixl_cu12")
_NEVER = "^cma,xpmem,knem,sysv,posix"
_SEGMENT = "64k"  # of UCX's TCP; with its own 8 KiB a read is less than half as fast
_PROGRESS_US = 1000  # of the passive side's thread: how long it sleeps where nothing wakes it
_STAGGER_NAPS = 6  # between the beginnings of a transfer's first two parts
_NAP_S = 20e-6  # between two looks at a transfer: in it others run, as the peer on a small host
_UCX_DEFAULTS = {
    "UCX_LOG_LEVEL": "error",
    "UCX_TCP_TX_SEG_SIZE": _SEGMENT,
    "UCX_TCP_RX_SEG_SIZE": _SEGMENT,
}
_BODY = struct.Struct("<BxHIQ")  # RDMA?, regions, 0, address of the probe; then regions, metadata
_REGION = np.dtype([("address", "<u8"), ("nbytes", "<u8"), ("device", "<i8")])
_MOST_DEVICES = 1024  # of a host
_SEVERAL = "lie in the memory of several GPUs, or of one and the host's"
_PROBE_BYTES = 8

_creating = threading.Lock()


def load() -> Bindings:
    """NIXL's bindings of the wheel that is installed; `Unavailable`."""
    problems = []
    # The wheels bring a libnl of their own. Where the host has one too, a process ends in a
    # segmentation fault, unless the host's was loaded first.
    with contextlib.suppress(OSError):
        ctypes.CDLL("libnl-route-3.so.200")
    for wheel in _WHEELS:
        try:
            # Its __init__ says where NIXL looks for its plugins.
            importlib.import_module(wheel)
            return cast(Bindings, importlib.import_module(f"{wheel}._bindings"))
        except ImportError as error:
            problems.append(f"{wheel}: {error}")
    raise Unavailable(f"no NIXL: pip install nixl-cu13 or nixl-cu12 ({'; '.join(problems)})")


def has_rdma() -> bool:
    """Whether this host has an RDMA device."""
    folder = Path("/sys/class/infiniband")
    return folder.is_dir() and any(folder.iterdir())


def transports(*, rdma: bool) -> str:
    """UCX's transports that are used, as in `UCX_TLS`. With RDMA it does not fall back to TCP."""
    return f"{_NEVER},tcp" if rdma else _NEVER


class NixlAgent:
    """A NIXL agent: see `kvstore.transfer.base.Agent`.

    name: for logs. over_tcp: works without RDMA devices too, for tests and trusted networks:
    a process may then abort where its peer dies. `Unavailable` where neither is to be had.
    """

    kind = KIND

    def __init__(self, name: str, *, over_tcp: bool = False) -> None:
        self._bindings = load()
        self._name, self._rdma = name, has_rdma()
        if not self._rdma and not over_tcp:
            raise Unavailable(NO_RDMA)
        self._registered = Registered(devices=True)
        self._lock = threading.Lock()
        self._fixed = self._closed = False
        self._passive: _Engine | None = None
        self._remotes: set[NixlRemote] = set()

    def register(self, memory: Memory) -> None:
        """See `Agent`."""
        with self._lock:
            if self._fixed or self._closed:
                raise InvalidArgument("memory", "is registered before describe and connect only")
            self._registered.add(memory)

    def describe(self) -> bytes:
        """See `Agent`. From now on others can reach this process."""
        with self._lock:
            self._usable()
            if self._passive is None:
                self._passive = self._engine(passive=True)
            engine, ranges = self._passive, self._registered.regions.ranges
            head = _BODY.pack(self._rdma, len(ranges), 0, engine.probe.ctypes.data)
            table = np.array(ranges, _REGION).tobytes()
            return descriptions.pack(KIND, head + table + engine.metadata())

    def connect(self, description: bytes, timeout_s: float) -> NixlRemote:
        """See `Agent`. Writes a few bytes to memory of the other agent's own."""
        deadline = time.monotonic() + timeout_s
        rdma, probe, regions, metadata = _opened(descriptions.unpack(KIND, description))
        with self._lock:
            self._usable()
            if rdma != self._rdma:
                raise TransferFailed("one of the two hosts has RDMA devices and the other has none")
            engine = self._engine(passive=False)
            remote = NixlRemote(engine, self._registered.regions, regions)
            self._remotes.add(remote)
        try:
            remote.open(metadata, probe, max(0.0, deadline - time.monotonic()))
        except BaseException:
            remote.close()
            raise
        return remote

    def close(self) -> None:
        """See `Agent`."""
        with self._lock:
            self._closed = True
            remotes, self._remotes = self._remotes, set()
            passive, self._passive = self._passive, None
        if passive:
            passive.destroy()
        for remote in remotes:
            remote.close()

    def _usable(self) -> None:
        if self._closed:
            raise TransferFailed("this agent is closed")
        self._fixed = True
        self._remotes = {remote for remote in self._remotes if not remote.closed}

    def _engine(self, *, passive: bool) -> _Engine:
        ranges = self._registered.regions.ranges
        return _Engine(self._bindings, self._name, ranges, passive=passive, rdma=self._rdma)


class NixlRemote:
    """Another process's memory: see `kvstore.transfer.base.Remote`. Made by `NixlAgent`."""

    kind = KIND

    def __init__(self, engine: _Engine, local: Regions, remote: Regions) -> None:
        self._engine, self._local, self._remote = engine, local, remote
        self._peer: bytes | str = ""
        self._changed = threading.Condition()
        self._calls = 0
        self._ending = self._broken = False
        self.closed = False
        self._unsettled: list[int] = []  # transfers that did not end well: they may yet go on

    def open(self, metadata: bytes, probe: int, timeout_s: float) -> None:
        """Reaches the other process: `TransferFailed`, `ProtocolError`, `DeadlineExceeded`."""
        with self._call():
            self._peer = self._engine.load(metadata)
            one = np.array([self._engine.probe.ctypes.data], np.uint64)
            there, size = np.array([probe], np.uint64), np.array([_PROBE_BYTES], np.uint64)
            self._move([Pieces(one, there, size)], timeout_s, _Way(HOST, HOST, read=False))

    def read(self, pieces: Pieces, timeout_s: float, arrived: Arrived | None = None) -> None:
        """See `Remote`. With `arrived` it goes in parts, of which two are on their way."""
        self._run(pieces, timeout_s, read=True, arrived=arrived)

    def write(self, pieces: Pieces, timeout_s: float) -> None:
        """See `Remote`."""
        self._run(pieces, timeout_s, read=False)

    def close(self) -> None:
        """See `Remote`. Destroys the NIXL agent that it has to itself."""
        with self._changed:
            self._ending = True
            if not self._changed.wait_for(lambda: not self._calls, limits.TRANSFER_CLOSE_S):
                raise TransferFailed("a transfer does not end: its memory stays in use")
            if not self.closed:
                for handle in self._unsettled:
                    self._engine.abort(handle)
                self._engine.destroy()
                self.closed = True

    def _run(
        self, pieces: Pieces, timeout_s: float, *, read: bool, arrived: Arrived | None = None
    ) -> None:
        wanted = checked(pieces)
        here = self._local.find(wanted.local, wanted.nbytes)
        if here is None:
            raise InvalidArgument("pieces.local", "lies outside of the memory registered here")
        there = self._remote.find(wanted.remote, wanted.nbytes)
        if there is None:
            raise TransferFailed("the other process has not registered all of that memory")
        if not len(wanted.nbytes):
            return
        way = _way(self._local.device_of(here), self._remote.device_of(there), read=read)
        n = len(wanted.nbytes)
        # Only where none was empty it is known which of the caller's have arrived.
        ends, parts = [n], [wanted]
        if arrived and n == len(pieces.nbytes):
            ends = portions(wanted.nbytes)
            parts = [wanted.rows(at, end) for at, end in pairwise([0, *ends])]

        def landed(part: int) -> None:
            if arrived and part < len(parts) - 1:
                arrived(ends[part])

        with self._call():
            self._move(parts, timeout_s, way, landed=landed)

    def _fewest(self, pieces: Pieces) -> Pieces:
        fewer = merged(pieces)
        if fewer is pieces:
            return pieces
        # Memories that were registered one by one may be neighbours by chance.
        apart = (
            self._local.find(fewer.local, fewer.nbytes) is None
            or self._remote.find(fewer.remote, fewer.nbytes) is None
        )
        return pieces if apart else fewer

    @contextlib.contextmanager
    def _call(self) -> Iterator[None]:
        with self._changed:
            if self._ending or self._broken:
                raise TransferFailed("this connection has failed or ended: connect again")
            self._calls += 1
        try:
            yield
        finally:
            with self._changed:
                self._calls -= 1
                self._changed.notify_all()

    def _move(
        self,
        parts: Sequence[Pieces],
        timeout_s: float,
        way: _Way,
        *,
        landed: Callable[[int], None] = lambda _part: None,
    ) -> None:
        """Moves these one after the other, two at a time. landed: told of each once it is over."""
        end = time.monotonic() + timeout_s
        left = deque(parts)
        flying: deque[tuple[int, bool]] = deque()  # what was begun, and whether it ended at once
        naps = over = 0
        try:
            while left or flying:
                # The other side sends a bit of each block that was asked for in turn. So the second
                # part begins some time behind the first, and from then on one ends with each that
                # begins; asked for at one time all would end at one time.
                if left and (not flying or (len(flying) == 1 and naps >= _STAGGER_NAPS)):
                    flying.append(self._begin(left.popleft(), way))
                    naps = 0
                handle, done = flying[0]
                if not (done or self._engine.done(handle)):
                    if time.monotonic() > end:
                        total = sum(part.total for part in parts)
                        raise DeadlineExceeded(f"{total} bytes took more than {timeout_s:g} s")
                    if self._ending:
                        raise TransferFailed("the connection was closed")
                    time.sleep(_NAP_S)
                    naps += 1
                    continue
                self._engine.release(handle)
                flying.popleft()
                if left and flying:
                    flying.append(self._begin(left.popleft(), way))
                landed(over)
                over += 1
        finally:
            if flying:
                with self._changed:
                    self._broken = True
                    self._unsettled.extend(handle for handle, _ in flying)

    def _begin(self, part: Pieces, way: _Way) -> tuple[int, bool]:
        """Begins a transfer; whether it is over already."""
        handle = self._engine.request(self._fewest(part), self._peer, way)
        try:
            return handle, self._engine.post(handle)
        except BaseException:
            with self._changed:
                self._broken = True
                self._unsettled.append(handle)
            raise


@dataclass(frozen=True, slots=True)
class _Way:
    """Between whose memories bytes move: numbers of GPUs, or `HOST`; read: to here."""

    here: int
    there: int
    read: bool


def _way(here: int | None, there: int | None, *, read: bool) -> _Way:
    if here is None:
        raise InvalidArgument("pieces.local", _SEVERAL)
    if there is None:  # which the other process said
        raise TransferFailed(f"the other process's pieces {_SEVERAL}")
    return _Way(here, there, read)


class _Engine:
    """One agent of NIXL with a UCX worker. What it transfers ends when it is destroyed.

    passive: whether a thread answers to others; else `post` and `done` alone make progress.
    """

    def __init__(
        self,
        bindings: Bindings,
        name: str,
        ranges: Sequence[Region],
        *,
        passive: bool,
        rdma: bool,
    ) -> None:
        self._bindings = bindings
        self._errors = _errors(bindings)
        self.probe = np.zeros(_PROBE_BYTES, np.uint8)
        config = bindings.nixlAgentConfig()
        config.useProgThread, config.useListenThread = passive, False
        config.syncMode, config.pthrDelay = bindings.NIXL_THREAD_SYNC_STRICT, _PROGRESS_US
        regions = [*ranges, Region(self.probe.ctypes.data, self.probe.nbytes)]
        rows: dict[object, list[tuple[int, int, int, str]]] = {}
        for address, nbytes, device in regions:
            kind, number = self._kind(device)
            rows.setdefault(kind, []).append((address, nbytes, number, ""))
        with self._failing("NIXL does not start or does not take the memory"):
            agent = bindings.nixlAgent(f"{name}-{secrets.token_hex(8)}", config)
            with ucx_environment(transports(rdma=rdma)):
                backend = agent.createBackend("UCX", {})
            for kind, some in rows.items():
                agent.registerMem(bindings.nixlRegDList(kind, some), [backend])
        self._agent: Native | None = agent

    def metadata(self) -> bytes:
        """What another agent of NIXL loads."""
        with self._failing("NIXL has no metadata"):
            return self._own().getLocalMD()

    def load(self, metadata: bytes) -> bytes | str:
        """Adds another agent, and returns its name. `ProtocolError`, `TransferFailed`."""
        try:
            return self._own().loadRemoteMD(metadata)
        except self._errors as error:
            if type(error).__name__ in ("nixlBackendError", "nixlRemoteDisconnectError"):
                raise TransferFailed(f"the other process cannot be reached: {error}") from None
            raise ProtocolError(f"NIXL does not understand the other's metadata: {error}") from None

    def request(self, pieces: Pieces, peer: bytes | str, way: _Way) -> int:
        """Makes a transfer."""
        operation = self._bindings.NIXL_READ if way.read else self._bindings.NIXL_WRITE
        local = self._descriptors(pieces.local, pieces.nbytes, way.here)
        remote = self._descriptors(pieces.remote, pieces.nbytes, way.there)
        with self._failing("NIXL refuses the transfer"):
            return self._own().createXferReq(operation, local, remote, peer, b"", [])

    def post(self, handle: int) -> bool:
        """Begins a transfer; whether it is done."""
        with self._failing("the other process is gone, or refused"):
            return self._is_done(self._own().postXferReq(handle, b""))

    def done(self, handle: int) -> bool:
        """Goes on with a transfer; whether it is done."""
        with self._failing("the other process is gone, or refused"):
            return self._is_done(self._own().getXferStatus(handle))

    def release(self, handle: int) -> None:
        """Forgets a transfer that is done."""
        with self._failing("NIXL does not release a transfer"):
            self._own().releaseXferReq(handle)

    def abort(self, handle: int) -> None:
        """Forgets a transfer that is not; it may go on until `destroy`."""
        # What cannot be released is destroyed with the agent.
        with contextlib.suppress(*self._errors):
            self._own().releaseXferReq(handle)

    def destroy(self) -> None:
        """Ends all transfers, of this process and of others. `TransferFailed` where it may not."""
        agent, self._agent = self._agent, None
        # NIXL's own end is that of the last reference: this one, and the argument's.
        if agent is not None and sys.getrefcount(agent) > 2:
            raise TransferFailed("somebody else holds the NIXL agent: its memory stays in use")

    def _own(self) -> Native:
        if self._agent is None:
            raise TransferFailed("this agent is closed")
        return self._agent

    def _is_done(self, status: object) -> bool:
        if status not in (self._bindings.NIXL_SUCCESS, self._bindings.NIXL_IN_PROG):
            raise TransferFailed(f"NIXL's transfer failed: {status}")
        return status == self._bindings.NIXL_SUCCESS

    def _descriptors(self, addresses: U64, nbytes: U64, device: int) -> object:
        kind, number = self._kind(device)
        rows = np.empty((len(addresses), 3), np.uint64)
        rows[:, 0], rows[:, 1], rows[:, 2] = addresses, nbytes, number
        return self._bindings.nixlXferDList(kind, rows)

    def _kind(self, device: int) -> tuple[object, int]:
        """NIXL's kind of memory, and its number of the device."""
        if device == HOST:
            return self._bindings.DRAM_SEG, 0
        return self._bindings.VRAM_SEG, device

    @contextlib.contextmanager
    def _failing(self, words: str) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            raise TransferFailed(f"{words}: {error}") from None


def _errors(bindings: Bindings) -> tuple[type[Exception], ...]:
    return tuple(
        each
        for name, each in vars(bindings).items()
        if name.endswith("Error") and isinstance(each, type) and issubclass(each, Exception)
    )


def _opened(body: bytes) -> tuple[bool, int, Regions, bytes]:
    """RDMA?, the probe's address, the regions and NIXL's metadata."""
    if len(body) < _BODY.size:
        raise ProtocolError("a NIXL agent's description is too short")
    rdma, n, _, probe = _BODY.unpack_from(body)
    end = _BODY.size + _REGION.itemsize * n
    if n > limits.MAX_AGENT_REGIONS or len(body) <= end:
        raise ProtocolError("a NIXL agent's description is too short")
    table = np.frombuffer(body, _REGION, n, _BODY.size)
    if not ((table["device"] >= HOST) & (table["device"] < _MOST_DEVICES)).all():
        raise ProtocolError("a NIXL agent's description names no device")
    try:
        regions = Regions([Region(*row) for row in table.tolist()])
    except InvalidArgument:
        raise ProtocolError("a NIXL agent's memories overlap") from None
    return bool(rdma), probe, regions, body[end:]


@contextlib.contextmanager
def ucx_environment(allowed: str) -> Iterator[None]:
    """Has UCX use the transports that are allowed, and segments over TCP that make reads fast. It
    reads its settings when a backend is made, and from the environment alone where a list
    is meant. What others in this process want of it is left as it is."""
    wanted = {"UCX_TLS": allowed}
    wanted |= {name: os.environ.get(name, usual) for name, usual in _UCX_DEFAULTS.items()}
    with _creating:
        before = {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
