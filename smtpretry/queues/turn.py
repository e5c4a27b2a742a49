"""One turn of a worker at one delivery, the same for each engine: what is stored when, and who is told."""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from smtpretry import log
from smtpretry.errors import ClientClosed, NotOurs

if TYPE_CHECKING:
    from smtpretry.delivery import Delivery

    from .engine import OnEnd, SupportsAttempt

_PACKAGE = str(Path(log.__file__).parent)
_DEADLY = 3  # workers in a row that died with a delivery, after which it is taken for what kills them
_FRESH = 0.5  # seconds after a worker has taken a delivery in which it need not ask whether it has it still


class Hold(Protocol):
    """An engine's hold on a delivery, from when its worker took it until it is over or comes again."""

    name: str
    number: int  # how many times it has been taken
    deaths: int  # how many workers in a row have died that had it
    taken_at: float  # when its worker asked for it, by `time.monotonic`

    def load(self) -> Delivery:
        """The delivery as it is stored."""

    async def save(self, delivery: Delivery, *, over: bool) -> bool:
        """Store its state; where it is over, let go of its message. False: another worker has it."""

    async def again(self, delivery: Delivery | None, wait: float) -> None:
        """Store its state, and let it be taken again after so many seconds. Nothing happens where another has it."""

    async def count_death(self, delivery: Delivery, wait: float | None) -> bool:
        """Store the number of these; where there is a wait, let it be taken again only then. As `save`."""


class Turn:
    """What is written in a turn that goes well is one thing: that it is over, or when it comes again."""

    def __init__(self, hold: Hold, smtp: SupportsAttempt, on_end: OnEnd | None) -> None:
        self._hold, self._smtp, self._on_end = hold, smtp, on_end
        self._fresh_until = hold.taken_at + _FRESH
        self._stored: list[tuple[object, ...]] | None = None
        self._over = self._tells = False

    async def take(self) -> None:
        """Make the attempt. Whatever comes of it, the delivery is over, comes again, or is another worker's.

        Raises:
            ClientClosed: the client was closed.
        """
        delivery: Delivery | None = None
        try:
            delivery = self._hold.load()
            if not (self._hold.deaths and await self._spares_workers(delivery)):
                await self._attempt(delivery)
        except NotOurs:
            log.say(logging.WARNING, "smtp %s: another worker has it now", self._hold.name, job=self._hold.name)
        except asyncio.CancelledError:
            await self._hold.again(delivery, 0.0)
            raise
        except Exception as error:
            if isinstance(error, ClientClosed) and not self._tells:  # the worker's own, and not one that `on_end` uses
                await self._hold.again(delivery, 0.0)
                raise
            wait = self._smtp.policy.backoff(attempt=self._hold.number, elapsed=0.0)
            job, own = self._hold.name, error if self._tells else None  # the application's: it may be shown in full
            told = f"{type(error).__name__}: {error}" if delivery is None else _place(error)
            message = "smtp job %s: %s; comes again in %.0f s"
            log.say(logging.ERROR, message, job, told, wait, error=own, job=job, wait=wait)
            await self._hold.again(delivery, wait)

    async def _spares_workers(self, delivery: Delivery) -> bool:
        """Whether it has to wait: else a message that kills its worker would kill one after another, all day long."""
        job, deaths, wait = self._hold.name, self._hold.deaths, None
        if deaths >= _DEADLY:
            wait = self._smtp.policy.backoff(attempt=deaths - _DEADLY + 1, elapsed=0.0)
            message = "smtp job %s: %d workers in a row died that had it; comes again in %.0f s, if nobody drops it"
            log.say(logging.ERROR, message, job, deaths, wait, job=job, wait=wait)
        if not await self._hold.count_death(delivery, wait):
            raise NotOurs
        return wait is not None

    async def _attempt(self, delivery: Delivery) -> None:
        self._stored = _ends(delivery)
        if delivery.next_at is not None:
            await self._smtp.attempt(delivery, self._save)
        if self._over:
            return
        if delivery.next_at is not None:
            await self._hold.again(delivery, delivery.next_at - self._smtp.policy.clock())
        elif self._on_end is None or not _tellable(delivery):
            await self._write(delivery, over=True)
        else:
            await self._write(delivery, over=False)
            self._tells = True
            told = self._on_end(delivery)
            if inspect.isawaitable(told):  # else it was a plain function, which has done its work
                await told
            self._tells = False
            await self._write(delivery, over=True)

    async def _save(self, delivery: Delivery) -> None:
        ends = _ends(delivery)
        if ends == self._stored and time.monotonic() < self._fresh_until:
            return
        await self._write(delivery, over=delivery.next_at is None and not (self._on_end and _tellable(delivery)))
        self._stored = ends

    async def _write(self, delivery: Delivery, *, over: bool) -> None:
        if not self._over:
            if not await self._hold.save(delivery, over=over):
                raise NotOurs
            self._over = over


def _ends(delivery: Delivery) -> list[tuple[object, ...]]:
    """What must not be forgotten, whatever happens."""
    return [(one.status, one.uncertain, one.doubts) for one in delivery.outcomes.values()]


def _tellable(delivery: Delivery) -> bool:
    return bool(delivery.refused or delivery.uncertain)


def _place(error: Exception) -> str:
    """Its name, and where this package called what raised it: what it says may quote the message, or a credential."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = max(number for number, frame in enumerate(frames) if frame.filename.startswith(_PACKAGE))
    at = frames[min(ours + 1, len(frames) - 1)]
    return f"{type(error).__name__} in {at.name} ({at.filename}, line {at.lineno})"
