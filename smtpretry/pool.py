"""Which connection a send gets, and the pause that a struggling server imposes on all of them."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import aiosmtplib

from .errors import ClientClosed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from .connection import Connection, Said

_CLOSED = "the client was closed; `async with` opens it again"
_WOKEN = "the client was closed while the send was waiting; exc.delivery holds what is pending"
_QUIT_TIMEOUT = 5.0  # seconds


class Pool:
    """One connection, lent to one pass at a time in the order of asking, and closed with QUIT when nobody wants it.

    Attributes:
        resumes_at: until when nothing is tried, on the policy's clock, because the server said so.
        reason: what the server said then.
        failures: how many times in a row it said so.
    """

    def __init__(
        self, connection: Connection, idle_timeout: float | None, sleep: Callable[[float], Awaitable[None]]
    ) -> None:
        self.connection = connection
        self.idle_timeout = idle_timeout
        self.resumes_at = 0.0
        self.reason: Said | None = None
        self.failures = 0
        self.closed = False
        self._sleep = sleep
        self._sleepers: set[asyncio.Future[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = asyncio.Lock()
        self._idle: asyncio.TimerHandle | None = None
        self._retiring: asyncio.Task[None] | None = None

    def pause(self, until: float, reason: Said) -> None:
        """Let nothing be tried until then."""
        self.failures += 1
        self.resumes_at, self.reason = max(self.resumes_at, until), reason

    def resume(self) -> None:
        """The server works: the next pause begins from a short one again."""
        self.failures = 0

    @asynccontextmanager
    async def lend(self) -> AsyncIterator[Connection]:
        """Lend the connection, open or not, for one pass. Whatever interrupts the pass closes it.

        Raises:
            ClientClosed: the pool was closed.
            ValueError: the connection belongs to another event loop.
        """
        self._belong_here()
        async with self._lock:
            if self.closed:
                raise ClientClosed(_CLOSED)
            if self._idle is not None:
                self._idle.cancel()
            self.connection.watch()
            try:
                yield self.connection
                self.connection.heed()
                self.connection.reused = True
            except BaseException:
                self.connection.abort()
                raise
            if self.connection.is_open and self.idle_timeout is not None:
                self._idle = asyncio.get_running_loop().call_later(self.idle_timeout, self._retire)

    async def sleep(self, seconds: float) -> None:
        """Wait, holding nothing. Raises `ClientClosed` as soon as the pool is closed."""
        if self.closed:
            raise ClientClosed(_CLOSED)
        sleeper: asyncio.Future[None] = asyncio.ensure_future(self._sleep(seconds))
        self._sleepers.add(sleeper)
        try:
            await asyncio.wait({sleeper})
        finally:
            self._sleepers.discard(sleeper)
            sleeper.cancel()
        if sleeper.cancelled():
            raise ClientClosed(_WOKEN)
        sleeper.result()

    async def close(self, *, politely: bool = True) -> None:
        """Wake the sends that wait, let the pass under way end, and close the connection (with QUIT, if politely)."""
        self._belong_here()
        self.closed = True
        for sleeper in self._sleepers:
            sleeper.cancel()
        async with self._lock:
            if self._idle is not None:
                self._idle.cancel()
            await self._hang_up(politely=politely)

    def _retire(self) -> None:
        if not self._lock.locked():
            self._retiring = asyncio.ensure_future(self._retire_politely())

    async def _retire_politely(self) -> None:
        async with self._lock:
            await self._hang_up(politely=True)

    async def _hang_up(self, *, politely: bool) -> None:
        if self.connection.is_open and politely:
            with suppress(aiosmtplib.SMTPException, OSError):  # nothing depends on the answer
                await self.connection.quit(_QUIT_TIMEOUT)
        else:
            self.connection.abort()

    def _belong_here(self) -> None:
        """An open connection lives in one event loop; a closed one can move to another."""
        loop = asyncio.get_running_loop()
        if self._loop is loop:
            return
        if self._loop is not None and self._loop.is_closed():
            self.connection.forget()  # what was left open there ended with it
        if self.connection.is_open and self.connection.client.loop is not loop:
            msg = "the client is connected in another event loop: close it there, or make one client for each loop"
            raise ValueError(msg)
        self._loop, self._lock = loop, asyncio.Lock()
