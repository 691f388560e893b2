"""What is said of measurements: medians within and over rounds, shares, ratios, and who wins."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import report
from benchmarks.report import Results, Round

KEY = ("4 MiB x64", "put")


def one_call(seconds: float, amount: int = 1000) -> Round:
    return Round.of([[(0.0, seconds)]], amount)


def results(ours: list[float], peer: list[float], copies: list[float]) -> Results:
    """Seconds of one call a round."""
    made = Results()
    made.systems[KEY]["ours"] = [one_call(seconds) for seconds in ours]
    made.systems[KEY]["peer"] = [one_call(seconds) for seconds in peer]
    for name in report.COPIES:
        made.limits[KEY][name] = [one_call(seconds) for seconds in copies]
    return made


def document(made: Results) -> dict[str, Any]:
    return {
        "machine": {"cores": 2},
        "versions": {"peer": "1.2"},
        "rounds": 3,
        "ours": "ours",
        "missing": {"other": "pip: no such package"},
        "limits": {"loopback TCP": 3e9},
        "move_limits": made.limit_rows(),
        "results": made.rows("ours", ["peer"]),
    }


def test_several_clients_have_moved_what_lies_between_the_first_begin_and_the_last_end() -> None:
    made = Round.of([[(0.0, 1.0)], [(0.5, 2.0)]], 100)
    assert made.rates == [100.0]
    assert made.seconds == [1.0, 1.5]


def test_ours_is_compared_with_a_peer_and_the_limit_within_each_round() -> None:
    # The machine is ten times slower in the second round: of that nothing may be seen.
    made = results(ours=[1, 10, 1], peer=[2, 20, 2], copies=[0.5, 5, 0.5])
    ours, peer = made.rows("ours", ["peer"])
    assert peer["ours"] == pytest.approx(2.0)
    assert ours["share"] == pytest.approx(0.5)
    assert "ours" not in ours


def test_the_table_marks_where_a_peer_wins() -> None:
    text = report.table(document(results(ours=[2, 2, 2], peer=[1, 1, 1], copies=[1, 1, 1])))
    assert "| 4 MiB x64 | **0.50** |" in text


def test_the_table_does_not_mark_where_ours_wins() -> None:
    text = report.table(document(results(ours=[1, 1, 1], peer=[2, 2, 2], copies=[1, 1, 1])))
    assert "| 4 MiB x64 | 2.00 |" in text


def test_the_table_says_what_is_missing_and_why() -> None:
    text = report.table(document(results(ours=[1], peer=[1], copies=[1])))
    assert "Missing: other: pip: no such package" in text


def test_every_round_is_in_the_rows() -> None:
    rows = results(ours=[1, 2], peer=[1, 1], copies=[1, 1]).rows("ours", ["peer"])
    assert [one["calls_us"] for one in rows[0]["rounds"]] == [[1_000_000], [2_000_000]]
