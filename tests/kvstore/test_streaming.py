"""Copies around the cache, and hashes of what passes: as memmove and xxhash do it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import xxhash

from kvstore.streaming import copy_and_hash_rows, copy_rows, hash_rows

# Around each step of XXH3: its short forms' ends, a stripe's, a block's.
SIZES = (1, 2, 3, 4, 8, 9, 16, 17, 63, 64, 65, 128, 129, 240, 241, 256, 300, 1023, 1024, 1025, 1087,
         1088, 1089, 2048, 4096, 65536, 262144 + 77)  # fmt: skip
ROWS, ROOM = 3, 128


def addresses(rows: list[npt.NDArray[np.uint8]]) -> npt.NDArray[np.uint64]:
    return np.array([row.ctypes.data for row in rows], np.uint64)


def rows_at(memory: npt.NDArray[np.uint8], nbytes: int, off: int) -> list[npt.NDArray[np.uint8]]:
    """A row in each row of memory, `off` bytes behind a boundary of 64."""
    firsts = [-row.ctypes.data % 64 + off for row in memory]
    return [row[first : first + nbytes] for row, first in zip(memory, firsts, strict=True)]


@pytest.mark.parametrize("nbytes", SIZES)
@pytest.mark.parametrize(("to", "out_of"), [(0, 0), (0, 3), (5, 0), (63, 1)])
def test_rows_arrive_whole_with_their_checksums_and_nothing_beside_them_changes(
    nbytes: int, to: int, out_of: int
) -> None:
    rng = np.random.default_rng(nbytes)
    memory = rng.integers(0, 256, (ROWS, nbytes + ROOM), np.uint8)
    sources = rows_at(memory, nbytes, out_of)
    sums = [xxhash.xxh3_64_intdigest(row) for row in sources]
    for copy, expected in ((copy_rows, None), (copy_and_hash_rows, sums)):
        area = rng.integers(0, 256, (ROWS, nbytes + ROOM), np.uint8)
        before, targets = area.copy(), rows_at(area, nbytes, to)
        found = copy(addresses(targets), addresses(sources), nbytes)
        assert expected is None or found.tolist() == expected
        for mine, theirs in zip(targets, sources, strict=True):
            assert (mine == theirs).all()
        for target, now, was in zip(targets, area, before, strict=True):
            first = target.ctypes.data - now.ctypes.data
            assert (now[:first] == was[:first]).all()
            assert (now[first + nbytes :] == was[first + nbytes :]).all()
    assert hash_rows(addresses(sources), nbytes).tolist() == sums


def test_no_rows_are_nothing_to_do() -> None:
    none = np.empty(0, np.uint64)
    copy_rows(none, none, 4096)
    assert copy_and_hash_rows(none, none, 4096).shape == hash_rows(none, 4096).shape == (0,)


def test_who_looks_through_all_modules_finds_nothing_that_breaks_it() -> None:
    """As vLLM does when it registers kernels."""
    for module in list(sys.modules.values()):
        if module.__name__.startswith(("kvstore", "llvmlite", "numba")):
            for value in list(vars(module).values()):
                if hasattr(value, "__dict__"):
                    vars(value).get("kernel")


def test_a_process_that_may_not_compile_is_told_so() -> None:
    env = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", "from kvstore import KVStore"],
        capture_output=True,
        text=True,
        timeout=120,
        env=env,
        check=False,
    )
    assert ran.returncode == 1
    assert "unset NUMBA_DISABLE_JIT" in ran.stderr


def test_a_folder_that_cannot_be_written_costs_the_cache_of_compiled_code_alone(
    tmp_path: Path,
) -> None:
    """A container whose files are read-only, and a user without a home."""
    code = (
        "import numba.core.caching as c; c.CacheImpl._locator_classes = []\n"
        "import numpy as np; from kvstore.streaming import hash_rows\n"
        "print(hash_rows(np.array([np.zeros(4096, np.uint8).ctypes.data], np.uint64), 4096).shape)"
    )
    env = {**os.environ, "HOME": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env=env,
        check=True,
    )
    assert ran.stdout == "(1,)\n"
