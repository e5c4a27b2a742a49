"""Opening a session: the client, the line, EHLO, and TLS where it is wanted."""

from __future__ import annotations

import asyncio
import inspect
import ipaddress
import os
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

import aiosmtplib
from aiosmtplib import SMTP, SMTPResponse
from aiosmtplib.smtp import SMTP_PORT, SMTP_STARTTLS_PORT, SMTP_TLS_PORT

from smtpretry.errors import NOT_CONNECTED
from smtpretry.replies.patterns import compiled
from smtpretry.replies.stage import Stage

from .codes import NO_EHLO
from .conversation import Conversation, Timeout
from .dial import Dial, impossible, unreachable
from .failed import Failed
from .line import Line
from .tls import NOT_OFFERED, SETTINGS, mistaken

if TYPE_CHECKING:
    import ssl

    from aiosmtplib.protocol import SMTPProtocol

    from .needs import Needs

MakeClient = Callable[[], SMTP | Awaitable[SMTP]]

_DOMAIN = r"(?ai)(?:[a-z0-9-]+\.)*(?!\d+\Z)[a-z0-9-]+"  # whose end is no number: that is an address
_NO_THREAD = "the TLS settings were not read in time: no thread of asyncio.to_thread came free"
_MISMATCHES = 3  # connections in a row after which it is no accident that the two sides differ about TLS


