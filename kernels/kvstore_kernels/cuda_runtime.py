"""The few calls of the CUDA runtime that torch does not have, on the library that torch has loaded.

TransferError (a RuntimeError)   bytes cannot be moved; the message says why
└── CudaCallFailedError          a call failed; has its name and code
"""

from __future__ import annotations

import ctypes
import functools
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvstore_kernels.checks import require

Numbers = npt.NDArray[np.int64]

_BATCH_FROM = 4  # pieces that cost less in one call than in a call each
_HOST_PAGE_TABLES = 100  # cudaDevAttrPageableMemoryAccessUsesHostPageTables
_MOST_PERSISTING = 108  # cudaDevAttrMaxPersistingL2CacheSize
_PERSISTING = 6  # cudaLimitPersistingL2CacheSize
_PORTABLE_AND_MAPPED, _READ_ONLY = 3, 8  # cudaHostRegister...
_ANY_DIRECTION = 4  # cudaMemcpyDefault: the addresses tell
_IN_STREAM_ORDER, _OVERLAPS_COMPUTE = 1, 1  # cudaMemcpySrcAccessOrderStream, cudaMemcpyFlag...
_NON_BLOCKING = 1  # cudaStreamNonBlocking
_FIRST_WITH_BATCHES, _WITHOUT_FAILED_INDEX = 12_080, 13_000  # versions


class TransferError(RuntimeError):
    """Bytes cannot be moved, or memory cannot be made ready for it."""


class CudaCallFailedError(TransferError):
    """A call of the CUDA runtime failed. What was begun before it may still be under way."""

    def __init__(self, call: str, code: int, name: str) -> None:
        super().__init__(f"{call} failed with {name} ({code})")
        self.call, self.code = call, code


class _Attributes(ctypes.Structure):
    """cudaMemcpyAttributes; the hints are for managed memory and stay 0."""

    _fields_ = (
        ("source_order", ctypes.c_int),
        ("hints", ctypes.c_int * 4),
        ("flags", ctypes.c_uint),
    )


