r"""A scripted SMTP server, and policies that do not wait: for the tests of applications that send mail.

The server is a real one, on a real socket of 127.0.0.1, in the event loop of the test: no thread, no sleeping. It takes
every message, except where a script says otherwise::

    import asyncio, smtpretry
    from smtpretry.testing import ScriptedServer, no_wait

    def test_greylisting():
        async def scenario():
            policy = no_wait()
            async with ScriptedServer() as server, smtpretry.RetryingSMTP(server.client(), policy) as smtp:
                server.on("RCPT", "bob@*", "450 4.2.0 greylisted, retry in 30 seconds", times=1)
                await smtp.sendmail("app@example.com", ["bob@example.com"], "Subject: hello\r\n\r\n")
                assert len(server.received("bob@example.com")) == 1
                assert policy.waits == [30.0]

        asyncio.run(scenario())

Needs the extra ``testing``.
"""

# ruff: noqa: N802, SLF001 - aiosmtpd finds commands by their names; a server and its sessions know each other

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import re
import secrets
import socket
import ssl
import struct
from base64 import b64decode
from dataclasses import dataclass, field, fields
from email import message_from_bytes
from email import policy as email_policy
from fnmatch import fnmatchcase
from itertools import count
from typing import TYPE_CHECKING, Any, Final, Literal, Self, cast

import aiosmtplib

from .policy import RetryPolicy
from .reply import Stage

try:
    import trustme
    from aiosmtpd import smtp as aiosmtpd
except ImportError as error:
    _message = "smtpretry.testing needs aiosmtpd and trustme: pip install 'smtpretry[testing]'"
    raise ImportError(_message, name=error.name) from error

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping
    from email.message import EmailMessage
    from types import TracebackType

__all__ = ["NoWait", "ReceivedMessage", "Script", "ScriptedServer", "no_wait"]

_IN_A_TRANSACTION: Final = ("DATA", "BODY", "END_OF_DATA")
_VERBS: Final = (
    *("CONNECT", "EHLO", "HELO", "STARTTLS", "AUTH", "CHALLENGE", "MAIL", "RCPT", *_IN_A_TRANSACTION),
    *("RSET", "NOOP", "VRFY", "QUIT"),
)
_WHOLE: Final = ("bytewise", "late", "unasked", "unasked_before")  # the whole reply arrives
_FAULTS: Final = ("fin", "rst", "stall", "garbage", "half", *_WHOLE)

_GARBAGE: Final = b"\xfe\x00 this is no SMTP \x1b[31m\r\n"
_UNASKED: Final = b"250 2.0.0 Unasked\r\n"
_FAILURE: Final = b"451 4.3.0 Temporary failure\r\n"
_UNAUTHORIZED: Final = b'{"status":"401","schemes":"bearer","scope":"https://mail.google.com/"}'


@dataclass(frozen=True, kw_only=True)
class ReceivedMessage:
    """One message that the server took."""

    sender: str  # "" for the null sender
    recipients: list[str]
    content: bytes = field(repr=False)  # as received, without the transparent dots (RFC 5321 §4.5.2)
    options: list[str]  # the parameters of MAIL, such as "BODY=8BITMIME"
    authenticated: str | None  # the user who had logged in
    tls: bool
    connection: int  # on which connection it came, from 1

    @property
    def message(self) -> EmailMessage:
        """The content, parsed."""
        return message_from_bytes(self.content, policy=email_policy.SMTP)


