"""Which blocks a step loads and saves: the scheduler's side of the connector, on its thread.

Looks the shared index up and keeps books; it neither copies nor waits, and knows nothing of
vLLM's classes: `connector.py` translates.
"""

from __future__ import annotations

import itertools
import logging
import math
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvstore import NamespaceHandle, Session, limits
from kvstore_integrations.options import RequestOptions
from kvstore_integrations.spaces import Spaces
from kvstore_integrations.vllm.plans import Dropped, End, Load, Part, Plan, Save

# A look-up makes a call only where the store has restarted and a namespace is opened again.
_LOOK_UP_S = 0.05
_OPENING_S = 0.1  # how long a request waits for its tenant's first namespace
_MOST_ROUNDS = 64  # of narrowing a hit down to what windows hold, in one look-up
Blocks = Sequence[Sequence[int]]  # by cache group
U8 = npt.NDArray[np.uint8]
log = logging.getLogger(__name__)


class EngineRequest(Protocol):
    """What this reads of the engine's request, which grows with each step.

    block_hashes: 32 bytes for each full block of hash_tokens tokens, each of which covers all
    tokens before it. num_tokens: those that are known; num_computed_tokens: whose KV is there.
    """

    request_id: str
    block_hashes: Sequence[bytes]
    num_computed_tokens: int
    num_prompt_tokens: int

    @property
    def num_tokens(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A cache group. window: how many tokens before the next its layers still see; None: all."""

    block_tokens: int
    window: int | None = None


@dataclass(slots=True)
class _Request:
    """One request that is cached.

    local: the tokens that the engine had itself when it asked last. limit: no tokens from here on
    are promised to it again, because they did not load. saved: by group, the blocks that were
    handed to the workers or are known to be stored; planned: the tokens that were looked at for
    that. unbroken: by group, whether all blocks before `saved` were stored already, so that the
    next may be too. chain: (n, 32), what was read of its hashes.
    """

    engine: EngineRequest
    options: RequestOptions
    space: str
    saved: list[int]
    unbroken: list[bool]
    planned: int = 0
    local: int = 0
    limit: int = limits.MAX_POSITION
    asked_s: float | None = None
    chain: U8 = field(default_factory=lambda: np.empty((0, limits.KEY_BYTES), np.uint8))


class Scheduling:
    """The books of one engine.

    groups: its cache groups. hash_tokens: tokens of a block hash. tenant: whose a request is that
    does not say. reads, writes: whether it loads and saves. save_decode: save also what is
    generated. drop_last: leave the last block of a hit to be computed. null_block: the number that
    the engine gives for a block that is not there.

    Nothing is cached until `use` has told where. Calls are made by one thread.
    """

    def __init__(
        self,
        session: Session,
        groups: Sequence[Group],
        *,
        hash_tokens: int,
        tenant: str,
        reads: bool = True,
        writes: bool = True,
        save_decode: bool = True,
        drop_last: bool = False,
        null_block: int = 0,
    ) -> None:
        self._session, self._groups, self._tenant = session, tuple(groups), tenant
        self._per_block = [group.block_tokens // hash_tokens for group in self._groups]
        self._unit = math.lcm(*(group.block_tokens for group in self._groups))
        self._least = min(group.block_tokens for group in self._groups)
        self._reads, self._writes, self._save_decode = reads, writes, save_decode
        self._drop_last = drop_last
        self.null_block = null_block
        self._ranks: list[Sequence[Spaces | None]] = []
        self._warned = False
        self._requests: dict[str, _Request] = {}
        self._loading: dict[str, Load] = {}
        self._new_loads: list[Load] = []
        self._ends: list[End] = []
        self._era = ""

    def use(self, ranks: Sequence[Sequence[Spaces | None]]) -> None:
        """Tells where blocks are: for each rank whose bytes differ and each cache group, the
        namespaces; None where the rank has no layer of the group."""
        self._ranks = [tuple(spaces) for spaces in ranks]

    def add(self, engine: EngineRequest, said: Mapping[str, Any] | None, adapter: str = "") -> None:
        """A new request. said: its parameters; adapter: the weights that change its KV."""
        if not self._ranks and not self._warned:
            self._warned = True
            log.error("nothing is cached: the workers have not told what their blocks are")
        options = RequestOptions.read(said, tenant=self._tenant)
        if options is None:
            return
        n = len(self._groups)
        space = f"{options.tenant}+{adapter}" if adapter else options.tenant
        self._requests[engine.request_id] = _Request(engine, options, space, [0] * n, [True] * n)

    def match(self, request_id: str, local: int) -> int | None:
        """How many tokens can be loaded beyond the `local` ones, which the engine has itself.

        At least one token is left to compute. None: ask again, its tenant's namespace is being
        opened.
        """
        request = self._requests.get(request_id)
        if request is None or not self._reads:
            return 0
        request.local = local
        known = min(request.engine.num_tokens - 1, request.limit)
        most = known // self._unit * self._unit
        if most <= local or local % self._unit:
            return 0
        handles = self._handles(request)
        if handles is None:
            return None if self._waits(request) else 0
        end = self._stored_until(request, handles, local, most)
        if self._drop_last:
            end -= self._unit
        return max(end - local, 0)

    def allocated(self, request_id: str, blocks: Blocks, tokens: int) -> None:
        """The engine has made room for the tokens that `match` promised it, or for fewer.

        blocks: of the whole request.
        """
        request = self._requests.get(request_id)
        if request is None or not tokens:
            return
        parts: list[Part] = []
        for number, group in enumerate(self._groups):
            first = request.local // group.block_tokens
            end = (request.local + tokens) // group.block_tokens
            parts += self._parts(request, number, first, end, blocks[number])
        load = Load(request=request_id, space=self._space(request), parts=tuple(parts))
        self._loading[request_id] = load
        self._new_loads.append(load)

    def step(self, scheduled: Mapping[str, int], blocks_of: Callable[[str], Blocks | None]) -> Plan:
        """What the workers do in this step. scheduled: the tokens that it computes, by request.

        A block is saved in the step that fills it, and once: what the store has is not sent again.
        """
        saves = []
        for request_id, count in scheduled.items() if self._writes else ():
            request = self._requests.get(request_id)
            if request is None:
                continue
            # Tokens that are guessed ahead are counted as computed, but have no hash yet.
            tokens = min(request.engine.num_computed_tokens + count, request.engine.num_tokens)
            if not self._save_decode:
                tokens = min(tokens, request.engine.num_prompt_tokens)
            if tokens // self._least > request.planned // self._least:
                save = self._save(request, tokens, blocks_of)
                if save:
                    saves.append(save)
        plan = Plan(self._new_loads, saves, self._ends, idle=not scheduled)
        self._new_loads, self._ends = [], []
        return plan

    def note(
        self,
        *,
        finished: Collection[str] = (),
        failed: Collection[str] = (),
        lost_blocks: Collection[int] = (),
        dropped: Dropped | None = None,
    ) -> None:
        """What the workers say: loads that are over, those that failed as a whole, blocks that did
        not load, and saves that found no room."""
        for request_id, load in self._loading.items() if lost_blocks or failed else ():
            request = self._requests.get(request_id)
            if request is None:
                continue
            if request_id in failed:
                request.limit = 0
            for part in load.parts:
                lost = next((i for i, b in enumerate(part.blocks) if b in lost_blocks), None)
                if lost is not None:
                    tokens = self._groups[part.group].block_tokens
                    request.limit = min(request.limit, (part.position + lost) * tokens)
        for request_id in finished:
            self._loading.pop(request_id, None)
        for (request_id, group), position in dropped.first.items() if dropped else ():
            request = self._requests.get(request_id)
            if request is not None:
                request.saved[group] = min(request.saved[group], position)

    def end(self, request_id: str) -> None:
        """The request is over; the store is told what becomes of its blocks."""
        request = self._requests.pop(request_id, None)
        hint = request.options.hint if request else None
        if request is None or hint is None or not self._ranks:
            return
        chains = {
            number: self._chain(request, number).tobytes() for number in range(len(self._groups))
        }
        if any(chains.values()):
            self._ends.append(End(space=self._space(request), chains=chains, hint=hint))

    def reset(self) -> None:
        """Forgets all that is stored, for this engine: its weights may be others from now on."""
        self._era = f"+{secrets.token_hex(8)}"
        for request in self._requests.values():
            request.saved = [0] * len(self._groups)
            request.unbroken = [True] * len(self._groups)
            request.planned = 0

    def close(self) -> None:
        """Ends the threads that open namespaces."""
        for spaces in itertools.chain.from_iterable(self._ranks):
            if spaces:
                spaces.close()

    # -- inside ------------------------------------------------------------------------

    def _space(self, request: _Request) -> str:
        return request.space + self._era

    def _handles(self, request: _Request) -> list[list[NamespaceHandle]] | None:
        """By cache group, those of all ranks; None unless all are open."""
        by_group: list[list[NamespaceHandle]] = [[] for _ in self._groups]
        whole = bool(self._ranks)
        for rank in self._ranks:
            for group, spaces in enumerate(rank):
                if spaces is None:
                    continue
                handle = spaces.get(self._space(request))
                if handle is None:
                    whole = False  # the others are asked too, so that they open meanwhile
                else:
                    by_group[group].append(handle)
        return by_group if whole else None

    def _waits(self, request: _Request) -> bool:
        """Whether the request should wait for a namespace that is being opened."""
        now = monotonic()
        if request.asked_s is None:
            request.asked_s = now
        space = self._space(request)
        opening = any(
            spaces.is_opening(space)
            for spaces in itertools.chain.from_iterable(self._ranks)
            if spaces
        )
        return opening and now - request.asked_s < _OPENING_S

    def _chain(self, request: _Request, group: int) -> U8:
        """(n, 32): the hashes of the request's blocks in the group."""
        hashes, chain = request.engine.block_hashes, request.chain
        known = len(chain)
        # A session of several inputs may take tokens back: each hash stands for all before it.
        if known > len(hashes) or (known and hashes[known - 1] != chain[-1].tobytes()):
            known, chain = 0, chain[:0]
        if len(hashes) > known:
            new = np.frombuffer(b"".join(hashes[known:]), np.uint8)
            request.chain = chain = np.concatenate((chain, new.reshape(-1, limits.KEY_BYTES)))
        per_block = self._per_block[group]
        return chain[per_block - 1 :: per_block]

    def _stored_until(
        self, request: _Request, handles: list[list[NamespaceHandle]], local: int, most: int
    ) -> int:
        """The token up to which all that is needed is stored, a multiple of all groups' blocks.

        Of a group with a window that is what the window holds at that token, of others all from
        `local` on.
        """
        end = most
        for number, group in enumerate(self._groups):
            if group.window is None:
                end = self._narrowed(request, handles, number, local, end)
        for _ in range(_MOST_ROUNDS):
            if end <= local:
                return local
            before = end
            for number, group in enumerate(self._groups):
                if group.window is not None:
                    first = max(local, end - group.window)
                    end = self._narrowed(request, handles, number, first, end)
            if end == before:
                return end
        return local

    def _narrowed(
        self,
        request: _Request,
        handles: list[list[NamespaceHandle]],
        group: int,
        first: int,
        end: int,
    ) -> int:
        """The last token of [first, end] up to which the group's blocks are stored, rounded down
        to what is a whole block in all groups."""
        tokens = self._groups[group].block_tokens
        row = first // tokens
        count = self._stored(request, handles, group, row, end // tokens)
        return min(end, (row + count) * tokens) // self._unit * self._unit

    def _stored(
        self,
        request: _Request,
        handles: list[list[NamespaceHandle]],
        group: int,
        first: int,
        end: int,
    ) -> int:
        """How many leading blocks of [first, end) all ranks have stored."""
        chain = self._chain(request, group)[first:end][: limits.MAX_KEYS_PER_CALL]
        for handle in handles[group]:
            if not len(chain):
                break
            chain = chain[: self._session.match(handle, chain, timeout_s=_LOOK_UP_S).count]
        return len(chain)

    def _save(
        self, request: _Request, tokens: int, blocks_of: Callable[[str], Blocks | None]
    ) -> Save | None:
        handles = self._handles(request)
        blocks = blocks_of(request.engine.request_id)
        if handles is None or blocks is None:
            return None
        request.planned = tokens
        parts: list[Part] = []
        for number, group in enumerate(self._groups):
            end = min(tokens // group.block_tokens, len(self._chain(request, number)))
            first = min(request.saved[number], end)
            if request.unbroken[number]:
                first += self._stored(request, handles, number, first, end)
                request.unbroken[number] = first == end
            parts += self._parts(request, number, first, end, blocks[number])
            request.saved[number] = end
        if not parts:
            return None
        return Save(
            request=request.engine.request_id,
            space=self._space(request),
            parts=tuple(parts),
            ttl_s=request.options.ttl_s,
        )

    def _parts(
        self, request: _Request, group: int, first: int, end: int, blocks: Sequence[int]
    ) -> Iterator[Part]:
        """Blocks [first, end) of the request, less those that are not there."""
        chain = self._chain(request, group)
        end = min(end, len(chain), len(blocks))
        for there, run in itertools.groupby(
            range(first, end), key=lambda i: blocks[i] != self.null_block
        ):
            if there:
                rows = list(run)
                at, behind = rows[0], rows[-1] + 1
                yield Part(
                    group=group,
                    position=at,
                    hashes=chain[at:behind].tobytes(),
                    blocks=tuple(blocks[at:behind]),
                    parent=chain[at - 1].tobytes() if at else b"",
                )
