"""Bugs that are planted, to see that the simulation catches them: each is one mistake that a
cluster like this one may have."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from cluster.sim.simulation import run_seed

from kvstore.cluster import copies, forgetting, heat, intake, messages, node, puts, repair, router
from kvstore.cluster.copies import Held, Lease, Spread
from kvstore.cluster.membership import Membership
from kvstore.cluster.moves import Moves
from kvstore.cluster.node import Node
from kvstore.cluster.repair import Repair
from kvstore.cluster.router import Router
from kvstore.cluster.site import Health, Site
from kvstore.errors import KVStoreError, Unavailable

Patch = pytest.MonkeyPatch


@dataclass(frozen=True, slots=True)
class Plant:
    """A bug. seed: of a run that catches it. caught_by: what the run says then, in part, one of
    these. plan: of those runs."""

    name: str
    seed: int
    caught_by: tuple[str, ...]
    plan: str
    apply: Callable[[Patch], None]


PLANTS: list[Plant] = []


def catching_seed(plant: Plant, seeds: Iterable[int]) -> int | None:
    """The first of them that catches it, by what it is expected to be caught by."""
    with pytest.MonkeyPatch.context() as patch:
        plant.apply(patch)
        for seed in seeds:
            try:
                run_seed(seed, plant.plan)
            except AssertionError as error:
                if isinstance(error.__cause__, (AttributeError, NameError, TypeError)):
                    raise  # the planting itself is broken
                if any(says in str(error).splitlines()[0] for says in plant.caught_by):
                    return seed
    return None


def plant(
    seed: int, *caught_by: str, plan: str = "ordinary"
) -> Callable[[Callable[[Patch], None]], Callable[[Patch], None]]:
    def add(apply: Callable[[Patch], None]) -> Callable[[Patch], None]:
        PLANTS.append(Plant(apply.__name__.replace("_", " "), seed, caught_by, plan, apply))
        return apply

    return add


# -- what is acknowledged ------------------------------------------------------------------


@plant(0, "is nowhere", "is not to be had", plan="mortal")
def copies_are_counted_before_they_are_there(patch: Patch) -> None:
    real = node.spread

    async def spread(site: Site, held: Held, *others: Any, copies: int, **options: Any) -> Spread:
        async def work() -> None:
            await real(site, held, *others, copies=copies, **options)

        site.world.spawn(work())
        n = len(held.hashes)
        return Spread(copies=np.full(n, copies, np.uint8), persisted=np.zeros(n, np.uint8))

    patch.setattr(node, "spread", spread)


@plant(1, "is nowhere", "is not to be had", plan="mortal")
def a_copy_that_failed_is_counted(patch: Patch) -> None:
    real = copies._outcome

    def outcome(task: Any, epoch: int) -> Any:
        found = real(task, epoch)
        return found if found is not None else (np.uint8(1), np.uint8(0))

    patch.setattr(copies, "_outcome", outcome)


@plant(3, "is nowhere", "is not to be had", plan="mortal")
def a_block_that_has_no_room_is_counted(patch: Patch) -> None:
    real = copies.push

    async def push(*args: Any, **options: Any) -> Any:
        pulled = await real(*args, **options)
        object.__setattr__(pulled, "status", np.zeros_like(pulled.status))
        return pulled

    patch.setattr(copies, "push", push)


# -- bytes -----------------------------------------------------------------------------------


@plant(2, "is nowhere", "is not to be had")
def what_arrives_is_not_verified(patch: Patch) -> None:
    real = intake._runs
    patch.setattr(intake, "_runs", lambda arrivals, sound: real(arrivals, np.ones_like(sound)))


@plant(2, "late bytes", plan="halting")
def slots_go_back_while_a_transfer_writes_to_them(patch: Patch) -> None:
    async def give_up(site: Site, _memory: Any, slots: Any) -> bool:
        if len(slots):
            give_back = intake.c.GiveBack(granules=slots)
            await site.store.command(give_back, site.policy.call_ms)
        return True

    patch.setattr(intake, "give_up", give_up)


@plant(5, "a late write", plan="halting")
def a_part_of_the_ring_is_used_again_though_somebody_may_write_there(patch: Patch) -> None:
    real = Router.__init__

    def init(self: Router, world: Any, memory: Any, *others: Any) -> None:
        memory.lose = memory.give
        real(self, world, memory, *others)

    patch.setattr(Router, "__init__", init)


@plant(0, "written over", plan="cramped")
def blocks_are_sent_without_a_lease(patch: Patch) -> None:
    real = node.leased

    @contextlib.asynccontextmanager
    async def leased(site: Site, *args: Any) -> AsyncIterator[Lease]:
        async with real(site, *args) as lease:
            pass
        yield lease

    patch.setattr(node, "leased", leased)


# -- leaks -----------------------------------------------------------------------------------


@plant(3, "holds", plan="halting")
def a_lease_stays_when_a_copy_fails(patch: Patch) -> None:
    real = copies.push

    async def push(site: Site, held: Held, *args: Any, **options: Any) -> Any:
        try:
            return await real(site, held, *args, **options)
        except KVStoreError:
            again = copies.c.Lease(namespace=held.space.number, hashes=held.hashes)
            await site.store.command(again, site.policy.call_ms)
            raise

    for module in (copies, repair, heat):
        patch.setattr(module, "push", push)


@plant(0, "bytes ahead", plan="halting")
def slots_stay_when_a_transfer_fails(patch: Patch) -> None:
    async def give_up(_site: Site, memory: Any, _slots: Any) -> bool:
        await memory.close()
        return True

    patch.setattr(intake, "give_up", give_up)


@plant(0, "sessions")
def sessions_never_end(patch: Patch) -> None:
    async def ended(_self: Node, _session: int) -> None:
        return

    patch.setattr(Node, "ended", ended)


# -- epochs ----------------------------------------------------------------------------------


@plant(2, "two views", plan="restless")
def two_keepers_make_one_epoch_each(patch: Patch) -> None:
    real = Membership.wanted

    def wanted(self: Membership, view: Any, present: Any) -> Any:
        made = real(self, view, present)
        if made is not None and view is not None:
            self._site.adopt(made)  # before it is agreed
        return made

    patch.setattr(Membership, "wanted", wanted)


# -- what was forgotten ----------------------------------------------------------------------


@plant(1, "is served", plan="parted")
def a_drop_is_acknowledged_though_not_all_have_done_it(patch: Patch) -> None:
    async def drop(self: Router, space: Any, timeout_ms: float) -> int:
        view, opened = await self.refresh(), []
        for member in view.members:
            with contextlib.suppress(KVStoreError):
                opened.append((await self.open_at(member, space)).generation)
        forget = messages.Forget(
            name=space.name,
            layout=space.layout.encode(),
            hashes=np.empty((0, 32), np.uint8),
            all_of_it=1,
            generation=max([*opened, view.epoch << 32]) + 1,
        )
        answers = await self._everywhere(view, forget, timeout_ms)
        if not any(answers):
            raise Unavailable("nobody answers")
        space.numbers.clear()
        return 0

    patch.setattr(Router, "drop_namespace", drop)


@plant(0, "is served", plan="forsaken")
def a_node_that_was_away_serves_what_was_forgotten_meanwhile(patch: Patch) -> None:
    async def learn(_self: Membership, _present: Any) -> bool:
        return True

    patch.setattr(Membership, "_learn_generations", learn)


@plant(29, "is served", plan="forsaken")
def a_node_tells_others_what_was_forgotten_though_it_does_not_know_all(patch: Patch) -> None:
    real = Membership.generations

    async def generations(self: Membership) -> Any:
        return replace(await real(self), since=0)

    patch.setattr(Membership, "generations", generations)


@plant(20, "is served", plan="forsaken")
def generations_are_counted_anew_by_who_missed_some(patch: Patch) -> None:
    patch.setattr(router, "_EPOCH_SHIFT", 0)


@plant(1, "is served", plan="forgetful")
def a_reader_with_a_later_view_is_answered(patch: Patch) -> None:
    patch.setattr(Site, "check_reader", lambda _self, _epoch: None)


@plant(1, "is served", plan="forgetful")
def a_node_serves_on_when_it_is_left_out(patch: Patch) -> None:
    real = Site.adopt

    def adopt(self: Site, view: Any) -> bool:
        serving = self.serving
        adopted = real(self, view)
        self.serving = serving
        return adopted

    patch.setattr(Site, "adopt", adopt)


@plant(1, "was dropped alone", plan="piecemeal")
def a_drop_of_keys_does_not_care_what_is_on_its_way(patch: Patch) -> None:
    real = Router._everywhere

    async def everywhere(self: Router, view: Any, message: Any, timeout_ms: float) -> Any:
        answers = await real(self, view, message, timeout_ms)
        if message.all_of_it:
            return answers
        return [answer and replace(answer, blocks=0) for answer in answers]

    async def over(*_args: Any) -> bool:
        return True

    patch.setattr(Router, "_everywhere", everywhere)
    patch.setattr(Moves, "over", over)


@plant(155, "was dropped alone", plan="piecemeal")
def a_drop_of_keys_asks_nobody_again_about_what_was_on_its_way(patch: Patch) -> None:
    async def forget_keys(site: Site, space: Any, hashes: Any) -> int:
        blocks = await forgetting._drop(site, space, hashes)
        moves = site.moves.under_way(space.mark, hashes)
        if not await site.moves.over(moves, site.policy.call_ms):
            return max(blocks, 1)
        return blocks + await forgetting._drop(site, space, hashes)

    patch.setattr(node, "forget_keys", forget_keys)


# -- parts -----------------------------------------------------------------------------------


@plant(0, "in part", plan="piecemeal")
def cells_of_two_puts_make_one_block(patch: Patch) -> None:
    patch.setattr(puts, "nonce_of", lambda agreed: bytes(len(_nonce_of(agreed))))


_nonce_of = puts.nonce_of


# -- repair ----------------------------------------------------------------------------------


@plant(2, "lacks")
def blocks_that_differ_are_not_offered(patch: Patch) -> None:
    async def offer(*_args: Any) -> None:
        return

    patch.setattr(Repair, "_offer", offer)


@plant(2, "another put")
def of_two_puts_each_node_keeps_its_own(patch: Patch) -> None:
    async def beaten(_self: Node, _space: Any, hashes: Any, *_rest: Any) -> Any:
        return np.zeros(len(hashes), bool)

    patch.setattr(Node, "_beaten", beaten)


@plant(2, ", which")
def all_is_settled_before_it_is(patch: Patch) -> None:
    async def round_(_self: Repair, _view: Any) -> bool:
        return True

    patch.setattr(Repair, "_round", round_)


# -- reading ---------------------------------------------------------------------------------


@plant(2, "is not to be had")
def the_first_miss_is_believed(patch: Patch) -> None:
    real = Router.readers

    def readers(self: Router, places: Any) -> Any:
        return {place: found[:1] for place, found in real(self, places).items()}

    patch.setattr(Router, "readers", readers)


@plant(1, "is nowhere", "is not to be had")
def a_block_that_is_not_there_hides_those_behind_it(patch: Patch) -> None:
    real = node.np.flatnonzero

    async def get(self: Node, message: Any) -> Any:
        tiers = self.site.store.look(message.namespace, message.hashes)
        missing = real(tiers == 0)
        first = int(missing[0]) if len(missing) else len(tiers)
        got = await _whole_get(self, message)
        object.__setattr__(got, "tiers", np.where(np.arange(len(tiers)) < first, got.tiers, 0))
        return got

    patch.setitem(node._HANDLERS, node.m.Get, get)


_whole_get = Node._get


@plant(1, "is not to be had", plan="halting")
def a_session_is_used_on_though_its_memory_is_closed(patch: Patch) -> None:
    patch.setattr(Router, "leave", lambda _self, _member, _session: None)


@plant(0, "is not to be had", "is nowhere")
def who_failed_once_is_never_asked_again(patch: Patch) -> None:
    patch.setattr(Health, "answered", lambda _self, _name: False)
    real = Router.readers

    def readers(self: Router, places: Any) -> Any:
        health, found = self.health, real(self, places)
        return {
            place: [member for member in members if not health.suspects(member.name)]
            for place, members in found.items()
        }

    patch.setattr(Router, "readers", readers)
