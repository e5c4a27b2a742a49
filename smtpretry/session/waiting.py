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

    TURN = "TURN"  # a connection, when the pace lets the next message through
    CONNECTION = "CONNECTION"  # a connection: no message is sent
    PLACE = "PLACE"  # that those who asked before have got what they wanted


@dataclass(eq=False, slots=True)
class Asked:
    """One who waits: `granted` is the connection, or None where there is none to come.

    It waits so many seconds, from `since` on (by the loop's time), and longer where the line has moved in those.
    """

    wish: Wish
    patience: float = math.inf
    since: float = field(default_factory=lambda: asyncio.get_running_loop().time())
    granted: asyncio.Future[Connection | None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Waiting:
    """The line. Only who wants a turn waits for the pace; who wants a connection alone passes those by meanwhile.

    Args:
        is_stuck: whether there is no connection for anybody now, because all are in use.

    Attributes:
        still: seconds since somebody has got a connection, where there is none for the next.
    """

    def __init__(self, is_stuck: Callable[[], bool]) -> None:
        self.still, self._is_stuck = 0.0, is_stuck
        self._line = deque[Asked]()
        self._unpaced = deque[Asked]()  # of the line: who wants a connection alone
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
        return sum(asked.wish is not Wish.PLACE and not asked.granted.done() for asked in tuple(self._line))

    def ask(self, wish: Wish, *, first: bool = False, patience: float = math.inf) -> Asked:
        """Join the line: at its end, or before all others; for so many seconds where it does not move."""
        asked = Asked(wish, patience)
        (self._line.appendleft if first else self._line.append)(asked)
        if wish is Wish.CONNECTION:
            _head(self._unpaced)  # or those who were served from `_line` would stay there
            self._unpaced.append(asked)
        if self._guard is None:
            self._watch()
        return asked

    def next(self) -> Asked | None:
        """Whose turn it is; None where nobody waits."""
        return _head(self._line)

    def next_unpaced(self) -> Asked | None:
        """Whose turn it is where the pace lets no message through."""
        return _head(self._unpaced)

    def clear(self) -> list[Asked]:
        """Send all of them away; return who they were."""
        asked = [one for one in self._line if not one.granted.done()]
        self._line.clear()
        self._unpaced.clear()
        if self._guard is not None:
            self._guard.cancel()
            self._guard = None
        return asked

    def _watch(self) -> None:
        self._guard = asyncio.get_running_loop().call_later(_LOOK, self._look)

    def _look(self) -> None:
        """Send those away whose time is over, where the line does not move."""
        self._guard = None
        self.still = self.still + _LOOK if self._is_stuck() else 0.0
        now = asyncio.get_running_loop().time()
        for asked in self._line if self.still >= _STILL else ():
            if asked.patience <= min(self.still, now - asked.since) and not asked.granted.done():
                asked.granted.set_exception(Stalled)
        if _head(self._line):
            self._watch()


def _head(line: deque[Asked]) -> Asked | None:
    """The first who still waits: who has been served or cancelled leaves."""
    while line and line[0].granted.done():
        line.popleft()
    return line[0] if line else None
