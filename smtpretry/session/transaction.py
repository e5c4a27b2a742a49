"""One mail transaction: MAIL, RCPT for each recipient, DATA (RFC 5321 §3.3). A refusal or a fault raises `Failed`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NoReturn

import aiosmtplib
from aiosmtplib.typing import Default

from smtpretry.envelope import mailbox_of
from smtpretry.replies.stage import Stage

from .connection import Connection, Failed, Timeout

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aiosmtplib import SMTPResponse

    from smtpretry.delivery import Delivery
    from smtpretry.replies.reply import Reply

_PERIOD = re.compile(rb"(?m)^\.")
_CHUNK = 64 * 1024  # bytes; what is no longer than this goes out in one write, final dot and all


class Transaction:
    """The steps, to be taken in this order: `mail`, `rcpt` as often as wanted, `data`."""

    def __init__(self, connection: Connection, delivery: Delivery, timeout: Timeout = Default.token) -> None:
        self.connection = connection
        self.delivery = delivery
        self.timeout = timeout
        self.dot_sent = False  # from here on the message may have been taken, whatever happens

    async def mail(self) -> None:
        """Open the transaction. Fails for good where the server lacks an extension that the message needs."""
        offers = self.connection.client.supports_extension
        options = {option.partition("=")[0].lower(): option for option in self.delivery.mail_options}
        if "smtputf8" in options and not offers("smtputf8"):
            self._cannot("an address is not ASCII, and the server does not offer SMTPUTF8 (RFC 6531)")
        if not self.delivery.message.isascii():
            if not offers("8bitmime"):
                self._cannot(
                    "the message has 8-bit bytes, and the server does not offer 8BITMIME (RFC 6152): "
                    "give send_message an EmailMessage, which it writes as 7-bit MIME"
                )
            options.setdefault("body", "BODY=8BITMIME")
        elif not offers("8bitmime"):
            options.pop("body", None)
        if offers("size"):
            options.setdefault("size", f"SIZE={len(self.delivery.message)}")
        await self._command(Stage.MAIL, "MAIL FROM", self.delivery.sender, options.values())

    async def rcpt(self, recipient: str) -> None:
        """Offer one recipient."""
        await self._command(Stage.RCPT, "RCPT TO", recipient, self.delivery.rcpt_options)

    async def data(self) -> Reply:
        """Send the message; return the reply that accepts it.

        A failure at DATA, or with a reply, means that the message was not taken. A failure at END_OF_DATA without a
        reply means that nobody knows (RFC 1047).
        """
        await self.connection.command(Stage.DATA, b"DATA", timeout=self.timeout, expect=3)
        body = self.delivery.message
        if body.startswith(b".") or b"\n." in body:
            body = _PERIOD.sub(b"..", body)
        body += b".\r\n"
        code, message = await self._send(body)
        if not self.dot_sent:
            self.connection.abort()  # refused in the middle of the body, and all that follows is body to the server
        self.connection.judge(self._stage, code, message, expect=2 if self.dot_sent else None)
        return self.connection.reply(code, message)

    async def _send(self, body: bytes) -> SMTPResponse:
        """Send the body, the final dot when all else has gone; return at once what the server says meanwhile.

        A server may refuse in the middle and hang up: what it said counts, not the broken pipe that follows.
        """
        for start in range(0, len(body), _CHUNK):
            sent = self.connection.send(body[start : start + _CHUNK], replies=not start)
            self.dot_sent = sent and start + _CHUNK >= len(body)
            if not self.dot_sent and not await self.connection.drain(self.timeout):
                break
        return await self.connection.receive(self._stage, self.timeout)

    @property
    def _stage(self) -> Stage:
        return Stage.END_OF_DATA if self.dot_sent else Stage.DATA

    async def _command(self, stage: Stage, verb: str, address: str, options: Iterable[str]) -> None:
        line = " ".join((f"{verb}:<{mailbox_of(address)}>", *options))
        await self.connection.command(stage, line.encode(), timeout=self.timeout)

    @staticmethod
    def _cannot(why: str) -> NoReturn:
        raise Failed.silently(Stage.MAIL, aiosmtplib.SMTPNotSupported(why), final=True)
