"""A deterministic event loop: time is a number, and what happens next is the top of a heap.

Coroutines run in processes, which are paused and killed as a whole. What runs at the same moment
runs in the order in which it was scheduled, so a seed is a run.
"""

from __future__ import annotations

import heapq
import itertools
import zlib
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Sequence
from typing import Any, Generic, TypeVar

from kvstore.errors import KVStoreError

T = TypeVar("T")
Action = Callable[[], None]
_LINES_KEPT = 4000  # of the journal, to be shown where a run fails
_EXITS = 8  # how often a dead coroutine may await something on its way out
UNASKED_MS = 120_000.0  # after that nobody is going to ask for the result of a task that failed


class Cancelled(BaseException):
    """Thrown into a task that is cancelled. No `Exception`, so that nobody handles it."""


class Dead(BaseException):
    """Raised by whatever a dead process still awaits, while its coroutines are cleared away."""


class StuckError(AssertionError):
    """Raised where simulated time, or the number of events, goes on beyond all bounds."""


class Timer:
    """Something that will happen."""

    __slots__ = ("action", "process")

    def __init__(self, action: Action, process: Process | None) -> None:
        self.action: Action | None = action
        self.process = process

    def cancel(self) -> None:
        """It will not happen."""
        self.action = None


class Process:
    """What is paused, and dies, as one. Dead, it stays so: a restart makes another one."""

    def __init__(self, loop: Loop, name: str) -> None:
        self.loop, self.name = loop, name
        self.alive, self.paused = True, False
        self.at_death: list[Action] = []
        self.tasks: dict[SimTask[Any], None] = {}
        self._backlog: list[Timer] = []

    def defer(self, timer: Timer) -> None:
        """Keeps what is due while the process is paused."""
        self._backlog.append(timer)

    def pause(self) -> None:
        """Nothing runs until `resume`, and what comes waits."""
        self.paused = True

    def resume(self) -> None:
        """All that was due meanwhile happens now, in its order."""
        self.paused = False
        backlog, self._backlog = self._backlog, []
        for timer in backlog:
            self.loop.push(0.0, timer)

    def kill(self) -> None:
        """Its tasks vanish where they are: nothing that they do on their way out has an effect."""
        if not self.alive:
            return
        self.alive, self.paused = False, False
        self._backlog.clear()
        for task in list(self.tasks):
            task.vanish()
        self.tasks.clear()
        for action in list(self.at_death):
            action()


class Future(Generic[T]):
    """A result that comes later, awaited by the tasks of one process, or looked at."""

    __slots__ = ("_callbacks", "_done", "_error", "_result")

    def __init__(self) -> None:
        self._done = False
        self._result: T | None = None
        self._error: BaseException | None = None
        self._callbacks: list[Action] = []

    @property
    def done(self) -> bool:
        return self._done

    def set(self, result: T) -> None:
        """It is done; a second result is dropped."""
        if not self._done:
            self._done, self._result = True, result
            self._tell()

    def fail(self, error: BaseException) -> None:
        """It is done, and raises."""
        if not self._done:
            self._done, self._error = True, error
            self._tell()

    def result(self) -> T:
        assert self._done, "asked for a result that is not there"
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]

    def when_done(self, action: Action) -> None:
        """Calls `action` once it is done, at once if it is."""
        if self._done:
            action()
        else:
            self._callbacks.append(action)

    def _tell(self) -> None:
        callbacks, self._callbacks = self._callbacks, []
        for action in callbacks:
            action()

    def __await__(self) -> Generator[Future[Any], None, T]:
        if not self._done:
            yield self
        return self.result()


class SimTask(Generic[T]):
    """A coroutine that runs by itself in a process; see `kvstore.cluster.world.Task`."""

    def __init__(self, process: Process, work: Coroutine[Any, Any, T]) -> None:
        self.process, self._work = process, work
        self.name = getattr(work, "__qualname__", "task")
        self.outcome: Future[T] = Future()
        self.cancelled = self.asked = False
        self._throws = False
        self._waits_for: Future[Any] | None = None  # None: it can go on
        if process.alive:
            process.tasks[self] = None
            self._soon()
        else:
            self.vanish()

    @property
    def done(self) -> bool:
        return self.outcome.done

    def result(self) -> T:
        self.asked = True
        return self.outcome.result()

    def cancel(self) -> None:
        """Throws `Cancelled` where it waits, in a moment; what it awaits on its way out happens.
        Who calls this does not ask what became of it."""
        self.asked = True
        if not self.done and not self.cancelled:
            self.cancelled = self._throws = True
            self._waits_for = None
            self._soon()

    def vanish(self) -> None:
        """Its process is dead: what it awaits on its way out raises."""
        self.cancelled = True
        for _ in range(_EXITS):
            try:
                self._work.close()
                break
            except (Dead, Cancelled, RuntimeError, KVStoreError):
                continue
        self.outcome.fail(Dead(self.process.name))

    def _soon(self) -> None:
        self.process.loop.after(0.0, self._step, self.process)

    def _step(self) -> None:
        if self.done or (self._waits_for is not None and not self._waits_for.done):
            return
        self._waits_for = None
        try:
            if self._throws:
                self._throws = False
                waits_for = self._work.throw(Cancelled())
            else:
                waits_for = self._work.send(None)
        except StopIteration as stop:
            self.process.tasks.pop(self, None)
            self.outcome.set(stop.value)
        except Cancelled as error:
            assert self.cancelled, f"{self.name} asked for the result of a task that was cancelled"
            self.process.tasks.pop(self, None)
            self.outcome.fail(error)
        except BaseException as error:
            self.process.tasks.pop(self, None)
            self.outcome.fail(error)
            self.process.loop.note_failure(self, error)
        else:
            self._waits_for = waits_for
            waits_for.when_done(self._soon)


