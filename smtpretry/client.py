"""The client that an application calls: `RetryingSMTP`, and `send`. It joins the rooms below."""

from __future__ import annotations

import email.message
import logging
from typing import TYPE_CHECKING, Any, Self, get_args

import aiosmtplib
from aiosmtplib.typing import Default, SMTPTokenGenerator, SocketPathType

from .attempt import Pass
from .bulk import Bulk
from .delivery import Delivery
from .envelope import Message, prepare
from .errors import conclude, exception_of, tell
from .outcome import Status
from .policy import RetryPolicy
from .session.connection import CleartextAuth, Connection, Failed, MakeClient, Needs, Timeout
from .session.credentials import Credentials
from .session.opening import check_client
from .session.pool import Pool

if TYPE_CHECKING:
    import socket
    import ssl
    from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Sequence
    from types import TracebackType

    from aiosmtplib import SMTPResponse

    from .attempt import Save
    from .queues.engine import Engine

_log = logging.getLogger("smtpretry")


_MANY = 10_000  # messages: what they hold while they wait is a few KB each


class RetryingSMTP:
    """An `aiosmtplib.SMTP` client that survives "not now", "log in first" and "I am going away".

    `send_message`, `sendmail`, `connect` and `quit` take, return and raise what the client's own do; what fails carries
    the `Delivery` as ``exc.delivery``. It connects when there is something to send (``async with`` alone does not), and
    closes the connection after ten idle seconds. Any number of tasks of one event loop may send at once; a send that
    waits holds neither the connection nor a lock.

    Args:
        client: the client to wrap, or a function, plain or coroutine, that makes one; it is called for each connection.
            Leave connecting and logging in to the wrapper. What it raises for want of a connection (OSError) is tried
            again; anything else, and what is no new client (TypeError, ValueError), comes out of the send.
        policy: the rules, the backoff and the limits.
        username: whom to log in as when the server asks for it (530 and its kin, RFC 4954 §6), and from then on at once
            on each connection. With the credentials of the client itself, each connection begins with AUTH.
        password: the password. A refusal (535) to PLAIN or LOGIN is final; a mechanism that does not work here (500 to
            504, 534; 535 to CRAM-MD5) gives way to the next one that the server offers.
        oauth_token_generator: a coroutine function that returns an OAuth token, in place of a password; asked again,
            once, where the server refuses the token. A refused token is never sent again.
        cleartext_auth: where AUTH may go over a connection without TLS: "loopback", "never" or "always". TLS comes
            first wherever the server offers it.
        idle_timeout: seconds after which an unused connection is closed with QUIT; None for never.
        max_connections: how many connections there may be at a time. One is opened where all others are in use, and
            logs in and encrypts on its own; where the server says that there are too many, fewer are used for a while.
        max_messages_per_connection: after how many messages a connection gives way to a new one; None for no limit. One
            that the server limits itself (421, or 452 4.5.3 to MAIL) is replaced as well.
        defer: a durable queue, an `Engine`. It gets what is pending where the next try is further off than `max_wait`.
        max_wait: the longest wait in process, in seconds, where there is an engine.

    Raises:
        TypeError: `client` is neither an aiosmtplib.SMTP nor a function, `policy` no RetryPolicy, `defer` no Engine.
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
        defer: Engine | None = None,
        max_wait: float = 60,
    ) -> None:
        if not isinstance(policy, RetryPolicy):
            msg = f"policy is a smtpretry.RetryPolicy, not {type(policy).__name__}"
            raise TypeError(msg)
        if cleartext_auth not in get_args(CleartextAuth):
            msg = f'cleartext_auth is "never", "loopback" or "always", not {cleartext_auth!r}'
            raise ValueError(msg)
        if idle_timeout is not None and not idle_timeout >= 0:
            msg = f"idle_timeout is a number of seconds, or None for never, not {idle_timeout!r}"
            raise ValueError(msg)
        if defer is not None and not callable(getattr(defer, "submit", None)):
            msg = f"defer is a smtpretry.Engine, which has a method submit, not {defer!r}"
            raise TypeError(msg)
        if not max_wait >= 0:
            msg = f"max_wait is a number of seconds, not {max_wait!r}"
            raise ValueError(msg)
        _check_number("max_connections", max_connections)
        if max_messages_per_connection is not None:
            _check_number("max_messages_per_connection", max_messages_per_connection)
        if not callable(client) or isinstance(client, type):
            check_client(client)
            if max_connections > 1:
                msg = "one client is one connection: for more of them give a function that makes a new one at each call"
                raise ValueError(msg)
        self.policy = policy
        self._engine, self._max_wait = defer, max_wait
        credentials, needs = Credentials(username, password, oauth_token_generator), Needs()

        def connection() -> Connection:
            return Connection(client, credentials, cleartext_auth, needs, max_messages_per_connection)

        self._pool = Pool(connection, max_connections, idle_timeout, policy.sleep)

    async def send_message(
        self,
        message: Message,
        /,
        *,
        sender: str | None = None,
        recipients: str | Sequence[str] | None = None,
        mail_options: Iterable[str] | None = None,
        rcpt_options: Iterable[str] | None = None,
        timeout: Timeout = Default.token,
    ) -> tuple[dict[str, SMTPResponse], str]:
        """Send a message object until every recipient has its end.

        Args:
            message: the message; its Bcc header is not sent.
            sender: the reverse-path; None for the message's Sender or From.
            recipients: whom to send it to; None for the message's To, Cc and Bcc.
            mail_options: ESMTP parameters of MAIL.
            rcpt_options: ESMTP parameters of each RCPT.
            timeout: seconds for each command, in place of the client's own.

        Returns:
            The recipients that were not accepted, each with the last reply that concerned it (its code is -1 where none
            came), and the text of the server's acceptance. Who was handed over to a queue (`defer`) is not among them;
            the text says until when.

        Raises:
            aiosmtplib.SMTPException: nobody was accepted. It is what aiosmtplib raises for the last failure, with
                `delivery` and a note that tells what was tried.
            UncertainDelivery: nobody was certainly accepted, and the line broke after the final dot.
            ClientClosed: `aclose` was called meanwhile.
            ValueError, TypeError: an argument is wrong; nothing was sent.
        """
        if not isinstance(message, email.message.Message):
            msg = f"message is a message object, not {type(message).__name__}: sendmail takes str and bytes"
            raise TypeError(msg)
        delivery = prepare(
            message, sender=sender, recipients=recipients, mail_options=mail_options, rcpt_options=rcpt_options
        )
        del message  # what waits, waits as bytes
        return conclude(await self._deliver(delivery, timeout), self.policy.clock())

    async def sendmail(
        self,
        sender: str,
        recipients: str | Sequence[str],
        message: str | bytes,
        /,
        *,
        mail_options: Iterable[str] | None = None,
        rcpt_options: Iterable[str] | None = None,
        timeout: Timeout = Default.token,
    ) -> tuple[dict[str, SMTPResponse], str]:
        """Send the bytes of a message; for the rest see `send_message`. A str has to be ASCII."""
        if not isinstance(message, (str, bytes)):
            msg = f"message is str or bytes, not {type(message).__name__}: send_message takes message objects"
            raise TypeError(msg)
        delivery = prepare(
            message, sender=sender, recipients=recipients, mail_options=mail_options, rcpt_options=rcpt_options
        )
        del message  # what waits, waits as bytes
        return conclude(await self._deliver(delivery, timeout), self.policy.clock())

    async def deliver(
        self,
        message: Message | str | bytes | Delivery,
        /,
        *,
        sender: str | None = None,
        recipients: str | Sequence[str] | None = None,
        mail_options: Iterable[str] | None = None,
        rcpt_options: Iterable[str] | None = None,
        timeout: Timeout = Default.token,
    ) -> Delivery:
        """Send as `send_message` does, and return the whole story instead; no refusal raises.

        A `Delivery` that was broken off goes on to those who are pending, with the same bytes; the other arguments are
        its own.
        """
        if not isinstance(message, Delivery):
            message = prepare(
                message, sender=sender, recipients=recipients, mail_options=mail_options, rcpt_options=rcpt_options
            )
        return await self._deliver(message, timeout)

    def send_many(
        self, messages: Iterable[Message | Delivery] | AsyncIterable[Message | Delivery], concurrency: int | None = None
    ) -> AsyncGenerator[Delivery, None]:
        """Send many messages, and yield a `Delivery` for each, in the order in which they end.

        ``async for delivery in smtp.send_many(messages)``. A message is drawn when it can be sent, so that the
        messages may be a generator of any length; one that waits for its next try does not hold up the others.

        Args:
            messages: an iterable or asynchronous iterable of message objects, or of what `prepare` makes.
            concurrency: how many messages may be under way at a time, those that wait among them; None for 10,000.

        Raises:
            ValueError: `concurrency` is below one.
            Whatever a message or the iterable raises, such as a ValueError for a message without recipients. Nothing
            more is drawn then, and it is raised when the messages under way have ended, and have been yielded.

        A loop that is left early (`break`) breaks off what is under way as soon as the generator is closed:
        ``async with contextlib.aclosing(smtp.send_many(messages)) as deliveries``. The log names who is pending then.
        """
        concurrency = _MANY if concurrency is None else concurrency
        _check_number("concurrency", concurrency)
        return Bulk(self.deliver, self._pool.room, concurrency).run(messages)

    async def attempt(
        self, delivery: Delivery, save: Save | None = None, *, timeout: Timeout = Default.token
    ) -> Delivery:
        """Make one pass over the recipients that are due, with all of its repairs and without any waiting.

        Afterwards `delivery.next_at` says when to come again; None: every recipient has its end.

        Args:
            delivery: the delivery; it is changed, and returned.
            save: a coroutine function of the delivery which stores it. It is awaited before each transaction, and
                after each reply that gives a recipient its end. What it raises comes out, and nothing more is sent:
                `NotOurs`, where another worker has taken the delivery over.
            timeout: seconds for each command, in place of the client's own.
        """
        one = Pass(delivery, self.policy, self._pool, timeout, save)
        while one.unfinished:
            async with self._pool.lend() as connection:
                await one.run(connection)
        return delivery

    async def enqueue(
        self,
        message: Message | str | bytes | Delivery,
        /,
        *,
        sender: str | None = None,
        recipients: str | Sequence[str] | None = None,
        mail_options: Iterable[str] | None = None,
        rcpt_options: Iterable[str] | None = None,
        connection: Any = None,  # noqa: ANN401 - each engine's own
    ) -> Delivery:
        """Hand a message over to the queue at once, without a first try.

        Args:
            message: as `deliver` takes it; a `Delivery` too, that was broken off, or whose submission was rolled back.
            sender: the reverse-path; None for the message's Sender or From.
            recipients: whom to send it to; None for the message's To, Cc and Bcc.
            mail_options: ESMTP parameters of MAIL.
            rcpt_options: ESMTP parameters of each RCPT.
            connection: a database connection of the application, where the engine can submit in its transaction: what
                is rolled back is not sent.

        Returns:
            The delivery; it is durable, and everybody in it is `deferred` who has no end yet.

        Raises:
            ValueError, TypeError: an argument is wrong, or the client has no `defer`.
            Whatever the engine raises, where it has not taken it; with the delivery as `exc.delivery`.
        """
        if self._engine is None:
            msg = "there is no queue: give RetryingSMTP an engine, defer="
            raise ValueError(msg)
        if not isinstance(message, Delivery):
            message = prepare(
                message, sender=sender, recipients=recipients, mail_options=mail_options, rcpt_options=rcpt_options
            )
        for who in message.deferred:  # by a submission that was rolled back
            message.outcomes[who].status = Status.PENDING
        try:
            await self._engine.submit(message, connection=connection)
        except BaseException as error:
            tell(error, message, self.policy.clock())
            raise
        _defer(message)
        return message

    async def connect(self, *, timeout: Timeout = Default.token) -> SMTPResponse:
        """Connect now, once, and return the server's banner. Sends connect by themselves, and again after a failure.

        Raises what aiosmtplib's own `connect` raises.
        """
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
        async with self._pool.lend() as connection:
            try:
                return await connection.quit(timeout)
            finally:
                await self._pool.hang_up()  # the others

    async def aclose(self) -> None:
        """Wake the sends that wait (each raises `ClientClosed` with its delivery), then disconnect with QUIT.

        A send that is not waiting, but talking to the server, finishes its pass first. ``async with`` does the same at
        its end, and opens the client again at its beginning.
        """
        await self._pool.close()

    @property
    def is_connected(self) -> bool:
        """Whether a connection is open now. None is needed to send."""
        return self._pool.is_connected

    async def __aenter__(self) -> Self:
        """Open the client for sending. The connection is made when it is needed."""
        self._pool.closed = False
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the client; without QUIT where something broke off."""
        await self._pool.close(politely=error is None or isinstance(error, Exception))

    async def _deliver(self, delivery: Delivery, timeout: Timeout) -> Delivery:
        if timeout is not None and timeout is not Default.token and not timeout > 0:
            msg = f"timeout is a positive number of seconds, or None for no limit, not {timeout!r}"
            raise ValueError(msg)
        try:
            await self.attempt(delivery, timeout=timeout)
            while (when := delivery.next_at) is not None:
                far = self._engine is not None and when - self.policy.clock() > self._max_wait
                if far and await self._hand_over(delivery):
                    break
                await self._pool.alarm(when - self.policy.clock())
                if far and await self._hand_over(delivery):  # it may have it: the first answer could have been lost
                    break
                await self.attempt(delivery, timeout=timeout)
        except BaseException as error:
            tell(error, delivery, self.policy.clock())
            raise
        return delivery

    async def _hand_over(self, delivery: Delivery) -> bool:
        """Give the rest to the queue; False where there is none, or where it cannot take it now."""
        if self._engine is None:
            return False
        try:
            await self._engine.submit(delivery)
        except Exception as error:  # noqa: BLE001 - whatever it is: nothing is lost, and the send waits in process
            said = str(error).strip().partition("\n")[0]  # what follows may quote what was to be stored
            _log.warning(
                "%s: not handed over to the queue, goes on in process: %s: %s", delivery.id, type(error).__name__, said
            )
            return False
        _defer(delivery)
        return True


