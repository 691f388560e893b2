"""Calls that vLLM 0.32 made of the connector's scheduler's side in a real run, with preemptions,
loads and corrupted blocks, made again without vLLM: plans are as they were then, and the bytes are
the ones that were saved.

`real/vllm/connector_recorder.py` has noted them, and says what the lines hold.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from integrations.pool import one_bit_off, spoil  # noqa: E402
from integrations.vllm_connector import content  # noqa: E402

from daemon import Daemon, daemon  # noqa: E402
from kvstore_client import KVStoreClient  # noqa: E402
from kvstore_integrations.identity import Identity  # noqa: E402
from kvstore_integrations.spaces import Spaces  # noqa: E402
from kvstore_integrations.vllm.pages import CpuMover, Pages  # noqa: E402
from kvstore_integrations.vllm.plans import Load, Plan, Save  # noqa: E402
from kvstore_integrations.vllm.scheduling import Group, Scheduling  # noqa: E402
from kvstore_integrations.vllm.worker import BlockWorker, Store  # noqa: E402

pytestmark = pytest.mark.engines

CALLS = (Path(__file__).parent / "vllm_connector_calls.jsonl").read_text().splitlines()
TOKENS, BLOCKS, WIDTH = 32, 16, 64


@dataclass
class Request:
    """What the connector sees of one of vLLM's."""

    request_id: str
    num_prompt_tokens: int
    num_tokens: int = 0
    num_computed_tokens: int = 0
    block_hashes: list[bytes] = field(default_factory=list)


class Replay:
    """One engine, whose KV memory holds what follows from each block's hash."""

    def __init__(self, server: Daemon) -> None:
        self.server = server
        self.client = KVStoreClient(server.target, verify_reads=True)
        self.memory = torch.zeros(BLOCKS, WIDTH, dtype=torch.bfloat16)
        pages = Pages([self.memory], BLOCKS)
        identity = Identity("test", "m@1", {})
        store = Store.of(identity, pages, TOKENS)
        self.worker = BlockWorker(self.client, [store], CpuMover(), staging_bytes=1 << 20)
        spaces = Spaces(self.client, identity, block_bytes=pages.block_bytes, block_tokens=TOKENS)
        spaces.open_now("default")
        self.books = Scheduling(
            self.client, [Group(block_tokens=TOKENS)], hash_tokens=TOKENS, tenant="default"
        )
        self.books.use([[spaces]])
        self.requests: dict[str, Request] = {}
        self.ended: Any = None
        self.loaded = self.saved = 0

    def add(self, name: str, prompt_tokens: int, said: Any, adapter: str) -> None:
        self.requests[name] = Request(name, prompt_tokens)
        self.books.add(self.requests[name], said, adapter)

    def state(self, name: str, tokens: int, computed: int, hashes: list[str]) -> None:
        request = self.requests[name]
        request.num_tokens, request.num_computed_tokens = tokens, computed
        request.block_hashes += [bytes.fromhex(digest) for digest in hashes]

    def match(self, name: str, local: int, found: int | None) -> None:
        assert self.books.match(name, local) == found

    def allocated(self, name: str, blocks: list[list[int]], tokens: int) -> None:
        self.books.allocated(name, blocks, tokens)

    def step(
        self,
        scheduled: dict[str, int],
        blocks: dict[str, list[list[int]]],
        loads: list[Any],
        saves: list[Any],
    ) -> None:
        plan = self.books.step(scheduled, blocks.__getitem__)
        assert _copies(plan.loads) == loads
        assert _copies(plan.saves) == saves
        self._copy(plan)

    def _copy(self, plan: Plan) -> None:
        """What the worker does, with the forward pass between loads and saves."""
        self.worker.begin_loads(plan.loads)
        self.worker.drain()
        self.ended = self.worker.ended()
        for load in plan.loads:
            for block, digest in _blocks(load):
                if block not in self.ended.lost_blocks:
                    wanted = content(0, 0, digest, WIDTH)
                    assert self.memory[block].view(torch.int16).equal(wanted.view(torch.int16))
                    self.loaded += 1
        for save in plan.saves:
            for block, digest in _blocks(save):
                self.memory[block] = content(0, 0, digest, WIDTH)
                self.saved += 1
        self.worker.save(plan.saves)
        self.worker.drain()

    def note(self, finished: list[str], failed: list[str], lost_blocks: list[int]) -> None:
        assert self.ended.requests == set(finished)
        assert self.ended.lost_blocks == set(lost_blocks)
        self.books.note(finished=finished, failed=failed, lost_blocks=lost_blocks)

    def end(self, name: str) -> None:
        self.books.end(name)

    def close(self) -> None:
        self.worker.close()
        self.books.close()
        self.client.close()


def _copies(those: Any) -> list[Any]:
    return [
        [one.request, part.group, part.position, list(part.blocks)]
        for one in those
        for part in one.parts
    ]


def _blocks(one: Load | Save) -> Iterator[tuple[int, bytes]]:
    for part in one.parts:
        for i, block in enumerate(part.blocks):
            yield block, part.hashes[32 * i : 32 * (i + 1)]


def test_plans_are_as_they_were_in_the_real_run_and_bytes_are_the_ones_saved(
    tmp_path: Path,
) -> None:
    with daemon(tmp_path, "--dram", "16MiB") as server:
        engine = Replay(server)
        names = [json.loads(line)[1] for line in CALLS if line.startswith('["add"')]
        for line in CALLS:
            kind, *given = json.loads(line)
            if kind == "add" and given[0] == names[-2]:  # of the last run, in which all was spoilt
                assert spoil(server, one_bit_off) > 0
            getattr(engine, kind)(*given)
        assert engine.loaded > 20
        assert engine.saved > 20
        engine.close()