@dataclass(kw_only=True, eq=False)
class Script:
    """What the server does in place of its own answer; `ScriptedServer.on` and `fail_at` make it."""

    verb: str
    pattern: str
    how: str  # "say", or a fault
    reply: bytes | None  # as sent; None: the server's own
    act: bool  # whether the server does what the command asks
    close: str  # "", "fin" or "rst": how the connection ends after it
    times: int | None  # None: for ever
    optional: bool
    delay: float = 0.0  # seconds before the reply
    used: int = 0  # how often it was reached

    def __post_init__(self) -> None:
        """Refuse at once what could never be reached, or said."""
        for name, value, known in (
            ("verb", self.verb, _VERBS),
            ("fault", self.how, ("say", *_FAULTS)),
            ("close", self.close, ("", "fin", "rst")),
        ):
            if value not in known:
                msg = f"{name} is one of {', '.join(filter(None, known))}, not {value!r}"
                raise ValueError(msg)
        if self.times is not None and self.times < 1:
            msg = f"times is at least 1, or None for ever, not {self.times!r}"
            raise ValueError(msg)

    def matches(self, verb: str, subjects: Iterable[str]) -> bool:
        """Whether this is the place, and not used up."""
        return (
            verb == self.verb
            and (self.times is None or self.used < self.times)
            and (self.pattern == "*" or any(fnmatchcase(one.lower(), self.pattern.lower()) for one in subjects))
        )

    def __str__(self) -> str:
        """Where and what, in one line."""
        said = self.how if self.how != "say" else (self.reply or b"").decode(errors="replace").strip()
        return f"{self.verb} {self.pattern!r}: {said or self.close!r} (reached {self.used} of {self.times} times)"


