"""Which segments give up their place on NVMe, and what becomes of the blocks that they hold."""

from __future__ import annotations

import numpy as np

from kvstore import limits
from kvstore.nvme.format import WHOLE_USE
from kvstore.nvme.volume import Health, Use, UseState, Volume
from kvstore.store.blocks import BlockState, IdArray
from kvstore.store.fetching import Fetcher
from kvstore.store.forgetting import Ending, ForgetLog
from kvstore.store.shelf import Shelf
from kvstore.store.writing import Writer

NO_IDS: IdArray = np.empty(0, np.uint32)


class Leaving:
    """Uses of segments that end, and the volumes' logs, for which some have to.

    logs: by the volumes' numbers.
    """

    def __init__(self, shelf: Shelf, writer: Writer, fetcher: Fetcher) -> None:
        self._shelf, self._writer, self._fetcher = shelf, writer, fetcher
        self.logs: dict[int, ForgetLog] = {}
        self._again: dict[Use, IdArray] = {}  # of uses that make room: what is kept

    @property
    def floors_said(self) -> bool:
        """Whether the logs say from where on the sequences of this life are, where they have to."""
        volumes = self._shelf.places.volumes
        return all(log.settled(volumes[number].floor_at) for number, log in self.logs.items())

    def write_logs(self) -> None:
        """Writes what must not come back, as far as nothing of it is under way."""
        for number, log in self.logs.items():
            if ends := log.pump():
                self._end_for_log(self._shelf.places.volumes[number], ends)
                log.pump()

    def make_room(self) -> None:
        """The oldest segment gives its place; what of it was read goes on elsewhere.

        Ahead of need only one that is whole: else what was just written would leave at once, to be
        written again and to leave again, for as long as somebody waits for it.
        """
        if self._again:
            return
        needed = self._writer.needed
        sizes = needed or self._writer.needed_ahead
        volumes = [v for v in self._shelf.places.writable() if any(map(v.holds, sizes))]
        oldest = [use for volume in volumes if (use := volume.oldest())]
        if not needed:
            oldest = [use for use in oldest if use.state is UseState.WHOLE]
        if oldest:
            self._leave_with_care(min(oldest, key=lambda use: (use.batches > 0, use.born)))

    def _end_for_log(self, volume: Volume, ends: set[Ending]) -> None:
        """Uses of which the log would have to say too much end, so that one record is enough."""
        for segment, sequence in ends:
            use = volume.uses.get(segment)
            if use is None or use.sequence != sequence:
                volume.forget([(segment, sequence, WHOLE_USE)])
            elif use not in self._again:
                self._leave_with_care(use)
        if self.settle() and self.floors_said:
            self._writer.pump()

    def _leave_with_care(self, use: Use) -> None:
        """What of the use was read is brought into memory, to be written again elsewhere."""
        shelf = self._shelf
        ids = shelf.places.in_use(use)
        most = -(-len(ids) // limits.NVME_AGAIN_SHARE)
        chosen = ids[shelf.places.reread(ids)][:most]
        self.leave(use, chosen)
        cold = chosen[shelf.blocks.state[chosen] == BlockState.COLD]
        if len(cold):
            namespace = shelf.namespaces.get(int(shelf.blocks.namespace[cold[0]]))
            self._fetcher.fetch(namespace, cold)

    def leave(self, use: Use, chosen: IdArray) -> None:
        """Ends the use once nobody reads or writes it. chosen: what of it is written again."""
        self._writer.let_go(use)
        use.state = UseState.LEAVING
        self._again[use] = chosen

    def settle(self) -> bool:
        """Ends the uses that nobody reads or writes any more, and gives up volumes that fail.
        Returns whether there is room now that there was not."""
        freed = False
        for volume in self._shelf.places.volumes:
            if volume.health is Health.OFF:
                for use in [u for u in volume.uses.values() if u not in self._again]:
                    self.leave(use, NO_IDS)
        for use in self._shelf.places.take_emptied():
            if use.state is UseState.WHOLE and use not in self._again:
                self.leave(use, NO_IDS)
        for use, chosen in list(self._again.items()):
            if not use.reads and not use.writing:
                del self._again[use]
                self._end(use, chosen)
                freed = True
        return freed

    def _end(self, use: Use, chosen: IdArray) -> None:
        shelf = self._shelf
        ids = shelf.places.in_use(use)
        live = shelf.blocks.state[ids] == BlockState.LIVE
        again = ids[live & np.isin(ids, chosen)]
        shelf.places.leave(ids, forgotten=False)
        shelf.places.close(use)
        # What was written elsewhere too, maybe later, goes on there.
        cold = ids[~live]
        shelf.fall_back(cold)
        shelf.lose_cold(cold[~shelf.places.there(cold)], forgotten=False)
        shelf.places.volumes[use.volume].end(use)
        if len(again):
            self._writer.wish(again, again=True)
