"""One mail transaction: MAIL, RCPT for each recipient, DATA (RFC 5321 §3.3). A refusal or a fault raises `Failed`."""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn, cast

import aiosmtplib
from aiosmtplib import SMTPResponse
from aiosmtplib.typing import Default

from smtpretry.addresses import mailbox_of
from smtpretry.replies.reply import Reply, Said
from smtpretry.replies.stage import Stage

from .connection import Connection, Failed, Timeout

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aiosmtplib.protocol import SMTPProtocol

    from smtpretry.delivery import Delivery

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
        try:
            if len(body) > _CHUNK:
                with self.connection.at(Stage.DATA):
                    code, message = await self._send_in_chunks(body, self.connection.seconds(self.timeout))
            else:
                code, message = await self.connection.exchange(Stage.DATA, self._send_at_once(body), self.timeout)
        except Failed as failed:
            raise Failed(Said(self._stage, failed.said.reply, failed.said.error)) from failed.said.error
        if not self.dot_sent:
            self.connection.abort()  # refused in the middle of the body, and all that follows is body to the server
        self.connection.judge(self._stage, code, message, expect=2 if self.dot_sent else None)
        return self.connection.reply(code, message)

    async def _send_at_once(self, body: bytes) -> SMTPResponse:
        protocol = self._protocol
        protocol.write(body)
        self.dot_sent = True
        return await protocol.read_response()

    async def _send_in_chunks(self, body: bytes, timeout: float | None) -> SMTPResponse:
        """Send a large body, the final dot when all else has gone; return at once what the server says meanwhile.

        A server may refuse in the middle and hang up: what it said counts, not the broken pipe that follows.
        """
        protocol = self._protocol
        transport = cast("asyncio.WriteTransport", protocol.transport)
        transport.set_write_buffer_limits(high=1, low=0)  # drained is: with the kernel (at 0, TLS never resumes)
        reading = asyncio.ensure_future(protocol.read_response())
        try:
            for start in range(0, len(body), _CHUNK):
                protocol.write(body[start : start + _CHUNK])
                self.dot_sent = start + _CHUNK >= len(body)
                draining = asyncio.ensure_future(_drain(protocol))
                try:
                    await _first({reading, draining}, timeout)
                finally:
                    draining.cancel()
                if reading.done():
                    break
            await _first({reading}, timeout)
            return reading.result()
        finally:
            reading.cancel()

    @property
    def _protocol(self) -> SMTPProtocol:
        if self.connection.client.protocol is None:
            msg = "Connection lost"
            raise aiosmtplib.SMTPServerDisconnected(msg)
        return self.connection.client.protocol

    @property
    def _stage(self) -> Stage:
        return Stage.END_OF_DATA if self.dot_sent else Stage.DATA

    async def _command(self, stage: Stage, verb: str, address: str, options: Iterable[str]) -> None:
        line = " ".join((f"{verb}:<{mailbox_of(address)}>", *options))
        await self.connection.command(stage, line.encode(), timeout=self.timeout)

    @staticmethod
    def _cannot(why: str) -> NoReturn:
        raise Failed.silently(Stage.MAIL, aiosmtplib.SMTPNotSupported(why), final=True)


async def _drain(protocol: SMTPProtocol) -> None:
    with suppress(ConnectionError):  # the reader tells why
        await protocol._drain_helper()  # noqa: SLF001 - a StreamWriter around it would close the transport in the end


async def _first(futures: set[asyncio.Future[Any]], timeout: float | None) -> None:
    done, _ = await asyncio.wait(futures, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    if not done:
        msg = "Timed out sending the message"
        raise aiosmtplib.SMTPReadTimeoutError(msg)
