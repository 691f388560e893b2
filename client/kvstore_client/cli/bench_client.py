"""One client of `kvstore bench`: times calls, and checks the bytes it gets against a pattern.

A process of its own, told what to do by JSON lines on its standard input; it ends with them.
The blocks' bytes and hashes follow from a seed, so that any client can tell what another one put.
"""

from __future__ import annotations

import gc

if __name__ == "__main__":
    gc.disable()  # until `settle`

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvstore import limits
from kvstore.errors import KVStoreError, Unavailable
from kvstore.lasting import settle
from kvstore.session.base import Hit, Session
from kvstore_client.cli.bench_plan import NAMESPACE, layout_of
from kvstore_client.cli.target import connect

Bytes = npt.NDArray[np.uint8]

PHASES = ("put", "match", "get", "view")
_DROP_S = 5.0  # a store that has died is noticed here: its puts fail without a word
SAMPLE_EVERY = 16  # of later reads, one in so many has one block checked


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One client's part of a case: `blocks` of its own, a multiple of `batch`."""

    seed: int
    client: int
    reads_from: int  # the client whose blocks this one matches, gets and views
    size_bytes: int
    batch: int
    blocks: int
    seconds: float


@dataclass(slots=True, kw_only=True)
class Measured:
    """What one client saw in one phase. `misses` counts blocks, `wrong` those checked and bad."""

    latencies_ns: list[int] = field(default_factory=list)
    blocks: int = 0
    misses: int = 0
    checked: int = 0
    wrong: int = 0


def parse_measured(line: str) -> Measured:
    """The inverse of what `serve` prints for a phase."""
    return Measured(**json.loads(line))


@dataclass(frozen=True, slots=True, eq=False)
class Pattern:
    """The blocks of one client: `stored[i]`, uint8 (blocks, size_bytes), under `hashes[i]`."""

    hashes: Bytes
    stored: Bytes


def make_pattern(plan: Plan, client: int) -> Pattern:
    """What `client` puts in this case."""
    rng = np.random.Generator(np.random.SFC64([plan.seed, plan.size_bytes, client]))
    hashes = _random_bytes(rng, plan.blocks * limits.KEY_BYTES)
    stored = _random_bytes(rng, plan.blocks * plan.size_bytes)
    return Pattern(hashes.reshape(plan.blocks, -1), stored.reshape(plan.blocks, -1))


def _random_bytes(rng: np.random.Generator, nbytes: int) -> Bytes:
    words = rng.integers(0, 1 << 64, -(-nbytes // 8), np.uint64)
    return words.view(np.uint8)[:nbytes]


class Client:
    """Runs the phases of one plan over a session; `put` before the others."""

    def __init__(self, session: Session, plan: Plan) -> None:
        self._session, self._plan = session, plan
        self._namespace = session.open_namespace(NAMESPACE, layout_of(plan.size_bytes))
        self._pattern = make_pattern(plan, plan.client)
        self._destinations = np.zeros((plan.batch, plan.size_bytes), np.uint8)

    def run(self, phase: str) -> Measured:
        """Times calls of one of `PHASES` for the plan's seconds, all of the blocks at least once.

        Raises what the session raises.
        """
        if phase == PHASES[1]:
            # The expected bytes of all that is read are made anew, by the client that reads.
            del self._pattern
            self._pattern = make_pattern(self._plan, self._plan.reads_from)
        calls: dict[str, Callable[[int, Measured], None]] = {
            "put": self._put,
            "match": self._match,
            "get": self._get,
            "view": self._view,
        }
        measured = Measured()
        for number, at in enumerate(self._batch_starts()):
            if phase == "put" and number and not at:
                self._session.drop(self._namespace, self._pattern.hashes, timeout_s=_DROP_S)
            calls[phase](at, measured)
        return measured

    def _batch_starts(self) -> Iterator[int]:
        """First blocks of batches, round and round; whole rounds, until the time is over."""
        end = time.monotonic() + self._plan.seconds
        while True:
            yield from range(0, self._plan.blocks, self._plan.batch)
            if time.monotonic() >= end:
                return

    def _hashes(self, at: int) -> Bytes:
        return self._pattern.hashes[at : at + self._plan.batch]

    def _put(self, at: int, measured: Measured) -> None:
        hashes = self._hashes(at)
        sources = list(self._pattern.stored[at : at + self._plan.batch])
        start = time.perf_counter_ns()
        result = self._session.put(self._namespace, hashes, sources)
        measured.latencies_ns.append(time.perf_counter_ns() - start)
        self._count(measured, result.stored)

    def _match(self, at: int, measured: Measured) -> None:
        hashes = self._hashes(at)
        start = time.perf_counter_ns()
        found = self._session.match(self._namespace, hashes)
        measured.latencies_ns.append(time.perf_counter_ns() - start)
        self._count(measured, found.count)

    def _get(self, at: int, measured: Measured) -> None:
        hashes, destinations = self._hashes(at), list(self._destinations)
        start = time.perf_counter_ns()
        results = self._session.get_into(self._namespace, hashes, destinations)
        measured.latencies_ns.append(time.perf_counter_ns() - start)
        hits = sum(isinstance(result, Hit) for result in results)
        self._count(measured, hits)
        self._check(at, destinations[:hits], measured)

    def _view(self, at: int, measured: Measured) -> None:
        hashes = self._hashes(at)
        start = time.perf_counter_ns()
        view = self._session.view(self._namespace, hashes)
        taken = time.perf_counter_ns() - start
        try:
            self._count(measured, len(view.blocks))
            self._check(at, view.blocks, measured)
        finally:
            start = time.perf_counter_ns()
            view.release()
            measured.latencies_ns.append(taken + time.perf_counter_ns() - start)

    def _count(self, measured: Measured, done: int) -> None:
        measured.blocks += done
        measured.misses += self._plan.batch - done

    def _check(self, at: int, blocks: list[Bytes], measured: Measured) -> None:
        """Compares the whole of the first reads' blocks, and of one block of a later sample."""
        number = len(measured.latencies_ns)
        if measured.checked >= self._plan.blocks:
            pick = (number // SAMPLE_EVERY) % self._plan.batch
            chosen = [pick] if number % SAMPLE_EVERY == 0 and pick < len(blocks) else []
        else:
            chosen = list(range(len(blocks)))
        measured.checked += len(chosen)
        for i in chosen:
            measured.wrong += not np.array_equal(blocks[i], self._pattern.stored[at + i])


def serve(target: str, timeout_s: float) -> None:
    """Answers requests, one JSON line each: a plan, or the name of a phase of the last one."""
    with connect(target, timeout_s) as session:
        client: Client | None = None
        for line in sys.stdin:
            request = json.loads(line)
            if isinstance(request, str):
                assert client is not None, "a plan comes before its phases"
                answer: object = dataclasses.asdict(client.run(request))
            else:
                client = None  # the last plan's bytes make room for this one's
                client, answer = Client(session, Plan(**request)), {}
            print(json.dumps(answer), flush=True)


def main() -> int:
    """Entry point of the process; an error is one line on standard error."""
    settle()
    try:
        serve(sys.argv[1], float(sys.argv[2]))
    except KVStoreError as error:
        print(error, file=sys.stderr)
        return Unavailable.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
