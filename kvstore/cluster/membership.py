"""How a node learns who is a member, and how the members' list changes.

Whoever has the least name of the members that are registered keeps the list: it takes out who is
gone, lets in who has come, and ends a joining or a draining once all members have brought their
blocks to where they belong. Each change is a compare-and-swap of the epoch, so two keepers do no
harm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from kvstore import commands as c
from kvstore import limits
from kvstore.cluster.coordination import Coordination
from kvstore.cluster.copies import call, tell_view
from kvstore.cluster.forgetting import catch_up
from kvstore.cluster.members import Member, MemberState, View
from kvstore.cluster.messages import (
    AskGenerations,
    AskView,
    Generations,
    Learn,
    Ping,
    Pong,
    WrongEpoch,
)
from kvstore.cluster.site import Site
from kvstore.errors import (
    DeadlineExceeded,
    InvalidArgument,
    KVStoreError,
    PermissionDenied,
    ProtocolError,
    Unavailable,
)

_AWAY = (Unavailable, DeadlineExceeded)
_TRIES = 5


def _keeper(view: View | None, names: Sequence[str]) -> str:
    """Who keeps the list, of those that are registered: a member that takes part in drops, so that
    it can tell whether anybody is left who knows what was forgotten; any one where there is none.
    Empty for none."""
    states = {member.name: member.state for member in view.members} if view else {}
    taking = [name for name in names if states.get(name, MemberState.OUT) != MemberState.OUT]
    return min(taking or names, default="")


class Membership:
    """One node's part in it."""

    def __init__(self, site: Site, coordination: Coordination) -> None:
        self._site, self._coordination = site, coordination
        self.coordinated = False  # whether the last look at the coordination worked
        self.failed = False  # whether some look at it did not

    async def run(self) -> None:
        """Registers, then follows and keeps the list for ever. Never ends by itself, but for
        `InvalidArgument`: another living node has this one's name; and `PermissionDenied`, where it
        may not even register."""
        site = self._site
        registered = False
        while True:
            try:
                if not registered:
                    await self._coordination.register(site.me)
                    registered = True
                await self._round()
                self.coordinated = True
                await self._coordination.changed(site.policy.watch_s)
            except (*_AWAY, ProtocolError, PermissionDenied) as error:
                if isinstance(error, PermissionDenied) and not registered:
                    raise  # whoever has set this up is to see it
                # The data path goes on under the last view.
                self.coordinated, self.failed = False, True
                await site.world.sleep(site.policy.retry_ms)

    async def _round(self) -> None:
        site = self._site
        present = await self._coordination.registered()
        view = await self._coordination.view()
        if view is not None:
            site.adopt(view)
        await self._serve(present)
        names = [member.name for member in present]
        if site.me.name == _keeper(view, names):
            if view is not None:
                await self._look_for([m for m in view.members if m.name not in names])
            wanted = self.wanted(view, present)
            if wanted is not None and await self._coordination.advance(wanted):
                site.adopt(wanted)
                await self._serve(present)

    async def _look_for(self, members: Sequence[Member]) -> None:
        """Asks those whose registration has ended whether they live: after an outage of the
        coordination all registrations have, and nobody is gone for that."""
        site = self._site
        unknown = [m for m in members if not site.health.suspects(m.name)]
        tasks = [site.world.spawn(self._ping(member)) for member in unknown]
        await site.world.wait_all(tasks, 2 * site.policy.ping_timeout_ms)

    def wanted(self, view: View | None, present: Sequence[Member]) -> View | None:
        """The next view, None where the present one is right. present: who is registered. Who is
        not, and does not answer either, is out of it."""
        site = self._site
        if view is None:
            members = tuple(replace(m, state=MemberState.UP, joined=1) for m in present)
            return View(epoch=1, replicas=site.replicas, members=members)
        here = {member.name: member for member in present}
        gone = [m.name for m in view.members if m.name not in here]
        gone = [name for name in gone if site.health.suspects(name)]
        holders = (MemberState.UP, MemberState.DRAINING)
        left = [m for m in view.members if m.name in here and m.state in holders]
        # Where nobody is left who knows what was forgotten, those that are gone are waited for.
        if gone and (left or (site.serving and site.role != MemberState.OUT)):
            return view.without(*gone)
        again = [
            replace(here[m.name], state=m.state, joined=m.joined)
            for m in view.members
            if m.name in here
            and (here[m.name].run, here[m.name].address, here[m.name].weight)
            != (m.run, m.address, m.weight)
        ]
        if again:
            return view.with_members(again)
        new = [member for name, member in here.items() if view.find(name) is None]
        moving = [m for m in view.members if m.state in (MemberState.JOINING, MemberState.DRAINING)]
        # Who drains stays until there is somebody to take its blocks, and to be told what it knows.
        if moving and not any(
            m.state in (MemberState.UP, MemberState.JOINING) for m in view.members
        ):
            moving = []
        if moving:
            if not self._all_settled(view):
                return None  # one move at a time, so that readers look in two places at most
            after = {MemberState.JOINING: MemberState.UP, MemberState.DRAINING: MemberState.OUT}
            return view.with_members([replace(m, state=after[m.state]) for m in moving])
        if new:
            empty = not any(m.state in holders for m in view.members)
            state = MemberState.UP if empty else MemberState.JOINING
            since = view.epoch + 1
            return view.with_members([replace(m, state=state, joined=since) for m in new])
        return None

    def _all_settled(self, view: View) -> bool:
        site = self._site
        holders = [m for m in view.members if m.state in (MemberState.UP, MemberState.DRAINING)]
        settled = {**site.settled_at, site.me.name: site.settled}
        return all(settled.get(member.name, -1) >= view.epoch for member in holders)

    # -- serving -----------------------------------------------------------------------

    async def _serve(self, present: Sequence[Member]) -> None:
        """Begins to serve once this node knows what was forgotten while it was no member; ends it
        when it is a member no more. present: who is registered."""
        site = self._site
        member = site.view.find(site.me.name)
        if member is None:
            site.serving = False
            return
        if site.serving:
            return
        if member.joined != site.learnt and not await self._learn_generations(present):
            return
        now = site.view.find(site.me.name)
        if now is None or now.joined != member.joined:
            return  # it was left out meanwhile, and is behind again
        if site.learnt != member.joined:
            site.learnt, site.through = member.joined, site.view.epoch
            site.save()
        site.serving, self._lonely_ms = True, None

    async def _learn_generations(self, present: Sequence[Member]) -> bool:
        """Whether all is known. A drop is acknowledged only when all members have done it, so any
        one that serves knows of those since it joined or learnt of them itself; where none serves,
        all of them together. In a static list none acknowledged a drop without this node. Where all
        who may know are gone for long, this node forgets whatever it has."""
        site = self._site
        others = site.others()
        answers: dict[str, Generations] = {}
        for member in others:
            try:
                found = await call(site, member, AskGenerations(), site.policy.call_ms)
            except KVStoreError:
                continue
            assert isinstance(found, Generations)
            await catch_up(site, found)
            answers[member.name] = found
        me = site.view.find(site.me.name)
        joined = me.joined if me else site.view.epoch
        since = [found.since for found in answers.values()]
        # One that serves under a view from before this node joined may have been left out itself.
        known = [each.since for each in answers.values() if each.serving and each.through >= joined]
        near, whole = site.through + 1, len(answers) == len(others)
        if not others or min(known, default=near + 1) <= near or (whole and min(since) <= near):
            return True
        if not (known and await self._has_nothing()):
            if site.world.now_ms() < self._lonely_until_ms:
                return False
            here = {member.name for member in present}
            if not joined:
                return True
            if any(member.name in here and member.name not in answers for member in others):
                return False
            await self._forget_everything()
        site.since = min(known, default=joined)
        return True

    async def _has_nothing(self) -> bool:
        stats: c.Stats = await self._site.store.command(c.Stat(), self._site.policy.call_ms)
        return not stats.blocks

    async def _forget_everything(self) -> None:
        """As if this node had come with nothing: who could tell what was forgotten is gone."""
        site = self._site
        found: c.Description = await site.store.command(c.Describe(), site.policy.call_ms)
        names = found.names.split("\n") if found.names else []
        layouts = found.layouts.split("\n") if found.layouts else []
        for name, layout in zip(names, layouts, strict=True):
            space = await site.open(name, layout.encode())
            # Here alone: should the others come back, nothing of theirs was forgotten by this.
            drop = c.Drop(namespace=space.number, hashes=np.empty((0, limits.KEY_BYTES), np.uint8))
            await site.store.command(drop, 2 * limits.MAX_FORGET_MS)
            site.forget_space(space)

    @property
    def _lonely_until_ms(self) -> float:
        if self._lonely_ms is None:
            self._lonely_ms = self._site.world.now_ms() + self._site.policy.learn_ms
        return self._lonely_ms

    _lonely_ms: float | None = None

    async def generations(self) -> Generations:
        """What this node knows of namespaces that were forgotten as a whole."""
        site = self._site
        known = list(site.forgotten.items())
        return Generations(
            names="\n".join(name for (name, _layout), _n in known),
            layouts="\n".join(layout for (_name, layout), _n in known),
            numbers=np.array([n for _, n in known], np.uint64),
            serving=int(site.serving),
            since=site.since,
            through=site.through,
        )

    # -- health ------------------------------------------------------------------------

    async def pong(self) -> Pong:
        """How this node is."""
        site = self._site
        stats: c.Stats = await site.store.command(c.Stat(), site.policy.call_ms)
        site.loads[site.me.name] = (stats.used_bytes, stats.total_bytes)
        return Pong(
            name=site.me.name,
            run=site.me.run,
            epoch=site.view.epoch,
            serving=int(site.serving),
            settled=site.settled,
            used_bytes=stats.used_bytes,
            total_bytes=stats.total_bytes,
            blocks=stats.blocks,
        )

    async def ping_for_ever(self) -> None:
        """Asks some members how they are, those that are suspected among them each time."""
        site = self._site
        while True:
            await site.world.sleep(site.policy.ping_ms)
            others = site.others()
            suspected = [m for m in others if site.health.suspects(m.name)]
            sound = [m for m in others if not site.health.suspects(m.name)]
            if len(sound) > site.policy.pings:
                sound = site.world.random.sample(sound, site.policy.pings)
            tasks = [site.world.spawn(self._ping(m)) for m in (*suspected, *sound)]
            await site.world.wait_all(tasks, 2 * site.policy.ping_timeout_ms)

    async def _ping(self, member: Member) -> None:
        site = self._site
        suspected = site.health.suspects(member.name)
        try:
            ping = Ping(epoch=site.view.epoch)
            pong = await call(site, member, ping, site.policy.ping_timeout_ms)
        except KVStoreError:
            return
        assert isinstance(pong, Pong)
        if pong.name != member.name:  # somebody else lives there now
            site.health.failed(member.name, at_once=True)
            return
        site.loads[member.name] = (pong.used_bytes, pong.total_bytes)
        site.settled_at[member.name] = pong.settled
        if suspected:
            site.missed.add(member.name)  # it may lack what was stored meanwhile
        try:
            if pong.epoch > site.view.epoch:
                learnt = await call(site, member, AskView(), site.policy.call_ms)
                assert isinstance(learnt, Learn)
                site.learn(learnt.view)
            elif pong.epoch < site.view.epoch:
                await tell_view(site, member)
        except (*_AWAY, WrongEpoch):
            return

    # -- changes that an administrator asks for ----------------------------------------

    async def drain(self, name: str) -> View:
        """Begins to take a member's blocks away. `InvalidArgument`, `Unavailable`."""
        return await self._change(name, MemberState.DRAINING)

    async def join(self, name: str) -> View:
        """Lets a drained (or draining) member take blocks again."""
        return await self._change(name, MemberState.JOINING)

    async def _change(self, name: str, state: MemberState) -> View:
        for _ in range(_TRIES):
            view = await self._coordination.view()
            if view is None:
                raise Unavailable("the cluster has no members yet: try again in a moment")
            member = view.find(name)
            if member is None:
                known = ", ".join(m.name for m in view.members)
                raise InvalidArgument("name", f"{name!r} is no member; members are {known}")
            if state == MemberState.DRAINING:
                if member.state in (MemberState.DRAINING, MemberState.OUT):
                    return view
                left = sum(m.state in (MemberState.UP, MemberState.JOINING) for m in view.members)
                if left < 2:
                    raise InvalidArgument("name", f"{name} is the only member that takes blocks")
            elif member.state in (MemberState.UP, MemberState.JOINING):
                return view
            # One that was out has missed what was forgotten meanwhile, as one that is new.
            since = view.epoch + 1 if member.state == MemberState.OUT else member.joined
            wanted = view.with_members([replace(member, state=state, joined=since)])
            if await self._coordination.advance(wanted):
                self._site.adopt(wanted)
                return wanted
        raise Unavailable("the members' list cannot be changed now: is it a static one?")
