"""One connection to a scripted server."""

# ruff: noqa: D102, N802, SLF001 - aiosmtpd finds commands by their names

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
from typing import TYPE_CHECKING, Final, cast

try:
    import trustme
    from aiosmtpd import smtp as aiosmtpd
except ImportError as error:
    _message = "smtpretry.testing needs aiosmtpd and trustme: install smtpretry with its extra 'testing'"
    raise ImportError(_message, name=error.name) from error

from .scripts import IN_A_TRANSACTION, WHOLE, ReceivedMessage, Script, wire

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from .scenario import Scenario

HOSTNAME: Final = "127.0.0.1"
_GARBAGE: Final = b"\xfe\x00 this is no SMTP \x1b[31m\r\n"
_TOO_EARLY: Final = b"554 5.5.0 SMTP synchronization error: PIPELINING is not offered\r\n"
_NOISE: Final = b"\r\nDEBUG: a line that is no reply\r\n"
_UNASKED: Final = b"250 2.0.0 Unasked\r\n"
_UNAUTHORIZED: Final = b'{"status":"401","schemes":"bearer","scope":"https://mail.google.com/"}'


@functools.cache
def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Return the client's and the server's side of one certificate, made once in a process."""
    client, server = ssl.create_default_context(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority = trustme.CA()
    authority.configure_trust(client)
    authority.issue_cert("localhost", HOSTNAME).configure_cert(server)
    return client, server


contexts()  # while the time of day is the real one: freezegun's dates make cryptography fail, from then on for good


class _InsteadError(Exception):
    """A script takes the place of the rest of a command."""

    def __init__(self, script: Script) -> None:
        self.script = script


class _Identity(aiosmtpd.Session):
    login_data = None  # aiosmtpd's own warns at each log-in


class Session(aiosmtpd.SMTP):
    """One connection. The commands are aiosmtpd's; the loop that reads them, and what is said of them, are ours."""

    line_length_limit = 12_290  # what AUTH may need (RFC 4954 §4); a long token does not fit into aiosmtpd's
    session: aiosmtpd.Session
    envelope: aiosmtpd.Envelope

    def __init__(self, server: Scenario, loop: asyncio.AbstractEventLoop) -> None:
        self.server = server
        super().__init__(
            self,
            data_size_limit=server.size_limit,
            enable_SMTPUTF8=server.smtputf8,
            decode_data=not server.eightbitmime,
            hostname="localhost",
            ident="ESMTP",
            tls_context=contexts()[1] if server.tls in {True, "required"} else None,
            auth_require_tls=server.auth_requires_tls,
            auth_exclude_mechanism={"PLAIN", "LOGIN", "CRAM-MD5", "XOAUTH2"} - set(server.mechanisms),
            authenticator=self._authenticator_of_ours,
            loop=loop,
        )
        self._auth_required = server.auth_required  # as an argument it warns where TLS is not required too
        self._tls = self._over = self._more_came = False
        self._pipelining = server.pipelining
        self.welcome = True
        self._mail_refused = False  # the last one
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
        self.welcome = limit is None or sum(session.welcome for session in self.server.sessions) < limit
        self.server.sessions.add(self)
        if not self.server.listening:  # stopped since it was accepted
            self.drop()

    def connection_lost(self, error: Exception | None) -> None:
        self.server.sessions.discard(self)
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
            await self._writer.start_tls(contexts()[1])
        except BaseException:
            self.server.sessions.discard(self)  # connection_lost will not be called
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
                if self._more_came and not self._pipelining:
                    await self._say(_TOO_EARLY)
                    break
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
        if self.welcome:
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
        self._more_came = bool(self._buffer) and verb != "STARTTLS"  # whose answer went out before TLS
        if verb == "MAIL":
            said = self._script.reply if self._script is not None else None
            self._mail_refused = (self._reply if said is None else said).startswith((b"4", b"5"))
        await self._answer(self._reply)

    def _take(self, verb: str) -> Script | None:
        """Return the script for this place, and count it as reached. RCPT behind a refused MAIL reaches faults only."""
        subjects = [self._argument.partition(" ")[0]]
        if verb in {"MAIL", "RCPT"}:
            address, _ = self._getaddr(self._argument.partition(":")[2].strip())
            subjects = [(address or "").removeprefix("<>")]
        elif verb in IN_A_TRANSACTION:
            subjects = self.envelope.rcpt_tos
        return self.server.take(verb, subjects, faults_only=verb == "RCPT" and self._mail_refused)

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
                self._buffer[:0] = first  # back to where it came from
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
            "noise": [reply + _NOISE],
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

    @property
    def _buffer(self) -> bytearray:
        """What has come and was not read yet."""
        return cast("bytearray", self._reader._buffer)  # type: ignore[attr-defined]

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
        lines[-1:-1] = [*(["PIPELINING"] if self._pipelining else []), *self.server.extensions]
        return wire("250 " + "\n".join(lines)).decode().splitlines()

    async def smtp_STARTTLS(self, arg: str) -> None:
        if self.tls_context is None or arg:
            await self.push("501 5.5.4 Syntax: STARTTLS" if arg else "503 5.5.1 Error: STARTTLS is not offered")
            return
        ready = b"220 2.0.0 Ready to start TLS\r\n"
        if self._script is None or self._script.how in ("say", *WHOLE):
            await self._answer(ready)
            self._buffer.clear()  # what came in the clear behind STARTTLS is not answered (RFC 3207 §4.2)
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

    async def smtp_DATA(self, arg: str) -> None:
        script = self._script
        if script is None or not script.act or self.envelope.rcpt_tos:
            await super().smtp_DATA(arg)
            return
        await self.push("354 End data with <CR><LF>.<CR><LF>")  # though nobody is to get it (RFC 2920 §3.1)
        while await self._reader.readuntil() != b".\r\n":
            pass
        self._script = self._take("END_OF_DATA")
        await self.push("554 5.5.1 Error: no valid recipients")
        self._set_post_data_state()  # type: ignore[no-untyped-call] # aiosmtpd's

    async def handle_DATA(self, *_: object) -> str:
        """Take the message; called at the end of the data."""
        self._script = self._take("END_OF_DATA")
        if self._script is None and not self.server.admit(self.loop.time()):
            return "454 4.7.0 Throttling failure: Maximum sending rate exceeded"
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
