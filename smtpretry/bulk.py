"""Many messages through one client: drawn as fast as they are sent, told in the order in which they end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Coroutine, Iterable
from contextlib import aclosing
from typing import Any, Generic, TypeVar

from .delivery import Delivery
from .errors import ClientClosed, delivery_of

T = TypeVar("T")


class Bulk(Generic[T]):
    """The sends that are under way.

    A message is drawn when there is `room`, and fewer than `concurrency` are under way or not yet yielded. What cannot
    be sent is told at the end, and holds up nobody else.
    """

    def __init__(
        self,
        deliver: Callable[[T], Coroutine[Any, Any, Delivery]],
        room: Callable[[], Awaitable[None]],
        concurrency: int,
    ) -> None:
        self._deliver, self._room = deliver, room
        self._slots = asyncio.Semaphore(concurrency)
        self._sends = set[asyncio.Task[Delivery]]()
        self._ended: asyncio.Queue[asyncio.Task[Delivery] | None] = asyncio.Queue()
        self._failures = list[Exception]()
        self._closed: ClientClosed | None = None
        self._feeding: asyncio.Task[None]

    async def run(self, messages: Iterable[T] | AsyncIterable[T]) -> AsyncGenerator[Delivery, None]:
        """Send each of the messages, and yield what became of it."""
        self._feeding = feeding = asyncio.ensure_future(self._feed(messages))
        feeding.add_done_callback(lambda _: self._ended.put_nowait(None))
        del messages
        try:
            while self._sends or not feeding.done():
                send = await self._ended.get()
                if send is not None and (delivery := self._taken(send)) is not None:
                    yield delivery
            self._conclude(None if feeding.cancelled() else feeding.exception())
        finally:
            feeding.cancel()
            try:
                await asyncio.sleep(0)  # a message that was just drawn becomes a delivery, or the log could not name it
            finally:
                for send in self._sends:
                    send.cancel()
                await asyncio.gather(feeding, *self._sends, return_exceptions=True)

    async def _feed(self, messages: Iterable[T] | AsyncIterable[T]) -> None:
        number = 0
        await self._slots.acquire()
        async with aclosing(_each(messages)) as source:
            del messages  # a generator that nobody draws from any more ends at once, and closes what it reads from
            async for message in source:
                number += 1
                send = asyncio.ensure_future(self._send(message, number))
                self._sends.add(send)
                send.add_done_callback(self._ended.put_nowait)
                del message, send  # what waits, waits as bytes
                await asyncio.sleep(0)  # it takes a connection, or its place in the queue for one
                await self._slots.acquire()
                await self._room()

    async def _send(self, message: T, number: int) -> Delivery:
        sending = self._deliver(message)
        del message
        try:
            return await sending
        except ClientClosed as error:
            self._closed = self._closed or error
            self._feeding.cancel()  # which may wait for the next message
            raise
        except asyncio.CancelledError as error:
            if (task := asyncio.current_task()) is None or task.cancelling():
                raise
            msg = "the send was cancelled from within: by what pace= or the function that makes clients awaits"
            raise self._told_at_the_end(RuntimeError(msg), number) from error
        except Exception as error:
            self._told_at_the_end(error, number)
            raise

    def _told_at_the_end(self, error: Exception, number: int) -> Exception:
        error.add_note(f"smtpretry: it was message {number} of send_many")
        self._failures.append(error)
        return error

    def _conclude(self, source: BaseException | None) -> None:
        """Raise what went wrong: with the client, with the iterable, with single messages."""
        if self._closed is not None:
            raise self._closed
        if source is not None and (not self._failures or not isinstance(source, Exception)):
            raise source
        if self._failures:
            count = len(self._failures)
            msg = f"{count} message{'s' * (count > 1)} could not be sent at all; the others were yielded"
            if isinstance(source, Exception):
                self._failures.append(source)
                msg += ", until the iterable raised"
            raise ExceptionGroup(msg, self._failures)

    def _taken(self, send: asyncio.Task[Delivery]) -> Delivery | None:
        """What became of one; None where it never was a delivery."""
        self._sends.remove(send)
        self._slots.release()
        if send.cancelled():
            return None
        failure = send.exception()
        return send.result() if failure is None else delivery_of(failure)


async def _each(messages: Iterable[T] | AsyncIterable[T]) -> AsyncGenerator[T, None]:
    if isinstance(messages, AsyncIterable):
        async for message in messages:
            yield message
    else:
        for message in messages:
            yield message
