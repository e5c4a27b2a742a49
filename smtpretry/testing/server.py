"""A real SMTP server on a real socket which answers as scripted: `ScriptedServer`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, Literal, Self

import aiosmtplib

from .scenario import Scenario
from .scripts import wire
from .session import HOSTNAME, Session, contexts

if TYPE_CHECKING:
    import ssl
    from types import TracebackType


class ScriptedServer(Scenario):
    """A real SMTP server on 127.0.0.1 which does as scripted, in the event loop that starts it.

    ``async with`` starts and stops it; at the end it raises what went wrong inside the server, and AssertionError where
    a script with `times` was not reached that often.

    Args:
        tls: True offers STARTTLS; "required" refuses the rest before it, with 530 (RFC 3207 §4); "implicit" speaks TLS
            from the first byte, as port 465 does. The certificate is for localhost and 127.0.0.1.
        auth: a user and a password, or a mapping of them, to log in with.
        token: an OAuth token to log in with by XOAUTH2, as any user; `tokens` for several.
        auth_required: whether MAIL before AUTH gets 530 5.7.0; None: where there is something to log in with.
        auth_requires_tls: whether AUTH is offered on encrypted connections only.
        mechanisms: those offered for `auth`, of PLAIN, LOGIN and CRAM-MD5.
        max_recipients: beyond this number RCPT gets 452 4.5.3.
        max_connections: beyond this number of open connections, the next ones get a 421 in place of the banner.
        max_rate: how many messages are taken in how many seconds of the event loop's time, such as (14, 1); the others
            get 454 4.7.0 after the final dot, as Amazon SES says it.
        size_limit: the largest message in bytes, offered as SIZE; a bigger one gets 552.
        eightbitmime: whether 8BITMIME is offered; where not, 8-bit content is refused.
        smtputf8: whether SMTPUTF8 is offered; where not, a command that is no ASCII is refused.
        pipelining: whether PIPELINING is offered (RFC 2920). Commands that come together are answered in order; where
            it is not offered, the second of them gets 554, and the connection ends, as with Exim.
        extensions: further lines for the reply to EHLO. Nothing else comes of them.
        port: 0 for a free one. `start` after `stop` takes the same port again.

    Each is an attribute too; a change holds for `credentials`, `tokens` and `max_...` at once, for the others on
    the connections made from then on.
    """

    hostname: Final = HOSTNAME

    _server: asyncio.Server | None = None

    def disconnect(self, reply: str | bytes = b"", *, close: bool | Literal["fin", "rst"] = True) -> None:
        """End every open connection now, as an idle time-out or a restart does, after a last word such as a 421.

        Args:
            reply: what to say before; by default nothing.
            close: True or "fin" in good order, "rst" by a reset; False says the word and leaves them open.
        """
        for session in list(self.sessions):
            session.hang_up(wire(reply) if reply else b"", close=close)

    @property
    def open_connections(self) -> int:
        """How many connections are open now."""
        return len(self.sessions)

    # How clients get there

    @property
    def tls_context(self) -> ssl.SSLContext:
        """A context for clients, which trusts the server's certificate."""
        return contexts()[0]

    def client(self, **options: Any) -> aiosmtplib.SMTP:  # noqa: ANN401 - aiosmtplib's
        """Return a client for this server which trusts its certificate; `options` are those of `aiosmtplib.SMTP`."""
        defaults: dict[str, Any] = {
            "hostname": self.hostname,
            "port": self.port,
            "use_tls": self.tls == "implicit",
            "local_hostname": "client.example",  # aiosmtplib's default asks the resolver, in a thread
        }
        if not {"client_cert", "cert_bundle", "validate_certs"} & options.keys():
            defaults["tls_context"] = self.tls_context
        return aiosmtplib.SMTP(**(defaults | options))

    # Its life

    async def start(self) -> Self:
        """Listen; after a `stop`, on the same port as before."""
        if self._server is not None:
            msg = "the server has been started already"
            raise RuntimeError(msg)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: Session(self, loop), self.hostname, self.port, backlog=4096
        )  # a full backlog would make clients wait for a second of real time
        self.port, self.listening = self._server.sockets[0].getsockname()[1], True
        return self

    async def stop(self) -> None:
        """Listen no more, and drop every connection without a word. What was received stays."""
        if self._server is None:
            return
        server, self._server, self.listening = self._server, None, False
        server.close()
        await asyncio.gather(*[session.drop() for session in self.sessions], return_exceptions=True)
        for _ in range(3):  # one round of the loop closes a socket, one more tells TLS, and the next the session
            await asyncio.sleep(0)
        await server.wait_closed()

    async def aclose(self) -> None:
        """Stop."""
        await self.stop()

    async def __aenter__(self) -> Self:
        """Start."""
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop, and verify, except where the body has raised already."""
        await self.stop()
        if error is None:
            self.verify()
