"""What all connections of a client know of their server: `Needs`."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakSet

import aiosmtplib

from smtpretry.replies.stage import Stage

from .failed import Failed
from .pipelining import Pipelining
from .tls import Contexts

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from smtpretry.replies.reply import Reply

    from .dial import Address


@dataclass(slots=True)
class Needs:
    """What the sessions with a server turned out to need, what works there, and what it refused last."""

    tls: bool = False
    auth: bool = False
    refused: tuple[str | bytes, Reply] | None = None
    refusals: int = 0  # how many passwords were refused
    proven: bool = False  # somebody has logged in
    useless: set[str] = field(default_factory=set)  # mechanisms that failed where another one worked
    address: Address | None = None  # which one worked last
    hostname: str | None = None  # of this side
    in_use: WeakSet[aiosmtplib.SMTP] = field(default_factory=WeakSet)  # clients that a function has made
    mismatches: int = 0  # connections in a row on which one side spoke TLS and the other did not
    opened: bool = False  # a session has been opened with these settings
    contexts: Contexts = field(default_factory=Contexts)
    pipelining: Pipelining = field(default_factory=Pipelining)
    _trying: tuple[asyncio.AbstractEventLoop, asyncio.Lock] | None = None

    @asynccontextmanager
    async def one_log_in_at_a_time(self, seconds: float | None) -> AsyncIterator[None]:
        """Let one connection log in at a time until one has: a wrong password is not to be sent by all of them.

        Raises `Failed` where its turn does not come in so many seconds.
        """
        loop = asyncio.get_running_loop()
        if self._trying is None or self._trying[0] is not loop:
            self._trying = loop, asyncio.Lock()
        async with AsyncExitStack() as stack:
            if not self.proven:
                try:
                    async with asyncio.timeout(seconds):
                        await stack.enter_async_context(self._trying[1])
                except TimeoutError as error:
                    why = "another connection is logging in, and gets no answer"
                    raise Failed.without_reply(Stage.AUTH, aiosmtplib.SMTPTimeoutError(why)) from error
            if self.proven:
                await stack.aclose()
            yield
