"""An engine as the connector's scheduler and workers see it, without vLLM: requests that grow,
blocks that are handed out, and KV memory whose bytes follow from the tokens."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from kvstore_client import KVStoreClient
from kvstore_integrations.identity import Identity
from kvstore_integrations.spaces import Spaces
from kvstore_integrations.vllm.pages import CpuMover, Pages
from kvstore_integrations.vllm.plans import Plan
from kvstore_integrations.vllm.scheduling import Group, Scheduling
from kvstore_integrations.vllm.worker import BlockWorker, Store

TOKENS = 16  # of a block hash, and of a block unless a test says otherwise
BLOCKS, LAYERS, HEADS, WIDTH = 96, 3, 2, 8
NULL = 0
WAIT_S = 20.0
_numbers = itertools.count()


@dataclass
class Request:
    """One of the engine's requests. salt: what it has in its hashes beside its tokens."""

    tokens: list[int]
    num_prompt_tokens: int = 0
    num_computed_tokens: int = 0
    salt: str = ""
    request_id: str = field(default_factory=lambda: f"r{next(_numbers)}")
    block_hashes: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.tokens)
        self.grow()

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def grow(self, *tokens: int) -> None:
        """Tokens are appended, and hashed as vLLM does it: each block over all before it."""
        self.tokens += tokens
        for i in range(len(self.block_hashes), len(self.tokens) // TOKENS):
            before = self.block_hashes[-1] if self.block_hashes else self.salt.encode()
            block = self.tokens[TOKENS * i : TOKENS * (i + 1)]
            self.block_hashes.append(hashlib.sha256(before + repr(block).encode()).digest())


def prompt(seed: int, tokens: int, **more: Any) -> Request:
    """A request of so many random tokens."""
    return Request(np.random.default_rng(seed).integers(0, 512, tokens).tolist(), **more)


def layers_of(layout: str = "LBHNC", blocks: int = BLOCKS, tokens: int = TOKENS) -> Any:
    """KV memory of one kind of layers, as vLLM makes it: one allocation, a view for each layer,
    (blocks, heads, tokens, width) bfloat16, its dimensions in the order of `layout`'s letters."""
    sizes = dict(zip("LBHNC", (LAYERS, blocks, HEADS, tokens, WIDTH), strict=True))
    memory = torch.zeros([sizes[letter] for letter in layout], dtype=torch.bfloat16)
    logical = memory.permute([layout.index(letter) for letter in "LBHNC"])
    return list(logical.unbind(0))


def content(layer: int, group: int, digest: bytes, nelements: int) -> torch.Tensor:
    """The KV of one block in one layer: what it is follows from its hash."""
    seed = [layer, group, *digest]
    raw = np.random.default_rng(seed).integers(0, 1 << 16, nelements, np.uint16)
    return torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16)


class Rank:
    """One worker and its KV memory, by cache group."""

    def __init__(self, engine: Engine, number: int, *, shared: bool, staging_bytes: int) -> None:
        self.groups = [layers_of(engine.layout, tokens=g.block_tokens) for g in engine.groups]
        facts = {"rank": 0 if shared else number}
        self.identities = [
            Identity("test", engine.model, {**facts, "group": i}) for i in range(len(self.groups))
        ]
        stores = [
            Store.of(identity, Pages(layers, BLOCKS), group.block_tokens)
            for identity, layers, group in zip(
                self.identities, self.groups, engine.groups, strict=True
            )
        ]
        self.block_bytes = [store.pages.block_bytes for store in stores]
        self.number = 0 if shared else number
        self.worker = BlockWorker(
            engine.client,
            stores,
            CpuMover(),
            staging_bytes=staging_bytes,
            writes=not shared or number == 0,
        )


