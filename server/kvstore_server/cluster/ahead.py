"""What a node's puts need of its core, had before they need it: empty slots, a board to post on.

A put that finds enough slots in the stock, and room on the board, makes no call that it waits for.
The core is asked for the next one's slots while this one's bytes arrive, and takes over what was
posted when it hears of anything else.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import numpy as np

from kvstore import commands as c
from kvstore import limits
from kvstore.block import NO_PARENT, PUT_ID_BYTES, pack_many, write_headers
from kvstore.errors import KVStoreError, ResourceExhausted
from kvstore.index.format import key_words
from kvstore.layout import Layout
from kvstore.session.link import Memory
from kvstore.session.parts import part_of
from kvstore.session.posting import Board
from kvstore.session.writes import SlotStock
from kvstore_server.cluster.port import LoopPort

_FEWEST_AHEAD = 16  # slots to ask for, so that small puts seldom ask
_REFILL_S = 4e-3  # after a put has taken slots: by then its bytes are on their way
_TELL_S = 20e-3  # after a post, unless another command has told the core of it
_IDLE_S = 1.0  # after the last put, until slots that nobody fills go back
_ANSWER_S = 10.0


class Ahead:
    """The slots and the board of one connection; on its loop alone.

    memory: the core's, as it is mapped now.
    """

    def __init__(self, port: LoopPort, memory: Callable[[], Memory]) -> None:
        self._port, self._memory = port, memory
        boards, number = memory().index.boards, port.welcome.board
        self._board = Board(boards, number) if boards and number >= 0 else None
        self._stock = SlotStock()
        self._layouts: dict[int, Layout] = {}  # of namespaces, by their numbers
        # Numbers that the core has taken for good ones since the index had this epoch: one that was
        # dropped meanwhile must be refused, and of what is posted nobody would be told.
        self._known: set[int] = set()
        self._epoch = -1
        self._largest: dict[int, int] = {}  # by size of slots, the blocks of the largest put so far
        self._filling: set[int] = set()  # sizes of slots that are being asked for
        self._used_s = 0.0  # when slots were last taken
        self._resting = False  # whether somebody waits for the stock to lie idle
        self._untold = False  # whether something was posted after the last command
        self._tasks: set[asyncio.Task[None]] = set()

    async def ask(self, command: c.Command, timeout_s: float) -> Any:
        """See `LoopPort.ask`; puts go by way of the stock and the board."""
        if isinstance(command, c.Grant):
            return await self._grant(command, timeout_s)
        if isinstance(command, c.Commit):
            return await self._commit(command, timeout_s)
        answer = await self._call(command, timeout_s)
        if isinstance(command, c.OpenNamespace):
            self._layouts[answer.namespace] = Layout.decode(command.layout)
            while len(self._layouts) > limits.MAX_NAMESPACES:  # the oldest were dropped by now
                self._layouts.pop(next(iter(self._layouts)))
        return answer

    def close(self) -> None:
        """Nothing is posted any more when this returns: call it before the connection ends."""
        if self._board:
            self._board.close()
        for task in self._tasks:
            task.cancel()

    # -- inside ------------------------------------------------------------------------

    async def _call(self, command: c.Command, timeout_s: float) -> Any:
        self._untold = False  # whatever the core hears of, it looks at the boards before
        return await self._port.ask(command, timeout_s)

    async def _grant(self, command: c.Grant, timeout_s: float) -> c.Granted:
        layout = self._layouts.get(command.namespace)
        if layout is None:
            granted: c.Granted = await self._call(command, timeout_s)
            return granted
        size, n = part_of(layout).slot_granules, command.blocks
        self._largest[size] = max(n, self._largest.get(size, 0))
        slots = self._stock.take(size, n)
        self._used_s = asyncio.get_running_loop().time()
        if len(slots) < n:
            try:
                granted = await self._call(replace(command, blocks=n - len(slots)), timeout_s)
                slots += granted.granules.tolist()
            except BaseException as error:
                if not slots or not isinstance(error, ResourceExhausted):
                    self._stock.put(size, slots)
                    raise
        if size not in self._filling and self._wanted(size, n):
            self._filling.add(size)
            self._spawn(self._refill(command.namespace, size, n))
        return c.Granted(granules=np.array(slots, np.uint32))

    async def _commit(self, command: c.Commit, timeout_s: float) -> c.Committed:
        layout, n = self._layouts.get(command.namespace), len(command.hashes)
        epoch = self._memory().index.namespace_epoch
        if epoch != self._epoch:
            self._epoch = epoch
            self._known.clear()
        if layout is not None and command.namespace in self._known and self._post(command, layout):
            if not self._untold:
                self._untold = True
                # The core takes over many at once while their sender hears of it, so that who asks
                # for them next need not wait for that.
                after_s = 0.0 if n >= _FEWEST_AHEAD else _TELL_S
                self._spawn(self._tell(command.namespace, after_s))
            status = np.full(n, c.CommitStatus.STORED, np.uint8)
            return c.Committed(status=status, granules=np.empty(0, np.uint32))
        committed: c.Committed = await self._call(command, timeout_s)
        if epoch == self._epoch:
            self._known.add(command.namespace)
        return committed

    def _post(self, command: c.Commit, layout: Layout) -> bool:
        """Writes headers and shows the blocks; False where they have to be shown by a call."""
        if self._board is None or command.ttl_ms or self._port.closed:
            return False
        words, n = key_words(command.hashes), len(command.hashes)
        if len(set(words[:, 0].tolist())) < n:
            return False
        parents, positions = np.zeros_like(command.hashes), np.full(n, -1, np.int32)
        if command.position >= 0:
            parents[0] = np.frombuffer(command.parent or NO_PARENT, np.uint8)
            parents[1:] = command.hashes[:-1]
            positions = command.position + np.arange(n, dtype=np.int32)
        of_all = len(command.put_id) == PUT_ID_BYTES
        headers = pack_many(
            namespace=command.namespace,
            keys=command.hashes,
            put_ids=command.put_id * n if of_all else command.put_id,
            length=layout.block_bytes,
            checksums=command.checksums,
            parents=parents,
            positions=positions,
        )
        memory = self._memory()
        write_headers(memory.pool, command.granules, headers)
        return self._board.post(
            command.namespace,
            words,
            length=layout.block_bytes,
            granules=command.granules,
            generations=memory.generations,
        )

    def _wanted(self, size: int, n: int) -> int:
        """How many slots to ask for after a put of n blocks, so that another one like the largest
        finds them here; after small ones only once in a while."""
        nbytes = min(limits.MAX_AHEAD_BYTES, self._memory().pool.size // limits.AHEAD_SHARE)
        most = nbytes // (size * limits.GRANULE_BYTES)
        left, enough = self._stock.count(size), min(max(self._largest[size], _FEWEST_AHEAD), most)
        return max(0, enough - left) if n >= _FEWEST_AHEAD or left < enough // 2 else 0

    # What follows goes on by itself: where it fails, the next put hears of what is the matter.

    async def _refill(self, number: int, size: int, n: int) -> None:
        try:
            await asyncio.sleep(_REFILL_S)
            wanted = self._wanted(size, n)
            if wanted:
                with contextlib.suppress(KVStoreError):
                    grant = c.Grant(namespace=number, blocks=wanted)
                    granted: c.Granted = await self._call(grant, _ANSWER_S)
                    self._stock.put(size, granted.granules.tolist())
        finally:
            self._filling.discard(size)
        if len(self._stock) and not self._resting:
            self._resting = True
            self._spawn(self._rest())

    async def _rest(self) -> None:
        """Gives the stock back when nobody has put anything for a while."""
        loop, wait_s = asyncio.get_running_loop(), _IDLE_S
        while wait_s > 0:
            await asyncio.sleep(wait_s)
            wait_s = self._used_s + _IDLE_S - loop.time()
        self._resting = False
        slots = self._stock.take_all()
        if slots:
            with contextlib.suppress(KVStoreError):
                await self._call(c.GiveBack(granules=np.array(slots, np.uint32)), _ANSWER_S)

    async def _tell(self, number: int, after_s: float) -> None:
        """Has the core take over what was posted, which is shown already."""
        await asyncio.sleep(after_s)
        if self._untold:
            with contextlib.suppress(KVStoreError):
                await self._call(c.Adopt(namespace=number), _ANSWER_S)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
