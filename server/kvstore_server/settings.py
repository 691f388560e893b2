"""The daemon's settings: flags over `KVSTORE_*` environment over a TOML file over defaults."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from kvstore import limits
from kvstore.channel.paths import default_socket, grpc_socket
from kvstore.cluster.members import Member, parse_members
from kvstore.errors import InvalidArgument
from kvstore.memory import HugePages
from kvstore.nvme.opening import EngineName, Location
from kvstore.sizes import format_size, parse_size
from kvstore_server.logs import LogFormat, LogLevel

_MIN_VOLUME_BYTES = 64 << 20
_MAX_SOCKET_PATH_BYTES = 107  # of sockaddr_un's 108 one is the closing zero


def default_data_dir() -> Path:
    """Where the secrets are kept between runs; `InvalidArgument` for a user without a home."""
    state = os.environ.get("XDG_STATE_HOME")
    if state:
        return Path(state) / "kvstore"
    try:
        return Path.home() / ".local" / "state" / "kvstore"
    except RuntimeError:
        raise InvalidArgument("data_dir", "this user has no home folder: name one") from None


def _absolute(path: Path) -> Path:
    """The gateway and later readers of the banner need not share this working folder."""
    try:
        return path.expanduser().absolute()
    except RuntimeError as error:
        raise ValueError(str(error)) from None


def _parse_pool_size(value: object) -> int:
    nbytes = parse_size(value)
    if nbytes < limits.MIN_POOL_BYTES:
        raise ValueError(f"should be {format_size(limits.MIN_POOL_BYTES)} or more")
    return nbytes


def _not_bool(value: object) -> object:
    # Python counts True as the number 1; in a settings file it is a mistake.
    if isinstance(value, bool):
        raise ValueError("should be a whole number")
    return value


def _none_word(value: object) -> object:
    """Lets the environment and flags say what TOML says by leaving the key out."""
    return None if isinstance(value, str) and value.strip().lower() == "none" else value


def _check_socket_path(path: Path) -> None:
    length = len(os.fsencode(path))
    if length > _MAX_SOCKET_PATH_BYTES:
        raise ValueError(
            f"{path} has {length} bytes, a unix socket's path at most {_MAX_SOCKET_PATH_BYTES}:"
            " choose a shorter one"
        )


def _parse_rate(value: object) -> object:
    return parse_size(value) if isinstance(value, str) and value.strip() != "0" else value


def _parse_volumes(value: object) -> object:
    """`DIR:SIZE`, several with commas between, or a list of those."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list | tuple):
        raise ValueError("expected DIR:SIZE, such as /mnt/nvme:200GiB")
    parts = [
        part
        for each in value
        for part in (each.split(",") if isinstance(each, str) else [each])
        if not isinstance(part, str) or part.strip()
    ]
    return tuple(_parse_volume(part) for part in parts)


def _parse_volume(value: object) -> Location:
    if isinstance(value, Location):
        return value
    path, colon, size = str(value).strip().rpartition(":")
    if not colon or not path:
        raise ValueError(f"{value!r} is not DIR:SIZE, such as /mnt/nvme:200GiB")
    nbytes = parse_size(size) // limits.GRANULE_BYTES * limits.GRANULE_BYTES
    if nbytes < _MIN_VOLUME_BYTES:
        raise ValueError(f"{path}: a volume needs at least {format_size(_MIN_VOLUME_BYTES)}")
    return Location(_absolute(Path(path)), nbytes)


NvmeVolumes = Annotated[tuple[Location, ...], NoDecode, BeforeValidator(_parse_volumes)]
ByteRate = Annotated[int, BeforeValidator(_parse_rate), Field(ge=0)]
PoolSize = Annotated[int, BeforeValidator(_parse_pool_size)]
WholeNumber = Annotated[int, BeforeValidator(_not_bool)]
AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
OptionalPath = Annotated[AbsolutePath | None, BeforeValidator(_none_word)]
OptionalText = Annotated[str | None, BeforeValidator(_none_word)]


