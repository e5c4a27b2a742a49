"""The line to a server: bytes out in one write, replies in order.

aiosmtplib's own protocol takes one reply and drops what else has come; this one keeps all that are due, so that
commands may be pipelined (RFC 2920), and knows what came beyond.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from typing import TYPE_CHECKING, Final, cast

from aiosmtplib import (
    SMTPDataError,
    SMTPReadTimeoutError,
    SMTPResponse,
    SMTPResponseException,
    SMTPServerDisconnected,
)
from aiosmtplib.protocol import SMTPProtocol

from smtpretry.replies.reply import NO_REPLY

from .reader import LONGEST_LINE, NOTHING, Beyond, Replies

if TYPE_CHECKING:
    from collections.abc import Callable

_FORBIDDEN = re.compile(rb"[\x00-\x1f\x7f]")
LEADING_DOT: Final = re.compile(rb"(?m)^\.")  # which is doubled in a message (RFC 5321 §4.5.2)
_LINE_END = re.compile(rb"\r\n|\n|\r")
_LOST = "Connection lost"
_ROUNDS = 3  # of the event loop, after which a write that failed is known: one each for the socket, TLS and the line
_TOO_LATE = "Timed out waiting for server response"


class _Deadline:
    """When a reply must have come: one timer for all commands, for most are answered long before."""

    def __init__(self, missed: Callable[[], None], has_come: Callable[[], bool]) -> None:
        self._missed, self._has_come = missed, has_come
        self._at: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def set(self, seconds: float | None) -> None:
        """Call `missed` after so many seconds, in place of what was set before; None for never."""
        if seconds is None:
            self._at = None
            return
        loop = asyncio.get_running_loop()
        self._at = loop.time() + seconds
        if self._timer is not None and self._timer.when() <= self._at:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = loop.call_at(self._at, self._look)

    def cancel(self) -> None:
        """Let go of the timer, which holds all of the connection."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        loop = asyncio.get_running_loop()
        if self._at is not None and (self._at > loop.time() or self._has_come()):  # it came while the loop stood still
            self._timer = loop.call_at(self._at, self._look)
        elif self._at is not None:
            self._missed()


