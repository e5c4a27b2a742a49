"""A worker: it takes what is due in a queue, makes the attempts, and waits for more. The same for each engine."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, TypeVar

from smtpretry import clock, log
from smtpretry.errors import ClientClosed

from .engine import Pause, QueueError, type_of
from .servers import Wants
from .signals import stopping
from .site import HasSites, Site
from .stored import by_the_time_of_day, delivery_of
from .turn import Turn

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from smtpretry.delivery import Delivery

    from .engine import OnEnd, OnProgress, Paced, Progress, SupportsAttempt
    from .servers import Known

T = TypeVar("T")

_AGAIN: Final = 1.0  # seconds between two tries where the queue cannot be written now
_ASK: Final = 1.0  # seconds between two questions of a worker that has deliveries without a turn
_IDLE: Final = 3600.0  # seconds after which a worker forgets what ended long ago, also where it has nothing to do
_REPORT: Final = 60.0  # seconds between two reports
_TWICE: Final = 0.5  # seconds after a signal in which a second one is the same
_LAST: Final = 5.0  # seconds in which a queue takes back what a worker that ends has not finished
_DEATHS: Final = "deaths"  # in the stored state, beside what a delivery knows of itself; its next state is without
_SHORTEST_LEASE: Final = 2.0  # seconds: an attempt relies on what it knew a second ago


@dataclass(slots=True)
class Taken:
    """A delivery that a worker has taken."""

    name: str
    envelope: str
    state: str
    message: bytes | None
    taken: int  # how many times
    died: bool  # the worker that had it before
    number: int = 0  # of its row, where it has one

    @property
    def deaths(self) -> int:
        """How many workers in a row have died that had it."""
        return int(json.loads(self.state).get(_DEATHS, 0)) + 1 if self.died else 0

    def load(self, now: float) -> Delivery:
        """The delivery. An attempt that its worker did not survive counts as one."""
        delivery = delivery_of(self.envelope, self.state, self.message or b"")
        if self.message is None:
            msg = "the message is not in the queue any more"
            raise ValueError(msg)
        if self.died:
            for who in delivery.due(now):
                delivery.outcomes[who].attempts += 1
        return delivery


class Batch(NamedTuple):
    """What a look into the queue has brought, with the seconds to the next look, and what it told of each server."""

    taken: Sequence[Taken]
    wait: float | None
    known: Sequence[Known]


class Change(NamedTuple):
    """What is to be written about a delivery that a worker has."""

    state: str | None  # None: as it is
    wait: float | None = None  # seconds after which it may be taken again, where the worker lets go of it
    over: bool = False


class Store(Protocol):
    """A queue, as one worker sees it. Each call is on the disk when it returns, or raises a `QueueError`."""

    name: str
    lease: float  # seconds without a heartbeat after which a worker counts as dead
    grace: float  # seconds that attempts under way get to finish
    concurrency: int

    def listening(self, wake: Callable[[], None]) -> AbstractAsyncContextManager[None]:
        """Have it called when there may be something new, as long as the block lasts."""

    async def take(self, room: int, wants: Mapping[str, Wants], those: Sequence[Taken]) -> Batch:
        """Take what is due, at most so many; none of it where the servers want nothing now.

        Where a server is paced, each has a turn, and before them those that were taken and are waiting for one.

        Args:
            room: how many.
            wants: the servers, the preferred one first, and what this worker tells of itself.
            those: under way here, and never taken, not even where their lease is over, as after a sleep or where the
                clock was set forward.
        """

    async def write(self, one: Taken, change: Change) -> bool:
        """Write it, unless another worker has the delivery: then False."""

    async def beat(self, those: Sequence[Taken]) -> None:
        """Say that their worker lives; forget what ended long ago."""

    async def tell(self, server: str, pause: Pause | None, paced: Paced | None) -> None:
        """Tell the other workers of a pause, and what makes of the stored pace the one that holds now."""

    async def progress(self) -> Progress:
        """How many there are."""


class _Shared:
    """A server, and what the workers know of it."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self._known, self._paced, self._alone = Pause(), False, False
        self._told = False  # since the others were asked: their answer is older

    def ask(self) -> Wants:
        """What is told with a question that `learn` gets the answer to."""
        self._told = False
        return Wants(self.site.without_turn if self._paced else 0, self.site.exempt())

    def learn(self, known: Known) -> None:
        """Take in what the others know."""
        self._alone = self._alone or known.alone
        if self._told:
            self.site.follow(None, known.turns)
            return
        if known.pause != self._known:
            self._known = known.pause
            self.site.adopt(known.pause)
        self._paced = known.pace is not None
        self.site.follow(known.pace, known.turns)

    def news(self) -> tuple[Pause | None, Paced | None] | None:
        """What they do not know; None where that is nothing."""
        pause, paced = None if self.site.pause == self._known else self.site.pause, self.site.tell_pace()
        self._known, self._paced = pause or self._known, self._paced or paced is not None
        if pause is None and paced is None and not self._alone:
            return None
        self._alone, self._told = False, True
        return pause, paced


