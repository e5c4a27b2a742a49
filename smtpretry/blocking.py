"""The client for code without an event loop: `Blocking`. Its loop runs in a thread, one for the whole process."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import os
import threading
import weakref
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar, cast

from .calls import MOMENT, Call, Exchange
from .checks import check_messages, check_timeout
from .client import RetryingSMTP
from .errors import delivery_of, tell
from .log import here

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Iterator
    from types import TracebackType

    from .delivery import Delivery
    from .envelope import Message
    from .policy import RetryPolicy
    from .stats import Stats

P = ParamSpec("P")
T = TypeVar("T")


class _Loop:
    """The event loop of this process, in a daemon thread that begins with the first call."""

    def __init__(self) -> None:
        self._beginning = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def begin(self) -> asyncio.AbstractEventLoop:
        """The loop, which runs.

        Raises:
            RuntimeError: the thread that asks runs an event loop itself, or is logging what came of a mail.
        """
        if here.speaks:
            msg = (
                "what smtpretry logs of a mail cannot be mailed by smtpretry.Blocking: that mail would be logged, too; "
                'keep the logger "smtpretry" from handlers that send mail'
            )
            raise RuntimeError(msg)
        running = asyncio._get_running_loop()  # noqa: SLF001 - the one that raises nothing
        if running is not None and (running is not self._loop or self.is_here):  # greenlets share its thread with it
            msg = (
                "smtpretry.Blocking would stop the event loop that runs in this thread: use smtpretry.RetryingSMTP and "
                "await its methods, or call this one in a thread (asyncio.to_thread)"
            )
            raise RuntimeError(msg)
        with self._beginning:
            if self._loop is None:
                loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=loop.run_forever, name="smtpretry", daemon=True)
                try:
                    self._thread.start()
                except RuntimeError:  # there are too many of them
                    loop.close()
                    raise
                self._loop = loop
            return self._loop

    @property
    def is_here(self) -> bool:
        """Whether it is the loop's thread that asks: one that waited for the loop would wait for ever."""
        return threading.current_thread() is self._thread

    def end(self) -> None:
        """Say QUIT to those who listen, and stop."""
        with self._beginning:
            loop, self._loop = self._loop, None
        if loop is None or self._thread is None:
            return
        closing = asyncio.run_coroutine_threadsafe(_wind_up(), loop)
        closing.add_done_callback(lambda _: loop.call_soon_threadsafe(loop.stop))
        self._thread.join(3 * MOMENT)
        if not self._thread.is_alive():
            loop.close()

    def forget(self) -> None:
        """Be as new, in a process that was forked: the thread has stayed with the parent, and the loop is its own."""
        if self._loop is not None:
            _of_parents.append(self._loop)
        self.__init__()  # type: ignore[misc] # the lock, too, may be held by a thread that is not there


async def _wind_up() -> None:
    """Close the clients, and break off what is still under way then: it belongs to daemon threads."""
    closing = [asyncio.ensure_future(one._smtp.aclose()) for one in _all]  # noqa: SLF001 - ours
    if closing:
        await asyncio.wait(closing, timeout=MOMENT)
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=MOMENT)


def _forked() -> None:
    _loop.forget()
    for one in _all:
        one._forget()  # noqa: SLF001 - ours


def sends_here() -> bool:
    """Whether this thread is the one that sends for all of the process: it cannot wait for itself."""
    return _loop.is_here


