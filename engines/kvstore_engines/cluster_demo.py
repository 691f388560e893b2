"""The main job on many nodes: an engine goes on when a server that it reads from is killed.

etcd and three `kvstore-server`s that keep everything twice; one process prefills and puts, another
gets and decodes, and in the middle of that the server which has sent it most is killed with
`kill -9`. A third process without a store is the reference. Exits 1 when a token differs, when
nothing was matched, or nothing after the kill. Imports no torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape

from kvstore.cluster.members import MemberState
from kvstore.errors import KVStoreError
from kvstore_client.cli import cluster
from kvstore_client.cluster.access import TOKEN_FILE
from kvstore_client.targets import connect_to_ask
from kvstore_engines.demo import (
    END_S,
    LAST_LINE_OF_BANNER,
    NEW_TOKENS,
    NUM_PAGES,
    ServerError,
    Steps,
    answer,
)
from kvstore_engines.demo_report import Row, print_report
from kvstore_engines.demo_text import QUESTIONS, prompt_text
from kvstore_engines.etcd import EtcdServer, EtcdUnavailableError, find_etcd
from kvstore_engines.jobs import EngineSpec, Result, WorkerError
from kvstore_engines.smollm2 import ModelUnavailableError, ensure_smollm2, load_tokenizer

NAMES = ("a", "b", "c")
COPIES = 2
KILL_BEFORE = 2  # the number of the question, from 0 on
JOINED_S = 30.0
_LOOK_S = 0.1
_CALL_S = 2.0

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Server:
    """One `kvstore-server` that is a node of the cluster; what it logs goes to a file."""

    def __init__(self, folder: Path, name: str, port: int, *flags: str) -> None:
        self.name, self.address = name, f"127.0.0.1:{port}"
        self._log = folder / "log"
        folder.mkdir()
        command = [sys.executable, "-m", "kvstore_server.cli", "--dram", "256MiB", "--no-grpc"]
        command += ["--socket", str(folder / "kvstore.sock"), "--data-dir", str(folder / "data")]
        command += ["--node-name", name, "--peer-listen", self.address, *flags]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)

    def wait_ready(self) -> None:
        """Returns once it serves. Raises ServerError with its own last words."""
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith(LAST_LINE_OF_BANNER):
                return
        said = self._log.read_text().splitlines()[-3:]
        raise ServerError("\n".join([f"kvstore-server {self.name} did not start:", *said]))

    def kill(self) -> None:
        """`kill -9`."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(END_S)

    def ask_to_end(self) -> None:
        """Begins an orderly end."""
        if self._process.poll() is None:
            self._process.terminate()

    def end(self) -> None:
        """Waits for the end, which is made sure of."""
        try:
            self._process.communicate(timeout=END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Three servers that know each other. Clients find the token in the environment."""

    servers: tuple[Server, ...]

    @property
    def target(self) -> str:
        """The cluster's, as a client takes it."""
        return f"cluster://{','.join(each.address for each in self.servers)}?transfer=grpc"

    def report(self) -> cluster.Report:
        """What the members say of themselves."""
        with contextlib.closing(connect_to_ask(self.target, timeout_s=_CALL_S)) as session:
            return cluster.report(session, _CALL_S)

    def wait_joined(self) -> None:
        """Returns once all three take blocks. Raises ServerError."""
        end, again = time.monotonic() + JOINED_S, threading.Event()
        while time.monotonic() < end:
            with contextlib.suppress(KVStoreError):
                rows = self.report().rows
                up = [r for r in rows if r.member.state == MemberState.UP and r.pong]
                if sum(row.pong.serving for row in up if row.pong) == len(self.servers):
                    return
            again.wait(_LOOK_S)
        raise ServerError(f"the servers did not find each other within {JOINED_S:.0f} s")

    def kill_busiest(self) -> tuple[str, int]:
        """Kills the server that has sent most blocks; its name, and how many those were."""
        sent = {row.member.name: row.counters.get("sent_blocks", 0) for row in self.report().rows}
        busiest = max(self.servers, key=lambda each: sent.get(each.name, 0))
        busiest.kill()
        return busiest.name, sent.get(busiest.name, 0)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The answers; which server was killed, and how many blocks it had sent until then."""

    rows: Sequence[Row]
    killed: str
    sent_blocks: int

    @property
    def matched_after(self) -> int:
        """Prompt tokens that came from the other servers, after the kill."""
        return sum(row.with_store.matched_tokens for row in self.rows[KILL_BEFORE:])


@contextlib.contextmanager
def running_cluster(folder: Path, etcd: str) -> Iterator[Cluster]:
    """Three servers, for the length of a `with`. Raises ServerError."""
    secret = folder / "secret"
    token = _make_secret(secret)
    (folder / "token").write_text(token)
    flags = ["--etcd", etcd, "--cluster-secret", str(secret), "--replicas", str(COPIES)]
    flags += ["--transfer", "grpc"]  # works on every machine
    ports = _free_ports(len(NAMES))
    with contextlib.ExitStack() as stack:
        servers = []
        for name, port in zip(NAMES, ports, strict=True):
            server = Server(folder / name, name, port, *flags)
            stack.callback(server.end)
            servers.append(server)
        # All are asked to end before any is waited for.
        for server in servers:
            stack.callback(server.ask_to_end)
        stack.enter_context(_variable(TOKEN_FILE, str(folder / "token")))
        for server in servers:
            server.wait_ready()
        found = Cluster(servers=tuple(servers))
        found.wait_joined()
        yield found


def _make_secret(path: Path) -> str:
    """Makes the cluster's secret, as an administrator does; the clients' token."""
    command = [sys.executable, "-m", "kvstore_server.cli"]
    try:
        subprocess.run([*command, "new-secret", str(path)], check=True, capture_output=True)
        shown = subprocess.run(
            [*command, "cluster-token", "--cluster-secret", str(path)],
            check=True,
            capture_output=True,
            text=True,
        )
    except subprocess.CalledProcessError as error:
        raise ServerError(f"no secret could be made: {error.stderr}") from None
    return shown.stdout.strip()


def _free_ports(n: int) -> list[int]:
    """Ports that nobody has now."""
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(n):
            probe = stack.enter_context(socket.socket())
            probe.bind(("127.0.0.1", 0))
            found.append(probe.getsockname()[1])
        return found


@contextlib.contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """A variable for this process and those that it starts meanwhile."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def measure(steps: Steps) -> Outcome:
    """The whole job."""
    with steps.step("SmolLM2-135M-Instruct and etcd, made ready once") as progress:
        folder = ensure_smollm2(progress=progress)
        program = find_etcd(progress=progress)
        tokenizer = load_tokenizer(folder)
        prompts = [tokenizer.encode(prompt_text(turns)).ids for turns in QUESTIONS]
    engine = EngineSpec(model=str(folder), namespace="demo", num_pages=NUM_PAGES)
    decoded, killed, sent = _through_the_cluster(engine, prompts, steps, program)
    with steps.step("reference process: computes everything, no store") as progress:
        plain = answer(engine, prompts, NEW_TOKENS, progress)
    rows = [
        Row(with_store=a, without=b, text=tokenizer.decode(list(a.token_ids)))
        for a, b in zip(decoded, plain, strict=True)
    ]
    return Outcome(rows=rows, killed=killed, sent_blocks=sent)


def _through_the_cluster(
    engine: EngineSpec, prompts: Sequence[list[int]], steps: Steps, program: Path
) -> tuple[list[Result], str, int]:
    with tempfile.TemporaryDirectory() as work, contextlib.ExitStack() as running:
        with steps.step("etcd and three kvstore-servers start"):
            etcd = EtcdServer(program, Path(work) / "etcd")
            running.callback(etcd.stop)
            endpoint = etcd.start().endpoint
            found = running.enter_context(running_cluster(Path(work), endpoint))
        stored = dataclasses.replace(engine, target=found.target)
        with steps.step("prefill process: computes the prompts, puts their blocks") as progress:
            answer(stored, prompts, 1, progress)
        killed = []

        def kill(number: int) -> None:
            if number == KILL_BEFORE:
                killed.append(found.kill_busiest())
                progress(f"kill -9 of kvstore-server {killed[0][0]}")

        with steps.step("decode process: gets, decodes; a server is killed") as progress:
            decoded = answer(stored, prompts, NEW_TOKENS, progress, before=kill)
    return decoded, *killed[0]


def print_outcome(console: Console, outcome: Outcome) -> bool:
    """Prints the table and what follows from it; whether the job was done as it should be."""
    good = print_report(console, outcome.rows)
    after = sum(row.with_store.prompt_tokens for row in outcome.rows[KILL_BEFORE:])
    console.print(
        f"kvstore-server {outcome.killed}, which had sent {outcome.sent_blocks} blocks, was killed"
        f" before question {KILL_BEFORE + 1};\nfrom then on {outcome.matched_after} of {after}"
        " prompt tokens came from the other two."
    )
    if not outcome.matched_after:
        console.print("[bold red]Nothing was matched after the kill.[/]")
    return good and outcome.matched_after > 0


@app.command()
def main() -> None:
    """Runs the demo; exits 1 where a token differs, nothing was matched, or it cannot run."""
    console = Console(width=min(120, max(100, Console().width)), highlight=False)
    console.print("kvstore cluster demo: three servers, two copies, one killed while it is read")
    cannot = (ModelUnavailableError, EtcdUnavailableError, ServerError, WorkerError, KVStoreError)
    try:
        outcome = measure(Steps(console))
    except cannot as error:
        console.print(f"[bold red]The demo cannot run.[/] {escape(str(error))}")
        raise typer.Exit(1) from None
    if not print_outcome(console, outcome):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
