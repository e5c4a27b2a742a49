"""SIGINT and SIGTERM for workers: each of them in this event loop ends in good order."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import signal
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard
from weakref import WeakKeyDictionary

from smtpretry import log

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Stops:
    """What to call in one loop, and what was called before.

    An application's own handler is called, too; what it raises, such as SystemExit, is raised when all have ended. One
    of the loop's (`add_signal_handler`) is called in any case: a file descriptor wakes the loop.
    """

    def __init__(self) -> None:
        self.calls = dict[Callable[[], None], bool]()  # and whether it ends the main task, too
        self._before = dict[int, Any]()
        self._raised: BaseException | None = None

    def begin(self, loop: asyncio.AbstractEventLoop) -> None:
        call = functools.partial(self._signalled, loop)
        self._before = {one: signal.signal(one, call) for one in _SIGNALS}

    def end(self) -> None:
        for one, handler in self._before.items():
            signal.signal(one, handler or signal.SIG_DFL)
        raised, self._raised = self._raised, None
        if raised is not None:
            raise raised

    def is_main(self, task: object) -> bool:
        """Whether that is the task that `asyncio.run` waits for, as far as it can be told."""
        handler = self._before[signal.SIGINT]
        return not _is_runners(handler) or handler.keywords.get("main_task", task) is task

    def _signalled(self, loop: asyncio.AbstractEventLoop, number: int, frame: FrameType | None) -> None:
        before = self._before[number]
        is_passed_on = callable(before) and not _cancels(before)
        loop.call_soon_threadsafe(self._stop, None if is_passed_on else signal.Signals(number).name)
        if is_passed_on:
            try:
                before(number, frame)
            except BaseException as error:  # noqa: BLE001 - raised at the end
                self._raised = error

    def _stop(self, unheard: str | None) -> None:
        if unheard and not any(self.calls.values()):
            message = "smtp worker ends at %s; what runs beside it goes on: end that when work() returns"
            log.say(logging.WARNING, message, unheard)
        for call in list(self.calls):
            call()


def _cancels(handler: object) -> bool:
    """Whether it is Python's own, or `asyncio.run`'s: these would cancel what is to end in good order."""
    return handler is signal.default_int_handler or _is_runners(handler)


def _is_runners(handler: object) -> TypeGuard[functools.partial[None]]:
    owner = getattr(handler.func, "__self__", None) if isinstance(handler, functools.partial) else None
    return isinstance(owner, asyncio.Runner)


_stops = WeakKeyDictionary[asyncio.AbstractEventLoop, _Stops]()


@contextlib.contextmanager
def stopping(stop: Callable[[], None]) -> Iterator[None]:
    """Call it at a signal, as long as the block lasts; where the loop is not the main thread's, leave signals alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    stops = _stops.setdefault(loop, _Stops())
    if not stops.calls:
        stops.begin(loop)
    stops.calls[stop] = stops.is_main(asyncio.current_task())
    try:
        yield
    finally:
        del stops.calls[stop]
        if not stops.calls:
            stops.end()
