"""One connection kept usable: connect, EHLO, TLS, AUTH, close.

What its sessions need (`Needs`) is learned once for all connections of a client; `prepare` brings it about, each time
anew after a reconnect. A step that fails raises `Failed`, which says at which stage, and with which reply.
"""

from __future__ import annotations

import ipaddress
import math
from contextlib import suppress
from functools import partial
from typing import Literal, NoReturn

import aiosmtplib
from aiosmtplib import SMTPResponse
from aiosmtplib.typing import Default

from smtpretry.errors import NOT_CONNECTED
from smtpretry.replies.patterns import caseless
from smtpretry.replies.reply import Reply, Said
from smtpretry.replies.stage import Stage
from smtpretry.replies.words import LOG_IN, TLS

from .codes import LOG_IN_FIRST, MECHANISM_FAILS
from .conversation import Timeout
from .credentials import Credentials
from .failed import Failed
from .login import ask_for, is_logged_in, log_in
from .needs import Needs
from .opening import MakeClient, Opening

__all__ = ["CleartextAuth", "Connection", "Failed", "MakeClient", "Needs", "Timeout"]

CleartextAuth = Literal["never", "loopback", "always"]

_CREDIT = 2  # failures
_QUIT_TIMEOUT = 5.0  # seconds
_RSET_TIMEOUT = 10.0  # seconds, after which a new connection is the shorter way to a new transaction


