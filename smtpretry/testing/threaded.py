"""A scripted server for code without an event loop: `ThreadedServer`."""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from .server import ScriptedServer

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator
    from concurrent.futures import Future
    from types import TracebackType

T = TypeVar("T")


class ThreadedServer(ScriptedServer):
    """A `ScriptedServer` that runs in a thread, for blocking tests as for asynchronous ones.

    ``with ThreadedServer(tls=True) as server:`` starts and stops it, and raises at the end what ``async with`` raises.
    Its arguments, scripts and records are those of `ScriptedServer`. Its time is real.
    """

    _own: asyncio.AbstractEventLoop | None = None

    async def start(self) -> Self:
        """Listen; after a `stop`, on the same port as before."""
        with self._begun():
            await asyncio.wrap_future(self._there(super().start()))
        return self

    async def stop(self) -> None:
        """Listen no more, and drop every connection without a word. What was received stays."""
        if self._own is not None:
            await asyncio.wrap_future(self._there(super().stop()))
            self._end()

    def disconnect(self, reply: str | bytes = b"", *, close: bool | Literal["fin", "rst"] = True) -> None:
        """End every open connection now; see `ScriptedServer.disconnect`."""

        async def disconnect() -> None:
            super(ThreadedServer, self).disconnect(reply, close=close)

        self._there(disconnect()).result()

    def __enter__(self) -> Self:
        """Start."""
        with self._begun():
            self._there(super().start()).result()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop, and verify, except where the body has raised already."""
        if self._own is not None:
            self._there(super().stop()).result()
            self._end()
        if error is None:
            self.verify()

    @contextmanager
    def _begun(self) -> Iterator[None]:
        """A thread with a loop, which ends where the server cannot start in it."""
        if self._own is not None:  # it has been started, and says so
            yield
            return
        self._own = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._own.run_forever, name="ThreadedServer", daemon=True)
        self._thread.start()
        try:
            yield
        except BaseException:
            self._end()
            raise

    def _end(self) -> None:
        own, self._own = self._own, None
        if own is not None:
            own.call_soon_threadsafe(own.stop)
            self._thread.join()
            own.close()

    def _there(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        if self._own is None:
            work.close()
            msg = "the server is not running: use it in a with block"
            raise RuntimeError(msg)
        return asyncio.run_coroutine_threadsafe(work, self._own)
