"""Lets these tests import LMCache: pytest names a folder's modules after it, and this one's name is
that of LMCache's package. Its metrics' files go where pytest's do."""

import sys
from collections.abc import Iterator

import pytest

sys.modules.pop("lmcache", None)

import lmcache  # noqa: E402, F401


@pytest.fixture(scope="session", autouse=True)
def metrics(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path_factory.mktemp("metrics")))
        yield
