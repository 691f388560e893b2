"""Names in profiles."""

from __future__ import annotations

import pytest
import torch

from kvstore_kernels import ranges
from kvstore_kernels.ranges import DECODE, GET, span


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What NVTX is told, as if there were a GPU."""
    noted: list[str] = []
    monkeypatch.setattr(ranges, "_seen_by_profilers", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", noted.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: noted.append("pop"))
    return noted


def test_spans_are_nested_and_end_with_an_error(noted: list[str]) -> None:
    with pytest.raises(ZeroDivisionError), span(DECODE), span(GET):
        1 / 0  # noqa: B018
    assert noted == ["decode", "get", "pop", "pop"]


def test_a_function_may_be_a_span_again_and_again(noted: list[str]) -> None:
    @span(GET)
    def get() -> int:
        return 3

    assert get() + get() == 6
    assert noted == ["get", "pop"] * 2


def test_torch_s_profiler_has_them_too(noted: list[str]) -> None:
    with torch.profiler.profile() as profile, span(DECODE):
        torch.zeros(3)
    assert DECODE in {event.key for event in profile.key_averages()}


def test_without_a_gpu_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "_seen_by_profilers", lambda: False)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", pytest.fail)
    with span(DECODE):
        pass