class ScriptedServer:
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
        size_limit: the largest message in bytes, offered as SIZE; a bigger one gets 552.
        eightbitmime: whether 8BITMIME is offered; where not, 8-bit content is refused.
        smtputf8: whether SMTPUTF8 is offered; where not, a command that is no ASCII is refused.
        extensions: further lines for the reply to EHLO. Nothing else comes of them.
        port: 0 for a free one. `start` after `stop` takes the same port again.

    Each is an attribute too; a change holds for `credentials`, `tokens` and `max_...` at once, for the others on
    the connections made from then on.
    """

    hostname: Final = "127.0.0.1"

    def __init__(
        self,
        *,
        tls: bool | Literal["required", "implicit"] = False,
        auth: tuple[str, str] | Mapping[str, str] | None = None,
        token: str | None = None,
        tokens: Iterable[str] | None = None,
        auth_required: bool | None = None,
        auth_requires_tls: bool = False,
        mechanisms: Iterable[str] = ("PLAIN", "LOGIN"),
        max_recipients: int | None = None,
        max_connections: int | None = None,
        size_limit: int | None = 2**25,
        eightbitmime: bool = True,
        smtputf8: bool = True,
        extensions: Iterable[str] = (),
        port: int = 0,
    ) -> None:
        """Nothing happens before `start`; see the class for the arguments."""
        if tls not in {True, False, "required", "implicit"}:
            msg = f'tls is True, False, "required" or "implicit", not {tls!r}'
            raise ValueError(msg)
        offered = list(mechanisms) if auth else []
        if unknown := set(offered) - {"PLAIN", "LOGIN", "CRAM-MD5"}:
            msg = f"unknown mechanisms: {', '.join(sorted(unknown))}"
            raise ValueError(msg)
        self.tls = tls
        self.credentials: dict[str, str] = dict([auth] if isinstance(auth, tuple) else auth or {})
        self.tokens: set[str] = {*(tokens or ()), *(() if token is None else (token,))}
        self.mechanisms = offered if token is None and tokens is None else [*offered, "XOAUTH2"]
        self.auth_required = bool(self.mechanisms) if auth_required is None else auth_required
        self.auth_requires_tls = auth_requires_tls
        self.max_recipients = max_recipients
        self.max_connections = max_connections
        self.size_limit = size_limit
        self.eightbitmime = eightbitmime
        self.smtputf8 = smtputf8
        self.extensions = list(extensions)
        self.port = port

        self.messages: list[ReceivedMessage] = []  # in the order in which they came
        self.commands: list[str] = []  # the lines that came, without what AUTH carries
        self.connections = 0  # how many there have been
        self.scripts: list[Script] = []
        self.errors: list[Exception] = []  # what went wrong inside the server
        self._sessions: set[_Session] = set()
        self._server: asyncio.Server | None = None

    # What it is to do

    def on(
        self,
        verb: str | Stage,
        pattern: str | bytes | None = "*",
        reply: str | bytes | None = "",
        *,
        times: int | None = None,
        close: bool | Literal["fin", "rst"] | None = None,
        accepted: bool | None = None,
        optional: bool = False,
    ) -> Script:
        """Answer so, in place of whatever the server would say; the first script that matches and isn't used up wins.

        ``on("MAIL", "451 4.3.0 later")``, or with a pattern: ``on("RCPT", "bob@*", "550 5.1.1 who?")``.

        Args:
            verb: a `Stage`, or CONNECT (the banner), EHLO, HELO, STARTTLS, AUTH, CHALLENGE (a 334 of AUTH), MAIL, RCPT,
                DATA (in place of 354), BODY (after the first line of the body), END_OF_DATA (after the dot), RSET,
                NOOP, VRFY, QUIT.
            pattern: like a file name's, in any case: the address at MAIL and RCPT, any recipient at DATA, BODY and
                END_OF_DATA, the mechanism at AUTH and CHALLENGE, the client's name at EHLO.
            reply: further lines of it follow after a line feed. Bytes are sent as they are, right or wrong. None says
                nothing, and closes.
            times: how often; None for ever. One that was reached less often is an error at the end of ``async with``.
            close: close the connection after it: True or "fin" in good order, "rst" by a reset; None: after 421.
            accepted: whether the server does what the command asks, whatever it says of it: at END_OF_DATA, whether it
                takes the message. None: where the reply is 2xx or 3xx.
            optional: it need not be reached.

        Raises:
            ValueError: a verb or a reply that does not exist.
        """
        if reply == "":  # without a pattern
            pattern, reply = "*", pattern
        wire = None if reply is None else _wire(reply)
        if wire is None and not close:
            msg = "nothing to say: give a reply, or close=True, or see fail_at"
            raise ValueError(msg)
        positive = wire is not None and wire[:1] in {b"2", b"3"}
        if close is None:
            close = wire is not None and wire.startswith(b"421")
        return self._add(
            verb,
            pattern,
            how="say",
            reply=b"" if wire is None else wire,
            act=positive if accepted is None else accepted,
            close=close,
            times=times,
            optional=optional,
        )

    def fail_at(
        self,
        verb: str | Stage,
        how: str,
        pattern: str = "*",
        *,
        act: bool | None = None,
        reply: str | bytes | None = None,
        times: int | None = None,
        close: bool | Literal["fin", "rst"] = False,
        delay: float = 90.0,
        optional: bool = False,
    ) -> Script:
        """Break the connection or the protocol there; verbs, patterns and `times` are those of `on`.

        Args:
            verb: where.
            how: "fin", "rst": the connection ends without a reply.
                "stall": no reply, ever; nothing more is read.
                "garbage": a line that is no SMTP, in place of the reply.
                "half": half of the reply, then silence (or the end, with `close`).
                "bytewise": the reply in pieces of one byte.
                "late": the reply after `delay` seconds of the event loop's time.
                "unasked", "unasked_before": one more 250 in the same packet, after or before the reply.
            pattern: whom it concerns.
            act: whether the server does what the command asks before it fails (STARTTLS: it says 220, and the handshake
                is what fails). None: where the whole reply arrives ("bytewise", "late", "unasked", "unasked_before").
            reply: the reply that is broken; None: the server's own where it acts, else a 451.
            times: how often; None for ever.
            close: close the connection afterwards: True or "fin" in good order, "rst" by a reset.
            delay: for "late"; the default is more than aiosmtplib waits for a reply (60).
            optional: it need not be reached.

        Raises:
            ValueError: a verb, a fault or a reply that does not exist.
        """
        if pattern in _FAULTS and how not in _FAULTS:  # in the order that `on` has
            how, pattern = pattern, how
        act = how in _WHOLE if act is None else act
        return self._add(
            verb,
            pattern,
            how=how,
            reply=_wire(reply) if reply is not None else None if act else _FAILURE,
            act=act,
            close=close or (how if how in {"fin", "rst"} else ""),
            times=times,
            optional=optional,
            delay=delay if how == "late" else 0.0,
        )

    def _add(
        self,
        verb: str | Stage,
        pattern: object,
        *,
        close: bool | str,
        **rest: Any,  # noqa: ANN401 - the other fields of a Script
    ) -> Script:
        if not isinstance(pattern, str):
            msg = f"a pattern is a str, not {pattern!r}"
            raise TypeError(msg)
        name = verb.value if isinstance(verb, Stage) else verb.upper()
        script = Script(verb=name, pattern=pattern, close="fin" if close is True else close or "", **rest)
        self.scripts.append(script)
        return script

    def clear(self) -> None:
        """Forget all scripts, those too that were not reached."""
        self.scripts.clear()

    def disconnect(self, reply: str | bytes = b"", *, close: bool | Literal["fin", "rst"] = True) -> None:
        """End every open connection now, as an idle time-out or a restart does, after a last word such as a 421.

        Args:
            reply: what to say before; by default nothing.
            close: True or "fin" in good order, "rst" by a reset; False says the word and leaves them open.
        """
        for session in list(self._sessions):
            session.hang_up(_wire(reply) if reply else b"", close=close)

    # What it has seen

    @property
    def mailboxes(self) -> dict[str, list[ReceivedMessage]]:
        """What each recipient got: every message that the server took for that address."""
        boxes: dict[str, list[ReceivedMessage]] = {}
        for message in self.messages:
            for recipient in message.recipients:
                boxes.setdefault(recipient, []).append(message)
        return boxes

    def received(self, recipient: str) -> list[ReceivedMessage]:
        """Return what this recipient got."""
        return self.mailboxes.get(recipient, [])

    @property
    def verbs(self) -> list[str]:
        """The verbs of `commands`."""
        return [command.partition(" ")[0].upper() for command in self.commands]

    @property
    def open_connections(self) -> int:
        """How many connections are open now."""
        return len(self._sessions)

    # How clients get there

    @property
    def tls_context(self) -> ssl.SSLContext:
        """A context for clients, which trusts the server's certificate."""
        return _contexts()[0]

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
            lambda: _Session(self, loop), self.hostname, self.port, backlog=4096
        )  # a full backlog would make clients wait for a second of real time
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        """Listen no more, and drop every connection without a word. What was received stays."""
        if self._server is None:
            return
        server, self._server = self._server, None
        server.close()
        await asyncio.gather(*[session.drop() for session in self._sessions], return_exceptions=True)
        for _ in range(3):  # one round of the loop closes a socket, one more tells TLS, and the next the session
            await asyncio.sleep(0)
        await server.wait_closed()

    aclose = stop

    def verify(self) -> None:
        """Raise what went wrong inside the server, or AssertionError where a script was not reached often enough."""
        if self.errors:
            raise self.errors[0]
        missing = [str(one) for one in self.scripts if one.times and one.used < one.times and not one.optional]
        if missing:
            msg = f"scripts that were not reached: {'; '.join(missing)}. The server saw: {', '.join(self.commands)}"
            raise AssertionError(msg)

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


