"""Bugs that are planted, to see that the simulation catches them: each is one mistake that a
cluster like this one may have."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from kvstore.cluster import copies, heat, intake, node, repair
from kvstore.cluster.copies import Held, Spread
from kvstore.cluster.membership import Membership
from kvstore.cluster.node import Node
from kvstore.cluster.repair import Repair
from kvstore.cluster.router import Router, _Get
from kvstore.cluster.site import Health, Site
from kvstore.errors import KVStoreError

Patch = pytest.MonkeyPatch


@dataclass(frozen=True, slots=True)
class Plant:
    """A bug. seed: of a run that catches it, None for one that takes too many. caught_by: what the
    run says then, in part, one of these."""

    name: str
    seed: int | None
    caught_by: tuple[str, ...]
    apply: Callable[[Patch], None]


PLANTS: list[Plant] = []


def plant(
    seed: int | None, *caught_by: str
) -> Callable[[Callable[[Patch], None]], Callable[[Patch], None]]:
    def add(apply: Callable[[Patch], None]) -> Callable[[Patch], None]:
        PLANTS.append(Plant(apply.__name__.replace("_", " "), seed, caught_by, apply))
        return apply

    return add


# -- what is acknowledged ------------------------------------------------------------------


@plant(None, "")
def copies_are_counted_before_they_are_there(patch: Patch) -> None:
    real = node.spread

    async def spread(site: Site, held: Held, *others: Any, copies: int, **options: Any) -> Spread:
        async def work() -> None:
            await real(site, held, *others, copies=copies, **options)

        site.world.spawn(work())
        n = len(held.hashes)
        return Spread(copies=np.full(n, copies, np.uint8), persisted=np.zeros(n, np.uint8))

    patch.setattr(node, "spread", spread)


@plant(44, "is nowhere")
def a_copy_that_failed_is_counted(patch: Patch) -> None:
    real = copies._outcome

    def outcome(task: Any, epoch: int) -> Any:
        found = real(task, epoch)
        return found if found is not None else (np.uint8(1), np.uint8(0))

    patch.setattr(copies, "_outcome", outcome)


@plant(None, "")
def a_block_that_has_no_room_is_counted(patch: Patch) -> None:
    real = copies.push

    async def push(*args: Any, **options: Any) -> Any:
        pulled = await real(*args, **options)
        object.__setattr__(pulled, "status", np.zeros_like(pulled.status))
        return pulled

    patch.setattr(copies, "push", push)


# -- bytes -----------------------------------------------------------------------------------


@plant(None, "")
def what_arrives_is_not_verified(patch: Patch) -> None:
    real = intake._runs
    patch.setattr(intake, "_runs", lambda arrivals, sound: real(arrivals, np.ones_like(sound)))


@plant(11, "late bytes")
def slots_go_back_while_a_transfer_writes_to_them(patch: Patch) -> None:
    async def give_up(site: Site, _memory: Any, slots: Any) -> bool:
        if len(slots):
            give_back = intake.c.GiveBack(granules=slots)
            await site.store.command(give_back, site.policy.call_ms)
        return True

    patch.setattr(intake, "give_up", give_up)


@plant(None, "")
def a_part_of_the_ring_is_used_again_though_somebody_may_write_there(patch: Patch) -> None:
    def failed(self: _Get, piece: Any, _error: KVStoreError) -> None:
        self._router._memory.give(piece.addresses)

    patch.setattr(_Get, "_failed", failed)


@plant(None, "")
def blocks_are_sent_without_a_lease(patch: Patch) -> None:
    real = node.hold

    @asynccontextmanager
    async def hold(site: Site, *args: Any) -> AsyncIterator[Held]:
        async with real(site, *args) as held:
            pass
        yield held

    patch.setattr(node, "hold", hold)


# -- leaks -----------------------------------------------------------------------------------


@plant(2, "holds")
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


@plant(11, "bytes ahead")
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


@plant(None, "")
def two_keepers_make_one_epoch_each(patch: Patch) -> None:
    real = Membership.wanted

    def wanted(self: Membership, view: Any, present: Any) -> Any:
        made = real(self, view, present)
        if made is not None and view is not None:
            self._site.adopt(made)  # before it is agreed
        return made

    patch.setattr(Membership, "wanted", wanted)


# -- what was forgotten ----------------------------------------------------------------------


@plant(None, "")
def a_drop_is_acknowledged_though_not_all_have_done_it(patch: Patch) -> None:
    real = Router._everywhere

    async def everywhere(self: Router, *args: Any) -> list[Any]:
        answers = await real(self, *args)
        heard = [answer for answer in answers if answer is not None]
        return [answer if answer is not None else heard[0] for answer in answers] if heard else []

    patch.setattr(Router, "_everywhere", everywhere)


@plant(8, "is served")
def a_node_that_was_away_serves_what_was_forgotten_meanwhile(patch: Patch) -> None:
    async def learn(_self: Membership, _present: Any) -> bool:
        return True

    patch.setattr(Membership, "_learn_generations", learn)


@plant(None, "")
def a_reader_with_a_later_view_is_answered(patch: Patch) -> None:
    patch.setattr(Site, "check_reader", lambda _self, _epoch: None)


@plant(None, "")
def a_node_serves_on_when_it_is_left_out(patch: Patch) -> None:
    real = Site.adopt

    def adopt(self: Site, view: Any) -> bool:
        serving = self.serving
        adopted = real(self, view)
        self.serving = serving
        return adopted

    patch.setattr(Site, "adopt", adopt)


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
    real = Router._readers

    def readers(self: Router, places: Any) -> Any:
        return {place: found[:1] for place, found in real(self, places).items()}

    patch.setattr(Router, "_readers", readers)


@plant(0, "is not to be had")
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


@plant(None, "")
def who_failed_once_is_never_asked_again(patch: Patch) -> None:
    patch.setattr(Health, "answered", lambda _self, _name: False)
    real = Router._by_health

    def by_health(self: Router, members: Any) -> Any:
        known = real(self, members)
        return [member for member in known if not self.health.suspects(member.name)]

    patch.setattr(Router, "_by_health", by_health)
