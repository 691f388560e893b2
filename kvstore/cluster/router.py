"""A client's part of a cluster: whom it asks for which blocks, and whom next when that one fails.

A read goes to the best member for each segment, and at once to the next one where that fails, is
suspected or is slow. A miss is believed only when every member that may have the block has said so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kvstore import commands as c
from kvstore.cluster import messages as m
from kvstore.cluster.contacts import GONE, NO_NODE, ClusterSpace, Contacts
from kvstore.cluster.gets import Accept, Get, Keep, Watch
from kvstore.cluster.members import Member, MemberState, View
from kvstore.cluster.puts import Put, PutOutcome, Puts
from kvstore.cluster.world import Task
from kvstore.errors import InvalidArgument, KVStoreError, ResourceExhausted, Unavailable

_DROPS = 8  # rounds in which keys are dropped, until one finds none
_EPOCH_SHIFT = 32  # where a generation of a namespace has the epoch in which it began


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """What became of a drop of keys. blocks: that the fullest node had. everywhere: whether all
    members of one view have dropped them, and none has them any more."""

    blocks: int
    everywhere: bool


class Router(Contacts):
    """Finds, gets and puts blocks. seeds: addresses of some nodes, of which one must answer."""

    # -- match -------------------------------------------------------------------------

    async def match(
        self, space: ClusterSpace, chain: c.U8, places: c.U64, timeout_ms: float
    ) -> c.U8:
        """The tiers of the longest stored leading part of a chain: uint8 (count,)."""
        await self.present()
        world, end_ms = self.world, self.world.now_ms() + timeout_ms
        readers = self.readers(places)
        left = [list(readers[place]) for place in places.tolist()]
        tiers, heard = np.zeros(len(chain), np.uint8), np.zeros(len(chain), bool)
        rows, count = [row for row in range(len(chain)) if left[row]], 0
        asked: list[tuple[Member, Task[None]]] = []
        slow: set[str] = set()

        async def look(member: Member, of: list[int]) -> None:
            seen = await self._look(space, np.ascontiguousarray(chain[of]), member, end_ms)
            tiers[of] = np.where(tiers[of], tiers[of], seen.tiers)
            heard[of] = True

        while rows or asked:
            by_member: dict[str, tuple[Member, list[int]]] = {}
            for row in rows:
                member = left[row].pop(0)
                by_member.setdefault(member.name, (member, []))[1].append(row)
            asked += [(each, world.spawn(look(each, of))) for each, of in by_member.values()]
            # Who takes long is waited for, but not alone.
            until_ms = min(end_ms, world.now_ms() + self.policy.hedge_ms)
            running = [task for _, task in asked]
            while running and world.now_ms() < until_ms:
                await world.wait(running, until_ms - world.now_ms())
                running = [task for task in running if not task.done]
            for entry in [entry for entry in asked if entry[1].done]:
                asked.remove(entry)
                _swallow(entry[1])
            count = len(tiers) if tiers.all() else int(tiers.argmin())
            if count == len(chain) or world.now_ms() >= end_ms:
                break
            # What nobody has answered for is worth asking for elsewhere; of what is not there, only
            # what ends the leading part, with its segment.
            ends = (np.arange(len(chain)) >= count) & (places == places[count])
            open_rows = np.flatnonzero((tiers == 0) & (~heard | ends)).tolist()
            rows = [row for row in open_rows if left[row]]
            slow = {member.name for member, _ in asked}
        for member, task in asked:
            task.cancel()
            if member.name in slow:  # others were faster
                self.health.failed(member.name)
        return tiers[:count].copy()

    async def _look(
        self, space: ClusterSpace, hashes: c.U8, member: Member, end_ms: float
    ) -> m.Seen:
        left_ms = max(min(self.policy.call_ms, end_ms - self.world.now_ms()), 1.0)
        seen: m.Seen = await self.read(
            member,
            space,
            lambda number, instance: m.Look(
                epoch=self.epoch, namespace=number, instance=instance, hashes=hashes
            ),
            timeout_ms=left_ms,
            patience_ms=left_ms,
        )
        return seen

    # -- get ---------------------------------------------------------------------------

    async def get(
        self,
        space: ClusterSpace,
        chain: c.U8,
        places: c.U64,
        *,
        cells: c.U32,
        nbytes: int,
        accept: Accept,
        keep: Keep | None = None,
        watch: Watch | None = None,
        leading: bool = False,
        timeout_ms: float,
    ) -> c.U8:
        """Gets blocks, in whatever order they come; the tier of each, 0 for a miss: uint8 (n,).

        nbytes: of the cells of one block. accept: copies a block from where it landed to where it
        is wanted, and says whether the copy is sound; only then it counts. keep: for blocks that
        are wanted where they landed. watch: sees them land; with it each block's header lands too.
        leading: whether nobody wants what is behind a miss.
        """
        await self.present()
        get = Get(
            self,
            space,
            chain,
            places,
            cells=cells,
            nbytes=nbytes,
            accept=accept,
            keep=keep,
            watch=watch,
            leading=leading,
        )
        return await get.run(self.world.now_ms() + timeout_ms)

    # -- put ---------------------------------------------------------------------------

    async def put(self, space: ClusterSpace, puts: Puts, timeout_ms: float) -> PutOutcome:
        """Puts blocks, several members at once. What fails is NO_SPACE or FAILED."""
        await self.present()
        return await Put(self, space, puts).run(self.world.now_ms() + timeout_ms)

    # -- forgetting, advice, explanations ----------------------------------------------

    async def drop(self, space: ClusterSpace, hashes: c.U8, timeout_ms: float) -> Dropped:
        """Drops blocks wherever they may be, again and again until no member has them: one that
        was on its way arrives where it was dropped before. A member that is away keeps what it
        has, and brings it back. `Unavailable` where none answers."""
        view, world = await self.present(), self.world
        end_ms, most = world.now_ms() + timeout_ms, 0
        forget = m.Forget(
            name=space.name,
            layout=space.layout.encode(),
            hashes=hashes,
            all_of_it=0,
            generation=0,
        )
        for turn in range(_DROPS):
            left_ms = end_ms - world.now_ms()
            if turn and left_ms <= 0:
                break
            answers = await self._everywhere(view, forget, left_ms)
            found = [answer.blocks for answer in answers if answer is not None]
            if not found and not turn:
                raise Unavailable(NO_NODE)
            most = max([most, *found])
            if len(found) < len(answers) or self.view is not view:
                break
            if not any(found):
                return Dropped(blocks=most, everywhere=True)
        return Dropped(blocks=most, everywhere=False)

    async def drop_namespace(self, space: ClusterSpace, timeout_ms: float) -> int:
        """Forgets a namespace at every member. `Unavailable` unless all of them have done it: then
        it may be forgotten in part, and is to be dropped again."""
        view = await self.refresh()
        members = self.by_health(view.members)
        opened = [(await self.open_at(member, space)).generation for member in members]
        if not opened:
            raise Unavailable(NO_NODE)
        # Above all of earlier epochs, also of those that no member of this one was there to see.
        generation = max(max(opened) + 1, view.epoch << _EPOCH_SHIFT)
        forget = m.Forget(
            name=space.name,
            layout=space.layout.encode(),
            hashes=np.empty((0, 32), np.uint8),
            all_of_it=1,
            generation=generation,
        )
        answers = await self._everywhere(view, forget, timeout_ms)
        if any(answer is None for answer in answers) or self.view is not view:
            raise Unavailable("not all members have forgotten the namespace: drop it again")
        space.generation = generation
        space.numbers.clear()
        return int(max(answer.blocks for answer in answers))

    async def _everywhere(self, view: View, message: Any, timeout_ms: float) -> list[Any]:
        """The answer of each member that is not out, None where it gave none."""
        members = [member for member in view.members if member.state != MemberState.OUT]
        tasks = [self.world.spawn(self.call(member, message, timeout_ms)) for member in members]
        await self.world.wait_all(tasks, timeout_ms)
        return [_answer(task) for task in tasks]

    async def advise(
        self, space: ClusterSpace, hashes: c.U8, *, kind: int, for_ms: int, timeout_ms: float
    ) -> int:
        """A hint to every member; how many of the blocks are stored at some of them."""
        view = await self.present()
        stored = np.zeros(len(hashes), bool)

        async def tell(member: Member) -> None:
            await self.asked(
                member,
                space,
                lambda number, instance: m.Advise(
                    namespace=number, instance=instance, kind=kind, for_ms=for_ms, hashes=hashes
                ),
                timeout_ms,
            )
            seen: m.Seen = await self.asked(
                member,
                space,
                lambda number, instance: m.Look(
                    epoch=self.epoch, namespace=number, instance=instance, hashes=hashes
                ),
                timeout_ms,
            )
            stored[seen.tiers > 0] = True

        tasks = [self.world.spawn(tell(member)) for member in self.by_health(view.members)]
        await self.world.wait_all(tasks, timeout_ms)
        for task in tasks:
            _swallow(task)
        return int(np.count_nonzero(np.unique(hashes[stored], axis=0).any(axis=1)))

    async def explain(
        self, space: ClusterSpace, hashes: c.U8, timeout_ms: float
    ) -> dict[str, c.Explained]:
        """What each member that answers says."""
        view, said = await self.present(), {}
        for member in self.by_health(view.members):
            try:
                said[member.name] = await self.asked(
                    member,
                    space,
                    lambda number, instance: m.Ask(
                        namespace=number, instance=instance, hashes=hashes
                    ),
                    timeout_ms,
                )
            except GONE:
                continue
        return said


def _swallow(task: Task[Any]) -> None:
    """What a member did not do is a miss; what the caller did wrong is an error."""
    if not task.done:
        return
    try:
        task.result()
    except (InvalidArgument, ResourceExhausted):
        raise
    except KVStoreError:
        return


def _answer(task: Task[Any]) -> Any:
    try:
        return task.result() if task.done else None
    except KVStoreError:
        return None
