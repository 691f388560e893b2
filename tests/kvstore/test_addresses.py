"""Where buffers lie, read from numpy's own fields and asked of numpy: both say the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore.errors import InvalidArgument, KVStoreError, LayoutMismatch
from kvstore.session import addresses
from kvstore.session.addresses import addresses_of

N = 40


class Subclass(np.ndarray):
    """As `numpy.memmap` is one."""


@pytest.fixture(params=[True, False], ids=["by fields", "one by one"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    assert addresses.PROMISED  # which this numpy keeps to
    monkeypatch.setattr(addresses, "PROMISED", request.param)


def locked(array: Any) -> Any:
    array.flags.writeable = False
    return array


GOOD: dict[str, Callable[[], Any]] = {
    "plain": lambda: np.zeros(N, np.uint8),
    "inside another": lambda: np.zeros(3 * N, np.uint8)[5 : 5 + N],
    "every second of one": lambda: np.zeros((2, N), np.uint8)[1],
    "a column of one byte's rows": lambda: np.zeros((N, 1), np.uint8)[:, 0],
    "a subclass": lambda: np.zeros(N, np.uint8).view(Subclass),
    "of bools": lambda: np.zeros(N, np.bool_).view(np.uint8),
}
BAD: dict[str, tuple[Callable[[], Any], type[KVStoreError]]] = {
    "too short": (lambda: np.zeros(N - 1, np.uint8), LayoutMismatch),
    "too long": (lambda: np.zeros(N + 1, np.uint8), LayoutMismatch),
    "signed": (lambda: np.zeros(N, np.int8), LayoutMismatch),
    "wider": (lambda: np.zeros(N, np.uint16), LayoutMismatch),
    "two dimensions": (lambda: np.zeros((1, N), np.uint8), LayoutMismatch),
    "no dimension": (lambda: np.uint8(3), LayoutMismatch),
    "strided": (lambda: np.zeros(2 * N, np.uint8)[::2], InvalidArgument),
    "backwards": (lambda: np.zeros(N, np.uint8)[::-1], InvalidArgument),
    "locked": (lambda: locked(np.zeros(N, np.uint8)), InvalidArgument),
    "bytes": (lambda: bytes(N), InvalidArgument),
    "nothing": (lambda: None, InvalidArgument),
}


@pytest.mark.usefixtures("_way")
def test_addresses_are_what_arrays_say() -> None:
    arrays = [make() for _ in range(3) for make in GOOD.values()]
    want = [array.__array_interface__["data"][0] for array in arrays]
    for given in (arrays, tuple(arrays)):
        found = addresses_of("sources", given, len(arrays), N, writable=True)
        assert found.dtype == np.uint64
        assert found.tolist() == want
    table = np.zeros((7, N), np.uint8)
    rows = addresses_of("sources", table, 7, N, writable=True)  # type: ignore[arg-type]
    assert rows.tolist() == [table.ctypes.data + N * i for i in range(7)]
    held = locked(np.zeros(N, np.uint8))
    assert addresses_of("sources", [held], 1, N, writable=False).tolist() == [held.ctypes.data]


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("what", BAD)
def test_an_error_names_the_first_buffer_that_is_wrong(what: str) -> None:
    make, error = BAD[what]
    buffers = [np.zeros(N, np.uint8), make(), make(), np.zeros(N, np.uint8)]
    with pytest.raises(error, match=r"blocks\[1\]"):
        addresses_of("blocks", buffers, 4, N, writable=True)
    with pytest.raises(InvalidArgument, match="4 buffers for 3 keys"):
        addresses_of("blocks", buffers, 3, N, writable=True)


@pytest.mark.usefixtures("_way")
def test_a_mapped_file_is_a_buffer(tmp_path: Path) -> None:
    mapped = np.memmap(tmp_path / "x", np.uint8, "w+", shape=(N,))
    assert addresses_of("x", [mapped], 1, N, writable=True).tolist() == [mapped.ctypes.data]
