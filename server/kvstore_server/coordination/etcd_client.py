"""Calls to etcd: several endpoints, a deadline each, typed errors. Knows nothing of clusters.

The stubs are those of `aetcd`; its own client has one endpoint, no TLS, and watches that may wait
without end.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar
from urllib.parse import urlsplit

import grpc
from aetcd import rpc

from kvstore.errors import (
    InvalidArgument,
    KVStoreError,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)
from kvstore_server.secrets_file import load_password

T = TypeVar("T")
Metadata = tuple[tuple[str, str], ...]
Attempt = Callable[["_Endpoint", float, Metadata], Awaitable[T]]
Stream = grpc.aio.StreamStreamCall[rpc.WatchRequest, rpc.WatchResponse]

_RETRY_AFTER_MS = 1000
_DEFAULT_PORT = 2379
_MAX_MESSAGE_BYTES = 16 << 20
_OPTIONS = (
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    # Where etcd is, is said in full; the environment's proxies are for other things.
    ("grpc.enable_http_proxy", 0),
    # gRPC's own pauses grow to two minutes; an etcd that is back is to be found within a second.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.min_reconnect_backoff_ms", 2000),  # also what connecting may take
    # A watch on a machine that is gone hears nothing. etcd allows a ping every 5 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.use_local_subchannel_pool", 1),
)
_DENIED = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED)
_INVALID = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION)
_OLD_TOKEN = "revision in header is old"  # somebody changed users or roles meanwhile
# What to do about what etcd or gRPC says.
_ADVICE = {
    "user name is empty": ": it asks who this is, so set etcd_user and etcd_password_file",
    "authentication failed": ": correct etcd_user, {user}, or the password in {file}",
    "permission denied": ": grant this node's user readwrite on all keys under /kvstore/CLUSTER/",
}
_TLS_ADVICE = {
    "CERTIFICATE_VERIFY_FAILED": ": name the authority of etcd's certificate in etcd_ca",
    "Hostname Verification": ": etcd's certificate has to name the host of its endpoint",
    "TSI_DATA_CORRUPTED": ": etcd does not take this node's certificate, see etcd_cert",
    "Handshake read failed": ": etcd speaks no TLS there, so its endpoint begins with http://",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """What etcd asks for: PEM files of TLS, of endpoints with https://; a user, and the file of its
    password, which is read whenever etcd asks."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    user: str | None = None
    password_file: Path | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise InvalidArgument("etcd_cert", "a certificate and its key go together")
        if (self.user is None) != (self.password_file is None):
            raise InvalidArgument("etcd_user", "a user and its password go together")

    def password(self) -> str:
        """The user's; `InvalidArgument` where it cannot be read."""
        assert self.password_file
        return load_password(self.password_file)

    @property
    def tls(self) -> bool:
        """Whether any of it is for TLS."""
        return self.ca is not None or self.cert is not None


@dataclass(frozen=True, slots=True)
class Entry:
    """A key's value; revision: of its last change; lease: that it ends with, or 0."""

    key: str
    value: bytes
    revision: int
    lease: int


@dataclass(frozen=True, slots=True)
class Lease:
    """Ends `ttl_s` after it was granted or last renewed, and its keys with it."""

    id: int
    ttl_s: int


