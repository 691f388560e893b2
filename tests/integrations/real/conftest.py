"""What engines leave behind is removed after their tests."""

from __future__ import annotations

import getpass
import tempfile
from collections.abc import Iterator

import pytest
from integrations.leftovers import nothing_left_in


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    compiled = f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}"
    with (
        nothing_left_in(),
        # Short, for engines name sockets after it.
        tempfile.TemporaryDirectory(prefix="kv-") as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", compiled)  # is kept, as without a folder of our own
        yield
