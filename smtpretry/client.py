"""The client that an application calls: `RetryingSMTP`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self, get_args

import aiosmtplib
from aiosmtplib.typing import Default, SMTPTokenGenerator

from .attempt import Pass
from .checks import check_number, check_seconds, check_timeout, current_task
from .errors import exception_of
from .ledger import Position
from .observer import hooks_of
from .outcome import Status
from .policy import RetryPolicy
from .queues.site import Site
from .sending import Sends
from .session.connection import CleartextAuth, Connection, Failed, MakeClient, Needs, Timeout
from .session.credentials import Credentials
from .session.opening import check_client
from .session.pipelining import Pipelining
from .session.pool import Pool
from .session.rate_limiter import check_pace
from .session.waiting import Stalled, Wish
from .stats import Stats

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterable, Sequence
    from contextlib import AbstractAsyncContextManager
    from types import TracebackType

    from aiosmtplib import SMTPResponse

    from .attempt import Save
    from .delivery import Delivery
    from .events import Hook
    from .queues.engine import Engine

_ALONE = Position()


class RetryingSMTP(Sends):
    """An `aiosmtplib.SMTP` client that retries, logs in and reconnects when the server asks for it.

    `send_message`, `sendmail`, `connect` and `quit` take, return and raise what aiosmtplib's do. Their exceptions have
    the `Delivery` as ``exc.delivery``. The client connects when there is something to send (``async with`` alone does
    not), and closes the connection after ten idle seconds. Any number of tasks of one event loop may use it at once. A
    send that waits holds no connection and no lock.

    Args:
        client: the client to wrap, or a function (plain or coroutine) that makes one; it is called for each connection.
            Do not connect or log in yourself. A plain function has to be quick, for it runs in the event loop. If it
            raises an OSError, it is called again later; any other exception comes out of the send, and so does a
            TypeError or ValueError if it returns no new client.
        policy: the rules, the backoff and the limits.
        username: the user to log in as. The client logs in when the server first asks for it (530 and the like,
            RFC 4954 §6), and from then on at the start of each connection. If the credentials are the wrapped client's
            own, every connection starts with AUTH.
        password: the password. If the server refuses it (535) for PLAIN or LOGIN, that is final. If a mechanism does
            not work (500 to 504, 534; 535 for CRAM-MD5), the next one that the server offers is tried.
        oauth_token_generator: a coroutine function that returns an OAuth token, in place of a password. It is called
            again, once, if the server refuses the token. A refused token is never sent again. If it has no network, or
            takes too long, it is called again later; what else it raises comes out of the send.
        cleartext_auth: where AUTH may go over a connection without TLS: "loopback", "never" or "always". If the server
            offers TLS, it is used first.
        idle_timeout: seconds after which an unused connection is closed with QUIT; None for never.
        max_connections: the largest number of connections at a time. A new one is opened when all others are in use. If
            the server says that there are too many, fewer are used for a while.
        max_messages_per_connection: after how many messages a connection is replaced; None for no limit. If the server
            has a limit of its own (421, or 452 4.5.3 to MAIL), the connection is replaced then, too.
        pace: the speed, if you know it: an asynchronous context manager that waits on entry, such as
            ``aiolimiter.AsyncLimiter(1, 1 / 14)``, which is 14 a second. It is entered once for each transaction,
            before a connection is asked for, and left when the connection is given back. What it raises on entry comes
            out of the send; what it raises on exit is logged. Without it, the client measures the speed at the first
            refusal that says "too fast"; with it, such a refusal still lowers the speed.
        pipelining: whether MAIL, all RCPT and DATA go out in one write if the server offers it (RFC 2920). The message
            itself waits for the 354.
        defer: a durable queue, an `Engine`. It gets the recipients whose next try is further off than `max_wait`.
        max_wait: the longest wait in this process, in seconds, if there is a queue.
        on_step: a hook, or several: a plain function of a delivery and an event (see `smtpretry.events`). It is called
            for each reply that decided something (`Step`), each end of a recipient (`Ended`), each send that is broken
            off, each pause, and each connection that is opened or closed; the delivery is None if the event concerns
            none. It runs within the send, so it has to be quick. If it raises, that is logged once; the send goes on.

    Raises:
        TypeError: `client` is neither an aiosmtplib.SMTP nor a function, `policy` no RetryPolicy, `defer` no Engine,
            `on_step` no function, or a coroutine function, `pace` no asynchronous context manager, `idle_timeout` or
            `max_wait` no number.
        ValueError: a password together with a token generator, one of them without a username, an unknown
            `cleartext_auth`, a negative `idle_timeout` or `max_wait`, a number of connections or messages below one,
            several connections with one client.
    """

    def __init__(
        self,
        client: aiosmtplib.SMTP | MakeClient,
        policy: RetryPolicy = RetryPolicy(),  # noqa: B008 - a frozen value
        *,
        username: str | bytes | None = None,
        password: str | bytes | None = None,
        oauth_token_generator: SMTPTokenGenerator | None = None,
        cleartext_auth: CleartextAuth = "loopback",
        idle_timeout: float | None = 10,
        max_connections: int = 1,
        max_messages_per_connection: int | None = None,
        pace: AbstractAsyncContextManager[Any] | None = None,
        pipelining: bool = True,
        defer: Engine | None = None,
        max_wait: float = 60,
        on_step: Hook | Iterable[Hook] | None = None,
    ) -> None:
        super().__init__(policy, defer, max_wait, hooks_of(on_step))
        if cleartext_auth not in get_args(CleartextAuth):
            msg = f'cleartext_auth is "never", "loopback" or "always", not {cleartext_auth!r}'
            raise ValueError(msg)
        check_seconds("idle_timeout", idle_timeout, "never")
        check_number("max_connections", max_connections)
        if max_messages_per_connection is not None:
            check_number("max_messages_per_connection", max_messages_per_connection)
        check_pace(pace)
        if not callable(client) or isinstance(client, type):
            check_client(client)
            if max_connections > 1:
                msg = "one client is one connection: for more of them give a function that makes a new one at each call"
                raise ValueError(msg)
        credentials, needs = Credentials(username, password, oauth_token_generator), Needs()
        needs.pipelining = Pipelining(wanted=pipelining)

        def connection() -> Connection:
            return Connection(client, credentials, cleartext_auth, needs, max_messages_per_connection)

        self._pool = Pool(connection, max_connections, idle_timeout, policy, self._observer, limiter=pace)
        self._site = Site(self._pool, policy)
        self._observer.watch(self.stats)

    async def attempt(
        self, delivery: Delivery, save: Save | None = None, *, timeout: Timeout = Default.token
    ) -> Delivery:
        """Try once for the recipients that are due, and do not wait. Log-in, TLS and reconnects are done at once.

        Afterwards `delivery.next_at` says when to try again. If it is None, every recipient has its end.

        Args:
            delivery: the delivery; it is changed, and returned.
            save: a coroutine function that stores the delivery. It is awaited before each transaction, and after each
                one in which a recipient got its end. If it raises, nothing more is sent, and the exception comes out;
                an engine raises `NotOurs` if another worker has the delivery now. What has a `save` lies in a queue: a
                final refusal of the client itself, such as of its log-in, lets it wait, as in Postfix.
            timeout: seconds for each command, in place of the client's own.
        """
        check_timeout(timeout)
        with delivery.sent_by(current_task()):
            delivery.take_up(self.policy.clock(), late=True)
            await self._make_pass(delivery, save, _ALONE, timeout)
        return delivery

    def stats(self) -> Stats:
        """How the client is doing now, and what became of its recipients so far. It may be asked from any thread."""
        pool, counts = self._pool, self._observer.counts
        now = self.policy.clock()
        paused = now < pool.opens_at and pool.reason
        return Stats(
            at=now,
            server=pool.server,
            open=pool.open,
            in_use=pool.in_use,
            waiting=pool.waiting,
            paused_until=pool.opens_at if paused else None,
            reason=f"{paused.stage.value}: {paused.reply}" if paused else "",
            pace=pool.pace.rate if pool.pace.is_known else None,
            accepted=counts[Status.ACCEPTED],
            refused=counts[Status.REFUSED],
            uncertain=counts[Status.UNCERTAIN],
            deferred=counts[Status.DEFERRED],
        )

    # The connections

    async def connect(self, *, timeout: Timeout = Default.token) -> SMTPResponse:
        """Connect now, once, and return the server's banner. Sends connect by themselves, and again after a failure.

        If all connections are in use, this waits for one, and so does `quit`. The `timeout` does not limit that.

        Raises what aiosmtplib's own `connect` raises.
        """
        check_timeout(timeout)
        async with self._pool.lend() as connection:
            try:
                if not connection.is_open:
                    return await connection.connect(timeout)
            except Failed as failed:
                raise exception_of(failed.said.stage, failed.said.reply, failed.said.error) from None
        msg = "SMTP instance is already connected"
        raise aiosmtplib.SMTPException(msg)

    async def quit(self, *, timeout: Timeout = Default.token) -> SMTPResponse:
        """Say QUIT and disconnect; the next send connects again. Raises what aiosmtplib's own `quit` raises."""
        check_timeout(timeout)
        async with self._pool.lend() as connection:
            try:
                return await connection.quit(timeout)
            finally:
                await self._pool.hang_up()  # the others

    async def aclose(self) -> None:
        """Wake the sends that wait (each raises `ClientClosed` with its delivery), then disconnect with QUIT.

        A send that is not waiting, but talking to the server, finishes its pass first; where the server does not answer
        a message, that takes up to ten minutes. ``async with`` does the same at its end, and opens the client again at
        its beginning.
        """
        await self._pool.close()

    @property
    def is_connected(self) -> bool:
        """Whether a connection is open now. None is needed to send."""
        return self._pool.is_connected

    async def __aenter__(self) -> Self:
        """Open the client for sending. The connection is made when it is needed."""
        current_task()
        self._pool.closed = False
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the client; without QUIT where something broke off."""
        await self._pool.close(politely=error is None or isinstance(error, Exception))

    @property
    def sites(self) -> Sequence[Site]:
        """Its server, for the workers of a queue."""
        return (self._site,)

    def _alarm(self, seconds: float) -> Awaitable[None]:
        return self._pool.alarm(seconds)

    async def _room(self) -> None:
        await self._pool.room()

    # What a Failover asks

    async def _make_pass(self, delivery: Delivery, save: Save | None, position: Position, timeout: Timeout) -> None:
        """Make a pass, alone or as one of several servers."""
        one = Pass(delivery, self.policy, self._pool, timeout, save=save, position=position)
        while one.unfinished:
            has_asked_before = one.begun or (bool(delivery.attempts) and self._pool.is_paced)
            try:
                async with self._pool.lend(Wish.SEND, first=has_asked_before, timeout=one.pool_timeout) as connection:
                    await one.run(connection)
            except Stalled:
                one.stand_back()

    @property
    def _is_ready(self) -> bool:
        """Whether the server is in no trouble, or a message may find out whether it still is."""
        pool = self._pool
        return self.policy.clock() >= pool.opens_at and not (pool.is_probing or pool.is_stalled)

    @property
    def _is_hopeless(self) -> bool:
        """Whether waiting for it promises nothing."""
        return self._pool.is_hopeless

    @property
    def _resumes_at(self) -> float:
        """Until when the server is left alone, on the policy's clock."""
        return self._pool.opens_at