class Loop:
    """Runs what is scheduled, in the order of time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        self.journal: deque[str] = deque(maxlen=_LINES_KEPT)
        self.digest = 0  # of all lines of the journal: equal runs have equal ones
        self._heap: list[tuple[float, int, Timer]] = []
        self._numbers = itertools.count()
        self._failed: deque[tuple[float, SimTask[Any], BaseException]] = deque()

    def say(self, line: str) -> None:
        """A line of the journal."""
        line = f"{self.now:12.3f} {line}"
        self.digest = zlib.crc32(line.encode(), self.digest)
        self.journal.append(line)

    def after(self, ms: float, action: Action, process: Process | None = None) -> Timer:
        """Has something happen in `ms`, in a process if one is named: then not while it is paused,
        and not after its death."""
        timer = Timer(action, process)
        self.push(ms, timer)
        return timer

    def push(self, ms: float, timer: Timer) -> None:
        heapq.heappush(self._heap, (self.now + max(ms, 0.0), next(self._numbers), timer))

    def sleep(self, ms: float, process: Process) -> Future[None]:
        """Is done in `ms`, in that process."""
        if not process.alive:
            raise Dead(process.name)
        future: Future[None] = Future()
        self.after(ms, lambda: future.set(None), process)
        return future

    def note_failure(self, task: SimTask[Any], error: BaseException) -> None:
        """A task ended by an error; one that is no `KVStoreError` is a bug, and fails the run."""
        if not isinstance(error, KVStoreError):
            raise error
        self._failed.append((self.now, task, error))

    def check_failures(self, *, all_of_them: bool = False) -> None:
        """Fails where nobody asked for the result of a task that failed, and nobody will."""
        while self._failed and (all_of_them or self._failed[0][0] < self.now - UNASKED_MS):
            _, task, error = self._failed.popleft()
            if not (task.asked or task.cancelled or not task.process.alive):
                raise AssertionError(
                    f"nobody asked for what became of {task.name} in {task.process.name}"
                ) from error

    def step(self) -> bool:
        """The next event, which may be none any more; False if there is none."""
        if not self._heap:
            return False
        self.now, _, timer = heapq.heappop(self._heap)
        action, process = timer.action, timer.process
        if action is None or (process is not None and not process.alive):
            return True
        if process is not None and process.paused:
            process.defer(timer)
            return True
        timer.action = None
        self.events += 1
        action()
        return True

    def run_until(self, time: float) -> None:
        """All that happens up to a moment."""
        while self._heap and self._heap[0][0] <= time:
            self.step()
        self.now = max(self.now, time)
        self.check_failures()

    def run_until_idle(self, most_events: int = 1_000_000) -> None:
        """Until nothing is left to happen."""
        for _ in range(most_events):
            if not self.step():
                self.check_failures(all_of_them=True)
                return
        raise StuckError(f"{most_events} events, and no end")

    def run_until_done(self, task: SimTask[T], within_ms: float) -> T:
        """Until a task has ended; returns its result."""
        end = self.now + within_ms
        while not task.done:
            if not self._heap or self._heap[0][0] > end:
                raise StuckError(f"{task.name} did not end within {within_ms} ms")
            self.step()
        return task.result()


async def wait(
    loop: Loop, process: Process, tasks: Sequence[SimTask[Any]], timeout_ms: float
) -> None:
    """`World.wait`: until one more is done, or all are, or for so long."""
    open_ones = [task for task in tasks if not task.done]
    if not open_ones:
        return
    woken: Future[None] = Future()
    timer = loop.after(timeout_ms, lambda: woken.set(None), process)
    for task in open_ones:
        task.outcome.when_done(lambda: woken.set(None))
    await woken
    timer.cancel()
