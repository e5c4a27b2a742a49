"""Opening a line: the addresses of a server in turn, TLS from the first byte where it is wanted, and the banner."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import ssl
from contextlib import suppress
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import aiosmtplib
from aiosmtplib import SMTPConnectError, SMTPConnectResponseError, SMTPConnectTimeoutError

from smtpretry.replies.stage import Stage

from .codes import accepts
from .line import Line
from .tls import SPEAKS_CLEAR

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aiosmtplib import SMTP, SMTPResponse
    from aiosmtplib.protocol import SMTPProtocol

_FAMILIES: Final = {4: socket.AF_INET, 6: socket.AF_INET6}
_A_WHILE = 5.0  # seconds for a server to say in the clear why it takes no connection
_NO_BANNER = "Timed out waiting for server ready message"  # in aiosmtplib's words
_PATIENCE = 300.0  # seconds for one of several addresses, where the client has no time-out (RFC 5321 §4.5.3.2.1)


class Address(NamedTuple):
    """Where to connect to."""

    host: str
    port: int
    family: int


_OWN_SOCKET: Final = Address("", 0, 0)  # the client's: there is no choice


class Dial(NamedTuple):
    """How to open lines for a client.

    Attributes:
        client: whose host, socket and source address it is.
        port: where to connect to on each address.
        context: for TLS from the first byte; None for none.
        lost: called when the connection is lost.
        wary: whether the server seems to speak no TLS.
    """

    client: SMTP
    port: int
    context: ssl.SSLContext | None
    lost: Callable[[SMTPProtocol], None]
    wary: bool

    async def open(self, favourite: Address | None, timeout: float | None) -> tuple[Line, SMTPResponse, Address]:
        """Connect to the first address that greets with 220 (RFC 5321 §5.1); return the line, the banner, the address.

        Args:
            favourite: the address to begin with.
            timeout: seconds for all addresses together: each gets an equal share of what is left. None for no limit.

        Raises:
            SMTPConnectResponseError: the last reply, where an address gave one.
            SMTPConnectError, SMTPConnectTimeoutError, SMTPResponseException: the first failure, where none did.
        """
        loop, errors = asyncio.get_running_loop(), list[aiosmtplib.SMTPException]()
        end = None if timeout is None else loop.time() + timeout
        addresses = await self._addresses(favourite, timeout)
        for number, address in enumerate(addresses):
            left = len(addresses) - number
            share = (_PATIENCE if left > 1 else None) if end is None else max(end - loop.time(), 0.0) / left
            try:
                return *await self._open(address, share), address
            except aiosmtplib.SMTPException as error:
                errors.append(error)
        replies = [error for error in errors if isinstance(error, SMTPConnectResponseError)]
        raise replies[-1] if replies else errors[0]

    async def _addresses(self, favourite: Address | None, timeout: float | None) -> list[Address]:
        """Those of the host, the families in turn (RFC 8305 §4), the favourite first."""
        if self.client.sock is not None or self.client.socket_path is not None:
            return [_OWN_SOCKET]
        host = self.client.hostname or "localhost"
        with suppress(ValueError):
            return [Address(host, self.port, _FAMILIES[ipaddress.ip_address(host).version])]
        try:
            async with asyncio.timeout(timeout):
                found = await asyncio.get_running_loop().getaddrinfo(host, self.port, type=socket.SOCK_STREAM)
        except TimeoutError as error:
            msg = f"Timed out connecting to {self._where}"
            raise SMTPConnectTimeoutError(msg) from error
        except (OSError, UnicodeError) as error:
            msg = f"Error connecting to {self._where}: {error}"
            raise SMTPConnectError(msg) from error
        addresses = list(dict.fromkeys(_address(family, where) for family, _, _, _, where in found))
        return sorted(_in_turn(addresses), key=lambda address: address != favourite)

    async def _open(self, address: Address, seconds: float | None) -> tuple[Line, SMTPResponse]:
        """Try one address. What fails leaves no socket behind."""
        line, late = Line(self.lost), f"Timed out connecting to {self._where}"
        try:
            async with asyncio.timeout(seconds):
                await self._connect(address, line)
                if self.context is not None:
                    await self._hear_in_clear(line)
                    await line.encrypt(self.context, self.client.hostname, seconds, replies=1)
                late = _NO_BANNER
                banner = await line.receive()
            self._check(banner)
        except BaseException as error:
            line.abort()
            if isinstance(error, TimeoutError):
                with suppress(aiosmtplib.SMTPServerDisconnected):
                    self._check(await line.receive())  # a refusal whose end is missing
                raise SMTPConnectTimeoutError(late) from error
            if isinstance(error, (OSError, OverflowError)) and not isinstance(error, SMTPConnectResponseError):
                msg = f"Error connecting to {self._where}: {error}"
                raise SMTPConnectError(msg) from error
            raise
        return line, banner

    async def _hear_in_clear(self, line: Line) -> None:
        """Fail with what the server says in the clear: some refuse a connection before TLS begins.

        A handshake would lose those words. If the last one failed, this waits a while for them.
        """
        if self.wary or line.has_reply:
            with suppress(TimeoutError):
                async with asyncio.timeout(_A_WHILE):
                    self._check(await line.receive())
                    raise ssl.SSLError(ssl.SSL_ERROR_SSL, SPEAKS_CLEAR)

    @staticmethod
    def _check(banner: SMTPResponse) -> None:
        if not accepts(Stage.CONNECT, banner.code):
            raise SMTPConnectResponseError(*banner)

    async def _connect(self, address: Address, line: Line) -> None:
        loop, client = asyncio.get_running_loop(), self.client
        if client.sock is not None:
            await loop.create_connection(lambda: line, sock=client.sock)
        elif client.socket_path is not None:
            await loop.create_unix_connection(lambda: line, client.socket_path)  # type: ignore[arg-type] # bytes too
        else:
            await loop.create_connection(
                lambda: line, address.host, address.port, family=address.family, local_addr=client.source_address
            )

    @property
    def _where(self) -> str:
        """In aiosmtplib's words."""
        if self.client.socket_path is not None:
            return os.fsdecode(self.client.socket_path)
        if self.client.sock is not None:
            return f"{self.client.hostname} on port {self.client.port}"
        return f"{self.client.hostname or 'localhost'} on port {self.port}"