class Line(SMTPProtocol, asyncio.BufferedProtocol):
    """One connection's bytes and replies. A line that is broken says so at `receive`, after what came before.

    An aiosmtplib client works over it as over its own protocol. Of that protocol it uses nothing but `transport`,
    `is_connected`, `write` and the call that a lost connection causes.

    Args:
        lost: called when the connection is lost.
        due: 1 where a banner is to come.
    """

    def __init__(self, lost: Callable[[SMTPProtocol], None], due: int = 1) -> None:
        super().__init__(asyncio.get_running_loop(), lost)
        self._replies = Replies(due)
        self._out: asyncio.WriteTransport | None = None
        self._broken: Exception | None = None
        self._full = False  # what was written waits on this side
        self._room = memoryview(bytearray(LONGEST_LINE))  # asyncio's own, 256 KB for each read, costs more than reading
        self._waiting: asyncio.Future[None] | None = None
        self._lock = asyncio.Lock()  # for the methods that aiosmtplib has
        self._deadline = _Deadline(lambda: self._break(SMTPReadTimeoutError(_TOO_LATE)), self._is_woken)

    @property
    def beyond(self) -> Beyond:
        """What came beyond the replies that were due."""
        return self._replies.beyond

    @property
    def has_reply(self) -> bool:
        """Whether `receive` returns or raises at once."""
        return bool(self._replies.ready) or self._broken is not None

    def send(self, data: bytes, replies: int = 1) -> bool:
        """Write, and wait for so many more replies. Return False where the line is broken: `receive` says why."""
        if self._replies.beyond is not NOTHING:
            self._end_out_of_step()
        if replies:
            self._replies.expect(replies)
        if self._broken is not None or self._out is None or self._out.is_closing():
            return False
        self._out.write(data)
        return True

    def take(self) -> SMTPResponse | None:
        """The next reply that is due, where it has come already."""
        return self._replies.ready.popleft() if self._replies.ready else None

    async def receive(self, timeout: float | None = None) -> SMTPResponse:
        """The next reply that is due.

        Args:
            timeout: seconds; None for no limit.

        Raises:
            aiosmtplib.SMTPServerDisconnected: the connection was lost.
            aiosmtplib.SMTPReadTimeoutError: nothing came in time; the connection is closed.
            aiosmtplib.SMTPResponseException: what came is no SMTP (code -1); the connection is closed.
        """
        ready = self._replies.ready
        if not ready and self._broken is None:
            self._deadline.set(timeout)
            try:
                while not ready and self._broken is None:
                    await self._until_woken()
            finally:
                self._deadline.set(None)
        if ready:
            return ready.popleft()
        raise cast("Exception", self._broken).with_traceback(None)

    async def drain(self, timeout: float | None = None) -> bool:
        """Wait until what was written has gone, or until `has_reply`. Return whether to go on writing.

        Gone is what the kernel has.
        """
        self._deadline.set(timeout)
        try:
            for _ in range(_ROUNDS):
                await asyncio.sleep(0)
            while self._full and not self.has_reply:
                await self._until_woken()
        finally:
            self._deadline.set(None)
        return not self.has_reply

    async def encrypt(
        self,
        context: ssl.SSLContext,
        hostname: str | None,
        timeout: float | None,
        replies: int = 0,
    ) -> None:
        """Begin TLS, after which so many replies are due.

        What came in the clear and was not read may be an attacker's, and is thrown away (RFC 3207 §4.2).

        Raises:
            ssl.SSLError, ssl.CertificateError: the handshake failed.
            OSError: the connection was lost.
        """
        if self._out is None or self._out.is_closing():
            raise SMTPServerDisconnected(_LOST)
        self._replies.forget(replies)
        encrypted = await asyncio.get_running_loop().start_tls(
            self._out, self, context, server_hostname=hostname, ssl_handshake_timeout=timeout
        )
        self.connection_made(cast("asyncio.BaseTransport", encrypted))  # not None: the loop says so by an error

    def abort(self) -> None:
        """Close the socket at once, whatever is still to be sent, or TLS would like to say."""
        self._break(SMTPServerDisconnected(_LOST))

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self.transport = self._out = cast("asyncio.WriteTransport", transport)
        self._out.set_write_buffer_limits(high=1, low=0)  # at 0, TLS never resumes

    def get_buffer(self, _: int) -> memoryview:
        """Where to put what comes."""
        return self._room

    def buffer_updated(self, nbytes: int) -> None:
        """Something came, and was put there."""
        self.data_received(bytes(self._room[:nbytes]))

    def data_received(self, data: bytes) -> None:
        """Something came; uvloop says so itself."""
        self._replies.feed(data)
        if self._replies.fault is not None:
            self._break(self._replies.fault)
        elif not self._replies.ready and self.beyond is not NOTHING:
            self._end_out_of_step()
        self._wake()

    def eof_received(self) -> bool:
        """The server says no more."""
        self._break(SMTPServerDisconnected("Unexpected EOF received"))
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is no more."""
        error = SMTPServerDisconnected(f"{_LOST}: {exc}" if isinstance(exc, ssl.SSLError) else _LOST)
        error.__cause__ = exc
        self._break(error)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """What was written waits on this side."""
        self._full = True

    def resume_writing(self) -> None:
        """It has gone."""
        self._full = False
        self._wake()

    # aiosmtplib's side

    async def execute_command(self, *args: bytes, timeout: float | None = None) -> SMTPResponse:
        """Send a command and return the reply to it.

        Raises:
            ValueError: there is a control character in it.
        """
        if any(map(_FORBIDDEN.search, args)):
            msg = "Command arg contains a prohibited control character"
            raise ValueError(msg)
        async with self._lock:
            self.send(b" ".join(args) + b"\r\n")
            return await self.receive(timeout)

    async def execute_data_command(self, message: bytes, timeout: float | None = None) -> SMTPResponse:
        """Send a message: DATA, and what follows its 354."""
        lines = _LINE_END.sub(b"\r\n", message).removesuffix(b"\r\n") + b"\r\n"
        for data, expected in ((b"DATA\r\n", 354), (LEADING_DOT.sub(b"..", lines) + b".\r\n", 250)):
            async with self._lock:
                self.send(data)
                response = await self.receive(timeout)
            if response.code != expected:
                raise SMTPDataError(response.code, response.message)
        return response

    async def start_tls(
        self,
        tls_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> SMTPResponse:
        """STARTTLS."""
        response = await self.execute_command(b"STARTTLS", timeout=timeout)
        if response.code != 220:  # noqa: PLR2004
            raise SMTPResponseException(response.code, response.message)
        await self.encrypt(tls_context, server_hostname, timeout)
        return response

    def _end_out_of_step(self) -> None:
        if self.beyond.goodbye is not None:
            self.abort()
        else:
            self._break(SMTPResponseException(NO_REPLY, "the server sent a reply to nothing"))

    def _break(self, error: Exception) -> None:
        """Close; from now on `receive` raises the first of such errors, after a goodbye that nobody has read."""
        if self._broken is None:
            self._broken = error
            self._replies.end()
            if self.beyond.goodbye is not None:
                self._replies.ready.append(self.beyond.goodbye)
        self._deadline.cancel()
        if self._out is not None:
            self._out.abort()
        self._wake()

    def _until_woken(self) -> asyncio.Future[None]:
        self._waiting = asyncio.get_running_loop().create_future()
        return self._waiting

    def _is_woken(self) -> bool:
        return self._waiting is not None and self._waiting.done()

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)
