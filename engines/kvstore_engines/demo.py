"""The main job, on real input: one process prefills and puts, another gets and decodes.

A real `kvstore-server` stands between them, and a third process without a store is the
reference. Exits 1 when a token differs or nothing was matched. Imports no torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape

from kvstore_engines.demo_report import Row, print_report
from kvstore_engines.demo_text import QUESTIONS, prompt_text
from kvstore_engines.jobs import EngineSpec, Job, Result, WorkerError
from kvstore_engines.launch import Workers, workers
from kvstore_engines.smollm2 import ModelUnavailableError, ensure_smollm2, load_tokenizer

NEW_TOKENS = 24
NUM_PAGES = 256
END_S = 20.0
WARM_UP_TOKENS = 8  # less than a block: warms torch, not the store
LAST_LINE_OF_BANNER = "  ready"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class ServerError(RuntimeError):
    """The daemon did not start; its own words say why."""


class Steps:
    """Says what is going on, and how long it took."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[Callable[[str], None]]:
        """One step; what it yields shows how far the step is."""
        began = time.perf_counter()
        with self._console.status(title) as status:
            # Where there is no terminal, as in a log, a status line would never be seen.
            yield (
                (lambda detail: status.update(f"{title}: {detail}"))
                if self._console.is_terminal
                else (lambda detail: self._console.print(f"    {detail}"))
            )
        self._console.print(f"  {title:<58}{time.perf_counter() - began:6.1f} s")


@contextlib.contextmanager
def server(folder: Path) -> Iterator[str]:
    """A `kvstore-server` on a unix socket in `folder`; gives its target."""
    socket = folder / "kvstore.sock"
    flags = ["--dram", "512MiB", "--no-grpc", "--socket", str(socket)]
    process = subprocess.Popen(
        [sys.executable, "-m", "kvstore_server.cli", *flags, "--data-dir", str(folder / "data")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        _wait_ready(process)
        yield f"unix://{socket}"
    finally:
        process.terminate()
        try:
            process.communicate(timeout=END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def _wait_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout
    said: list[str] = []
    for line in process.stdout:
        said.append(line.rstrip())
        if line.startswith(LAST_LINE_OF_BANNER):
            return
    raise ServerError("\n".join(["kvstore-server did not start:", *said[-3:]]))


def answer(
    engine: EngineSpec,
    prompts: Sequence[list[int]],
    new_tokens: int,
    progress: Callable[[str], None],
    *,
    before: Callable[[int], None] | None = None,
) -> list[Result]:
    """Answers the prompts one after the other, in a process of its own.

    before: called with the number of each prompt, from 0 on, before it is asked.
    """
    progress("loading torch and the model")
    with workers() as started:
        _ask(started, engine, prompts[0][:WARM_UP_TOKENS], 1)
        results = []
        for i, prompt in enumerate(prompts):
            if before:
                before(i)
            progress(f"question {i + 1} of {len(prompts)}")
            results.append(_ask(started, engine, prompt, new_tokens))
    return results


def _ask(started: Workers, engine: EngineSpec, prompt: list[int], new_tokens: int) -> Result:
    return started.ask(Job(engine=engine, prompts=[prompt], new_tokens=new_tokens))[0][0]


def measure(steps: Steps) -> list[Row]:
    """The whole job: one row for each question."""
    with steps.step("SmolLM2-135M-Instruct, made ready once") as progress:
        folder = ensure_smollm2(progress=progress)
        tokenizer = load_tokenizer(folder)
        prompts = [tokenizer.encode(prompt_text(turns)).ids for turns in QUESTIONS]
    engine = EngineSpec(model=str(folder), namespace="demo", num_pages=NUM_PAGES)
    decoded = _through_the_store(engine, prompts, steps)
    with steps.step("reference process: computes everything, no store") as progress:
        plain = answer(engine, prompts, NEW_TOKENS, progress)
    return [
        Row(with_store=a, without=b, text=tokenizer.decode(list(a.token_ids)))
        for a, b in zip(decoded, plain, strict=True)
    ]


def _through_the_store(
    engine: EngineSpec, prompts: Sequence[list[int]], steps: Steps
) -> list[Result]:
    with tempfile.TemporaryDirectory() as work, contextlib.ExitStack() as running:
        with steps.step("kvstore-server starts"):
            target = running.enter_context(server(Path(work)))
        stored = dataclasses.replace(engine, target=target)
        with steps.step("prefill process: computes the prompts, puts their blocks") as progress:
            answer(stored, prompts, 1, progress)
        with steps.step("decode process: matches, gets and decodes") as progress:
            return answer(stored, prompts, NEW_TOKENS, progress)


@app.command()
def main() -> None:
    """Runs the demo; exits 1 where a token differs, nothing was matched, or it cannot run."""
    console = Console(width=min(120, max(100, Console().width)), highlight=False)
    console.print("kvstore demo: one process prefills and puts, another gets and decodes")
    try:
        rows = measure(Steps(console))
    except (ModelUnavailableError, ServerError, WorkerError) as error:
        console.print(f"[bold red]The demo cannot run.[/] {escape(str(error))}")
        raise typer.Exit(1) from None
    if not print_report(console, rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
