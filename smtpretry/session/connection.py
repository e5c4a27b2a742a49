"""One aiosmtplib client kept usable: connect, EHLO, TLS, AUTH, close. The only room that knows credentials.

What its sessions need (`Needs`) is learned once for all connections of a client; `prepare` brings it about, each time
anew after a reconnect. A step that fails raises `Failed`, which says at which stage, and with which reply.
"""

from __future__ import annotations

import asyncio
import ipaddress
import math
import ssl
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar

import aiosmtplib
from aiosmtplib.typing import Default

from smtpretry.replies.reply import NO_REPLY, Reply, Said
from smtpretry.replies.stage import Stage

from .credentials import Credentials
from .pipelining import Pipelining

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator

CleartextAuth = Literal["never", "loopback", "always"]
Timeout = float | Literal[Default.token] | None
T = TypeVar("T")

_TOO_LATE = "Timed out waiting for server response"
_QUIT_TIMEOUT = 5.0  # seconds
# Settings of an aiosmtplib client that have no public name. Its connect() would act on them by itself: log in over a
# clear connection, take a busy server for one without EHLO, and not tell at which stage it failed.
_SETTINGS = ("port", "_start_tls_on_connect", "_login_username", "_login_password", "_oauth_token_generator")


class Failed(Exception):  # noqa: N818 - not an error of the caller's: it never leaves the package
    """A step of the session or of the transaction failed.

    Attributes:
        said: what came instead of a success.
        final: why nothing that the server may say later changes it, where that is known on this side.
    """

    def __init__(self, said: Said, final: str | None = None) -> None:
        super().__init__(said)
        self.said, self.final = said, final

    @classmethod
    def silently(cls, stage: Stage, error: Exception, *, final: bool = False) -> Failed:
        """No reply came; the error says what did."""
        why = getattr(error, "message", str(error)) or type(error).__name__
        return cls(Said(stage, Reply.of(NO_REPLY, why), error), why if final else None)


@dataclass(slots=True)
class Needs:
    """What the sessions with a server turned out to need, and what it refused last."""

    tls: bool = False
    auth: bool = False
    refused: tuple[str | bytes, Reply] | None = None
    refusals: int = 0  # how many passwords were refused
    proven: bool = False  # somebody has logged in
    pipelining: Pipelining = field(default_factory=lambda: Pipelining(wanted=False))
    _trying: tuple[asyncio.AbstractEventLoop, asyncio.Lock] | None = None

    @asynccontextmanager
    async def trying(self) -> AsyncIterator[None]:
        """Let one connection log in at a time until one has: a wrong password is not to be sent by all of them."""
        if self.proven:
            yield
            return
        loop = asyncio.get_running_loop()
        if self._trying is None or self._trying[0] is not loop:
            self._trying = loop, asyncio.Lock()
        async with self._trying[1]:
            yield


class _Deadline:
    """When a reply must have come: one timer for all commands, for most are answered long before."""

    def __init__(self, missed: Callable[[], None]) -> None:
        self._missed = missed
        self._at: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def set(self, seconds: float | None) -> None:
        """Call `missed` after so many seconds, in place of what was set before; None for never."""
        loop = asyncio.get_running_loop()
        self._at = None if seconds is None else loop.time() + seconds
        if self._at is None or (self._timer is not None and self._timer.when() <= self._at):
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
        if self._at is not None and self._at > loop.time():
            self._timer = loop.call_at(self._at, self._look)
        elif self._at is not None:
            self._missed()


