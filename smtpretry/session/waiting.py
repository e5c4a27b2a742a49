"""Those who wait for a connection, in the order in which they asked."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from .connection import Connection

_STILL: Final = 10.0  # seconds without a connection for anybody, after which the line counts as one that does not move
_LOOK: Final = 1.0  # seconds between two looks at the line


class Stalled(Exception):  # noqa: N818 - nobody outside sees it
    """The line does not move, for the server does not answer those who have the connections."""


class Wish(Enum):
    """What is waited for."""

    SEND = "SEND"  # a connection to send a message over, when the pace lets the next one through
    CONNECTION = "CONNECTION"  # a connection: no message is sent
    ROOM = "ROOM"  # that those who asked before have got what they wanted


@dataclass(eq=False, slots=True)
class Request:
    """One who waits: `granted` is the connection, or None where there is none to come.

    It waits `timeout` seconds from `since` on (the loop's time), and on as long as others still get connections.
    """

    wish: Wish
    timeout: float = math.inf
    since: float = field(default_factory=lambda: asyncio.get_running_loop().time())
    granted: asyncio.Future[Connection | None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Waiting:
    """The line. Only a request to SEND waits for the pace; one for a CONNECTION alone passes it meanwhile.

    Args:
        is_stuck: whether there is no connection for anybody now, because all are in use.

    Attributes:
        still: seconds since somebody has got a connection, where there is none for the next.
    """

    def __init__(self, is_stuck: Callable[[], bool]) -> None:
        self.still, self._is_stuck = 0.0, is_stuck
        self._line = deque[Request]()
        self._unpaced = deque[Request]()  # those of them for a CONNECTION alone
        self._guard: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """How many there are; some of them may have been cancelled."""
        return len(self._line)

    @property
    def is_stalled(self) -> bool:
        """Whether nobody has got a connection for long, and nobody gets one now."""
        return self.still >= _STILL and self._is_stuck()

    @property
    def sends(self) -> int:
        """How many of them wait for a connection still."""
        return sum(request.wish is not Wish.ROOM and not request.granted.done() for request in tuple(self._line))

    def ask(self, wish: Wish, *, first: bool = False, timeout: float = math.inf) -> Request:
        """Join the line: at its end, or before all others; for so many seconds where it does not move."""
        request = Request(wish, timeout)
        (self._line.appendleft if first else self._line.append)(request)
        if wish is Wish.CONNECTION:
            _head(self._unpaced)  # or those who were served from `_line` would stay there
            self._unpaced.append(request)
        if self._guard is None:
            self._watch()
        return request

    def next(self) -> Request | None:
        """Whose turn it is; None where nobody waits."""
        return _head(self._line)

    def next_unpaced(self) -> Request | None:
        """Whose turn it is where the pace lets no message through."""
        return _head(self._unpaced)

    def clear(self) -> list[Request]:
        """Send all of them away; return who they were."""
        waiting = [request for request in self._line if not request.granted.done()]
        self._line.clear()
        self._unpaced.clear()
        if self._guard is not None:
            self._guard.cancel()
            self._guard = None
        return waiting

    def _watch(self) -> None:
        self._guard = asyncio.get_running_loop().call_later(_LOOK, self._look)

    def _look(self) -> None:
        """Send those away whose time is over, where the line does not move."""
        self._guard = None
        self.still = self.still + _LOOK if self._is_stuck() else 0.0
        now = asyncio.get_running_loop().time()
        for request in self._line if self.still >= _STILL else ():
            if request.timeout <= min(self.still, now - request.since) and not request.granted.done():
                request.granted.set_exception(Stalled)
        if _head(self._line):
            self._watch()


def _head(line: deque[Request]) -> Request | None:
    """The first who still waits: who has been served or cancelled leaves."""
    while line and line[0].granted.done():
        line.popleft()
    return line[0] if line else None
