"""Which connection a send gets, how many there are, and the pause that a struggling server imposes on all of them."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

from smtpretry import log
from smtpretry.errors import ClientClosed

from .alarms import Alarms
from .register import Register

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from smtpretry.observer import Observer
    from smtpretry.replies.reply import Said

    from .connection import Connection

_CLOSED = "the client was closed; `async with` opens it again"
_WOKEN = "the client was closed while the send was waiting; exc.delivery holds what is pending"


class Pool:
    """Connections, each lent to one pass at a time in the order of asking, and closed with QUIT when nobody wants it.

    Attributes:
        limit: how many may be in use now; fewer than `size` for a while where the server said that there are too many.
        resumes_at: until when nothing is tried, on the policy's clock, because the server said so.
        reason: what the server said then.
        failures: how many times in a row it said so. While there is one, a single connection finds out if it is over.
        observer: who is told of connections and pauses.
    """

    def __init__(
        self,
        make: Callable[[], Connection],
        size: int,
        idle_timeout: float | None,
        sleep: Callable[[float], Awaitable[None]] | None,
        observer: Observer,
    ) -> None:
        self.size = self.limit = size
        self.idle_timeout = idle_timeout
        self.resumes_at = 0.0
        self.reason: Said | None = None
        self.failures = 0
        self.closed = False
        self.observer, self._register = observer, Register(observer)
        self._make = make
        self._connections = [make()]  # all of them
        self._free = deque(self._connections)  # those that nobody uses: closed ones, then the open ones, last used last
        self._lent = 0
        self._waiting: deque[asyncio.Future[Connection | None]] = deque()
        self._alarms = Alarms(sleep)
        self._retiring = set[asyncio.Task[None]]()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._all_back = asyncio.Event()
        self._places: set[asyncio.Future[Connection | None]] = set()  # in `_waiting`: they want no connection
        self._sweeper: asyncio.TimerHandle | None = None
        self._widener: asyncio.TimerHandle | None = None

    @property
    def is_connected(self) -> bool:
        """Whether a connection is open."""
        return any(connection.is_open for connection in self._connections)

    @property
    def open(self) -> int:
        """How many connections are open."""
        return sum(connection.is_open for connection in self._connections)

    @property
    def in_use(self) -> int:
        """How many connections are used, or being opened."""
        return self._lent

    @property
    def waiting(self) -> int:
        """How many sends wait: for a connection, or until they may try again."""
        turns = sum(not turn.done() and turn not in self._places for turn in tuple(self._waiting))
        return turns + len(self._alarms)

    @property
    def server(self) -> str:
        """Where its connections go, such as "smtp.example.com:587"; empty where that is not known yet."""
        return self._register.server or self._connections[0].server

    def look_at(self, connection: Connection) -> str:
        """Note whether it was opened or closed since the last look; return the server at its other end."""
        return self._register.look_at(connection)

    @property
    def is_probing(self) -> bool:
        """Whether a single connection is finding out if the server works again."""
        return self.failures > 0 and self._lent > 0

    def strike(self, now: float) -> int:
        """Which failure of the server in a row this is. What comes during a pause belongs to the one that began it."""
        return max(1, self.failures + (now >= self.resumes_at))

    def pause(self, now: float, until: float, reason: Said) -> None:
        """Let nothing be tried until then."""
        self._tell_pause(now, until, reason)
        self.failures = self.strike(now)
        self.resumes_at, self.reason = max(self.resumes_at, until), reason

    def resume(self) -> None:
        """The server works: the next pause begins from a short one again."""
        if self.failures:
            self.observer.resumed(self.server)
            self.failures, self.limit = 0, self.size  # what was taken for too many connections was an outage
            self._serve()

    def _tell_pause(self, now: float, until: float, reason: Said) -> None:
        if until > max(now, self.resumes_at):
            self.observer.paused(self.server, now, until, reason, for_the_first=not self._register.has_opened)

    @property
    def others(self) -> int:
        """How many connections are open or in use beside the one in use here."""
        return self._lent - 1 + sum(connection.is_open for connection in self._free)

    def crowd(self, seconds: float) -> None:
        """Make do with those for so long."""
        self.limit = self.others
        self._widen_in(seconds)

    def adopt(self, until: float, failures: int, reason: Said | None) -> None:
        """Take over what another pool knows of the same server."""
        if failures and reason is not None:
            self._tell_pause(self.observer.clock(), until, reason)
        elif self.failures:
            self.observer.resumed(self.server)
        self.resumes_at, self.failures, self.reason = until, failures, reason
        self._serve()
        self.observer.tell()

    @asynccontextmanager
    async def lend(self) -> AsyncIterator[Connection]:
        """Lend a connection, open or not, for one pass. Whatever interrupts the pass closes it.

        Raises:
            ClientClosed: the pool was closed.
            ValueError: a connection belongs to another event loop.
        """
        self._belong_here()
        if self.closed:
            raise ClientClosed(_CLOSED)
        connection = (self._take() if not self._waiting else None) or await self._my_turn()
        connection.watch()
        loop = self._loop
        try:
            yield connection
            connection.heed()
            connection.reused = True
        except BaseException:
            if self._loop is loop:  # else its loop ended in the midst of it, and another one has the connection
                connection.abort()
            raise
        finally:
            if self._loop is loop:
                self._give_back(connection)

    def warn_if_slow(self) -> asyncio.TimerHandle:
        """Say so where a connection is not opened in time; to be cancelled when it is, or has failed."""
        loop = asyncio.get_running_loop()
        return loop.call_later(log.LONG, lambda: self.observer.still_connecting(self.server))

    def alarm(self, seconds: float) -> asyncio.Future[None]:
        """What to await to wait, holding nothing; it raises `ClientClosed` as soon as the pool is closed."""
        if self.closed:
            raise ClientClosed(_CLOSED)
        return self._alarms.set(seconds)

    async def close(self, *, politely: bool = True) -> None:
        """Wake the sends that wait, let the passes under way end, and close (with QUIT, if politely)."""
        self._belong_here()
        self.closed = True
        self._alarms.stop(partial(ClientClosed, _WOKEN))
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
        while self._lent:
            await self._all_back.wait()
        await self.hang_up(politely=politely)
        if self.closed:  # not opened again meanwhile
            for timer in (self._sweeper, self._widener):
                if timer is not None:
                    timer.cancel()  # or the loop would keep all of this until they are due
            self._sweeper = self._widener = None
            self.limit = self.size

    async def hang_up(self, *, politely: bool = True) -> None:
        """Close the connections that nobody uses."""
        free = list(self._free)
        self._free.clear()
        await asyncio.gather(*(self._retire(connection, politely=politely) for connection in free))

    def _take(self) -> Connection | None:
        """The open connection that was used last, or one to open; None where as many are in use as may be."""
        if self._lent >= (1 if self.failures else self.limit):
            return None
        if not self._free:
            self._connections.append(self._make())
            self._free.append(self._connections[-1])
        self._lent += 1
        self._all_back.clear()
        return self._free.pop()

    async def room(self) -> None:
        """Wait until fewer sends wait for a connection than there may be connections."""
        if len(self._waiting) >= self.size:
            place: asyncio.Future[Connection | None] = asyncio.get_running_loop().create_future()
            self._places.add(place)
            place.add_done_callback(self._places.discard)
            self._waiting.append(place)
            self._serve()
            await place

    async def _my_turn(self) -> Connection:
        turn: asyncio.Future[Connection | None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._serve()
        try:
            connection = await turn
        except asyncio.CancelledError:
            if not turn.cancelled() and turn.exception() is None and (connection := turn.result()) is not None:
                self._give_back(connection)  # it came with the cancellation
            raise
        if connection is None:
            raise ClientClosed(_CLOSED)
        return connection

    def _give_back(self, connection: Connection) -> None:
        if self.observer.hooks:
            self._register.look_at(connection)
        self._lent -= 1
        if not connection.is_open:
            self._free.appendleft(connection)
        else:
            self._free.append(connection)
            connection.idle_since = asyncio.get_running_loop().time()
            if self._sweeper is None:
                self._sweep_at(connection.idle_since)
        if not self._lent:
            self._all_back.set()
        self._serve()
        self.observer.tell()

    def _serve(self) -> None:
        """Lend what is free to those who wait, in the order in which they came."""
        while self._waiting:
            if self._waiting[0].done():  # cancelled
                self._waiting.popleft()
            elif self._waiting[0] in self._places:  # it wants no connection
                self._waiting.popleft().set_result(None)
            else:
                try:
                    connection = self._take()
                except Exception as error:  # noqa: BLE001 - the function that makes clients: whoever asked is told
                    self._waiting.popleft().set_exception(error)
                    continue
                if connection is None:
                    break
                self._waiting.popleft().set_result(connection)

    def _retire(self, connection: Connection, *, politely: bool = True) -> asyncio.Task[None]:
        """Close one that was taken out of `_free`. It comes back even where the task is cancelled before it begins."""

        def back(task: asyncio.Task[None]) -> None:
            self._retiring.discard(task)
            connection.abort()
            self._give_back(connection)

        self._lent += 1
        self._all_back.clear()
        retiring = asyncio.ensure_future(connection.hang_up(politely=politely))
        self._retiring.add(retiring)
        retiring.add_done_callback(back)
        return retiring

    def _sweep_at(self, idle_since: float) -> None:
        if self.idle_timeout is not None:
            self._sweeper = asyncio.get_running_loop().call_at(idle_since + self.idle_timeout, self._sweep)

    def _sweep(self) -> None:
        """Close the connections that have been idle for too long."""
        self._sweeper = None
        now = asyncio.get_running_loop().time()
        for connection in self._free:
            self._register.look_at(connection)  # the server may have closed it
        self.observer.tell()
        for connection in [connection for connection in self._free if connection.is_open]:
            if connection.idle_since + (self.idle_timeout or 0) > now:
                self._sweep_at(connection.idle_since)
                break
            self._free.remove(connection)
            self._retire(connection)

    def _widen_in(self, seconds: float) -> None:
        if self._widener is not None:
            self._widener.cancel()
        self._widener = asyncio.get_running_loop().call_later(seconds, self._widen, seconds)

    def _widen(self, seconds: float) -> None:
        """Try with one connection more."""
        self.limit = min(self.limit + 1, self.size)
        if self.limit < self.size:
            self._widen_in(seconds)
        self._serve()

    def _belong_here(self) -> None:
        """An open connection lives in one event loop; a closed one can move to another."""
        loop = asyncio.get_running_loop()
        if self._loop is loop:
            return
        if self._loop is not None and self._loop.is_closed():
            for connection in self._connections:
                connection.forget()  # what was left open there ended with it
        elif self._loop is not None and (self._lent or self._waiting or len(self._alarms)):
            msg = "the client is in use in another event loop: close it there, or make one client for each loop"
            raise ValueError(msg)
        if any(connection.is_open and connection.client.loop is not loop for connection in self._connections):
            msg = "the client is connected in another event loop: close it there, or make one client for each loop"
            raise ValueError(msg)
        self._loop, self._all_back = loop, asyncio.Event()
        self._free, self._lent, self.limit = deque(self._connections), 0, self.size
        self._waiting.clear()
        self._alarms.forget()
        self._sweeper = self._widener = None
