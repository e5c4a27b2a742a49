"""The rate limiter that the caller gives, `pace=`: a context manager, entered once for each message."""

from __future__ import annotations

import asyncio
import math
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from smtpretry import log

if TYPE_CHECKING:
    from types import TracebackType

Manager = AbstractAsyncContextManager[Any]


class RateLimiter:
    """Waits for the caller's limiter, until nobody needs to wait any more."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager
        self._waiting = set[asyncio.Timeout]()

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    async def enter(self, stack: AsyncExitStack) -> bool:
        """Wait until a message may go, and have the stack leave it; False where `let_go` came first."""
        waiting = asyncio.timeout(None)
        try:
            async with waiting:
                self._waiting.add(waiting)
                await self._manager.__aenter__()
                stack.push_async_exit(partial(_leave, self._manager))
        except TimeoutError:
            if not waiting.expired():
                raise
            return False
        finally:
            self._waiting.discard(waiting)
        return True

    def let_go(self) -> None:
        """Nobody waits any more."""
        while self._waiting:
            self._waiting.pop().reschedule(-math.inf)

    def forget(self) -> None:
        """Let go of what belongs to an event loop that has ended."""
        self._waiting.clear()


async def _leave(
    manager: Manager, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
) -> None:
    """Leave it. Whatever it makes of that, what became of the message is what counts."""
    try:
        await manager.__aexit__(kind, error, traceback)
    except Exception as failure:  # noqa: BLE001 - somebody else's code
        if failure is not error:
            log.pace_failed(failure)


def check_pace(pace: object) -> None:
    """Raise TypeError where it is nothing that can be entered."""
    if pace is not None and not isinstance(pace, AbstractAsyncContextManager):
        msg = (
            "pace is an asynchronous context manager that waits on entry, such as aiolimiter.AsyncLimiter(1, 1 / 14) "
            f"for 14 messages a second, not {pace!r}"
        )
        raise TypeError(msg)
