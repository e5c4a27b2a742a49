"""The connections of a client: which of them nobody uses, and when those are closed."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from .connection import Connection


_LATE = 1.0  # seconds that the sweeper may be late on an event loop that is merely busy


class Connections:
    """Connections to take and to put back. An open one is taken first, and of those the one that was used last.

    Args:
        make: makes one, not open yet.
        idle_timeout: seconds after which an open one that nobody uses is closed with QUIT; None for never.
        look: called with each that comes back, or is found idle: the server may have closed it.
        on_put: called after that.

    Attributes:
        all: the connections, in use or not.
    """

    def __init__(
        self,
        make: Callable[[], Connection],
        idle_timeout: float | None,
        look: Callable[[Connection], object],
        on_put: Callable[[], None],
    ) -> None:
        self.idle_timeout = idle_timeout
        self._make, self._look, self._on_put = make, look, on_put
        self.all = [make()]
        self._free = deque(self.all)  # closed ones, then the open ones, last used last
        self._retiring = set[asyncio.Task[None]]()
        self._sweeper: asyncio.TimerHandle | None = None

    @property
    def in_use(self) -> int:
        """How many are in use, or being closed."""
        return len(self.all) - len(self._free)

    @property
    def idle(self) -> int:
        """How many are open, and used by nobody."""
        return sum(connection.is_open for connection in self._free)

    def take(self) -> Connection:
        """The open one that was used last, or one to open.

        Where the event loop stood still for longer than `idle_timeout`, the sweeper comes too late. A NAT on the way
        may have forgotten the connection, and nothing would ever be answered on it.
        """
        if not self._free:
            self.all.append(self._make())
            return self.all[-1]
        connection = self._free.pop()
        if connection.is_open and self._is_overdue(connection, asyncio.get_running_loop().time() - _LATE):
            connection.abort()
            connection.give_credit()
        return connection

    def put(self, connection: Connection) -> None:
        """Take one back."""
        self._look(connection)
        if not connection.is_open:
            self._free.appendleft(connection)
        else:
            self._free.append(connection)
            connection.idle_since = asyncio.get_running_loop().time()
            if self._sweeper is None:
                self._sweep_at(connection.idle_since)
        self._on_put()

    async def hang_up(self, *, politely: bool = True) -> None:
        """Close those that nobody uses: with QUIT, if politely."""
        free = list(self._free)
        self._free.clear()
        await asyncio.gather(*(self._retire(connection, politely=politely) for connection in free))

    def stop(self) -> None:
        """Look after them no more: a timer would keep all of this until it is due."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None

    def forget(self) -> None:
        """Let go of what was left open in an event loop that has ended."""
        for connection in self.all:
            connection.forget()

    def move(self, loop: asyncio.AbstractEventLoop) -> None:
        """Belong to that event loop from now on. An open connection lives in one; a closed one can move to another.

        Raises:
            ValueError: one is open in another loop.
        """
        if any(connection.is_open and connection.client.loop is not loop for connection in self.all):
            msg = "the client is connected in another event loop: close it there, or make one client for each loop"
            raise ValueError(msg)
        self._free, self._sweeper = deque(self.all), None

    def _retire(self, connection: Connection, *, politely: bool = True) -> asyncio.Task[None]:
        """Close one that was taken out of `_free`. It comes back even where the task is cancelled before it begins."""

        def back(task: asyncio.Task[None]) -> None:
            self._retiring.discard(task)
            connection.abort()
            self.put(connection)

        retiring = asyncio.ensure_future(connection.hang_up(politely=politely))
        self._retiring.add(retiring)
        retiring.add_done_callback(back)
        return retiring

    def _sweep_at(self, idle_since: float) -> None:
        if self.idle_timeout is not None:
            self._sweeper = asyncio.get_running_loop().call_at(idle_since + self.idle_timeout, self._sweep)

    def _is_overdue(self, connection: Connection, now: float) -> bool:
        return self.idle_timeout is not None and connection.idle_since + self.idle_timeout <= now

    def _sweep(self) -> None:
        """Close those that have been idle for too long."""
        self._sweeper = None
        now = asyncio.get_running_loop().time()
        for connection in self._free:
            self._look(connection)
        for connection in [connection for connection in self._free if connection.is_open]:
            if not self._is_overdue(connection, now):
                self._sweep_at(connection.idle_since)
                break
            self._free.remove(connection)
            self._retire(connection)
        self._on_put()