class Worker:
    """What is under way, and what it waits for."""

    def __init__(
        self,
        store: Store,
        smtp: SupportsAttempt,
        on_end: OnEnd | None,
        on_progress: OnProgress | None,
    ) -> None:
        if not callable(getattr(smtp, "attempt", None)):
            msg = f"a worker sends with a RetryingSMTP or a Failover, not with a {type_of(smtp)}"
            raise TypeError(msg)
        self.store, self.smtp, self.clock = store, smtp, smtp.policy.clock
        self._on_end, self._on_progress = on_end, on_progress
        self._turns = dict[asyncio.Task[None], Taken]()
        self._bell = asyncio.Event()
        self._stopped, self._stopped_at, self._ends_now = asyncio.Event(), 0.0, False
        self._closed: ClientClosed | None = None
        self._sites = [_Shared(site) for site in smtp.sites] if isinstance(smtp, HasSites) else []
        self._busy, self._moved = asyncio.Event(), asyncio.Event()

    @property
    def ahead(self) -> float:
        """Seconds that its clock is ahead of the time of day, which was set back; `take_up` corrects one that lags."""
        return max(0.0, -clock.lag()) if self.clock is clock.now else 0.0

    async def run(self, *, signals: bool = True) -> None:
        """Work until a signal, or until it is cancelled."""
        with stopping(self._stop) if signals else contextlib.nullcontext():
            async with self.store.listening(self._bell.set):
                tasks = [asyncio.ensure_future(one) for one in (self._look(), self._beat(), self._stopped.wait())]
                looking, beating, _ = tasks
                reporting = asyncio.ensure_future(self._report())
                try:
                    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                    await asyncio.wait([looking], timeout=_AGAIN)  # it begins what it is just taking
                    for one in (looking, beating):
                        if one.done():
                            one.result()
                finally:
                    try:
                        await self._finish(looking)
                    finally:
                        await broken_off(*tasks, reporting)

    async def _look(self) -> None:
        while not self._stopped.is_set():
            if self._closed is not None:
                raise self._closed
            self._bell.clear()
            await self._wait(await self._take())

    async def insist(self, call: Callable[[], Awaitable[T]]) -> T:
        """Do it, and where the queue cannot be used now, wait until it can: what is known must not be forgotten.

        Where a worker's time to end is over, a turn tries once.
        """
        while True:
            try:
                return await call()
            except QueueError as error:
                if not error.passing or (self._ends_now and asyncio.current_task() in self._turns):
                    raise
                log.say(logging.WARNING, "smtp queue: %s; tried again in %.0f s", error, _AGAIN, wait=_AGAIN)
            await asyncio.sleep(_AGAIN)

    async def write(self, one: Taken, change: Change) -> bool:
        """Write it, and tell what this client knows newly of its server: an end comes first, a new try last."""
        at = self.clock() + (change.wait or 0.0)
        if change.wait is not None:
            await self._tell()

        def write() -> Awaitable[bool]:
            wait = None if change.wait is None else max(0.0, at - self.clock())
            return self.store.write(one, change._replace(wait=wait))

        written = await self.insist(write)
        if change.wait is None:
            await self._tell()
        return written

    async def _tell(self) -> None:
        for shared in self._sites:
            if (news := shared.news()) is not None:
                await self.insist(functools.partial(self.store.tell, shared.site.server, *news))

    def _stop(self) -> None:
        """End; where that was asked for before, break off what is under way. Some programs pass a signal on twice."""
        now = time.monotonic()
        if not self._stopped.is_set():
            self._stopped.set()
            self._stopped_at = now
            if self._turns:
                message = "smtp worker ends; %d under way get %.0f s, a second signal breaks them off"
                log.say(logging.INFO, message, len(self._turns), self.store.grace)
        elif now - self._stopped_at > _TWICE:
            self._ends_now = True
        self._bell.set()

    async def _take(self) -> float | None:
        """Begin what is due, as much as there is room for; seconds until the next look."""
        room = self.store.concurrency - len(self._turns)
        is_unknown = bool(self._sites) and not any(shared.site.server for shared in self._sites)
        if is_unknown:
            room = min(room, 1 - len(self._turns))  # the first connection tells whose pause is to be kept
        sites: dict[str, _Shared] = {}
        for shared in self._sites:
            sites.setdefault(shared.site.server, shared)
        wants = {server: shared.ask() for server, shared in sites.items()}
        waiting = sum(want.waiting for want in wants.values())
        if room + waiting <= 0:
            return _ASK if is_unknown else None
        asked_at = time.monotonic()
        those = list(self._turns.values())
        batch = await self.insist(lambda: self.store.take(room, wants, those))
        for shared, known in zip(sites.values(), batch.known, strict=True):
            shared.learn(known)
        for one in batch.taken:
            turn = asyncio.ensure_future(self._turn(one, asked_at))
            self._turns[turn] = one
            self._busy.set()
            turn.add_done_callback(self._ended)
        if waiting and any(known.pace is not None for known in batch.known):
            return _ASK if batch.wait is None else min(batch.wait, _ASK)
        return batch.wait

    async def _turn(self, one: Taken, asked_at: float) -> None:
        await Turn(_Hold(self, one, asked_at), self.smtp, self._on_end).take()

    def _ended(self, turn: asyncio.Task[None]) -> None:
        one = self._turns.pop(turn)
        self._bell.set()
        if not self._turns:
            self._busy.clear()
        if turn.cancelled() or (error := turn.exception()) is None:
            return
        if isinstance(error, ClientClosed):
            self._closed = error
        else:
            log.say(logging.ERROR, "smtp job %s: %s: %s", one.name, type(error).__name__, error, job=one.name)

    async def _wait(self, wait: float | None) -> None:
        """Wait until something was submitted, has ended, or was written by another process; or for so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait):  # Python 3.11's wait_for loses a cancellation that comes with the bell
                await self._bell.wait()
                self._moved.set()

    async def _beat(self) -> None:
        """Renew the leases, and forget what has ended long ago."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_IDLE):
                    await self._busy.wait()
            await asyncio.sleep(self.store.lease / 3)
            await self.insist(lambda: self.store.beat(list(self._turns.values())))

    async def _report(self) -> None:
        """Say how far it is, where that has changed."""
        before: Progress | None = None
        while True:
            progress = await self.insist(self.store.progress)
            if progress != before:
                before = progress
                log.say(logging.INFO, "smtp queue %s: %s", self.store.name, progress)
                try:
                    if self._on_progress is not None:
                        self._on_progress(progress)
                except Exception as error:  # noqa: BLE001 - somebody else's code
                    log.say(logging.ERROR, "smtp queue %s: on_progress failed", self.store.name, error=error)
            await asyncio.sleep(_REPORT)
            await self._moved.wait()
            self._moved.clear()

    async def _finish(self, looking: asyncio.Future[Any]) -> None:
        """Take no more. Let what is under way end, within the time that it gets; give back what does not."""
        try:
            await broken_off(looking)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.store.grace):
                    while self._turns and not self._ends_now:
                        self._bell.clear()
                        await self._bell.wait()
        finally:
            self._ends_now = True
            turns = list(self._turns)
            for turn in turns:
                turn.cancel()
            try:
                if turns:
                    await asyncio.wait(turns, timeout=_LAST)
            finally:
                await broken_off(*turns)