class Connection:
    """An aiosmtplib client and what is known of its session."""

    def __init__(
        self,
        client: aiosmtplib.SMTP,
        credentials: Credentials,
        cleartext_auth: CleartextAuth,
        needs: Needs,
        max_messages: int | None,
    ) -> None:
        self.client = client
        self._start_tls: bool | None = client._start_tls_on_connect  # noqa: SLF001
        self.credentials = credentials or Credentials.of(client)
        self._must_log_in = bool(self.credentials) and not credentials  # a client with its own always does
        self.cleartext_auth = cleartext_auth
        self.needs = needs
        self.needs.auth |= self._must_log_in
        self.max_messages = math.inf if max_messages is None else max_messages
        self.carried = 0  # messages, since it was connected
        self.idle_since = 0.0  # on the event loop's clock
        self.authenticated: Reply | None = None  # what the server said to the log-in of this session
        if self._must_log_in and client.is_connected:
            self.authenticated = Reply(235, text="logged in by the client itself")
        self.reused = client.is_connected  # whether it was connected before this send: it may have died since
        self._deadline = _Deadline(self._give_up)
        self._in_time = True
        self._task: asyncio.Task[Any] | None = None
        self._cancelling = 0
        self._refreshed = False
        self._sent: str | bytes = ""  # what the last AUTH was made with
        self._forms = list[str]()  # in which it was sent
        self._refusals = needs.refusals  # when it was connected

    @property
    def is_open(self) -> bool:
        """Whether there is a connection, as far as this side knows."""
        return self.client.is_connected

    @property
    def is_tls(self) -> bool:
        """Whether it is encrypted."""
        return self.is_open and self.client.get_transport_info("sslcontext") is not None

    def watch(self) -> None:
        """Remember who uses the connection now, for `heed`."""
        self._task = asyncio.current_task()
        self._cancelling = self._task.cancelling() if self._task else 0

    def heed(self) -> None:
        """Raise the cancellation that asyncio.wait_for swallowed, as Python 3.11's does when a reply comes with it."""
        if self._task is not None and self._task.cancelling() > self._cancelling:
            raise asyncio.CancelledError

    async def prepare(self, timeout: Timeout = Default.token) -> None:
        """Bring the session to where a transaction can begin. Raises `Failed`."""
        if self.carried >= self.max_messages:
            await self.hang_up()
        if self.is_open:
            await self._secure(timeout)
        else:
            await self.connect(timeout)
        if self.needs.auth and self.authenticated is None:
            if self._can_encrypt:
                await self._encrypt(timeout)
            obstacle = self.obstacle_to_auth()
            if obstacle is None:
                async with self.needs.trying():
                    await self._log_in(timeout)
            elif self._must_log_in:
                raise Failed.silently(Stage.AUTH, aiosmtplib.SMTPNotSupported(obstacle), final=True)

    async def connect(self, timeout: Timeout = Default.token) -> aiosmtplib.SMTPResponse:
        """Connect, and encrypt where the client is set to. Returns the server's banner. Raises `Failed`."""
        self.authenticated, self.reused, self._refreshed, self.carried = None, False, False, 0
        self._deadline, self._in_time = _Deadline(self._give_up), True
        self._refusals = self.needs.refusals
        port = self.client.port
        if port is None and self._start_tls and not (self.client.sock or self.client.socket_path):
            port = 587  # aiosmtplib's own default for start_tls=True
        if self.client.sock is not None and self.client.sock.fileno() < 0:
            msg = "the socket that was given carries one connection, which is over"
            raise Failed.silently(Stage.CONNECT, aiosmtplib.SMTPConnectError(msg), final=True)
        given = {name: getattr(self.client, name) for name in _SETTINGS}
        step_by_step: dict[str, Any] = {
            "start_tls": False,
            "username": None,
            "password": None,
            "oauth_token_generator": None,
        }
        try:
            with self.at(Stage.CONNECT):
                banner = await self._interruptibly(self.client.connect(port=port, **step_by_step, timeout=timeout))
        finally:
            for name, value in given.items():  # connect() remembers what it is told
                setattr(self.client, name, value)
        await self._secure(timeout)
        return banner

    def obstacle_to_tls(self) -> str | None:
        """Why STARTTLS cannot be done now; None where it can."""
        if self.is_tls:
            return "the session is encrypted already"
        if self.is_open and not self._can_encrypt:
            return "the server offers no STARTTLS"
        return None

    def obstacle_to_auth(self) -> str | None:
        """Why AUTH cannot be done now; None where it can (over TLS first, where that is offered)."""
        if not self.credentials:
            return "no credentials are configured: give username= and password=, or oauth_token_generator="
        if self.authenticated is not None:
            return "the session was logged in already"
        if self.is_open and not self._can_encrypt:
            if not self.is_tls and not self._may_be_clear:
                return (
                    "the credentials were not sent, for the connection is in the clear and the server offers no TLS: "
                    'use TLS, or cleartext_auth="always"'
                )
            if self._mechanism is None:
                return "the server offers no AUTH mechanism that the credentials fit"
        return None

    def obstacle_to_refresh(self) -> str | None:
        """Why another token cannot be asked for now; None where it can."""
        if not self.credentials.token:
            return "no oauth_token_generator is configured"
        return "the server refused a fresh token, too" if self._refreshed else None

    def remember(self, refusal: Reply, *, final: bool) -> None:
        """Never send the refused token again, nor the refused password on this connection."""
        self.needs.refused = self._sent, refusal
        self.needs.refusals += 1
        if final:
            self.needs.auth = self._must_log_in  # what goes without logging in, goes

    def refresh(self) -> None:
        """Ask for another token at the next `prepare`, once a connection."""
        self._refreshed = True

    def seconds(self, timeout: Timeout) -> float | None:
        """A time-out as the client has it: its own, where none is given."""
        return self.client.timeout if timeout is Default.token else timeout

    async def command(self, stage: Stage, *words: bytes, timeout: Timeout = Default.token, expect: int = 2) -> None:
        """Send a command and `judge` its reply."""
        self.heed()
        code, message = await self.exchange(stage, self.client.execute_command(*words, timeout=None), timeout)
        self.judge(stage, code, message, expect)

    # SHIM
    def send(self, data: bytes, replies: int) -> None:
        with self.at(Stage.MAIL):
            if self.client.protocol is None:
                raise aiosmtplib.SMTPServerDisconnected("Connection lost")
            self.client.protocol._response_pending = True
            self.client.protocol.write(data)

    async def receive(self, stage: Stage, timeout: Timeout) -> aiosmtplib.SMTPResponse:
        if self.client.protocol is None:
            self._fail(stage, aiosmtplib.SMTPServerDisconnected("Connection lost"))
        return await self.exchange(stage, self.client.protocol.read_response(), timeout)

    @property
    def line(self) -> Any:
        class L:
            async def drain(_):
                with suppress(ConnectionError):
                    await self.client.protocol._drain_helper()

        self.client.transport.set_write_buffer_limits(high=1, low=0)
        return L()

    async def exchange(
        self, stage: Stage, answer: Awaitable[aiosmtplib.SMTPResponse], timeout: Timeout
    ) -> aiosmtplib.SMTPResponse:
        """Await one reply of the server's, which is to come in time."""
        self._deadline.set(self.seconds(timeout))
        try:
            return await answer
        except (aiosmtplib.SMTPException, OSError) as error:
            self._fail(stage, error if self._in_time else aiosmtplib.SMTPReadTimeoutError(_TOO_LATE))
        finally:
            self._deadline.set(None)

    def _give_up(self) -> None:
        self._in_time = False
        self._drop(self.client.transport)

    def reply(self, code: int, message: str) -> Reply:
        """What the server said, without the credentials that some servers repeat."""
        if any(form in message for form in self._forms):
            message = "(not shown: it repeats the credentials)"
        return Reply.of(code, message)

    def judge(self, stage: Stage, code: int, message: str, expect: int | None = 2) -> None:
        """Take a reply whose first digit is the expected one (RFC 5321 §4.2.1; None: none); else raise `Failed`."""
        more = self.client.protocol._buffer if self.client.protocol else b""  # noqa: SLF001 - nothing public shows it
        in_step = not more or more.startswith(b"421")  # which may come at any time (RFC 5321 §3.8)
        if in_step and code // 100 == expect:
            return
        reply = self.reply(code, message)
        if not in_step and reply.code != NO_REPLY:
            reply = Reply.of(NO_REPLY, f"more than one reply to one command, first {reply}")
        if reply.is_transient or reply.is_permanent:
            raise Failed(Said(stage, reply))
        self.abort()
        why = reply.text if reply.code == NO_REPLY else f"unexpected reply: {reply}"
        raise Failed.silently(stage, aiosmtplib.SMTPResponseException(NO_REPLY, why))

    async def reset(self, timeout: Timeout = Default.token) -> None:
        """End the open transaction: with RSET, or with the connection. Raises nothing, for it follows a refusal."""
        if self.is_open:
            try:
                await self.command(Stage.MAIL, b"RSET", timeout=timeout)
            except Failed:
                self.abort()

    async def quit(self, timeout: Timeout = Default.token) -> aiosmtplib.SMTPResponse:
        """Send QUIT and close, whatever the server says to it. Raises aiosmtplib's errors."""
        transport = self.client.transport  # which the client lets go of at once, and TLS takes its time to close
        try:
            return await self.client.quit(timeout=timeout)
        finally:
            self._drop(transport)
            self.abort()

    async def hang_up(self, *, politely: bool = True) -> None:
        """Close: with QUIT, if politely. Raises nothing, for nothing depends on the server's answer."""
        if self.is_open and politely:
            with suppress(aiosmtplib.SMTPException, OSError):
                await self.quit(_QUIT_TIMEOUT)
        else:
            self.abort()

    def abort(self) -> None:
        """Close at once; what is written and not yet gone is dropped, for it could still become a mail."""
        self._drop(self.client.transport)
        self.client.close()
        self._deadline.cancel()

    def forget(self) -> None:
        """Let go of a connection whose event loop has ended, and of what could not be closed with it."""
        self.client.transport = None
        self.client.close()

    @staticmethod
    def _drop(transport: asyncio.BaseTransport | None) -> None:
        if transport is not None:
            transport.abort()  # type: ignore[attr-defined] # every transport that writes has it

    @property
    def _can_encrypt(self) -> bool:
        return self.is_open and not self.is_tls and self.client.supports_extension("starttls")

    @property
    def _may_be_clear(self) -> bool:
        if self.cleartext_auth != "loopback":
            return self.cleartext_auth == "always"
        peer = self.client.get_transport_info("peername")
        if isinstance(peer, tuple):
            return ipaddress.ip_address(peer[0].partition("%")[0]).is_loopback
        return isinstance(peer, (str, bytes))  # a Unix domain socket

    @property
    def _mechanism(self) -> str | None:
        """The one mechanism to use. In the clear (loopback, or as told) one that hides the password goes first."""
        if self.credentials.token:
            wanted: tuple[str, ...] = ("xoauth2",)
        elif self.is_tls:
            wanted = ("plain", "login", "cram-md5")
        else:
            wanted = ("cram-md5", "plain", "login")
        return next((name for name in wanted if name in self.client.server_auth_methods), None)

    async def _secure(self, timeout: Timeout) -> None:
        """EHLO where it is due, and TLS where the client is set to it or the server wants it: never on without it."""
        if self.client.is_ehlo_or_helo_needed:
            await self._greet(timeout)
        if not self.is_tls:
            welcome = self._start_tls is None or self.needs.tls
            if self._start_tls or (welcome and self._can_encrypt):
                await self._encrypt(timeout)

    async def _greet(self, timeout: Timeout) -> None:
        """EHLO; HELO only where the server does not know EHLO (RFC 5321 §3.2), never where it is just busy."""
        try:
            with self.at(Stage.EHLO):
                await self.client.ehlo(timeout=timeout)
        except Failed as failed:
            if not failed.said.reply.is_unknown_command:
                raise
            try:
                with self.at(Stage.EHLO):
                    await self.client.helo(timeout=timeout)
            except Failed:
                raise failed from None

    async def _encrypt(self, timeout: Timeout) -> None:
        """STARTTLS, and EHLO anew: what was offered before counts no more (RFC 3207 §4.2)."""
        with self.at(Stage.STARTTLS):
            if not self._can_encrypt:
                msg = "SMTP STARTTLS extension not supported by server."
                raise aiosmtplib.SMTPNotSupported(msg)
            await self._interruptibly(self.client.starttls(timeout=timeout))
        await self._greet(timeout)

    async def _log_in(self, timeout: Timeout) -> None:
        """One AUTH command (RFC 4954 §4), and none with what was refused before."""
        log_in = getattr(self.client, f"auth_{self._mechanism}".replace("-", ""))
        secret = self.credentials.password or ""
        if self.credentials.oauth_token_generator is not None:
            try:
                async with asyncio.timeout(self.seconds(timeout)):
                    secret = await self.credentials.token_for_now()
            except TimeoutError as error:
                no_token = aiosmtplib.SMTPTimeoutError("no token came from oauth_token_generator in time")
                raise Failed.silently(Stage.AUTH, no_token) from error
        refused = self.needs.refused
        since = self.needs.refusals > self._refusals
        # A token is never sent again, a password on a new connection: servers have refused good ones that they could
        # not check.
        if refused and refused[0] == secret and (since or self.credentials.token):
            what = "token that the generator gave" if self.credentials.token else "password"
            raise Failed(Said(Stage.AUTH, refused[1]), f"the {what} is the one that the server refused before")
        self._sent, self._forms = secret, self.credentials.forms(secret)
        with self.at(Stage.AUTH):
            accepted = await self._interruptibly(log_in(self.credentials.username, secret, timeout=timeout))
        self.judge(Stage.AUTH, *accepted)
        self.authenticated, self._refreshed = self.reply(*accepted), False
        self.needs.refused, self.needs.proven = None, True

    async def _interruptibly(self, steps: Coroutine[Any, Any, T]) -> T:
        """Await several steps of aiosmtplib's in one; a cancellation in their midst is not swallowed (see `heed`)."""
        task = asyncio.ensure_future(steps)
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            while not task.done():
                task.cancel()
                await asyncio.sleep(0)
            if not task.cancelled():
                task.exception()  # seen, or the loop would complain
            raise
        return task.result()

    @contextmanager
    def at(self, stage: Stage) -> Iterator[None]:
        """Turn what aiosmtplib raises into `Failed`; close a connection on which no valid reply came."""
        self.heed()
        try:
            yield
        except (aiosmtplib.SMTPException, OSError) as error:
            self._fail(stage, error)

    def _fail(self, stage: Stage, error: aiosmtplib.SMTPException | OSError) -> NoReturn:
        if isinstance(error, aiosmtplib.SMTPResponseException):
            self.judge(stage, error.code, error.message, expect=None)
        final = isinstance(error, aiosmtplib.SMTPNotSupported)
        if not final:
            self.abort()
        raise Failed.silently(stage, error, final=final or _is_local(stage, error)) from error


def _is_local(stage: Stage, error: Exception) -> bool:
    """Whether it is this side's trouble, such as a certificate file that cannot be read: trying again is no help."""
    if isinstance(error, aiosmtplib.SMTPException):  # aiosmtplib wraps what happens in connecting
        return False
    return stage is Stage.CONNECT or not isinstance(error, (ssl.SSLError, ConnectionError, TimeoutError))
