"""What is said over one line: commands, replies, and what a reply is worth. It knows no order of commands."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, NoReturn

import aiosmtplib
from aiosmtplib.smtp import DEFAULT_TIMEOUT
from aiosmtplib.typing import Default

from smtpretry.errors import NOT_CONNECTED
from smtpretry.replies.reply import NO_REPLY, Reply, Said
from smtpretry.replies.stage import Stage

from .codes import CLOSING, GOODBYES, accepts, agree
from .failed import Failed
from .reader import NOTHING
from .redactor import Redactor

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterator

    from aiosmtplib import SMTPResponse

    from .line import Line

Timeout = float | Literal[Default.token] | None


class Conversation:
    """A client of aiosmtplib's, and the line under it."""

    def __init__(self) -> None:
        self._client: aiosmtplib.SMTP | None = None
        self._line: Line | None = None
        self._redactor = Redactor()  # hides what was sent to log in

    @property
    def client(self) -> aiosmtplib.SMTP:
        """The client of the connection, or of the last one."""
        if self._client is None:
            raise aiosmtplib.SMTPServerDisconnected(NOT_CONNECTED)
        return self._client

    @property
    def transport(self) -> asyncio.BaseTransport | None:
        """What the bytes go through; None where there was no connection yet."""
        return None if self._client is None else self._client.transport

    @property
    def is_open(self) -> bool:
        """Whether there is a connection, as far as this side knows."""
        protocol = None if self._client is None else self._client.protocol
        return protocol is not None and protocol.is_connected

    def seconds(self, timeout: Timeout) -> float | None:
        """A time-out as the client has it: its own, where none is given."""
        if timeout is not Default.token:
            return timeout
        return DEFAULT_TIMEOUT if self._client is None else self._client.timeout

    async def command(self, stage: Stage, *words: bytes, timeout: Timeout = Default.token) -> SMTPResponse:
        """Send a command, `check` its reply, and return it."""
        self.send(b" ".join(words) + b"\r\n")
        response = await self.receive(stage, timeout)
        self.check(stage, *response)
        return response

    def send(self, data: bytes, replies: int = 1) -> bool:
        """Write, and wait for so many more replies. Return False where the line is broken: `receive` says why."""
        return self._line is not None and self._line.send(data, replies)

    def take(self) -> SMTPResponse | None:
        """The next reply that is due, where it has come already."""
        return None if self._line is None else self._line.take()

    async def receive(self, stage: Stage, timeout: Timeout = Default.token) -> SMTPResponse:
        """The next reply that is due, in order. Raises `Failed` where the line is broken or silent."""
        try:
            if self._line is None:
                raise aiosmtplib.SMTPServerDisconnected(NOT_CONNECTED)
            return await self._line.receive(self.seconds(timeout))
        except (aiosmtplib.SMTPException, OSError) as error:
            self._fail(stage, error)

    async def drain(self, timeout: Timeout = Default.token) -> bool:
        """Wait until what was sent has gone, or until a reply has come. Return whether to go on sending."""
        return self._line is not None and await self._line.drain(self.seconds(timeout))

    def hide(self, *sent: bytes) -> None:
        """Show none of it where the server repeats it."""
        self._redactor.add(*(part.decode(errors="replace") for part in sent))

    def reply(self, code: int, message: str) -> Reply:
        """What the server said, without the credentials that some servers repeat."""
        return Reply.of(code, self._redactor.redact(message))

    def check(self, stage: Stage, code: int, message: str, expect: int | None = 2) -> None:
        """Raise `Failed` unless the reply's first digit is the expected one (RFC 5321 §4.2.1); with None, always.

        If a goodbye or another reply has come behind it, the connection is closed in any case.
        """
        line = None if stage is Stage.STARTTLS else self._line  # where what came in the clear is thrown away
        beyond = NOTHING if line is None else line.beyond
        in_step = not beyond.further or agree(stage, code, beyond.further)
        if code == CLOSING or beyond is not NOTHING:
            self.abort()
        if in_step and code // 100 == expect and (expect != 2 or accepts(stage, code)):  # noqa: PLR2004
            return
        reply = self.reply(code, message)
        if not in_step and reply.code != NO_REPLY:
            reply = Reply.of(NO_REPLY, f"more than one reply to one command, first {reply}")
        if reply.is_transient or reply.is_permanent:
            self._refused(stage, reply)
            raise Failed(Said(stage, reply))
        self.abort()
        if reply.code in GOODBYES:
            raise Failed.without_reply(stage, aiosmtplib.SMTPServerDisconnected(f"the server hung up: {reply}"))
        why = reply.text if reply.code == NO_REPLY else f"unexpected reply: {reply}"
        raise Failed.without_reply(stage, aiosmtplib.SMTPResponseException(NO_REPLY, why))

    def _refused(self, stage: Stage, reply: Reply) -> None:
        """Called with each refusal; it may raise another `Failed`."""

    def abort(self) -> None:
        """Close at once; what is written and not yet gone is dropped, for it could still become a mail."""
        if self._line is not None:
            self._line.abort()
        if self._client is not None:
            self._client.close()

    @contextmanager
    def at(self, stage: Stage) -> Iterator[None]:
        """Turn what is raised into `Failed`; close a connection on which no valid reply came."""
        try:
            yield
        except (aiosmtplib.SMTPException, OSError) as error:
            self._fail(stage, error)

    def _fail(self, stage: Stage, error: aiosmtplib.SMTPException | OSError) -> NoReturn:
        if isinstance(error, aiosmtplib.SMTPResponseException):
            self.check(stage, error.code, error.message, expect=None)
        final = isinstance(error, aiosmtplib.SMTPNotSupported)
        if not final:
            self.abort()
        raise Failed.without_reply(stage, error, final=final) from error