class EtcdClient:
    """One etcd cluster. endpoints: `http://HOST:PORT` or `https://HOST:PORT`, all alike.

    Each call ends within `timeout_s`, of which every endpoint that does not answer gets its share.
    Raises `Unavailable` where none answers: then a change may have been made or not;
    `PermissionDenied` and `InvalidArgument` with etcd's own words, and what to do. Belongs to one
    event loop.
    """

    def __init__(self, endpoints: Sequence[str], *, access: Access, timeout_s: float) -> None:
        """Connects with the first call. `InvalidArgument` for what cannot be tried at all."""
        addresses, tls = _parse_endpoints(endpoints)
        if access.tls and not tls:
            raise InvalidArgument("etcd", "certificates are for endpoints with https://")
        if access.user is not None:
            access.password()
        self._addresses, self._access, self._timeout_s = addresses, access, timeout_s
        self._credentials = _credentials(access) if tls else None
        self._endpoints: list[_Endpoint] = []
        self._first = 0  # the endpoint that answered last
        self._closed = False

    async def get(self, key: str) -> Entry | None:
        """A key's value now, or None; linearizable."""
        found = await self._range(rpc.RangeRequest(key=key.encode()))
        return found[0] if found else None

    async def under(self, prefix: str, *, most: int) -> list[Entry]:
        """All keys that begin with it, in order; linearizable.

        `ResourceExhausted` for more than `most`.
        """
        begin, end = _span(prefix)
        found = await self._range(rpc.RangeRequest(key=begin, range_end=end, limit=most + 1))
        if len(found) > most:
            raise ResourceExhausted(
                f"etcd has more than {most} keys under {prefix}", retry_after_ms=_RETRY_AFTER_MS
            )
        return found

    async def put_if(self, key: str, value: bytes, *, revision: int, lease: int = 0) -> bool:
        """Sets a key if its last change is of that revision; 0: if it is not there."""
        request = rpc.TxnRequest(
            compare=[
                rpc.Compare(
                    result=rpc.Compare.EQUAL,
                    target=rpc.Compare.MOD,
                    key=key.encode(),
                    mod_revision=revision,
                )
            ],
            success=[
                rpc.RequestOp(
                    request_put=rpc.PutRequest(key=key.encode(), value=value, lease=lease)
                )
            ],
            failure=[rpc.RequestOp(request_range=rpc.RangeRequest(key=key.encode()))],
        )
        attempts = 0

        async def attempt(endpoint: _Endpoint, left_s: float, metadata: Metadata) -> bool:
            nonlocal attempts
            attempts += 1
            done = await endpoint.kv.Txn(request, timeout=left_s, metadata=metadata)
            if done.succeeded:
                return True
            # An earlier attempt may have been carried out although its answer was lost.
            there = done.responses[0].response_range.kvs
            return attempts > 1 and bool(there) and there[0].value == value

        return await self._call(attempt)

    async def grant(self, ttl_s: int) -> Lease:
        """A new lease; etcd may make it longer than asked."""

        async def attempt(endpoint: _Endpoint, left_s: float, metadata: Metadata) -> Lease:
            request = rpc.LeaseGrantRequest(TTL=ttl_s)
            made = await endpoint.lease.LeaseGrant(request, timeout=left_s, metadata=metadata)
            return Lease(made.ID, made.TTL)

        return await self._call(attempt)

    async def renew(self, lease: Lease) -> bool:
        """False where the lease has ended."""

        async def attempt(endpoint: _Endpoint, left_s: float, metadata: Metadata) -> bool:
            request = rpc.LeaseKeepAliveRequest(ID=lease.id)
            stream = endpoint.lease.LeaseKeepAlive(timeout=left_s, metadata=metadata)
            try:
                await stream.write(request)
                answer = await stream.read()
                if answer is grpc.aio.EOF:
                    raise Unavailable(f"{endpoint.address} ended the stream")
                return bool(answer.TTL > 0)
            finally:
                stream.cancel()

        return await self._call(attempt)

    async def left_s(self, lease: int) -> int:
        """For how long a lease lasts unless it is renewed; 0 where it has ended."""

        async def attempt(endpoint: _Endpoint, left_s: float, metadata: Metadata) -> int:
            request = rpc.LeaseTimeToLiveRequest(ID=lease)
            told = await endpoint.lease.LeaseTimeToLive(request, timeout=left_s, metadata=metadata)
            return max(int(told.TTL), 0)

        return await self._call(attempt)

    async def revoke(self, lease: Lease) -> None:
        """Ends a lease that has not ended, and its keys."""

        async def attempt(endpoint: _Endpoint, left_s: float, metadata: Metadata) -> None:
            request = rpc.LeaseRevokeRequest(ID=lease.id)
            await endpoint.lease.LeaseRevoke(request, timeout=left_s, metadata=metadata)

        await self._call(attempt)

    async def watch(self, prefix: str) -> AsyncGenerator[None, None]:
        """Yields once all that changes from now on will be told, then for all changes.

        Never ends by itself: `Unavailable` where it breaks, before it began within `timeout_s`.
        """
        begin, end = _span(prefix)
        create = rpc.WatchCreateRequest(key=begin, range_end=end)
        stream = await self._call(self._open_watch(rpc.WatchRequest(create_request=create)))
        try:
            yield
            while True:
                with _ends_seen():
                    told = await stream.read()
                if not _goes_on(told):
                    raise Unavailable("etcd ended the watch")
                yield
        except rpc.AioRpcError as error:
            raise Unavailable(f"the watch broke: {error.details()}") from None
        finally:
            stream.cancel()

    async def close(self) -> None:
        """Ends the connections. Later calls raise `Unavailable`."""
        self._closed = True
        endpoints, self._endpoints = self._endpoints, []
        for endpoint in endpoints:
            await endpoint.channel.close()

    @staticmethod
    def _open_watch(request: rpc.WatchRequest) -> Attempt[Stream]:
        async def attempt(endpoint: _Endpoint, left_s: float, metadata: Metadata) -> Stream:
            # A member that lost the others ends such a watch instead of never saying anything.
            stream: Stream = endpoint.watch.Watch(metadata=(*metadata, ("hasleader", "true")))
            try:
                async with asyncio.timeout(left_s):
                    await stream.write(request)
                    told = await stream.read()
            except TimeoutError:
                stream.cancel()
                raise Unavailable(f"no answer from {endpoint.address}") from None
            except BaseException:
                stream.cancel()
                raise
            if not _goes_on(told):
                stream.cancel()
                raise Unavailable(f"{endpoint.address} refuses to watch")
            return stream

        return attempt

    async def _range(self, request: rpc.RangeRequest) -> list[Entry]:
        async def attempt(endpoint: _Endpoint, left_s: float, metadata: Metadata) -> list[Entry]:
            found = await endpoint.kv.Range(request, timeout=left_s, metadata=metadata)
            return [
                Entry(kv.key.decode(errors="replace"), kv.value, kv.mod_revision, kv.lease)
                for kv in found.kvs
            ]

        return await self._call(attempt)

    async def _call(self, attempt: Attempt[T]) -> T:
        """Tries the endpoints, that which answered last at first."""
        now = asyncio.get_running_loop().time
        end, failures = now() + self._timeout_s, []
        endpoints = self._connected()
        for tried in range(len(endpoints)):
            at = (self._first + tried) % len(endpoints)
            endpoint = endpoints[at]
            share = (end - now()) / (len(endpoints) - tried)
            try:
                with _ends_seen():
                    result = await self._try(endpoint, attempt, now() + share)
            except (rpc.AioRpcError, Unavailable) as error:
                failures.append(_words(error))
            else:
                self._first = at
                return result
        addresses = ", ".join(endpoint.address for endpoint in endpoints)
        raise Unavailable(f"no answer from etcd at {addresses}: {'; '.join(failures)}")

    async def _try(self, endpoint: _Endpoint, attempt: Attempt[T], end: float) -> T:
        now = asyncio.get_running_loop().time
        for last in (False, True):
            try:
                metadata = await endpoint.authenticate(self._access, end - now())
                return await attempt(endpoint, end - now(), metadata)
            except rpc.AioRpcError as error:
                if not last and endpoint.forgets_token(error):
                    continue
                _raise_refusal(error, endpoint.address, self._access)
                raise
        raise AssertionError

    def _connected(self) -> list[_Endpoint]:
        if self._closed:
            raise Unavailable("the connection to etcd is closed")
        if not self._endpoints:
            self._endpoints = [_Endpoint(each, self._credentials) for each in self._addresses]
        return self._endpoints