_loop = _Loop()
_all: weakref.WeakSet[Blocking] = weakref.WeakSet()
_of_parents = list[asyncio.AbstractEventLoop]()  # kept: an end of theirs here would be one there
atexit.register(_loop.end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def _as_in(
    method: Callable[Concatenate[RetryingSMTP, P], object],
) -> Callable[[Callable[..., T]], Callable[Concatenate[Blocking, P], T]]:
    """Say that a method takes what one of RetryingSMTP's does."""

    def dress(own: Callable[..., T]) -> Callable[Concatenate[Blocking, P], T]:
        return cast("Callable[Concatenate[Blocking, P], T]", functools.wraps(method, assigned=())(own))

    return dress


def _waiting_for(
    method: Callable[Concatenate[RetryingSMTP, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Blocking, P], T]:
    """Make a method that does what one of RetryingSMTP's does, and waits for it."""

    @_as_in(method)
    def call(self: Blocking, /, *args: Any, timeout: float | None = None, **kwargs: Any) -> T:  # noqa: ANN401 - P's
        return self._run(functools.partial(method, self._smtp, *args, **kwargs), timeout)

    call.__name__, call.__qualname__ = method.__name__, f"Blocking.{method.__name__}"
    call.__doc__ = f"Do what `RetryingSMTP.{method.__name__}` does; `timeout` is for all of it, in seconds."
    return call


class Blocking:
    """A `RetryingSMTP` for code without an event loop: the same methods, without `await`.

    Make one for the process, and call it from any thread: all threads share its connections and its pauses. The event
    loop runs in a daemon thread that starts with the first call; to hand a call over costs about 0.1 ms. After a fork
    the child process starts anew, with connections of its own.

    Arguments and exceptions are those of `RetryingSMTP`. A method's `timeout=` limits the whole call, in seconds. If it
    is over, the method raises TimeoutError, with the `Delivery` as `exc.delivery`. Ctrl-C breaks a call off in the same
    way. The next call works in both cases. What is logged of a call is logged in the thread that made it; hooks
    (`on_step`) are called in the thread of the event loop.

    Raises:
        RuntimeError: by each method, in a thread that runs an event loop: there, await `RetryingSMTP` itself. And in a
            log handler that handles what smtpretry logged of another mail.
    """

    @_as_in(RetryingSMTP.__init__)
    def __init__(self, *args: Any, **options: Any) -> None:  # noqa: ANN401 - RetryingSMTP's
        self._make = functools.partial(RetryingSMTP, *args, **options)
        self._smtp = self._make()
        _all.add(self)

    send_message = _waiting_for(RetryingSMTP.send_message)
    sendmail = _waiting_for(RetryingSMTP.sendmail)
    deliver = _waiting_for(RetryingSMTP.deliver)
    connect = _waiting_for(RetryingSMTP.connect)
    quit = _waiting_for(RetryingSMTP.quit)

    @_as_in(RetryingSMTP.enqueue)
    def enqueue(self, *args: Any, connection: Any = None, **options: Any) -> Delivery:  # noqa: ANN401
        """Do what `RetryingSMTP.enqueue` does; with a `connection` in this thread, as databases ask for."""
        begin = functools.partial(self._smtp.enqueue, *args, connection=connection, **options)
        if connection is None:
            return self._run(begin)
        _loop.begin()
        with contextlib.closing(asyncio.new_event_loop()) as own:
            return own.run_until_complete(begin())

    def send_many(self, messages: Iterable[Message | Delivery], concurrency: int | None = None) -> Iterator[Delivery]:
        """Do what `RetryingSMTP.send_many` does: ``for delivery in smtp.send_many(messages)``.

        `messages` is drawn in the thread that iterates, and only while it waits for the next delivery.
        """
        loop = _loop.begin()
        check_messages(messages)
        exchange = Exchange(iter(messages))
        return exchange.run(loop, self._smtp.send_many(exchange.drawn(), concurrency))

    def close(self) -> None:
        """Wake the sends of other threads that wait, as `RetryingSMTP.aclose` does, then disconnect with QUIT."""
        self._run(self._smtp.aclose)

    def stats(self) -> Stats:
        """Do what `RetryingSMTP.stats` does."""

        async def look() -> Stats:
            return self._smtp.stats()

        return self._run(look)

    @property
    def policy(self) -> RetryPolicy:
        """The policy that was given."""
        return self._smtp.policy

    @property
    def is_connected(self) -> bool:
        """Whether a connection is open now. None is needed to send."""
        return self._smtp.is_connected

    def __enter__(self) -> Self:
        """Open the client for sending. The connection is made when it is needed."""
        self._run(self._smtp.__aenter__)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the client; without QUIT where something broke off."""
        self._run(functools.partial(self._smtp.__aexit__, kind, error, traceback))

    def _run(self, begin: Callable[[], Coroutine[Any, Any, T]], timeout: float | None = None) -> T:
        """Have the loop do it, and wait for its end; break it off when the time is over, or at Ctrl-C."""
        check_timeout(timeout)
        call = Call(_loop.begin(), begin)
        try:
            in_time = call.wait(timeout)
        except BaseException as interrupted:
            call.break_off()
            self._tell(interrupted, call.error)
            raise
        if not in_time:
            call.break_off()
            if not call.ended or isinstance(call.error, asyncio.CancelledError):
                late = TimeoutError(f"not done within {timeout:g} s")
                self._tell(late, call.error)
                raise late from call.error
        return call.result()

    def _tell(self, error: BaseException, broken: BaseException | None) -> None:
        if broken is not None and (delivery := delivery_of(broken)) is not None:
            tell(error, delivery, self.policy.clock())

    def _forget(self) -> None:
        """Let go of the connections, which are the parent's, and begin anew."""
        for connection in self._smtp._pool.connections:  # noqa: SLF001 - next door
            transport = connection.transport
            theirs = None if transport is None else transport.get_extra_info("socket")
            if theirs is not None and (number := theirs.fileno()) >= 0:
                _close_copy(number)
            connection.forget()
        self._smtp = self._make()


def _close_copy(number: int) -> None:
    """Close this process's copy of a file, but keep its number, which a socket object will close again."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, number)
    os.close(nowhere)