class Settings(BaseSettings):
    """Everything that `kvstore-server` can be told. Built from arguments alone; `load` in
    `settings_sources` is what reads the file and the environment."""

    model_config = SettingsConfigDict(
        env_prefix="KVSTORE_",
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        validate_default=True,
    )

    socket: AbsolutePath = Field(
        default_factory=default_socket, description="Unix socket of the same-host channel."
    )
    dram: PoolSize = Field(default=1 << 30, description="Pool size, such as 8GiB.")
    data_dir: AbsolutePath = Field(
        default_factory=default_data_dir, description="Folder of the chain key and the token."
    )
    nvme: NvmeVolumes = Field(
        default=(),
        description="Directory or block device and bytes for blocks that leave memory, such as"
        " /mnt/nvme:200GiB; several with commas between, or the flag again.",
    )
    nvme_engine: EngineName = Field(
        default="pread", description="What moves blocks to and from NVMe: pread or nixl."
    )
    nvme_admission: Literal["read", "every"] = Field(
        default="read",
        description="What is written to NVMe: blocks that were read again, or every block.",
    )
    nvme_write_rate: ByteRate = Field(
        default=0, description="Bytes a second that background writes to NVMe may take (0: all)."
    )
    nvme_scrub_rate: ByteRate = Field(
        default=16 << 20,
        description="Bytes a second at which what lies on NVMe is verified anew (0: never).",
    )
    eviction: Literal["lru", "arc", "s3fifo"] = Field(
        default="lru", description="Which blocks go first: lru, arc or s3fifo."
    )
    tenants: WholeNumber = Field(
        default=1, ge=1, description="How many users may have a pool; the memory is split."
    )
    max_blocks: Annotated[WholeNumber | None, BeforeValidator(_none_word)] = Field(
        default=None, ge=1, description="Most blocks in one pool (none: as many as may fit)."
    )
    trust: Literal["direct", "copy-in"] = Field(
        default="direct",
        description="direct: the owner's engines write the pool; copy-in: only the daemon does.",
    )
    huge_pages: HugePages = Field(
        default=HugePages.AUTO, description="Huge pages for the pool: auto, off or require."
    )
    numa_node: Annotated[WholeNumber | None, BeforeValidator(_none_word)] = Field(
        default=None, ge=0, le=1023, description="NUMA node of the pool (none: any)."
    )
    prefault: bool = Field(default=True, description="Take the pool's memory at the start.")
    grpc: bool = Field(default=True, description="Serve gRPC, in a process of its own.")
    grpc_port: Annotated[WholeNumber | None, BeforeValidator(_none_word)] = Field(
        default=None,
        ge=0,
        le=65535,
        description="Loopback TCP port of gRPC (0: any free one; none: no TCP).",
    )
    node_name: OptionalText = Field(
        default=None, description="This daemon's name in a cluster (none: it is alone)."
    )
    peer_listen: str = Field(
        default="127.0.0.1:7420", description="HOST:PORT for the cluster's nodes and clients."
    )
    peer_advertise: OptionalText = Field(
        default=None, description="HOST:PORT that others reach it at (none: as peer-listen)."
    )
    members: str = Field(
        default="", description="All nodes of a cluster without etcd: NAME=HOST:PORT,..."
    )
    etcd: str = Field(default="", description="etcd's endpoints, http://HOST:PORT,...")
    etcd_user: OptionalText = Field(
        default=None, description="User of etcd, where it asks for one (none: it does not)."
    )
    etcd_password_file: OptionalPath = Field(
        default=None, description="File with that user's password."
    )
    etcd_ca: OptionalPath = Field(
        default=None, description="PEM of the authority of etcd's certificates (none: public ones)."
    )
    etcd_cert: OptionalPath = Field(
        default=None, description="PEM of the certificate that this node shows to etcd."
    )
    etcd_key: OptionalPath = Field(default=None, description="PEM of its key.")
    cluster: str = Field(default="default", description="The cluster's name in etcd.")
    replicas: WholeNumber = Field(
        default=2, ge=1, le=limits.MAX_REPLICAS, description="Copies that a cluster keeps."
    )
    node_weight: WholeNumber = Field(
        default=1, ge=1, le=limits.MAX_MEMBER_WEIGHT, description="This node's share of the blocks."
    )
    transfer: Literal["shm", "nixl", "ucxx", "grpc", "auto"] = Field(
        default="auto", description="How blocks travel: shm, nixl, ucxx, grpc or auto."
    )
    repair_rate: ByteRate = Field(
        default=256 << 20, description="Bytes a second that bringing copies to nodes may take."
    )
    cluster_secret: OptionalPath = Field(
        default=None,
        description="File with the secret that all nodes of a cluster share (none: chain.key in"
        " the data folder).",
    )
    peer_tls_ca: OptionalPath = Field(
        default=None, description="PEM of the authority of all nodes' and clients' certificates."
    )
    peer_tls_certificate: OptionalPath = Field(
        default=None, description="PEM of this node's own certificate."
    )
    peer_tls_key: OptionalPath = Field(default=None, description="PEM of its key.")
    peer_insecure: bool = Field(
        default=False, description="Serve other hosts without TLS, on a network of their own."
    )
    node_metrics_port: Annotated[WholeNumber | None, BeforeValidator(_none_word)] = Field(
        default=None, ge=0, le=65535, description="Loopback port of the node's metrics (none: no)."
    )
    log_format: LogFormat = Field(default="text", description="Log lines as text or json.")
    log_level: LogLevel = Field(
        default="info", description="Least level to log: debug, info, warning or error."
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments alone: what reads the world also has to say where each value came from."""
        del settings_cls, env_settings, dotenv_settings, file_secret_settings
        assert isinstance(init_settings, InitSettingsSource)
        return (init_settings,)

    @field_validator("socket")
    @classmethod
    def _socket_fits(cls, path: Path) -> Path:
        _check_socket_path(grpc_socket(path))  # the longer of the two
        return path

    @field_validator("tenants")
    @classmethod
    def _pools_fit(cls, tenants: int, info: ValidationInfo) -> int:
        dram = info.data.get("dram")
        if dram is not None and dram // tenants < limits.MIN_POOL_BYTES:
            raise ValueError(
                f"{format_size(dram)} split {tenants} ways is under"
                f" {format_size(limits.MIN_POOL_BYTES)} a pool: raise dram or lower tenants"
            )
        return tenants

    @field_validator("max_blocks")
    @classmethod
    def _blocks_fit(cls, max_blocks: int | None, info: ValidationInfo) -> int | None:
        dram, tenants = info.data.get("dram"), info.data.get("tenants")
        if max_blocks is None or dram is None or tenants is None:
            return max_blocks
        nvme = sum(location.nbytes for location in info.data.get("nvme") or ())
        most = (dram + nvme) // tenants // limits.GRANULE_BYTES
        if max_blocks > most:
            where = "with its NVMe " if nvme else ""
            size = format_size((dram + nvme) // tenants)
            raise ValueError(f"a pool of {size} {where}holds at most {most}")
        return max_blocks

    @model_validator(mode="after")
    def _cluster_fits(self) -> Self:
        if self.node_name is None:
            return self
        if bool(self.members) == bool(self.etcd):
            raise ValueError("a node needs either members or etcd, and not both")
        if self.trust != "direct":
            raise ValueError("a node writes the pool itself: trust must be direct")
        try:
            Member(name=self.node_name, address=self.advertised, weight=self.node_weight)
            known = parse_members(self.members)
        except InvalidArgument as error:
            raise ValueError(str(error)) from None
        if known and self.replicas > len(known):
            raise ValueError(f"{self.replicas} replicas cannot be on {len(known)} nodes")
        self._check_etcd()
        tls = (self.peer_tls_ca, self.peer_tls_certificate, self.peer_tls_key)
        if any(tls) and not all(tls):
            raise ValueError("peer_tls_ca, peer_tls_certificate and peer_tls_key go together")
        host = self.peer_listen.rpartition(":")[0]
        loopback = host in ("localhost", "[::1]") or host.startswith("127.")
        if not (loopback or any(tls) or self.peer_insecure):
            raise ValueError(
                f"{self.peer_listen} is open to other hosts: name peer_tls_ca, peer_tls_certificate"
                " and peer_tls_key, or say peer_insecure"
            )
        return self

    def _check_etcd(self) -> None:
        tls = (self.etcd_ca, self.etcd_cert, self.etcd_key)
        who = (self.etcd_user, self.etcd_password_file)
        if not self.etcd and any((*tls, *who)):
            raise ValueError("etcd_user and the like need etcd: members are in a list here")
        if any(who) and not all(who):
            raise ValueError("etcd_user and etcd_password_file go together")
        if any(tls[1:]) and not all(tls[1:]):
            raise ValueError("etcd_cert and etcd_key go together")
        if any(tls) and "https://" not in self.etcd:
            raise ValueError("etcd_ca, etcd_cert and etcd_key are for endpoints with https://")

    @property
    def advertised(self) -> str:
        """Where others reach this node."""
        return self.peer_advertise or self.peer_listen

    @property
    def shared_secret(self) -> Path:
        """The file of the secret that all nodes of the cluster have."""
        return self.cluster_secret or self.data_dir / "chain.key"

    @property
    def volumes(self) -> tuple[Location, ...]:
        """Where blocks go that leave memory, and by which engine."""
        return tuple(replace(location, engine=self.nvme_engine) for location in self.nvme)

    @property
    def max_blocks_per_pool(self) -> int:
        """`max_blocks`, or what a pool of this size is made for."""
        nvme = sum(location.nbytes for location in self.nvme)
        return self.max_blocks or limits.default_max_blocks(
            self.dram // self.tenants, nvme // self.tenants
        )
