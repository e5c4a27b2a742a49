"""A worker of an SQLite queue: it takes what is due, and waits for more without reading the file."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import uuid
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from smtpretry import log

from . import schema
from .engine import Pause, SharesPause
from .file import QueueError
from .schema import Taken
from .signals import stopping
from .turn import Turn

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from datetime import timedelta
    from pathlib import Path

    from smtpretry.delivery import Delivery

    from .engine import OnEnd, OnProgress, Progress, SupportsAttempt
    from .file import File

T = TypeVar("T")

_AGAIN: Final = 1.0  # seconds between two tries where the file cannot be written now
_REPORT: Final = 60.0  # seconds between two reports


class Queue(Protocol):
    """What a worker works on."""

    path: Path
    file: File
    lease: float
    concurrency: int
    keep: timedelta

    def heard(self, wake: Callable[[], None]) -> AbstractContextManager[Callable[[], None]]:
        """Have it called when something was submitted in this process."""

    async def progress(self, now: float | None = None) -> Progress:
        """How many there are."""


class Worker:
    """What is under way, and what it waits for."""

    def __init__(
        self, queue: Queue, smtp: SupportsAttempt, on_end: OnEnd | None, on_progress: OnProgress | None
    ) -> None:
        self.queue, self.smtp, self.clock = queue, smtp, smtp.policy.clock
        self._on_end, self._on_progress = on_end, on_progress
        self._holder = uuid.uuid4().hex
        self._turns = dict[asyncio.Task[None], Taken]()
        self._bell = asyncio.Event()
        self._stopped = False
        self._shares = smtp if isinstance(smtp, SharesPause) else None
        self._known = Pause()
        self._busy, self._moved = asyncio.Event(), asyncio.Event()

    async def run(self) -> None:
        """Work until a signal, or until it is cancelled."""
        await self.queue.file.look(lambda _: None)  # it is there now, for those who watch it
        with stopping(self._stop), self.queue.heard(self._bell.set) as bell, self.queue.file.watched(bell):
            beating = asyncio.ensure_future(self._beat())
            reporting = asyncio.ensure_future(self._report())
            try:
                while not self._stopped:
                    self._bell.clear()
                    when = await self._take()
                    if beating.done():
                        beating.result()
                    await self._wait(when)
            finally:
                try:
                    await self._finish()
                finally:
                    beating.cancel()
                    reporting.cancel()

    async def transact(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do it, and where the file cannot be written now, wait until it can: what is known must not be forgotten."""
        while True:
            try:
                return await self.queue.file.transact(work)
            except QueueError as error:
                if not error.passing:
                    raise
                log.say(logging.WARNING, "smtp queue: %s; tried again in %.0f s", error, _AGAIN, wait=_AGAIN)
            await asyncio.sleep(_AGAIN)

    def _stop(self) -> None:
        self._stopped = True
        self._bell.set()

    async def _take(self) -> float | None:
        """Begin what is due, as much as there is room for; when to look again, on the policy's clock."""
        room = self.queue.concurrency - len(self._turns)
        if room <= 0:
            return None
        asked_at = time.monotonic()
        pause, taken, when = await self.transact(partial(self._due, self.clock(), room))
        if self._shares is not None and pause != self._known:
            self._known = pause
            self._shares.adopt(pause)
        for one in taken:
            turn = asyncio.ensure_future(self._turn(one, asked_at))
            self._turns[turn] = one
            self._busy.set()
            turn.add_done_callback(self._ended)
        return when

    def _due(self, now: float, room: int, connection: sqlite3.Connection) -> tuple[Pause, list[Taken], float | None]:
        due = schema.next_due(connection)
        if due is None or due > now:
            return self._known, [], due
        pause, limit, ask_again = Pause(), None, None
        if self._shares is not None:
            pause, limit, ask_again = schema.may_try(connection, self._shares.server, now)
        room = room if limit is None else min(limit, room)
        taken = schema.take(connection, now, now + self.queue.lease, self._holder, room) if room else []
        return pause, taken, schema.next_due(connection) if ask_again is None else ask_again

    async def _turn(self, one: Taken, asked_at: float) -> None:
        await Turn(_Hold(self, one, asked_at), self.smtp, self._on_end).take()

    def _ended(self, turn: asyncio.Task[None]) -> None:
        one = self._turns.pop(turn)
        self._bell.set()
        self._moved.set()
        if not self._turns:
            self._busy.clear()
        if not turn.cancelled() and (error := turn.exception()) is not None:
            log.say(logging.ERROR, "smtp job %s: %s: %s", one.name, type(error).__name__, error, job=one.name)

    async def _wait(self, when: float | None) -> None:
        """Wait until something was submitted, has ended, or was written by another process; or until then."""
        wait = None if when is None else max(0.0, when - self.clock())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait):  # Python 3.11's wait_for loses a cancellation that comes with the bell
                await self._bell.wait()

    async def _beat(self) -> None:
        """Renew the leases, and forget what has ended long ago."""
        while True:
            await self._busy.wait()
            await asyncio.sleep(self.queue.lease / 3)
            now = self.clock()
            await self.transact(partial(self._renew, now))

    def _renew(self, now: float, connection: sqlite3.Connection) -> None:
        schema.renew(connection, list(self._turns.values()), now + self.queue.lease)
        schema.forget(connection, now - self.queue.keep.total_seconds())

    async def _report(self) -> None:
        """Say how far it is, where that has changed."""
        before: Progress | None = None
        while True:
            progress = await self.queue.progress(self.clock())
            if progress != before:
                before = progress
                log.say(logging.INFO, "smtp queue %s: %s", self.queue.path.name, progress)
                if self._on_progress is not None:
                    self._on_progress(progress)
            await asyncio.sleep(_REPORT)
            await self._moved.wait()
            self._moved.clear()

    async def _finish(self) -> None:
        """Let what is under way end, within the time of a lease; give back what does not."""
        try:
            if self._turns:
                await asyncio.wait(list(self._turns), timeout=self.queue.lease)
        finally:
            turns = list(self._turns)
            for turn in turns:
                turn.cancel()
            await asyncio.gather(*turns, return_exceptions=True)

    def share(self) -> Callable[[sqlite3.Connection], None] | None:
        """What to write, where this client knows something new of its server."""
        if self._shares is None or self._shares.pause == self._known:
            return None
        self._known = self._shares.pause
        return partial(schema.tell, server=self._shares.server, pause=self._known)


class _Hold:
    """A worker's hold on one delivery."""

    def __init__(self, worker: Worker, one: Taken, taken_at: float) -> None:
        self._worker, self._one = worker, one
        self.name, self.number, self.taken_at = one.name, one.taken, taken_at

    def load(self) -> Delivery:
        return self._one.load(self._worker.clock())

    async def save(self, delivery: Delivery, *, over: bool) -> bool:
        now, state = self._worker.clock(), json.dumps(delivery.state())
        if over:
            return await self._write(lambda own: schema.end(own, self._one, now, state))
        until = now + self._worker.queue.lease
        return await self._write(lambda own: schema.store(own, self._one, until, state))

    async def again(self, delivery: Delivery | None, wait: float) -> None:
        due, state = self._worker.clock() + wait, json.dumps(delivery.state()) if delivery else None
        await self._write(lambda own: schema.store(own, self._one, due, state, free=True))

    async def _write(self, work: Callable[[sqlite3.Connection], bool]) -> bool:
        share = self._worker.share()

        def both(connection: sqlite3.Connection) -> bool:
            if share is not None:
                share(connection)
            return work(connection)

        return await self._worker.transact(both)