class Engine:
    """An engine of one process, several ranks, and several cache groups."""

    def __init__(
        self,
        target: str,
        model: str = "m@1",
        *,
        groups: Sequence[Group] = (Group(block_tokens=TOKENS),),
        layout: str = "LBHNC",
        ranks: int = 1,
        shared: bool = False,
        staging_bytes: int = 1 << 20,
        client: Any = None,
        **settings: Any,
    ) -> None:
        """shared: whether all ranks hold equal bytes. settings: of `Scheduling`."""
        self.model, self.groups, self.layout = model, list(groups), layout
        self.client = client or KVStoreClient(target, verify_reads=True, timeout_s=WAIT_S)
        self.ranks = [
            Rank(self, number, shared=shared, staging_bytes=staging_bytes)
            for number in range(ranks)
        ]
        self.scheduling = Scheduling(
            self.client,
            self.groups,
            hash_tokens=TOKENS,
            tenant="default",
            **{"null_block": NULL, **settings},
        )
        self.spaces = [
            [
                Spaces(self.client, identity, block_bytes=nbytes, block_tokens=group.block_tokens)
                for identity, nbytes, group in zip(
                    rank.identities, rank.block_bytes, self.groups, strict=True
                )
            ]
            for rank in (self.ranks[:1] if shared else self.ranks)
        ]
        self.scheduling.use(self.spaces)
        self.tables: dict[str, list[list[int]]] = {}
        self._free = [list(range(1, BLOCKS)) for _ in self.groups]

    def open(self, *tenants: str) -> Engine:
        for tenant in tenants or ("default",):
            for space in itertools.chain.from_iterable(self.spaces):
                space.open_now(tenant)
        return self

    def serve(self, request: Request, *, local: int = 0, adapter: str = "", **said: Any) -> int:
        """Serves a request's prompt from its arrival on; returns the tokens that were loaded.

        local: tokens that the engine has in its own memory.
        """
        self.scheduling.add(request, said, adapter)
        loaded = self.admit(request, local)
        self.compute(request, len(request.tokens))
        return loaded

    def admit_after_add(self, request: Request) -> int:
        """A request that arrives, and loads what can be; returns the tokens that were."""
        self.scheduling.add(request, None)
        return self.admit(request)

    def admit(self, request: Request, local: int = 0) -> int:
        """Loads what can be; returns the tokens that were."""
        found = self.scheduling.match(request.request_id, local)
        assert found is not None
        self.place(request)
        self.fill(request, 0, local)
        self.scheduling.allocated(request.request_id, self.tables[request.request_id], found)
        loaded = self.load(self.scheduling.step({}, self.tables.get), found)
        request.num_computed_tokens = local + loaded
        return loaded

    def load(self, plan: Plan, found: int) -> int:
        """Carries the loads of one request out; returns the tokens up to the first lost block."""
        lost: set[int] = set()
        failed: set[str] = set()
        for rank in self.ranks:
            rank.worker.begin_loads(plan.loads)
            rank.worker.drain()
            ended = rank.worker.ended()
            assert ended.requests == {load.request for load in plan.loads}
            lost |= ended.lost_blocks
            failed |= ended.failed
        several = len(self.groups) > 1
        self.scheduling.note(
            finished=[load.request for load in plan.loads],
            failed=failed if several else (),
            lost_blocks=() if several else lost,
        )
        if not plan.loads or not lost:
            return found
        if several:
            return 0
        (part,) = plan.loads[0].parts
        first = next(i for i, block in enumerate(part.blocks) if block in lost)
        return first * self.groups[0].block_tokens

    def place(self, request: Request) -> None:
        """Hands out blocks for all its tokens and some more."""
        table = self.tables.setdefault(request.request_id, [[] for _ in self.groups])
        for number, group in enumerate(self.groups):
            while len(table[number]) * group.block_tokens < len(request.tokens) + TOKENS:
                table[number].append(self._free[number].pop())

    def compute(self, request: Request, until: int, *, guessed: int = 0) -> Plan:
        """A step in which the tokens up to `until`, and some guessed ones, are computed."""
        begin, count = request.num_computed_tokens, until - request.num_computed_tokens
        self.place(request)
        plan = self.scheduling.step({request.request_id: count + guessed}, self.tables.get)
        self.fill(request, begin, until)
        self.save(plan)
        request.num_computed_tokens = until
        return plan

    def save(self, plan: Plan) -> None:
        """Carries the saves out, and tells what found no room."""
        for rank in self.ranks:
            rank.worker.save(plan.saves)
            rank.worker.end(plan)
            rank.worker.drain()
            self.scheduling.note(dropped=rank.worker.dropped())

    def fill(self, request: Request, begin: int, end: int) -> None:
        """Writes the KV of the tokens; of blocks that are not full yet, nothing."""
        for rank in self.ranks:
            for group, number, digest, block in self.blocks(request, end):
                if (number + 1) * self.groups[group].block_tokens > begin:
                    for layer, memory in enumerate(rank.groups[group]):
                        page = content(layer + 100 * rank.number, group, digest, memory[0].numel())
                        memory[block] = page.view(memory[block].shape)

    def holds(self, request: Request, begin: int, end: int) -> bool:
        """Whether the KV memory has the KV of all blocks in [begin, end)."""
        return all(
            torch.equal(
                memory[block].reshape(-1).view(torch.int16),
                content(layer + 100 * rank.number, group, digest, memory[0].numel()).view(
                    torch.int16
                ),
            )
            for rank in self.ranks
            for group, number, digest, block in self.blocks(request, end)
            if number * self.groups[group].block_tokens >= begin
            for layer, memory in enumerate(rank.groups[group])
        )

    def blocks(self, request: Request, end: int) -> list[tuple[int, int, bytes, int]]:
        """(group, number in the chain, hash, block) of the full blocks before token `end` that are
        there."""
        found = []
        for group, form in enumerate(self.groups):
            per = form.block_tokens // TOKENS
            hashes = request.block_hashes[per - 1 :: per]
            table = self.tables[request.request_id][group]
            found += [
                (group, number, hashes[number], table[number])
                for number in range(end // form.block_tokens)
                if table[number] != NULL
            ]
        return found

    def close(self) -> None:
        for rank in self.ranks:
            rank.worker.close()
        self.scheduling.close()
        self.client.close()