@contextlib.contextmanager
def _ends_seen() -> Iterator[None]:
    """`Unavailable` for a call that etcd or `close` ended: gRPC raises what else only says that the
    caller's own task is cancelled, and a task that keeps a lease alive would silently be gone."""
    try:
        yield
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise Unavailable("the call was ended") from None
    except grpc.aio.UsageError:
        raise Unavailable("the connection to etcd is closed") from None


class _Endpoint:
    """One of etcd's members: its channel, its stubs, and the token that it gave."""

    def __init__(self, address: str, credentials: grpc.ChannelCredentials | None) -> None:
        self.address = address
        if credentials is None:
            self.channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        else:
            self.channel = grpc.aio.secure_channel(address, credentials, options=_OPTIONS)
        self.kv = rpc.KVStub(self.channel)
        self.lease = rpc.LeaseStub(self.channel)
        self.watch = rpc.WatchStub(self.channel)
        self._auth = rpc.AuthStub(self.channel)
        self._token: str | None = None

    async def authenticate(self, access: Access, left_s: float) -> Metadata:
        """What calls must bring along; asks for a token where there is none."""
        if access.user is None:
            return ()
        if self._token is None:
            try:
                password = access.password()
            except InvalidArgument as error:  # it was there at the start: somebody changes it
                raise PermissionDenied(str(error)) from None
            request = rpc.AuthenticateRequest(name=access.user, password=password)
            self._token = (await self._auth.Authenticate(request, timeout=left_s)).token
        return (("token", self._token),)

    def forgets_token(self, error: rpc.AioRpcError) -> bool:
        """Whether a call failed because its token is no longer good, as after etcd's restart."""
        old = error.code() == grpc.StatusCode.UNAUTHENTICATED or _OLD_TOKEN in error.details()
        if self._token is None or not old:
            return False
        self._token = None
        return True


