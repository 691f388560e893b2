"""Files in shared memory that nobody has any more go; what somebody has, or was before, stays."""

from __future__ import annotations

import contextlib
import mmap
from pathlib import Path

from integrations.leftovers import nothing_left_in


def test_only_what_is_new_and_in_nobody_s_hands_is_removed(tmp_path: Path) -> None:
    (tmp_path / "old").touch()
    with (
        contextlib.ExitStack() as held,
        contextlib.suppress(AssertionError),
        nothing_left_in(tmp_path),
    ):
        for name in ("left", "open", "mapped"):
            (tmp_path / name).write_bytes(bytes(mmap.PAGESIZE))
        held.enter_context(open(tmp_path / "open", "rb"))
        with open(tmp_path / "mapped", "r+b") as file:
            held.enter_context(mmap.mmap(file.fileno(), mmap.PAGESIZE))
        raise AssertionError("as where a test fails")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["mapped", "old", "open"]