def _defer(delivery: Delivery) -> None:
    """The queue has taken the rest."""
    for who in delivery.pending:
        delivery.outcomes[who].status = Status.DEFERRED
    _log.info("%s: handed over to the queue (%s)", delivery.id, ", ".join(delivery.deferred))


async def send(
    message: Message | str | bytes,
    /,
    *,
    sender: str | None = None,
    recipients: str | Sequence[str] | None = None,
    mail_options: Sequence[str] | None = None,
    rcpt_options: Sequence[str] | None = None,
    hostname: str | None = "localhost",
    port: int | None = None,
    username: str | bytes | None = None,
    password: str | bytes | None = None,
    oauth_token_generator: SMTPTokenGenerator | None = None,
    local_hostname: str | None = None,
    source_address: tuple[str, int] | None = None,
    timeout: float | None = 60,
    use_tls: bool = False,
    start_tls: bool | None = None,
    validate_certs: bool = True,
    client_cert: str | None = None,
    client_key: str | None = None,
    tls_context: ssl.SSLContext | None = None,
    cert_bundle: str | None = None,
    socket_path: SocketPathType | None = None,
    sock: socket.socket | None = None,
    policy: RetryPolicy = RetryPolicy(),  # noqa: B008 - a frozen value
) -> tuple[dict[str, SMTPResponse], str]:
    """Connect, send one message until every recipient has its end, disconnect: `aiosmtplib.send` with a policy.

    Arguments, return value and exceptions are aiosmtplib's; see `RetryingSMTP.send_message` for what retrying adds.
    With a username each connection begins with AUTH, over TLS or loopback only.

    Raises:
        aiosmtplib.SMTPException: nobody was accepted.
        ValueError, TypeError: an argument is wrong; nothing was sent.
    """
    client = aiosmtplib.SMTP(
        hostname=hostname,
        port=port,
        username=username,
        password=password,
        oauth_token_generator=oauth_token_generator,
        local_hostname=local_hostname,
        source_address=source_address,
        timeout=timeout,
        use_tls=use_tls,
        start_tls=start_tls,
        validate_certs=validate_certs,
        client_cert=client_cert,
        client_key=client_key,
        tls_context=tls_context,
        cert_bundle=cert_bundle,
        socket_path=socket_path,
        sock=sock,
    )
    delivery = prepare(
        message, sender=sender, recipients=recipients, mail_options=mail_options, rcpt_options=rcpt_options
    )
    smtp = RetryingSMTP(client, policy)
    try:
        async with smtp:
            await smtp._deliver(delivery, Default.token)  # noqa: SLF001 - next door
    except BaseException as error:
        if not hasattr(error, "delivery"):  # it came in closing
            tell(error, delivery, policy.clock())
        raise
    return conclude(delivery, policy.clock())


def _check_number(name: str, number: int) -> None:
    if not isinstance(number, int) or number < 1:
        msg = f"{name} is a whole number from 1 on, not {number!r}"
        raise ValueError(msg)
