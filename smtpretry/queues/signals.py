"""SIGINT and SIGTERM for workers: each of them in this event loop ends in good order."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

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
        self.calls = set[Callable[[], None]]()
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

    def _signalled(self, loop: asyncio.AbstractEventLoop, number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(self._stop)
        before = self._before[number]
        if callable(before) and not _cancels(before):
            try:
                before(number, frame)
            except BaseException as error:  # noqa: BLE001 - raised at the end
                self._raised = error

    def _stop(self) -> None:
        for call in list(self.calls):
            call()


def _cancels(handler: object) -> bool:
    """Whether it is Python's own, or `asyncio.run`'s: these would cancel what is to end in good order."""
    owner = getattr(handler.func, "__self__", None) if isinstance(handler, functools.partial) else None
    return handler is signal.default_int_handler or isinstance(owner, asyncio.Runner)


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
    stops.calls.add(stop)
    try:
        yield
    finally:
        stops.calls.discard(stop)
        if not stops.calls:
            stops.end()
