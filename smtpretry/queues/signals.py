"""SIGINT and SIGTERM for workers: each of them in this event loop ends in good order."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from collections.abc import Iterator

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Stops:
    """What to call in one loop, and what was called before."""

    def __init__(self) -> None:
        self.calls = set[Callable[[], None]]()
        self.before = dict[signal.Signals, Any]()

    def __call__(self) -> None:
        for call in list(self.calls):
            call()

    def begin(self, loop: asyncio.AbstractEventLoop) -> None:
        self.before = {one: signal.getsignal(one) for one in _SIGNALS}
        for one in _SIGNALS:
            loop.add_signal_handler(one, self)

    def end(self, loop: asyncio.AbstractEventLoop) -> None:
        for one, handler in self.before.items():
            loop.remove_signal_handler(one)
            signal.signal(one, handler or signal.SIG_DFL)


_stops = WeakKeyDictionary[asyncio.AbstractEventLoop, _Stops]()


@contextlib.contextmanager
def stopping(stop: Callable[[], None]) -> Iterator[None]:
    """Call it at a signal, as long as the block lasts; where the loop is not the main thread's, leave signals alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    stops = _stops.setdefault(loop, _Stops())
    with contextlib.suppress(NotImplementedError):  # Windows: Ctrl-C cancels, as everywhere
        if not stops.calls:
            stops.begin(loop)
    stops.calls.add(stop)
    try:
        yield
    finally:
        stops.calls.discard(stop)
        with contextlib.suppress(NotImplementedError):
            if not stops.calls:
                stops.end(loop)
