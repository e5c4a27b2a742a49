"""An event loop on which waiting takes no time, while real sockets of the same process keep working.

Its clock stands still as long as there is anything to do: callbacks, traffic on a socket, a job in a thread. Only when
everybody waits does it jump to the next timer. So an hour's back-off and a client's 60 s time-out pass at once, in the
right order, and a test that nobody would ever wake ends with an error instead of hanging.

Not for what comes from outside the process, such as a Postfix: its answer takes real time, and the timers win.
"""

from __future__ import annotations

import asyncio
import math
import selectors
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple

if TYPE_CHECKING:
    import concurrent.futures
    from collections.abc import Callable, Coroutine

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

EPOCH = 1_700_000_000.0  # what `clock` says when a loop begins, in seconds
GRACE = 0.0005  # real seconds in which what was sent over loopback has certainly arrived
PATIENCE = 30.0  # real seconds that a job in a thread may take


class DeadlockError(RuntimeError):
    """Everybody waits, and nothing can come: no timer, no traffic, no job in a thread."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """A selector event loop whose `time` is virtual, in seconds from 0."""

    def __init__(self) -> None:
        """Begin at 0."""
        self.now = 0.0
        self.jobs = 0  # how many threads work for this loop
        super().__init__(_VirtualSelector(self))

    def time(self) -> float:
        """Return the virtual time."""
        return self.now

    def clock(self) -> float:
        """Return the virtual time as seconds since the epoch."""
        return EPOCH + self.now

    def run_in_executor(
        self, executor: concurrent.futures.Executor | None, func: Callable[[*Ts], T], *args: *Ts
    ) -> asyncio.Future[T]:
        """Run it in a thread; the time stands still until it is done."""
        future = super().run_in_executor(executor, func, *args)
        self.jobs += 1
        future.add_done_callback(self._job_done)
        return future

    def _job_done(self, _: object) -> None:
        self.jobs -= 1

    async def shutdown_default_executor(self, *args: float | None) -> None:
        """Wait for the threads, in real time."""
        self.jobs += 1
        try:
            await super().shutdown_default_executor(*args)
        finally:
            self.jobs -= 1


class _VirtualSelector(selectors.DefaultSelector):
    """Where an ordinary selector would sleep, this one moves the clock."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._owner = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Return what is ready; where nothing is, let `timeout` seconds pass at once."""
        events = super().select(0)
        if events or timeout == 0:  # 0: callbacks are due
            return events
        events = super().select(PATIENCE if self._owner.jobs else GRACE)
        if events:
            return events
        if self._owner.jobs:
            msg = f"a job in a thread has not ended in {PATIENCE:.0f} s"
            raise DeadlockError(msg)
        if timeout is None:
            waiting = "\n".join(map(repr, asyncio.all_tasks(self._owner)))
            msg = f"everybody waits for something that cannot come:\n{waiting}"
            raise DeadlockError(msg)
        self._owner.now = math.nextafter(self._owner.now + timeout, math.inf)  # never short of the timer by rounding
        return events


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run it on a `VirtualLoop` of its own, as `asyncio.run` does."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(coroutine)


def clock() -> float:
    """Return the running loop's virtual time as seconds since the epoch: a `RetryPolicy`'s `clock`."""
    return EPOCH + asyncio.get_running_loop().time()
