"""Those who wait for a connection, in the order in which they asked."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .connection import Connection


class Wish(Enum):
    """What is waited for."""

    TURN = "TURN"  # a connection, when the pace lets the next message through
    CONNECTION = "CONNECTION"  # a connection: no message is sent
    PLACE = "PLACE"  # that those who asked before have got what they wanted


@dataclass(eq=False, slots=True)
class Asked:
    """One who waits: `granted` is the connection, or None where there is none to come."""

    wish: Wish
    granted: asyncio.Future[Connection | None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Waiting:
    """The line. Only who wants a turn waits for the pace; who wants a connection alone passes those by meanwhile."""

    def __init__(self) -> None:
        self._line = deque[Asked]()
        self._unpaced = deque[Asked]()  # of the line: who wants a connection alone

    def __len__(self) -> int:
        """How many there are; some of them may have been cancelled."""
        return len(self._line)

    @property
    def sends(self) -> int:
        """How many of them wait for a connection still."""
        return sum(asked.wish is not Wish.PLACE and not asked.granted.done() for asked in tuple(self._line))

    def ask(self, wish: Wish, *, first: bool = False) -> Asked:
        """Join the line: at its end, or before all others."""
        asked = Asked(wish)
        (self._line.appendleft if first else self._line.append)(asked)
        if wish is Wish.CONNECTION:
            _head(self._unpaced)  # or those who were served from `_line` would stay there
            self._unpaced.append(asked)
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
        return asked


def _head(line: deque[Asked]) -> Asked | None:
    """The first who still waits: who has been served or cancelled leaves."""
    while line and line[0].granted.done():
        line.popleft()
    return line[0] if line else None
