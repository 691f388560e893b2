"""The main job, on real input: one process prefills and puts, another gets and decodes.

A real `kvstore-server` stands between them, and a third run without a store is the reference.
Exits 1 when a token differs or nothing was matched.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvstore import Attention, Layout
from kvstore_client import KVStoreClient
from kvstore_engines.adapter import SessionStore
from kvstore_engines.checkpoint import fingerprint, load_checkpoint
from kvstore_engines.engine import Engine
from kvstore_engines.smollm2 import ensure_smollm2, load_tokenizer

BLOCK_TOKENS = 16
NEW_TOKENS = 24
SYSTEM = (
    "You are the assistant of a small public library. You answer in one or two plain sentences. "
    "The library opens at nine and closes at eighteen from Monday to Friday, and at thirteen on "
    "Saturday; it is closed on Sunday. Books are lent for four weeks and may be renewed twice. "
    "Films are lent for one week. Children under twelve need a card signed by a parent. The "
    "reading room on the second floor is quiet; the ground floor is for talking and coffee. "
    "Do not invent rules that are not written here."
)
FIRST = "What is the capital of France?"
QUESTIONS = [
    [FIRST],
    ["How long may I keep a book?"],
    ["When do you close on Saturday?"],
    [FIRST, "The capital of France is Paris.", "And on which river does it lie?"],
]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def prompt_text(turns: list[str]) -> str:
    """A conversation in SmolLM2's chat format, open for the assistant's next answer."""
    roles = ("user", "assistant")
    said = "".join(
        f"<|im_start|>{roles[i % 2]}\n{turn}<|im_end|>\n" for i, turn in enumerate(turns)
    )
    return f"<|im_start|>system\n{SYSTEM}<|im_end|>\n{said}<|im_start|>assistant\n"


def layout_of(model: Path) -> Layout:
    """The layout of the model's fp32 blocks."""
    config = load_checkpoint(model).config
    return Layout(
        model=fingerprint(model),
        attention=Attention.GQA,
        layers=config.layers,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        dtype="float32",
        block_tokens=BLOCK_TOKENS,
    )


def answer(model: Path, target: str | None, new_tokens: int) -> list[dict[str, Any]]:
    """Answers every question in turn, with the store at `target` or without one."""
    tokenizer = load_tokenizer(model)
    prompts = [tokenizer.encode(prompt_text(turns)).ids for turns in QUESTIONS]
    store = None
    if target:
        store = SessionStore(KVStoreClient(target), "demo", layout_of(model))
    engine = Engine(model, store=store, num_pages=256, block_tokens=BLOCK_TOKENS)
    engine.generate([prompts[0][:8]], 1)  # the first forward pass warms torch, not the store
    rows = []
    for prompt in prompts:
        result = engine.generate([prompt], new_tokens)[0]
        rows.append(
            {
                "prompt_tokens": result.prompt_tokens,
                "matched_tokens": result.matched_tokens,
                "tier": result.tier,
                "ttft_s": result.time_to_first_token_s,
                "stored": result.stored_blocks,
                "tokens": list(result.token_ids),
                "text": tokenizer.decode(list(result.token_ids)),
            }
        )
    return rows


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """A `kvstore-server` on a unix socket in `folder`."""
    socket = folder / "kvstore.sock"
    command = [sys.executable, "-m", "kvstore_server.cli", "--dram", "512MiB"]
    process = subprocess.Popen(
        [*command, "--socket", str(socket), "--data-dir", str(folder / "data")],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith("  blocks"):  # the banner's last line: it serves
                break
        yield f"unix://{socket}"
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()


def run_process(model: Path, target: str | None, new_tokens: int) -> list[dict[str, Any]]:
    """`answer` in a process of its own."""
    command = [sys.executable, "-m", "kvstore_engines.demo", "--model", str(model)]
    command += ["--new-tokens", str(new_tokens), *(["--target", target] if target else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def show(console: Console, decoded: list[dict[str, Any]], plain: list[dict[str, Any]]) -> bool:
    """Prints the table; returns whether all tokens are equal and something was matched."""
    table = Table(title="SmolLM2-135M through kvstore")
    for name in ("prompt tokens", "matched", "tier", "TTFT with", "TTFT without", "tokens equal"):
        table.add_column(name, justify="right")
    table.add_column("answer")
    for with_store, without in zip(decoded, plain, strict=True):
        table.add_row(
            str(with_store["prompt_tokens"]),
            str(with_store["matched_tokens"]),
            with_store["tier"] or "-",
            f"{with_store['ttft_s'] * 1e3:.0f} ms",
            f"{without['ttft_s'] * 1e3:.0f} ms",
            "yes" if with_store["tokens"] == without["tokens"] else "NO",
            with_store["text"].strip()[:48],
        )
    console.print(table)
    matched = sum(row["matched_tokens"] for row in decoded)
    prompts = sum(row["prompt_tokens"] for row in decoded)
    equal = [a["tokens"] == b["tokens"] for a, b in zip(decoded, plain, strict=True)]
    console.print(
        f"{matched} of {prompts} prompt tokens came from the store; "
        f"{sum(equal)} of {len(equal)} answers equal to the token"
    )
    return all(equal) and matched > 0


@app.command()
def main(
    model: Annotated[Path | None, typer.Option(hidden=True)] = None,
    target: Annotated[str | None, typer.Option(hidden=True)] = None,
    new_tokens: Annotated[int, typer.Option(hidden=True)] = NEW_TOKENS,
) -> None:
    """Runs the whole demo, or (with --model) one of its processes."""
    if model:
        print(json.dumps(answer(model, target, new_tokens)))
        return
    console = Console(width=120)
    with console.status("getting the model ready (once)"):
        folder = ensure_smollm2(progress=console.print)
    with tempfile.TemporaryDirectory() as work, server(Path(work)) as at:
        with console.status("prefill process: computes the prompts and puts their blocks"):
            run_process(folder, at, 1)
        with console.status("decode process: matches, gets and decodes"):
            decoded = run_process(folder, at, NEW_TOKENS)
    with console.status("reference process: no store"):
        plain = run_process(folder, None, NEW_TOKENS)
    if not show(console, decoded, plain):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