class CudaRuntime:
    """Calls of one libcudart; raises CudaCallFailedError. Addresses and streams are integers."""

    def __init__(self, library: Any) -> None:
        """library: as ctypes has it."""
        self._library = library
        library.cudaGetErrorName.restype = ctypes.c_char_p
        version = ctypes.c_int()
        self._call("cudaRuntimeGetVersion", ctypes.byref(version))
        self._version = version.value
        self._attributes = _Attributes(_IN_STREAM_ORDER, (0, 0, 0, 0), _OVERLAPS_COMPUTE)

    @property
    def has_batches(self) -> bool:
        """Whether many copies can be begun by one call."""
        return self._version >= _FIRST_WITH_BATCHES

    def register(self, address: int, nbytes: int, *, read_only: bool = False) -> None:
        """Pins host memory for all devices; read_only: it is mapped without write access."""
        flags = _PORTABLE_AND_MAPPED | (_READ_ONLY if read_only else 0)
        self._call("cudaHostRegister", ctypes.c_void_p(address), ctypes.c_size_t(nbytes), flags)

    def unregister(self, address: int) -> None:
        """Ends what `register` began."""
        self._call("cudaHostUnregister", ctypes.c_void_p(address))

    def device_attribute(self, attribute: int, device: int) -> int:
        """The value of a cudaDeviceAttr."""
        value = ctypes.c_int()
        self._call("cudaDeviceGetAttribute", ctypes.byref(value), attribute, device)
        return value.value

    def persisting(self) -> int:
        """Bytes of the current device's L2 that lines which are the last to leave it may take."""
        value = ctypes.c_size_t()
        self._call("cudaDeviceGetLimit", ctypes.byref(value), _PERSISTING)
        return value.value

    def let_persist(self, nbytes: int) -> None:
        """Has `persisting` at so much, or as much as there can be; never at less than before."""
        device = ctypes.c_int()
        self._call("cudaGetDevice", ctypes.byref(device))
        wanted = min(nbytes, self.device_attribute(_MOST_PERSISTING, device.value))
        if self.persisting() < wanted:
            self._call("cudaDeviceSetLimit", _PERSISTING, ctypes.c_size_t(wanted))

    def copy(self, targets: Numbers, sources: Numbers, sizes: Numbers, stream: int) -> None:
        """Begins copies between GPU memory and pinned host memory, in the fastest way.

        targets, sources, sizes: (n,) addresses and bytes; no copy may depend on another. stream: of
        the current device, and not the default one.
        """
        if self.has_batches and len(sizes) >= _BATCH_FROM:
            self.copy_batch(targets, sources, sizes, stream)
        else:
            self.copy_each(targets, sources, sizes, stream)

    def copy_each(self, targets: Numbers, sources: Numbers, sizes: Numbers, stream: int) -> None:
        """`copy` with a call for each piece."""
        for target, source, size in zip(
            targets.tolist(), sources.tolist(), sizes.tolist(), strict=True
        ):
            self.copy_one(target, source, size, stream)

    def copy_one(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """`copy` of one piece."""
        self._call(
            "cudaMemcpyAsync",
            ctypes.c_void_p(target),
            ctypes.c_void_p(source),
            ctypes.c_size_t(nbytes),
            _ANY_DIRECTION,
            ctypes.c_void_p(stream),
        )

    def copy_batch(self, targets: Numbers, sources: Numbers, sizes: Numbers, stream: int) -> None:
        """`copy` in one call; raises TransferError where the runtime has no such call."""
        if not self.has_batches:
            raise TransferError(f"CUDA runtime {self._version} has no batched copies")
        arrays = [np.ascontiguousarray(array) for array in (targets, sources, sizes)]
        failed = ctypes.c_size_t()
        self._call(
            "cudaMemcpyBatchAsync",
            *(ctypes.c_void_p(array.ctypes.data) for array in arrays),
            ctypes.c_size_t(len(sizes)),
            ctypes.byref(self._attributes),
            ctypes.byref(ctypes.c_size_t(0)),  # the attributes are for all from the first on
            ctypes.c_size_t(1),
            *(() if self._version >= _WITHOUT_FAILED_INDEX else (ctypes.byref(failed),)),
            ctypes.c_void_p(stream),
        )

    def create_stream(self) -> int:
        """A stream of the current device that waits for no other, the default one included."""
        stream = ctypes.c_void_p()
        self._call("cudaStreamCreateWithFlags", ctypes.byref(stream), _NON_BLOCKING)
        return stream.value or 0

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            self._library.cudaGetLastError()  # else torch would report it as its own
            raise CudaCallFailedError(name, code, self._library.cudaGetErrorName(code).decode())


@functools.cache
def cuda_runtime() -> CudaRuntime:
    """The runtime that torch uses; raises TransferError where there is none."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        raise TransferError("this torch has no GPU")
    torch.cuda.init()  # type: ignore[no-untyped-call]  # loads the library
    name = f"libcudart.so.{torch.version.cuda.partition('.')[0]}"
    try:
        return CudaRuntime(ctypes.CDLL(name))
    except OSError as error:
        raise TransferError(f"{name}, which torch was built with, cannot be loaded") from error


def host_is_coherent(device: torch.device) -> bool:
    """Whether the GPU reads and writes the host's memory by the host's own page tables (Grace)."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return bool(cuda_runtime().device_attribute(_HOST_PAGE_TABLES, index))


class Registration:
    """Host memory, for example shared memory of the store, pinned until it is closed.

    Costs 0.04 s/GiB of memory that was touched before, 0.6 s/GiB of other. Close it, or leave its
    `with` block, when no copy is under way and before the memory is unmapped.
    """

    def __init__(
        self, memory: torch.Tensor, *, read_only: bool = False, runtime: CudaRuntime | None = None
    ) -> None:
        """memory: contiguous, on the CPU. read_only: mapped without write access.

        Raises KernelArgumentError, and CudaCallFailedError for example for memory that is
        registered already.
        """
        self._address: int | None = None  # until it is registered
        require(memory.device.type == "cpu", "memory", "must be on the CPU")
        require(memory.is_contiguous() and memory.numel() > 0, "memory", "must be contiguous bytes")
        self._runtime = runtime or cuda_runtime()
        nbytes = memory.numel() * memory.element_size()
        self._runtime.register(memory.data_ptr(), nbytes, read_only=read_only)
        self._address = memory.data_ptr()

    def close(self) -> None:
        """Makes it ordinary memory again; further calls do nothing."""
        address, self._address = self._address, None
        if address is not None:
            self._runtime.unregister(address)

    def __enter__(self) -> Registration:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