class Opening(Conversation):
    """Opens a session: connects, says EHLO, begins TLS.

    Args:
        client: the client, or a function that makes one for each connection.
        needs: what is known of all connections of this client.
    """

    def __init__(self, client: SMTP | MakeClient, needs: Needs) -> None:
        super().__init__()
        self.needs = needs
        self._make: MakeClient | None = None
        self._start_tls: bool | None = None
        self._greeted = False
        if isinstance(client, SMTP):
            self._use(client)
        else:
            self._make = client

    @property
    def is_tls(self) -> bool:
        """Whether it is encrypted."""
        transport = self.transport if self.is_open else None
        return transport is not None and transport.get_extra_info("sslcontext") is not None

    @property
    def server(self) -> str:
        """Where it goes: "smtp.example.com:587", or the path of a socket; empty where that is not known yet."""
        if self._client is None:
            return ""
        if self._client.socket_path:
            return os.fsdecode(self._client.socket_path)
        host = self._client.hostname or ""
        return f"[{host}]:{self._port}" if ":" in host else f"{host}:{self._port}"

    def obstacle_to_tls(self) -> str | None:
        """Why STARTTLS cannot be done now; None where it can."""
        if self.is_tls:
            return "the session is encrypted already"
        if self.is_open and not self._can_encrypt:
            return "the server offers no STARTTLS"
        return None

    @property
    def _can_encrypt(self) -> bool:
        return self.client.supports_extension("starttls") and self.is_open and not self.is_tls

    def _use(self, client: SMTP) -> None:
        self._client = client
        self._start_tls = client._start_tls_on_connect  # noqa: SLF001 - it has no public name

    async def _made_by(self, make: MakeClient, seconds: float | None) -> SMTP:
        """A client for one connection. What fails for want of a connection, of a proxy say, is like a refused one."""
        try:
            async with asyncio.timeout(seconds):
                made = make()
                client = await made if inspect.isawaitable(made) else made
        except aiosmtplib.SMTPException:
            raise
        except OSError as error:
            why = f"{type(error).__name__}: {error}".rstrip(": ")
            msg = f"the function that makes clients made none: {why}"
            raise aiosmtplib.SMTPConnectError(msg) from error
        check_client(client)
        if client in self.needs.in_use:
            msg = "the function that makes clients returned one that is in use: make a new one at each call"
            raise ValueError(msg)
        self.needs.in_use.add(client)
        return client

    def _adopt(self) -> None:
        """Take over the line of a client that somebody else has connected."""
        if self.client.protocol is self._line or not self.is_open:
            return
        self._line = Line(self._lost, due=0)
        transport = self.client.transport
        transport.set_protocol(self._line)  # type: ignore[union-attr] # it is open
        self._line.connection_made(transport)  # type: ignore[arg-type] # it is open
        self.client.protocol = self._line
        self._greeted = not self.client.is_ehlo_or_helo_needed

    async def _open(self, timeout: Timeout) -> SMTPResponse:
        """Connect, unless the function that makes clients has done so; return the banner."""
        with self.at(Stage.CONNECT):
            if self._make is not None:
                self._use(await self._made_by(self._make, self.seconds(timeout)))
            if self.is_open:
                self._adopt()
                return SMTPResponse(220, "connected by the function that makes clients")
        client = self.client
        if client.sock is not None and client.sock.fileno() < 0:
            msg = (
                "the socket that was given carries one connection, which is over: "
                "give a function that makes a client with a new socket"
            )
            raise Failed.without_reply(Stage.CONNECT, aiosmtplib.SMTPConnectError(msg), final=True)
        context = await self._context(Stage.CONNECT, timeout) if client.use_tls else None
        with self.at(Stage.CONNECT):
            try:
                dialled = await Dial(client, self._port, context, self._lost, wary=self.needs.mismatches > 0).open(
                    self.needs.address, self.seconds(timeout)
                )
            except aiosmtplib.SMTPException as error:
                self._advise(Stage.CONNECT, error)
                raise
        self._line, banner, self.needs.address = dialled
        client.loop, client.protocol, client.transport = asyncio.get_running_loop(), self._line, self._line.transport
        self._greeted = False
        return banner

    def _fail(self, stage: Stage, error: aiosmtplib.SMTPException | OSError) -> NoReturn:
        if stage in (Stage.STARTTLS, Stage.EHLO):  # where TLS begins, and where its end is noticed
            self._advise(stage, error)
        super()._fail(stage, error)

    def _advise(self, stage: Stage, error: Exception) -> None:
        """Raise `Failed` with what to check on this side, where the error tells; final where it is no accident.

        Settings that have opened a session are no mistake, whatever the server has become since.
        """
        mismatch = mistaken(self.client, error)
        self.needs.mismatches += mismatch is not None
        if self.needs.opened:
            mismatch = None
        cure = mismatch if mismatch and self.needs.mismatches >= _MISMATCHES else impossible(error)
        hint = mismatch or cure or (unreachable(error) if stage is Stage.CONNECT else None)
        if hint is not None:
            self.abort()
            raise Failed.without_reply(stage, error, cure=cure, hint="" if cure else hint) from error

    @property
    def _port(self) -> int:
        """The client's port, or aiosmtplib's default for its settings."""
        if self.client.port is not None:
            return self.client.port
        if self.client.use_tls:
            return SMTP_TLS_PORT
        return SMTP_STARTTLS_PORT if self._start_tls else SMTP_PORT

    def _lost(self, protocol: SMTPProtocol) -> None:
        if self._client is not None and self._client.protocol is protocol:
            self.abort()

    def abort(self) -> None:
        """Close at once; what is written and not yet gone is dropped, for it could still become a mail."""
        super().abort()
        if self._client is not None:
            self.needs.in_use.discard(self._client)

    async def _secure(self, timeout: Timeout) -> None:
        """EHLO where it is due, and TLS where the client is set to it or the server wants it: never on without it."""
        if not self._greeted:
            await self._greet(timeout)
        if not self.is_tls:
            welcome = self._start_tls is None or self.needs.tls
            if self._start_tls or (welcome and self._can_encrypt):
                await self._encrypt(timeout)
        self.needs.mismatches, self.needs.opened = 0, True

    async def _greet(self, timeout: Timeout) -> None:
        """EHLO; HELO where the server does not take that command (RFC 5321 §3.2), never where it is just busy."""
        name, client = await self._own_name(timeout), self.client
        client.esmtp_extensions, client.server_auth_methods, client.supports_esmtp = {}, [], False  # RFC 3207 §4.2
        try:
            client.last_ehlo_response = await self.command(Stage.EHLO, b"EHLO", name, timeout=timeout)
        except Failed as failed:
            needs_more = self._start_tls or self.needs.tls or self.needs.auth  # than HELO offers
            if failed.said.reply.code not in NO_EHLO or needs_more:
                raise
            try:
                client.last_helo_response = await self.command(Stage.EHLO, b"HELO", name, timeout=timeout)
            except Failed:
                raise failed from None
        self._greeted = True

    async def _own_name(self, timeout: Timeout) -> bytes:
        """The name of this host, or its address where the name is none for SMTP (RFC 5321 §4.1.3)."""
        client = self.client
        if client.local_hostname is None:
            if self.needs.hostname is None:
                with suppress(OSError, UnicodeError):
                    async with asyncio.timeout(self.seconds(timeout)):
                        self.needs.hostname = await asyncio.to_thread(socket.getfqdn)
            name = self.needs.hostname or ""
            client.local_hostname = name if compiled(_DOMAIN).fullmatch(name) else None
        name, here = client.local_hostname or "", client.get_transport_info("sockname") if self.is_open else None
        address = here[0].partition("%")[0] if isinstance(here, tuple) else "127.0.0.1"
        with suppress(ValueError):
            address, name = str(ipaddress.ip_address(name)), ""  # a name that is one
        if name and name.isascii() and name.isprintable() and " " not in name:
            return name.encode()
        return f"[IPv6:{address}]".encode() if ":" in address else f"[{address}]".encode()

    async def _encrypt(self, timeout: Timeout) -> None:
        """STARTTLS, and EHLO anew: what was offered before counts no more (RFC 3207 §4.2)."""
        if not self._can_encrypt:
            msg = "SMTP STARTTLS extension not supported by server."
            raise Failed.without_reply(Stage.STARTTLS, aiosmtplib.SMTPNotSupported(msg), cure=NOT_OFFERED)
        context = await self._context(Stage.STARTTLS, timeout)
        await self.command(Stage.STARTTLS, b"STARTTLS", timeout=timeout)
        self._greeted = False
        with self.at(Stage.STARTTLS):
            await self._handshake(context, self.seconds(timeout))
        await self._greet(timeout)

    async def _handshake(self, context: ssl.SSLContext, seconds: float | None) -> None:
        line, client = self._line, self.client
        if line is None:
            raise aiosmtplib.SMTPServerDisconnected(NOT_CONNECTED)
        try:
            async with asyncio.timeout(seconds):
                await line.encrypt(context, client.hostname, seconds)
        except TimeoutError as error:
            msg = "Timed out while upgrading transport"
            raise aiosmtplib.SMTPTimeoutError(msg) from error
        except ConnectionError as error:
            msg = "Connection reset while upgrading transport"
            raise aiosmtplib.SMTPServerDisconnected(msg) from error
        client.transport = line.transport

    async def _context(self, stage: Stage, timeout: Timeout) -> ssl.SSLContext:
        """For TLS. What fails in it is this side's trouble, which no other attempt changes."""
        try:
            async with asyncio.timeout(self.seconds(timeout)) as limit:
                return await self.needs.contexts.of(self.client)
        except (OSError, ValueError) as error:
            self.abort()
            if limit.expired():
                raise Failed.without_reply(stage, aiosmtplib.SMTPTimeoutError(_NO_THREAD)) from error
            raise Failed.without_reply(stage, error, cure=SETTINGS) from error


def check_client(client: object) -> None:
    """Raise TypeError where it is no client, ValueError where its port is none: the resolver takes it modulo 65536."""
    if not isinstance(client, SMTP):
        msg = (
            "client is an aiosmtplib.SMTP, such as aiosmtplib.SMTP(hostname='smtp.example.com', port=587), "
            f"or a function that makes one, not {client!r}"
        )
        raise TypeError(msg)
    if isinstance(client.port, int) and not 0 <= client.port < 2**16:
        msg = f"port is at most 65535, such as 587, not {client.port}"
        raise ValueError(msg)