def unreachable(error: BaseException) -> str | None:
    """What to check where there is no such host, nothing listens there, or nobody greets."""
    if isinstance(error, SMTPConnectTimeoutError) and error.message == _NO_BANNER:
        return "where the port begins with TLS, give use_tls=True (Django: EMAIL_USE_SSL)"
    match error.__cause__:
        case socket.gaierror():
            return "check hostname="
        case aiosmtplib.SMTPServerDisconnected():
            return (
                "the server, or a proxy before it, hung up without a word: it may be down, it may not take connections "
                "from this host, or the port begins with TLS (use_tls=True)"
            )
        case ConnectionRefusedError():
            return "nothing listens there: check hostname= and port="
        case _:
            return None


def impossible(error: BaseException) -> str | None:
    """What is wrong with an argument, where it can lead nowhere."""
    match error.__cause__:
        case UnicodeError():
            return "hostname= is no name that a host can have"
        case OverflowError():
            return "port= is a number from 1 to 65535"
        case _:
            return None


def _address(family: int, where: Sequence[Any]) -> Address:
    host, port, *more = where
    scope = more[1] if more else 0  # of a link-local IPv6 address
    return Address(f"{host}%{scope}" if scope and "%" not in host else host, port, family)


def _in_turn(addresses: Sequence[Address]) -> list[Address]:
    """One of the first's family, one of the other, and so on."""
    same = [one for one in addresses if one.family == addresses[0].family]
    other = [one for one in addresses if one.family != addresses[0].family]
    return [one for one in chain.from_iterable(zip_longest(same, other)) if one is not None]
