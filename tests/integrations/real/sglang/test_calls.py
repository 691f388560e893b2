"""SGLang still calls what the recorded calls say, which `make test` makes again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from integrations.real.sglang.record import FIXTURE, record


def without_answers(calls: list[dict[str, Any]]) -> list[str]:
    """The calls in an order of their own: SGLang's threads make them side by side."""
    return sorted(json.dumps({**call, "answer": None}, sort_keys=True) for call in calls)


def test_a_real_run_makes_the_recorded_calls(tmp_path: Path) -> None:
    recorded = json.loads(FIXTURE.read_text())
    made = record(tmp_path)
    assert without_answers(made) == without_answers(recorded)
    assert [call.get("answer") for call in made] == [call.get("answer") for call in recorded]