class Connection(Opening):
    """A client and what is known of its session.

    Args:
        client: the client, or a function that makes one for each connection.
        credentials: what to log in with where the server asks; without them the client's own, at once.
        cleartext_auth: where AUTH may go without TLS.
        needs: what is known of all connections of this client.
        max_messages: how many messages it may carry; None for no limit.

    Attributes:
        carried: messages, since it was connected.
        reused: whether it was connected before this send: it may have died since.
        credit: failures to connect that are not held against the server: it may still count the one that it ended.
        let_through_at: when the pace let its message through, on the policy's clock; None where it did not.
        idle_since: on the event loop's clock; infinity where it has not been used here yet.
        authenticated: what the server said to the log-in of this session.
    """

    def __init__(
        self,
        client: aiosmtplib.SMTP | MakeClient,
        credentials: Credentials,
        cleartext_auth: CleartextAuth,
        needs: Needs,
        max_messages: int | None,
    ) -> None:
        self.credentials = self._given = credentials
        self.authenticated: Reply | None = None
        self._must_log_in = False
        super().__init__(client, needs)
        self.cleartext_auth = cleartext_auth
        self.max_messages = math.inf if max_messages is None else max_messages
        self.sessions = 0  # that were opened
        self.carried = 0
        self.idle_since = math.inf
        self.reused = self.is_open
        self.credit = 0
        self.let_through_at: float | None = None
        self._proven_at = 0  # what it had carried when it logged in
        self._refreshed = False
        self._sent: str | bytes = ""  # what the last AUTH was made with
        self._refusals = needs.refusals  # when it was connected
        self._prepared: object = None  # what the last `prepare` has brought about

    @property
    def is_ready(self) -> bool:
        """Whether a transaction can begin, for nothing has changed since the last `prepare`."""
        return self.is_open and self._prepared == self._state and self.carried < self.max_messages

    @property
    def _state(self) -> tuple[object, ...]:
        return self.client.protocol, self.needs.tls, self.needs.auth, self.authenticated

    async def prepare(self, timeout: Timeout = Default.token) -> None:
        """Bring the session to where a transaction can begin. Raises `Failed`."""
        if self.carried >= self.max_messages:
            await self.hang_up()
            self.give_credit()
        if self.is_open:
            self._adopt()
            await self._secure(timeout)
        else:
            await self.connect(timeout)
        if self.needs.auth and self.authenticated is None:
            if self._can_encrypt:
                await self._encrypt(timeout)
            obstacle = self.obstacle_to_auth()
            if obstacle is None:
                async with self.needs.one_log_in_at_a_time(self.seconds(timeout)):
                    await self._log_in(timeout)
            elif self._must_log_in:
                raise Failed.without_reply(Stage.AUTH, aiosmtplib.SMTPNotSupported(obstacle), final=True)
        self._prepared = self._state

    async def connect(self, timeout: Timeout = Default.token) -> SMTPResponse:
        """Connect, and encrypt where the client is set to. Returns the server's banner. Raises `Failed`."""
        self.authenticated, self.reused, self._refreshed, self.carried = None, False, False, 0
        self._refusals = self.needs.refusals
        banner = await self._open(timeout)
        await self._secure(timeout)
        self.credit = 0
        self.sessions += 1
        return banner

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
            if not self.client.server_auth_methods:
                return (
                    "the server offers no AUTH on this port; or a virus scanner or a firewall before it takes AUTH and "
                    "STARTTLS out of what it offers: use_tls=True on port 465 gets past those"
                )
            if not self._mechanisms:
                return "the server offers no AUTH mechanism that the credentials fit"
        return None

    def obstacle_to_refresh(self) -> str | None:
        """Why another token cannot be asked for now; None where it can."""
        if not self.credentials.token:
            return "no oauth_token_generator is configured"
        return "the server refused a fresh token, too" if self._refreshed else None

    def give_credit(self) -> None:
        """Forgive the next failures to connect: the server may count the connection that ends for a moment longer."""
        self.credit = _CREDIT

    def remember(self, refusal: Reply, *, final: bool) -> None:
        """Never send the refused token again, nor the refused password on this connection."""
        self.needs.refused = self._sent, refusal
        self.needs.refusals += 1
        if final:
            self.needs.auth = self._must_log_in  # what goes without logging in, goes

    def refresh(self) -> None:
        """Ask for another token at the next `prepare`, once a connection."""
        self._refreshed = True

    def _refused(self, stage: Stage, reply: Reply) -> None:
        """A session that has carried mail, and then wants a log-in, has lost the one it had."""
        if self.authenticated is not None and not stage.before_mail and _asks_for_log_in(reply):
            if self.carried == self._proven_at > 0:
                self._start_over(reply)
            if self.carried:
                self.authenticated = None

    async def reset(self, timeout: Timeout = Default.token) -> None:
        """End the open transaction: with RSET, or with the connection. Raises nothing, for it follows a refusal."""
        if self.is_open:
            own = self.seconds(timeout)
            try:
                await self.command(
                    Stage.MAIL, b"RSET", timeout=_RSET_TIMEOUT if own is None else min(own, _RSET_TIMEOUT)
                )
            except Failed:
                self.abort()

    async def quit(self, timeout: Timeout = Default.token) -> SMTPResponse:
        """Send QUIT and close, whatever the server says to it. Raises aiosmtplib's errors."""
        if not self.is_open:
            raise aiosmtplib.SMTPServerDisconnected(NOT_CONNECTED)
        self._adopt()
        try:
            response = await self.client.execute_command(b"QUIT", timeout=self.seconds(timeout))
        finally:
            self.abort()
        if response.code != 221:  # noqa: PLR2004
            raise aiosmtplib.SMTPResponseException(*response)
        return response

    async def hang_up(self, *, politely: bool = True) -> None:
        """Close: with QUIT, if politely. Raises nothing, for nothing depends on the server's answer."""
        if self.is_open and politely:
            with suppress(aiosmtplib.SMTPException, OSError):
                await self.quit(_QUIT_TIMEOUT)
        else:
            self.abort()

    def forget(self) -> None:
        """Let go of a connection whose event loop has ended, and of what could not be closed with it."""
        self._line = None
        if self._client is not None:
            self._client.transport = None
            self._client.close()

    def _use(self, client: aiosmtplib.SMTP) -> None:
        super()._use(client)
        self.credentials = self._given or Credentials.of(client)
        self._must_log_in = bool(self.credentials) and not self._given  # a client with its own always does
        self.needs.auth |= self._must_log_in
        if self._must_log_in and client.is_connected:
            self.authenticated = Reply(235, text="logged in by the client itself")

    @property
    def _may_be_clear(self) -> bool:
        if self.cleartext_auth != "loopback":
            return self.cleartext_auth == "always"
        peer = self.client.get_transport_info("peername")
        if isinstance(peer, tuple):
            return ipaddress.ip_address(peer[0].partition("%")[0]).is_loopback
        return isinstance(peer, (str, bytes))  # a Unix domain socket

    @property
    def _mechanisms(self) -> list[str]:
        wanted = self.credentials.mechanisms(encrypted=self.is_tls)
        offered = [name for name in wanted if name in self.client.server_auth_methods]
        return sorted(offered, key=self.needs.useless.__contains__)

    async def _log_in(self, timeout: Timeout) -> None:
        """AUTH (RFC 4954 §4), and never with what was refused before."""
        secret = await ask_for(self.credentials, self.seconds(timeout))
        refused = self.needs.refused
        since = self.needs.refusals > self._refusals
        # A token is never sent again, a password on a new connection: servers have refused good ones that they could
        # not check.
        if refused and refused[0] == secret and (since or self.credentials.token):
            what = "token that the generator gave" if self.credentials.token else "password"
            raise Failed(Said(Stage.AUTH, refused[1]), f"the {what} is the one that the server refused before")
        self._sent, self._redactor = secret, self.credentials.redactor(secret)
        mechanisms = self._mechanisms[:1] if self.carried else self._mechanisms  # again: what worked before, or nothing
        try:
            accepted = await log_in(self, partial(self.credentials.dialogue, secret), mechanisms, self.needs, timeout)
        except Failed as failed:
            refusal = failed.said.reply
            if self.carried and refusal.code in MECHANISM_FAILS:
                self._start_over(refusal)  # once a session, says RFC 4954 §4
            if self.carried or not is_logged_in(refusal):
                raise
            accepted = SMTPResponse(235, str(refusal))
        self.authenticated, self._refreshed, self._proven_at = self.reply(*accepted), False, self.carried
        self.needs.refused, self.needs.proven = None, True

    def _start_over(self, reply: Reply) -> NoReturn:
        """The log-in of a session that had one does not come back: it takes a new connection."""
        self.abort()
        why = f"the session has lost its log-in: {reply}"
        raise Failed.without_reply(Stage.AUTH, aiosmtplib.SMTPServerDisconnected(why)) from None


def _asks_for_log_in(reply: Reply) -> bool:
    asks = reply.code == LOG_IN_FIRST or caseless(LOG_IN).search(reply.text)
    return bool(asks) and not caseless(TLS).search(reply.text)
