"""Which connection a send gets, and when: in the order of asking, within what the server has let us know."""

from __future__ import annotations

import asyncio
import math
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

from smtpretry import log
from smtpretry.errors import ClientClosed

from .alarms import Alarms
from .connection_events import ConnectionEvents
from .connections import Connections
from .limits import Limits
from .rate_limiter import RateLimiter
from .shared import SharedPace
from .waiting import Request, Stalled, Waiting, Wish

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from contextlib import AbstractAsyncContextManager
    from types import TracebackType

    from smtpretry.observer import Observer
    from smtpretry.policy import RetryPolicy
    from smtpretry.replies.reply import Said

    from .connection import Connection
    from .rate_limiter import Manager

_CLOSED = "the client was closed; `async with` (Blocking: `with`) opens it again"
_WOKEN = "the client was closed while the send was waiting; exc.delivery holds what is pending"


def _endless() -> float:
    return math.inf


class Pool(Limits):
    """Connections, each lent to one pass at a time in the order of asking, and closed with QUIT when nobody wants it.

    Args:
        make: makes a connection.
        size: how many there may be.
        idle_timeout: seconds after which one that nobody uses is closed; None for never.
        policy: its clock, its way to wait, and its patience.
        observer: who is told of connections and pauses.
        limiter: the caller's own, entered for each transaction before a connection is lent.

    Attributes:
        closed: whether it lends nothing.
        loop: the event loop that it belongs to.
    """

    def __init__(
        self,
        make: Callable[[], Connection],
        size: int,
        idle_timeout: float | None,
        policy: RetryPolicy,
        observer: Observer,
        *,
        limiter: Manager | None = None,
    ) -> None:
        super().__init__(size, policy.patience)
        self.closed = False
        self._limiter, self._clock = None if limiter is None else RateLimiter(limiter), policy.clock
        self.observer, self._events = observer, ConnectionEvents(observer)
        self._connections = Connections(make, idle_timeout, self._events.look_at, self._use_returned)
        self._resting: dict[Connection, float] = {}  # and for how many seconds
        self._waiting = Waiting(self._is_full)
        self._alarms = Alarms(policy.sleep)  # of sends that wait for their next try
        self._own_alarms = Alarms(policy.sleep)  # for the pace, and for connections that rest
        self._slot: asyncio.Future[None] | None = None  # the alarm for the next one
        self.loop: asyncio.AbstractEventLoop | None = None
        self._all_back = asyncio.Event()

    @property
    def open(self) -> int:
        """How many connections are open."""
        return sum(connection.is_open for connection in tuple(self._connections.all))

    @property
    def in_use(self) -> int:
        """How many connections are used, or being opened."""
        return self._connections.in_use

    @property
    def waiting(self) -> int:
        """How many sends wait: for a connection, or until they may try again."""
        return self._waiting.sends + len(self._alarms) + len(self._limiter or ())

    @property
    def server(self) -> str:
        """Where its connections go, such as "smtp.example.com:587"; empty where that is not known yet."""
        return self._events.server or self._connections.all[0].server

    def look_at(self, connection: Connection) -> str:
        """Note whether it was opened or closed since the last look; return the server at its other end."""
        return self._events.look_at(connection)

    def server_of(self, connection: Connection) -> str:
        """The server at the other end of an open connection."""
        return self._events.server_of(connection)

    @property
    def is_probing(self) -> bool:
        """Whether a single connection is finding out if the server works again."""
        return (self.failures > 0 or self.pace.probing) and self._connections.in_use > 0

    @property
    def is_stalled(self) -> bool:
        """Whether the server answers none of those who have the connections."""
        return self._waiting.is_stalled

    @property
    def is_paced(self) -> bool:
        """Whether each transaction has to ask for a turn of its own."""
        return self._limiter is not None or self.pace.is_known

    def _note_pause(self, now: float, until: float, reason: Said) -> None:
        self.observer.paused(self.server, now, until, reason, for_the_first=not self._events.has_opened)

    def _note_end_of_pause(self) -> None:
        self.observer.resumed(self.server)

    @property
    def others(self) -> int:
        """How many connections are open or in use beside the one in use here."""
        return self._connections.in_use - 1 - len(self._resting) + self._connections.idle

    def rest(self, connection: Connection, seconds: float) -> None:
        """Lend that one again only so long after its pass. The others go on."""
        self._resting[connection] = seconds

    def adopt(self, until: float, failures: int, reason: Said | None) -> None:
        """Take over what another pool knows of the same server."""
        if failures and reason is not None and until > max(self.observer.clock(), self.resumes_at):
            self._note_pause(self.observer.clock(), until, reason)
        elif self.failures and not failures:
            self._note_end_of_pause()
        self.resumes_at, self.failures, self.reason = until, failures, reason or self.reason
        self.is_hopeless = self.is_hopeless and failures > 0
        self._serve()
        self.observer.call_hooks()

    def _share_pace(self) -> SharedPace:
        """Keep the pace together with other workers from now on; return it."""
        if not isinstance(self.pace, SharedPace):
            self.pace = SharedPace(self.pace)
        return self.pace

    def news(self) -> Callable[[str | None], str | None] | None:
        """What the clients of other workers do not know; None where that is nothing."""
        pace = self._share_pace()
        return pace.take_news(self.reason) if pace.has_news else None

    @property
    def without_turn(self) -> int:
        """How many sends wait for a turn in that pace."""
        return self._share_pace().without_turn(self._waiting.sends)

    def follow(self, stored: str | None, turns: Sequence[float]) -> None:
        """Keep the pace that several workers keep, with these turns in it."""
        said = self._share_pace().follow(stored, turns, self._clock())
        self.reason = self.reason or said
        self._slot = None  # its alarm may be too late now
        self._serve()

    @property
    def connections(self) -> Sequence[Connection]:
        """All of them, in use or not."""
        return self._connections.all

    def lend(
        self, wish: Wish = Wish.CONNECTION, *, first: bool = False, timeout: Callable[[], float] = _endless
    ) -> AbstractAsyncContextManager[Connection]:
        """Lend a connection, open or not, for one pass. Whatever interrupts the pass closes it.

        Args:
            wish: `Wish.SEND` for a message, which waits for the pace, too.
            first: before all who wait.
            timeout: gives the seconds to wait while nobody else gets one, either.

        Raises:
            ClientClosed: the pool was closed.
            Stalled: there was none in that time.
            ValueError: a connection belongs to another event loop.
        """
        self._belong_here()
        if self._limiter is None or wish is not Wish.SEND:
            return _Loan(self, wish, first=first, timeout=timeout)
        return self._lend_at_pace(self._limiter, first=first, timeout=timeout)

    @asynccontextmanager
    async def _lend_at_pace(
        self, limiter: RateLimiter, *, first: bool, timeout: Callable[[], float]
    ) -> AsyncIterator[Connection]:
        """Lend for one message when the caller's limiter lets it through; at once where the server wants nothing."""
        async with AsyncExitStack() as stack:
            is_closed = self.closed or self.is_closed(self._clock())
            may_go = not is_closed and await limiter.enter(stack)
            wish = Wish.SEND if may_go else Wish.CONNECTION
            yield await stack.enter_async_context(_Loan(self, wish, first=first, timeout=timeout))

    async def room(self) -> None:
        """Wait until fewer sends wait for a connection than there may be connections."""
        if len(self._waiting) >= self.size:
            place = self._waiting.ask(Wish.ROOM)
            self._serve()
            await place.granted

    def warn_if_slow(self) -> asyncio.TimerHandle:
        """Say so where a connection is not opened in time; to be cancelled when it is, or has failed."""
        seconds = log.LONG if self._events.has_opened else log.SOON
        return asyncio.get_running_loop().call_later(
            seconds, lambda: self.observer.still_connecting(self.server, seconds)
        )

    def alarm(self, seconds: float) -> asyncio.Future[None]:
        """What to await to wait, holding nothing; it raises `ClientClosed` as soon as the pool is closed."""
        self._belong_here()
        if self.closed:
            raise ClientClosed(_CLOSED)
        return self._alarms.set(seconds)

    @property
    def is_connected(self) -> bool:
        """Whether a connection is open."""
        return self.open > 0

    async def hang_up(self) -> None:
        """Close the connections that nobody uses, with QUIT."""
        await self._connections.hang_up()

    async def close(self, *, politely: bool = True) -> None:
        """Wake the sends that wait, let the passes under way end, and close (with QUIT, if politely)."""
        self._belong_here()
        self.closed = True
        for alarms in (self._alarms, self._own_alarms):
            alarms.stop(partial(ClientClosed, _WOKEN))
        if self._limiter is not None:
            self._limiter.let_go()
        for request in self._waiting.clear():
            request.granted.set_result(None)
        while self._connections.in_use:
            self._all_back.clear()
            await self._all_back.wait()
        await self._connections.hang_up(politely=politely)
        if self.closed:  # not opened again meanwhile
            self._connections.stop()
            self._reset_limit()

    async def acquire(self, wish: Wish, *, first: bool, timeout: Callable[[], float]) -> Connection:
        """Wait in line for a connection; see `lend`."""
        if self.closed:
            raise ClientClosed(_CLOSED)
        now = self._clock()
        is_free = not self._waiting.next() and not self.pace.is_known and now >= self.opens_at
        if is_free and not self._is_full():
            return self._take(wish, now)
        request = self._waiting.ask(wish, first=first, timeout=timeout())
        self._serve()
        granted = request.granted
        try:
            connection = await granted
        except (asyncio.CancelledError, Stalled):
            if not granted.cancelled() and granted.exception() is None and (connection := granted.result()) is not None:
                self.release(connection)  # it came with the cancellation
            else:
                self._serve()  # who is next may want less
            raise
        if connection is None:
            raise ClientClosed(_CLOSED)
        return connection

    def release(self, connection: Connection) -> None:
        """Take back what was lent."""
        if connection not in self._resting:
            self._connections.put(connection)
        elif self.closed:
            self._rested(connection)
        else:
            self._own_alarms.set(self._resting[connection]).add_done_callback(lambda _: self._rested(connection))

    def _use_returned(self) -> None:
        self._serve()
        self.observer.call_hooks()

    def _rested(self, connection: Connection) -> None:
        del self._resting[connection]
        self._connections.put(connection)

    def _serve(self) -> None:
        """Lend what is free to those who wait, in the order in which they came."""
        if not self._connections.in_use:
            self._all_back.set()
        if not self._waiting and self._limiter is None:
            return
        now = self._clock()
        if self._limiter is not None and self.is_closed(now):
            self._limiter.let_go()
        while (request := self._next(now)) is not None:
            if request.wish is Wish.ROOM:
                request.granted.set_result(None)
            elif self._is_full():
                break
            else:
                request.granted.set_result(self._take(request.wish, now))

    def _is_full(self) -> bool:
        """Whether all connections that there may be are in use."""
        return self._connections.in_use >= self._allowed

    def _next(self, now: float) -> Request | None:
        """Who is to be served next. In a pause everybody is: each is told of it, and waits elsewhere."""
        request = self._waiting.next()
        if request is None or request.wish is not Wish.SEND or self.is_closed(now):
            return request
        if (slot := self.pace.next_slot(now)) <= now:
            return request
        if self._slot is None or self._slot.done():
            self._slot = self._own_alarms.set(slot - now)
            self._slot.add_done_callback(lambda _: self._serve())
        return self._waiting.next_unpaced()

    def _take(self, wish: Wish, now: float) -> Connection:
        connection = self._connections.take()
        self._waiting.still = 0.0
        connection.let_through_at = None
        if wish is Wish.SEND and now >= self.opens_at:
            self.pace.let_through(now)
            connection.let_through_at = now
        return connection

    def _belong_here(self) -> None:
        """All of it lives in one event loop at a time."""
        loop = asyncio.get_running_loop()
        if self.loop is loop:
            return
        if self.loop is not None and self.loop.is_closed():
            self._connections.forget()
        elif self.loop is not None and (self.in_use or self.waiting or self._waiting.next()):
            msg = "the client is in use in another event loop: close it there, or make one client for each loop"
            raise ValueError(msg)
        self._connections.move(loop)
        self.loop, self._all_back = loop, asyncio.Event()
        self._reset_limit()
        self._resting.clear()
        self._waiting.clear()
        if self._limiter is not None:
            self._limiter.forget()
        self._alarms.forget()
        self._own_alarms.forget()
        self._slot = None


class _Loan:
    """A connection for one pass, and back."""

    def __init__(self, pool: Pool, wish: Wish, *, first: bool, timeout: Callable[[], float]) -> None:
        self._pool, self._wish, self._first, self._timeout = pool, wish, first, timeout

    async def __aenter__(self) -> Connection:
        connection = self._connection = await self._pool.acquire(self._wish, first=self._first, timeout=self._timeout)
        self._loop = self._pool.loop
        return connection

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pool, connection = self._pool, self._connection
        if pool.loop is not self._loop:
            return  # its loop ended in the midst of it, and another one has the connection
        try:
            if error is None:
                connection.reused = True
            else:
                connection.abort()
        finally:
            pool.release(connection)
