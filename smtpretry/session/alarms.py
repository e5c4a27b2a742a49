"""Waiting, for a hundred thousand at a time: no task, no coroutine and no timer of its own for any of them."""

from __future__ import annotations

import asyncio
import itertools
from functools import partial
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_FEW = 1000  # alarms


class Alarms:
    """Futures to await until their time has come, all of them on one timer.

    Args:
        sleep: the policy's own way to wait, in place of that timer; None for the event loop's time.
    """

    def __init__(self, sleep: Callable[[float], Awaitable[None]] | None) -> None:
        self._sleep = sleep
        self._heap = list[tuple[float, int, asyncio.Future[None]]]()  # when, and whom to wake
        self._number = itertools.count()  # for two at the same time
        self._timer: asyncio.TimerHandle | None = None
        self._sleepers = set[asyncio.Future[None]]()  # those whom `sleep` wakes
        self._prune_at = _FEW

    def __len__(self) -> int:
        """How many are waited for."""
        return sum(not woken.done() for _, _, woken in self._heap) + len(self._sleepers)

    def set(self, seconds: float) -> asyncio.Future[None]:
        """What to await for so long."""
        loop = asyncio.get_running_loop()
        woken: asyncio.Future[None] = loop.create_future()
        if self._sleep is None:
            self._prune()
            heappush(self._heap, (loop.time() + seconds, next(self._number), woken))
            self._set_timer()
        else:
            sleeping = asyncio.ensure_future(self._sleep(seconds))
            sleeping.add_done_callback(partial(_slept, woken))
            self._sleepers.add(woken)
            woken.add_done_callback(self._sleepers.discard)
            woken.add_done_callback(lambda _: sleeping.cancel())
        return woken

    def stop(self, why: Callable[[], Exception]) -> None:
        """Let all of them raise that."""
        for woken in [*(woken for _, _, woken in self._heap), *self._sleepers]:
            if not woken.done():
                _fail(woken, why())
        self._heap.clear()
        if self._timer is not None:
            self._timer.cancel()  # or the loop would keep all of this until it is due
            self._timer = None

    def forget(self) -> None:
        """Let go of what belongs to an event loop that has ended."""
        self._heap.clear()
        self._sleepers.clear()
        self._timer = None

    def _set_timer(self) -> None:
        due = self._heap[0][0]
        if self._timer is None or due < self._timer.when():
            if self._timer is not None:
                self._timer.cancel()
            self._timer = asyncio.get_running_loop().call_at(due, self._ring)

    def _ring(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        while self._heap and self._heap[0][0] <= now:
            woken = heappop(self._heap)[2]
            if not woken.done():
                woken.set_result(None)
        if self._heap:
            self._set_timer()

    def _prune(self) -> None:
        """Throw out those that were cancelled, each time that the heap has doubled."""
        if len(self._heap) >= self._prune_at:
            self._heap = [alarm for alarm in self._heap if not alarm[2].done()]
            heapify(self._heap)
            self._prune_at = max(_FEW, 2 * len(self._heap))


def _slept(woken: asyncio.Future[None], slept: asyncio.Future[None]) -> None:
    error = None if slept.cancelled() else slept.exception()
    if woken.done():
        return
    if error is None:
        woken.set_result(None)
    else:
        _fail(woken, error)


def _fail(woken: asyncio.Future[None], error: BaseException) -> None:
    woken.set_exception(error)
    woken.exception()  # seen, or asyncio would complain where who waits is cancelled at the same time