def _goes_on(told: rpc.WatchResponse) -> bool:
    return told is not grpc.aio.EOF and not told.canceled


def _raise_refusal(error: rpc.AioRpcError, address: str, access: Access) -> None:
    """Raises what no other endpoint would answer otherwise; returns for the rest."""
    said = error.details() or ""
    if "authentication is not enabled" in said:
        raise InvalidArgument(
            "etcd_user",
            f"etcd at {address} asks nobody for a password: enable that, or name no user",
        ) from None
    advice = next((words for sign, words in _ADVICE.items() if sign in said), "")
    if advice or error.code() in _DENIED:
        words = advice.format(user=access.user, file=access.password_file)
        raise PermissionDenied(f"etcd at {address}: {said}{words}") from None
    if error.code() in _INVALID:
        raise InvalidArgument("etcd", f"{said} ({address})") from None


def _words(error: rpc.AioRpcError | Unavailable) -> str:
    if isinstance(error, KVStoreError):
        return str(error)
    said = error.details() or ""
    advice = next((words for sign, words in _TLS_ADVICE.items() if sign in said), "")
    return f"{error.code().name.lower()}, {said}{advice}"


def _span(prefix: str) -> tuple[bytes, bytes]:
    """Begin and end of the keys with a prefix of ASCII."""
    begin = prefix.encode()
    return begin, begin[:-1] + bytes([begin[-1] + 1])


def _parse_endpoints(endpoints: Sequence[str]) -> tuple[list[str], bool]:
    """Addresses as gRPC has them, and whether they are reached by TLS."""
    schemes, addresses = set(), []
    for endpoint in endpoints:
        try:
            parts = urlsplit(endpoint)
            host, port = parts.hostname, parts.port or _DEFAULT_PORT
        except ValueError:
            _bad_endpoint(endpoint)
        if parts.scheme not in ("http", "https") or not host or parts.path not in ("", "/"):
            _bad_endpoint(endpoint)
        schemes.add(parts.scheme)
        addresses.append(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    if not addresses:
        raise InvalidArgument("etcd", "name at least one endpoint, such as http://10.0.0.1:2379")
    if len(schemes) > 1:
        raise InvalidArgument("etcd", "some endpoints have http://, some https://")
    return addresses, schemes == {"https"}


def _bad_endpoint(endpoint: str) -> NoReturn:
    # Whoever put a password into it does not want to see it in a log.
    shown = endpoint.rpartition("@")[2]
    raise InvalidArgument("etcd", f"{shown!r} is not http://HOST:PORT or https://HOST:PORT")


def _credentials(access: Access) -> grpc.ChannelCredentials:
    read = [None if path is None else _read(path) for path in (access.ca, access.key, access.cert)]
    return grpc.ssl_channel_credentials(*read)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidArgument("etcd", f"{path}: {error.strerror}") from None
