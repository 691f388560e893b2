"""What is used of NIXL's bindings, as types: no stubs of it exist.

Its Python layer has no way to set `pthrDelay`, and with the value that it sets a thread looks for
work without a pause.
"""

from __future__ import annotations

from typing import Protocol


class Native(Protocol):
    """What is used of `nixlAgent`."""

    def createBackend(self, name: str, parameters: dict[str, str]) -> int: ...  # noqa: N802
    def registerMem(self, descriptors: object, backends: list[int]) -> None: ...  # noqa: N802
    def getLocalMD(self) -> bytes: ...  # noqa: N802
    def loadRemoteMD(self, metadata: bytes) -> bytes | str: ...  # noqa: N802
    def createXferReq(  # noqa: N802, PLR0917
        self,
        operation: object,
        local: object,
        remote: object,
        peer: bytes | str,
        notification: bytes,
        backends: list[int],
    ) -> int: ...
    def postXferReq(self, handle: int, notification: bytes) -> object: ...  # noqa: N802
    def getXferStatus(self, handle: int) -> object: ...  # noqa: N802
    def releaseXferReq(self, handle: int) -> None: ...  # noqa: N802


class Config(Protocol):
    """What is used of `nixlAgentConfig`."""

    useProgThread: bool  # noqa: N815
    useListenThread: bool  # noqa: N815
    syncMode: object  # noqa: N815
    pthrDelay: int  # noqa: N815


class Lists(Protocol):
    """Makes a list of descriptors of one kind of memory."""

    def __call__(self, memory: object, rows: object) -> object: ...


class Bindings(Protocol):
    """What is used of the module `_bindings`."""

    DRAM_SEG: object
    FILE_SEG: object
    VRAM_SEG: object
    NIXL_READ: object
    NIXL_WRITE: object
    NIXL_SUCCESS: object
    NIXL_IN_PROG: object
    NIXL_THREAD_SYNC_STRICT: object
    nixlXferDList: Lists  # noqa: N815
    nixlRegDList: Lists  # noqa: N815

    def nixlAgentConfig(self) -> Config: ...  # noqa: N802
    def nixlAgent(self, name: str, config: Config) -> Native: ...  # noqa: N802