async def broken_off(*tasks: asyncio.Future[Any]) -> None:
    """Cancel them until they have ended: a cancellation gets lost in a connection that breaks, or that is silent."""
    while under_way := [task for task in tasks if not task.done()]:
        for task in under_way:
            task.cancel()
        await asyncio.wait(under_way, timeout=1.0)


def check_worker(name: str, lease: float, concurrency: int) -> None:
    """Refuse a lease that is too short, by the name that the engine gives it, and a concurrency below one."""
    if not lease >= _SHORTEST_LEASE:
        msg = f"{name} is {_SHORTEST_LEASE:g} seconds or more, not {lease!r}"
        raise ValueError(msg)
    if concurrency < 1:
        msg = f"concurrency is a whole number from 1 on, not {concurrency!r}"
        raise ValueError(msg)


class _Hold:
    """A worker's hold on one delivery."""

    def __init__(self, worker: Worker, one: Taken, taken_at: float) -> None:
        self._worker, self._one = worker, one
        self.name, self.number, self.deaths, self.taken_at = one.name, one.taken, one.deaths, taken_at

    def load(self) -> Delivery:
        ahead = self._worker.ahead
        delivery = self._one.load(self._worker.clock() - ahead)
        delivery.shift(ahead)
        return delivery

    async def save(self, delivery: Delivery, *, over: bool) -> bool:
        return await self._worker.write(self._one, Change(self._state(delivery), over=over))

    async def again(self, delivery: Delivery | None, wait: float) -> None:
        state = self._state(delivery) if delivery else None
        await self._worker.write(self._one, Change(state, wait))

    async def count_death(self, delivery: Delivery, wait: float | None) -> bool:
        return await self._worker.write(self._one, Change(self._state(delivery, {_DEATHS: self.deaths}), wait))

    def _state(self, delivery: Delivery, more: Mapping[str, int] = {}) -> str:
        told = by_the_time_of_day(delivery) if self._worker.clock is clock.now else delivery
        return json.dumps({**told.state(), **more})
