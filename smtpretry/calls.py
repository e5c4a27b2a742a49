"""What a thread without an event loop has a loop in another thread do, and waits for: `Call`, `Exchange`."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from . import log
from .delivery import Delivery

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator

    from .envelope import Message

T = TypeVar("T")

MOMENT: Final = 1.0
"""Seconds for what is broken off to end."""

_NO_MORE: Final = object()


class Call(Generic[T]):
    """What the loop does for a thread that waits for it. A bare lock is what wakes that thread fastest.

    What is logged of it is logged in that thread. A log handler that sends mail is locked while it waits for that mail,
    and the loop would wait for the lock for ever.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        begin: Callable[[], Coroutine[Any, Any, T]],
        put: Callable[[Callable[[], None] | None], None] | None = None,
    ) -> None:
        """`put` takes what is to be logged, and None for its end, where nobody calls `wait`."""
        self.error: BaseException | None = None
        self.ended = False
        self._result: T
        self._loop, self._begin, self._put = loop, begin, put
        self._lines: deque[Callable[[], None]] = deque()
        self._is_left = False
        self._news = threading.Lock()
        self._news.acquire()
        loop.call_soon_threadsafe(self._start)

    def wait(self, seconds: float | None) -> bool:
        """Wait for its end; returns whether it came in time."""
        until = None if seconds is None else time.monotonic() + seconds
        while self._news.acquire(timeout=-1 if until is None else _left(until)):
            ended = self.ended
            while self._lines:
                self._lines.popleft()()
            if ended:
                return True
        return False

    def result(self) -> T:
        """Return what it returned, or raise what it raised."""
        if self.error is not None:
            raise self.error
        return self._result

    def break_off(self) -> None:
        """Cancel it, and wait for a moment for what comes of that."""
        self._loop.call_soon_threadsafe(self._cancel)
        self.wait(MOMENT)
        self._is_left = True

    def _start(self) -> None:
        self._task = self._loop.create_task(self._do())

    async def _do(self) -> None:
        log.relay.set(self._hand_over)
        try:
            self._result = await self._begin()
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            self.error = error
        self.ended = True
        self._wake()
        if self._put is not None:
            self._put(None)

    def _hand_over(self, line: Callable[[], None]) -> None:
        """Have it logged where the call is waited for, if it still is."""
        if self.ended or self._is_left:
            line()
        elif self._put is not None:
            self._put(line)
        else:
            self._lines.append(line)
            self._wake()

    def _wake(self) -> None:
        if self._news.locked():  # only this thread lets go of it
            self._news.release()

    def _cancel(self) -> None:
        self._loop.call_soon(self._task.cancel)  # it has begun by then


class Exchange:
    """What goes between a thread that iterates over `send_many` and the loop: messages in, deliveries out."""

    def __init__(self, messages: Iterator[Message | Delivery]) -> None:
        self._messages = messages
        self._said: queue.SimpleQueue[asyncio.Future[Any] | Delivery | Callable[[], None] | None] = queue.SimpleQueue()

    def run(self, loop: asyncio.AbstractEventLoop, deliveries: AsyncGenerator[Delivery, None]) -> Iterator[Delivery]:
        """Hand over each message that is asked for, and yield each delivery."""
        call = Call(loop, partial(self._pass_on, deliveries), self._said.put)
        try:
            while (said := self._said.get()) is not None:
                if isinstance(said, asyncio.Future):
                    loop.call_soon_threadsafe(_answer, said, *self._draw())
                elif isinstance(said, Delivery):
                    yield said
                else:
                    said()
            call.result()
        finally:
            if not call.ended:
                call.break_off()
            while not self._said.empty():
                if callable(line := self._said.get()):
                    line()

    async def drawn(self) -> AsyncIterator[Message | Delivery]:
        """The messages, for the loop."""
        while True:
            asked = asyncio.get_running_loop().create_future()
            self._said.put(asked)
            message = await asked
            if message is _NO_MORE:
                return
            yield message
            del message  # what waits, waits as bytes

    async def _pass_on(self, deliveries: AsyncGenerator[Delivery, None]) -> None:
        async with contextlib.aclosing(deliveries):
            async for delivery in deliveries:
                self._said.put(delivery)

    def _draw(self) -> tuple[object, Exception | None]:
        try:
            return next(self._messages, _NO_MORE), None
        except Exception as error:  # noqa: BLE001 - send_many says when it is raised
            return None, error


def _left(until: float) -> float:
    return min(max(0.0, until - time.monotonic()), threading.TIMEOUT_MAX)


def _answer(asked: asyncio.Future[Any], message: object, error: Exception | None) -> None:
    if asked.done():  # nothing more is drawn
        return
    if error is None:
        asked.set_result(message)
    else:
        asked.set_exception(error)