def _wire(reply: str | bytes) -> bytes:
    """Return the bytes of a reply, with its code and enhanced status on each line (RFC 5321 §4.2.1, 2034 §4)."""
    if isinstance(reply, bytes):
        return reply
    match = re.fullmatch(r"([2-5]\d\d)(?:[ -]((?:[245]\.\d{1,3}\.\d{1,3} )?)(.*))?", reply, re.DOTALL)
    if match is None:
        msg = f"a reply begins with a code from 200 to 599 and a space, not {reply!r} (bytes are sent as they are)"
        raise ValueError(msg)
    code, status, text = match[1], match[2] or "", match[3] or ""
    lines = [re.sub(rf"^{code}[ -]", "", line).removeprefix(status) for line in text.split("\n")]
    wire = [f"{code}-{status}{line.rstrip()}\r\n" for line in lines]
    return "".join([*wire[:-1], wire[-1].replace("-", " ", 1)]).encode()


@functools.cache
def _contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Return the client's and the server's side of one certificate, made once in a process."""
    client, server = ssl.create_default_context(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority = trustme.CA()
    authority.configure_trust(client)
    authority.issue_cert("localhost", ScriptedServer.hostname).configure_cert(server)
    return client, server


class _InsteadError(Exception):
    """A script takes the place of the rest of a command."""

    def __init__(self, script: Script) -> None:
        self.script = script


class _Identity(aiosmtpd.Session):
    login_data = None  # aiosmtpd's own warns at each log-in


class _Session(aiosmtpd.SMTP):
    """One connection. The commands are aiosmtpd's; the loop that reads them, and what is said of them, are ours."""

    line_length_limit = 12_290  # what AUTH may need (RFC 4954 §4); a long token does not fit into aiosmtpd's
    session: aiosmtpd.Session
    envelope: aiosmtpd.Envelope

    def __init__(self, server: ScriptedServer, loop: asyncio.AbstractEventLoop) -> None:
        self.server = server
        super().__init__(
            self,
            data_size_limit=server.size_limit,
            enable_SMTPUTF8=server.smtputf8,
            decode_data=not server.eightbitmime,
            hostname="localhost",
            ident="ESMTP",
            tls_context=_contexts()[1] if server.tls in {True, "required"} else None,
            auth_require_tls=server.auth_requires_tls,
            auth_exclude_mechanism={"PLAIN", "LOGIN", "CRAM-MD5", "XOAUTH2"} - set(server.mechanisms),
            authenticator=self._authenticator_of_ours,
            loop=loop,
        )
        self._auth_required = server.auth_required  # as an argument it warns where TLS is not required too
        self._tls = self._over = False
        self._welcome = True
        self._argument = ""
        self._reply = b""
        self._script: Script | None = None

    # The connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._raw = cast("asyncio.Transport", transport)
        self._task = cast("asyncio.Task[None]", self._handler_coroutine)
        self.server.connections += 1
        self._number = self.server.connections
        limit = self.server.max_connections
        self._welcome = limit is None or sum(session._welcome for session in self.server._sessions) < limit
        self.server._sessions.add(self)
        if self.server._server is None:  # stopped since it was accepted
            self.drop()

    def connection_lost(self, error: Exception | None) -> None:
        self.server._sessions.discard(self)
        super().connection_lost(error)

    def _create_session(self) -> aiosmtpd.Session:
        return _Identity(self.loop)

    def _reset_timeout(self, duration: float | None = None) -> None:  # noqa: ARG002 - aiosmtpd's signature
        """No idle time-out: with virtual time it would come at once. The handle is for aiosmtpd to cancel."""
        self._timeout_handle = self.loop.create_future()  # type: ignore[assignment] # only cancel() is called on it

    def drop(self) -> asyncio.Task[None]:
        """End it at once, whatever is on its way; return what is left to wait for."""
        self._raw.abort()
        self._task.cancel()
        return self._task

    def hang_up(self, reply: bytes, *, close: bool | str) -> None:
        """Say `reply` and close, now, whatever the client is doing."""
        if self._writer.transport.is_closing():
            return  # the client was first
        self._writer.write(reply)
        if close == "rst":
            self._reset()
        elif close:
            self._writer.close()

    def _reset(self) -> None:
        linger = struct.pack("ii", 1, 0)  # for no time: what is unsent is thrown away, and a reset goes out
        self._raw.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._raw.abort()

    async def _start_tls(self) -> None:
        try:
            await self._writer.start_tls(_contexts()[1])
        except BaseException:
            self.server._sessions.discard(self)  # connection_lost will not be called
            self._raw.abort()
            raise
        self.transport = self._writer.transport
        self.envelope, self.session = self._create_envelope(), self._create_session()  # RFC 3207 §4.2: all is forgotten
        self._tls, self._auth_require_tls, self.tls_context = True, False, None  # and STARTTLS not offered again

    # The conversation

    async def _handle_client(self) -> None:
        try:
            if self.server.tls == "implicit":
                await self._start_tls()
            await self._step("CONNECT", "", self._greet)
            while not self._over:
                line = (await self._reader.readuntil()).rstrip(b"\r\n")
                self.server.commands.append(aiosmtpd.sanitize(line).decode(errors="replace"))
                verb, _, argument = line.decode(errors="surrogateescape").partition(" ")
                await self._step(verb.upper(), argument.strip(), self._command(verb.upper(), argument.strip()))
        except asyncio.LimitOverrunError:
            await self._say(b"500 5.5.2 Error: line too long\r\n")
        except OSError:
            pass  # the client has left, or does not trust the certificate
        except Exception as error:  # noqa: BLE001 - `verify` raises it
            self.server.errors.append(error)
        finally:
            self._writer.close()

    async def _greet(self) -> None:
        if self._welcome:
            await self.push(f"220 {self.hostname} {self.__ident__}")
        else:
            await self.push("421 4.7.0 Error: too many connections")
            self._over = True

    def _command(self, verb: str, argument: str) -> Callable[[], Awaitable[None]]:
        """Return what the server does about a command of its own accord."""
        method = self._smtp_methods.get(verb)
        if self.server.tls == "required" and not self._tls and verb not in aiosmtpd.ALLOWED_BEFORE_STARTTLS:
            return functools.partial(self.push, "530 5.7.0 Must issue a STARTTLS command first")
        if method is None:
            return functools.partial(self.push, "500 5.5.2 Error: command not recognized")
        if not argument.isascii() and not self.enable_SMTPUTF8:
            return functools.partial(self.push, "500 5.5.2 Error: not ASCII, and SMTPUTF8 is not offered")
        return functools.partial(method, argument or None)

    async def _step(self, verb: str, argument: str, act: Callable[[], Awaitable[None]]) -> None:
        """Do one command: what a script says, or what the server does, and what either says about it."""
        self._argument, self._reply = argument, b""
        self._script = self._take(verb)
        if self._script is None or self._script.act:
            try:
                await act()
            except _InsteadError as instead:
                self._script = instead.script
        await self._answer(self._reply)

    def _take(self, verb: str) -> Script | None:
        """Return the script for this place, and count it as reached."""
        subjects = [self._argument.partition(" ")[0]]
        if verb in {"MAIL", "RCPT"}:
            address, _ = self._getaddr(self._argument.partition(":")[2].strip())
            subjects = [(address or "").removeprefix("<>")]
        elif verb in _IN_A_TRANSACTION:
            subjects = self.envelope.rcpt_tos
        for script in self.server.scripts:
            if script.matches(verb, subjects):
                script.used += 1
                return script
        return None

    async def push(self, status: str | bytes) -> None:
        """Keep what aiosmtpd says until the command is done; but what asks the client to go on is said at once."""
        line = (status if isinstance(status, bytes) else status.encode(errors="surrogateescape")) + b"\r\n"
        if line.startswith(b"334"):
            script_at_end, self._script = self._script, self._take("CHALLENGE")
            if self._script is not None and not self._script.act:
                raise _InsteadError(self._script)
            await self._answer(line)
            self._script = script_at_end
        elif line.startswith(b"354"):
            await self._answer(line)
            self._script = self._take("BODY")
            if self._script is not None:
                first = await self._reader.readline()
                await self._answer(b"")
                self._reader._buffer[:0] = first  # type: ignore[attr-defined]  # back to where it came from
        else:
            self._reply += line

    async def _answer(self, own: bytes) -> None:
        """Say `own`, or what the script says in its place and as it says."""
        script, self._script = self._script, None
        if script is None:
            await self._say(own)
            return
        reply = own if script.reply is None else script.reply
        pieces = {
            "garbage": [_GARBAGE],
            "half": [reply[: len(reply) // 2]],
            "bytewise": [bytes([byte]) for byte in reply],
            "unasked": [reply + _UNASKED],
            "unasked_before": [_UNASKED + reply],
            "fin": [],
            "rst": [],
            "stall": [],
        }
        if script.delay:
            await asyncio.sleep(script.delay)
        for piece in pieces.get(script.how, [reply]):
            await self._say(piece)
            await asyncio.sleep(0)  # one round of the loop for the socket to become readable,
            await asyncio.sleep(0)  # and one for the client to read it
        if script.close == "rst":
            self._reset()
        elif script.close:
            # Not close(): where the client is still sending, that is a reset, and the reply may be lost.
            theirs = self._raw.get_extra_info("socket")
            with socket.fromfd(theirs.fileno(), theirs.family, theirs.type) as twin:  # uvloop's cannot be shut down
                twin.shutdown(socket.SHUT_WR)
            while await self._reader.read(2**16):
                pass
        if script.close or script.how in {"stall", "half"}:
            await self.loop.create_future()  # until the client closes, or `stop`

    async def _say(self, reply: bytes) -> None:
        if reply:
            self._writer.write(reply)
            await self._writer.drain()

    # The commands, where aiosmtpd's own will not do

    def _getaddr(self, arg: str) -> tuple[str | None, str | None]:
        try:
            return super()._getaddr(arg)
        except Exception:  # noqa: BLE001 - the standard library's parser fails in many ways; the client gets 553
            return None, None

    async def handle_EHLO(
        self, _server: object, session: aiosmtpd.Session, _envelope: object, hostname: str, responses: list[str]
    ) -> list[str]:
        session.host_name = hostname
        lines = [line[4:] for line in responses if self.server.mechanisms or not line.startswith("250-AUTH")]
        lines[-1:-1] = self.server.extensions
        return _wire("250 " + "\n".join(lines)).decode().splitlines()

    async def smtp_STARTTLS(self, arg: str) -> None:
        if self.tls_context is None or arg:
            await self.push("501 5.5.4 Syntax: STARTTLS" if arg else "503 5.5.1 Error: STARTTLS is not offered")
            return
        ready = b"220 2.0.0 Ready to start TLS\r\n"
        if self._script is None or self._script.how in ("say", *_WHOLE):
            await self._answer(ready)
            await self._start_tls()
        else:
            await self._say(ready)
            await self._reader.read(1)  # the client begins the handshake, which is what fails
            await self._answer(b"")
            self._over = True

    async def smtp_AUTH(self, arg: str) -> None:
        mechanism, space, response = (arg or "").partition(" ")
        if not self.server.mechanisms:
            await self.push("503 5.5.1 Error: authentication is not enabled")
        elif self.envelope.mail_from:
            await self.push("503 5.5.1 Error: MAIL transaction in progress")  # RFC 4954 §4
        else:
            await super().smtp_AUTH(mechanism.upper() + space + response)

    def _authenticator_of_ours(
        self, _server: object, _session: object, _envelope: object, _mechanism: str, data: aiosmtpd.LoginPassword
    ) -> aiosmtpd.AuthResult:
        known = {user.encode(): password.encode() for user, password in self.server.credentials.items()}
        return aiosmtpd.AuthResult(success=known.get(data.login) == data.password, handled=False, auth_data=data)

    async def auth_CRAM__MD5(self, _: object, _args: list[str]) -> aiosmtpd.AuthResult:
        challenge = f"<{secrets.token_hex(8)}@{self.hostname}>".encode()  # RFC 2195 §2
        answer = await self.challenge_auth(challenge)
        if not isinstance(answer, bytes):
            return aiosmtpd.AuthResult(success=False)
        user, _space, digest = answer.rpartition(b" ")
        password = self.server.credentials.get(user.decode(errors="replace"))
        good = password is not None and hmac.new(password.encode(), challenge, "md5").hexdigest().encode() == digest
        return aiosmtpd.AuthResult(success=good, handled=False, auth_data=aiosmtpd.LoginPassword(user, b""))

    async def auth_XOAUTH2(self, _: object, args: list[str]) -> aiosmtpd.AuthResult:
        # A refusal is a 334 with the reason in JSON; the client says an empty line to it; 535 follows.
        # https://developers.google.com/workspace/gmail/imap/xoauth2-protocol#error_response
        answer: object = b""
        if len(args) == 1:
            answer = await self.challenge_auth("")
        else:
            with contextlib.suppress(ValueError):
                answer = b64decode(args[1], validate=True)
        if not isinstance(answer, bytes):
            return aiosmtpd.AuthResult(success=False)
        match = re.fullmatch(rb"user=([^\x01]*)\x01auth=Bearer ([^\x01]*)\x01\x01", answer)
        if match is not None and match[2].decode(errors="replace") in self.server.tokens:
            return aiosmtpd.AuthResult(success=True, auth_data=aiosmtpd.LoginPassword(match[1], b""))
        said = await self.challenge_auth(_UNAUTHORIZED)
        refusal = "535 5.7.8 Username and Password not accepted"
        return aiosmtpd.AuthResult(success=False, handled=not isinstance(said, bytes), message=refusal)

    async def smtp_RCPT(self, arg: str | None) -> None:
        limit = self.server.max_recipients
        if limit is not None and len(self.envelope.rcpt_tos) >= limit:
            await self.push("452 4.5.3 Error: too many recipients")
        else:
            await super().smtp_RCPT(arg)

    async def handle_DATA(self, *_: object) -> str:
        """Take the message; called at the end of the data."""
        self._script = self._take("END_OF_DATA")
        if self._script is None or self._script.act:
            login = cast("aiosmtpd.LoginPassword | None", self.session.auth_data)
            self.server.messages.append(
                ReceivedMessage(
                    sender=(self.envelope.mail_from or "").removeprefix("<>"),
                    recipients=list(self.envelope.rcpt_tos),
                    content=self.envelope.original_content or b"",
                    options=list(self.envelope.mail_options),
                    authenticated=login.login.decode(errors="replace") if login is not None else None,
                    tls=self._tls,
                    connection=self._number,
                )
            )
        return f"250 2.0.0 Ok: queued as {len(self.server.messages)}"

    async def smtp_QUIT(self, _arg: str) -> None:
        self._over = True
        await self.push("221 2.0.0 Bye")


@dataclass(frozen=True, kw_only=True)
class NoWait(RetryPolicy):
    """A policy whose waits take no time; `waits` are the seconds that it would have waited, in order."""

    waits: list[float] = field(default_factory=list, repr=False, compare=False)


def no_wait(policy: RetryPolicy | None = None) -> NoWait:
    """Return a policy like the given one (default: `RetryPolicy()`) whose waits take no time, recorded in `waits`.

    Its clock stands still but for these waits. Where tasks wait at once, they go on in the order of their wake times.
    """
    policy = RetryPolicy() if policy is None else policy
    now, waits, numbers = policy.clock(), list[float](), count()
    asleep: set[tuple[float, int]] = set()

    async def sleep(seconds: float) -> None:
        nonlocal now
        waits.append(seconds)
        me = (now + max(seconds, 0.0), next(numbers))
        asleep.add(me)
        try:
            await asyncio.sleep(0)
            while min(asleep) != me:  # noqa: ASYNC110 - no event: it is to take no time, and one round of the loop each
                await asyncio.sleep(0)
            now = me[0]
        finally:
            asleep.remove(me)

    given = {one.name: getattr(policy, one.name) for one in fields(RetryPolicy)}
    return NoWait(**(given | {"sleep": sleep, "clock": lambda: now, "waits": waits}))
