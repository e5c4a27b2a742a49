"""Django's SMTP backend over a client that retries: `EmailBackend`."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
import os
import ssl
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

import aiosmtplib
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.mail.backends import smtp
from django.core.mail.utils import DNS_NAME

from smtpretry import log
from smtpretry.blocking import Blocking, sends_here
from smtpretry.decorator import retry
from smtpretry.envelope import prepare
from smtpretry.errors import conclude, exception_of
from smtpretry.policy import RetryPolicy
from smtpretry.queues.engine import QueueError
from smtpretry.session.connection import Failed

from .options import OF_THE_CLIENT, TAKEN, check_queue, given, instead_of
from .outbox import engine, outbox
from .translation import translated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from django.core.mail import EmailMessage

    from smtpretry.client import RetryingSMTP
    from smtpretry.delivery import Delivery

_POLICY: Final = RetryPolicy.interactive()  # most mails of a Django project are sent within a request
_WITH_QUEUE: Final = RetryPolicy.queue()
_MAX_WAIT: Final = 5.0  # seconds in a request, where there is a queue for what takes longer
_TIMEOUT: Final = 60.0  # seconds for each command, where EMAIL_TIMEOUT is None
_MOST: Final = 100  # clients that a process keeps
_clients: dict[tuple[object, ...], Blocking] = {}
_usable = set[str]()  # queues that could be opened in this process


class EmailBackend(smtp.EmailBackend):  # type: ignore[misc] # Django has no types
    """Django's SMTP backend with retries. Its settings, return values and exceptions are Django's.

    All backends of a process with the same settings share one client, its connections and its pauses. A connection
    stays open for ten idle seconds, so `open` and `close` cost nothing if there is one. `open` connects and logs in; it
    retries until the policy gives up.

    The arguments are Django's, those of `RetryingSMTP`, such as `max_connections`, and

    Args:
        policy: by default `RetryPolicy.interactive()`, half a minute; with a queue `RetryPolicy.queue()`, five days.
        queue: the file of a `smtpretry.queues.sqlite.SQLiteEngine`; a relative path begins at ``BASE_DIR``, if there is
            one. It takes what has to wait for longer than `max_wait`, by default five seconds; within
            ``transaction.atomic`` on the same file it takes every message, and forgets it where the transaction is
            rolled back. ``manage.py smtpretry_worker`` sends what it holds. None for no queue.

    They stand in ``MAILERS[...]["OPTIONS"]`` (Django 6.1), in ``get_connection(...)``, or in the setting ``SMTPRETRY``,
    a dictionary. With "smtpretry.django" in INSTALLED_APPS, ``manage.py check`` tells which of them are wrong.

    A message counts as sent if the server took it for at least one recipient, or the queue did. Recipients that did
    not get it are logged, and are in ``message.delivery``, a `Delivery`. If nobody got it, the exception is the one
    that smtplib would have raised, after all messages were tried.
    """

    def __init__(self, *args: Any, **options: Any) -> None:  # noqa: ANN401 - Django's
        own = given() | {name: options.pop(name) for name in TAKEN & options.keys()}
        super().__init__(*args, **options)
        queue = own.pop("queue", None)
        check_queue(queue)
        project = getattr(settings, "BASE_DIR", "")  # the worker may run in another folder
        self.queue = os.path.abspath(os.path.join(project, queue)) if queue else None  # noqa: PTH100, PTH118 - as SQLite finds it
        if unknown := sorted(own.keys() - OF_THE_CLIENT):
            msg = f"SMTPRETRY has {unknown[0]}, which EmailBackend does not take: {instead_of(unknown[0])}"
            raise TypeError(msg)
        self.connection: Blocking | None = None
        self.options: dict[str, Any] = {"policy": _WITH_QUEUE if self.queue else _POLICY} | own

    @functools.cached_property
    def ssl_context(self) -> ssl.SSLContext:
        """The context for TLS, with the client's certificate where there is one."""
        context = ssl.create_default_context()
        if self.ssl_certfile or self.ssl_keyfile:
            context.load_cert_chain(self.ssl_certfile, self.ssl_keyfile)
        return context

    @property
    def client(self) -> Blocking:
        """The client for these settings."""
        given = {name: value for name, value in vars(self).items() if name in _SETTINGS}
        key = (type(self), self.queue, *_identified(given), *_identified(self.options))
        if key not in _clients:
            _refuse_greenlets()
            while len(_clients) >= _MOST:
                _clients.pop(next(iter(_clients)), None)
            make, options = self.arguments()
            _clients.setdefault(key, Blocking(make, **options))
        return _clients[key]

    def open(self) -> bool | None:
        """Connect and log in. True where it was closed, False where it was open, None where it failed silently."""
        if self.connection:
            return False
        try:
            _outside_of_loops(self._open)
        except OSError:
            if not self.fail_silently:
                raise
            return None
        return True

    def close(self) -> None:
        """Be closed. The connections are the client's, which closes them when nobody needs them for a while."""
        self.connection = None

    def send_messages(self, email_messages: Sequence[EmailMessage]) -> int:
        """Send the messages, as many at once as the client can, and return how many were sent.

        Raises:
            smtplib.SMTPException, OSError: a message was taken for nobody; the first of these, where there are several.
                The others were sent all the same.
            QueueError: the queue cannot be used, and nothing was sent; it is an OSError.

        With `fail_silently`, these are logged, and what was not sent is not counted.
        """
        if not email_messages:
            return 0
        try:
            sent: int = _outside_of_loops(functools.partial(self._send_all, email_messages))
        except OSError as error:
            if not self.fail_silently:
                raise
            log.say(logging.ERROR, "smtp messages cannot be sent: %s", error)
            return 0
        return sent

    def _open(self) -> None:
        client = self.client
        try:
            retry(policy=client.policy)(client._run)(functools.partial(_log_in, client._smtp))  # noqa: SLF001 - next door
        except aiosmtplib.SMTPException as error:
            raise translated(error) from error
        self.connection = client

    def _send_all(self, messages: Sequence[EmailMessage]) -> int:
        client = self.client
        by_id = dict[str, tuple[int, Any]]()

        def prepared() -> Iterator[Delivery]:
            for number, message in enumerate(messages):
                if message.recipients():
                    delivery = self._prepare(message)
                    by_id[delivery.id] = number, message
                    yield delivery

        with outbox(self.queue) as connection:
            if connection is None:
                self._open_queue(client)
                ended = list(client.send_many(prepared()))
            else:
                ended = [client.enqueue(delivery, connection=connection) for delivery in prepared()]
        failures = dict[int, Exception]()
        for delivery in ended:
            number, message = by_id[delivery.id]
            message.delivery = delivery
            if (failure := _failure(delivery, client.policy)) is not None:
                failures[number] = failure
        raised = None if self.fail_silently else min(failures, default=None)
        for delivery in ended:
            if by_id[delivery.id][0] != raised:
                _log_losses(delivery)
        sent = len(ended) - len(failures)
        if raised is not None:
            failure = translated(failures[raised])
            failure.add_note(f"smtpretry: {sent} of {len(ended)} messages were sent")
            raise failure
        return sent

    def _open_queue(self, client: Blocking) -> None:
        """Say with the first mail that the queue cannot be used, and not with the first that has to wait."""
        if self.queue and self.queue not in _usable:
            try:
                client._run(engine(self.queue).__aenter__)  # noqa: SLF001 - next door
            except QueueError as error:
                if not error.passing:
                    raise
            _usable.add(self.queue)

    def _prepare(self, message: EmailMessage) -> Delivery:
        if hasattr(self, "prep_address"):  # Django 6
            address: Callable[[str], str] = self.prep_address
        else:
            from django.core.mail.message import sanitize_address  # noqa: PLC0415 - Django 6 has it no more

            address = functools.partial(sanitize_address, encoding=message.encoding or settings.DEFAULT_CHARSET)
        return prepare(
            message.message(),
            sender=address(message.from_email),
            recipients=[address(recipient) for recipient in message.recipients()],
        )

    def arguments(self) -> tuple[Callable[[], aiosmtplib.SMTP], dict[str, Any]]:
        """What to make a `RetryingSMTP` or `Blocking` with: a function that makes clients, and the options."""
        where = {
            "hostname": self.host,
            "port": self.port,
            "local_hostname": DNS_NAME.get_fqdn(),
            "timeout": _TIMEOUT if self.timeout is None else self.timeout,
            "use_tls": bool(self.use_ssl),
            "start_tls": bool(self.use_tls),
            "tls_context": self.ssl_context,
        }
        options = dict(self.options)
        if "oauth_token_generator" in options:
            options["username"] = self.username
        elif self.username and self.password:
            where |= {"username": self.username, "password": self.password}
        if self.queue:
            options = {"defer": engine(self.queue), "max_wait": _MAX_WAIT} | options
        return functools.partial(aiosmtplib.SMTP, **where), options


def _refuse_greenlets() -> None:
    """Django refuses its database to a thread that runs an event loop, and all greenlets are in the thread of ours."""
    for module, name, patched in (
        ("gevent.monkey", "is_module_patched", "threading"),
        ("eventlet.patcher", "is_monkey_patched", "thread"),
    ):
        if module in sys.modules and getattr(sys.modules[module], name)(patched):
            msg = (
                f"smtpretry.django.EmailBackend does not work under {module.partition('.')[0]}: run Django in threads, "
                "as with gunicorn --worker-class gthread, or send from another process"
            )
            raise ImproperlyConfigured(msg)


_SETTINGS: Final = frozenset(
    {"host", "port", "username", "password", "use_tls", "use_ssl", "timeout", "ssl_keyfile", "ssl_certfile"}
)


def _identified(values: dict[str, Any]) -> list[tuple[str, object]]:
    """Values to tell clients apart by: policies that compare equal may have clocks of their own."""
    plain = (str, int, float, type(None))
    return [(name, value if isinstance(value, plain) else id(value)) for name, value in sorted(values.items())]


async def log_losses(delivery: Delivery) -> None:
    """Log for whom a message was not taken."""
    _log_losses(delivery)


def _log_losses(delivery: Delivery) -> None:
    for who in [*delivery.refused, *delivery.uncertain]:
        log.lost(delivery.id, who, delivery.outcomes[who])


def _failure(delivery: Delivery, policy: RetryPolicy) -> Exception | None:
    """What a send raises, where a message was taken for nobody."""
    try:
        conclude(delivery, policy.clock())
    except aiosmtplib.SMTPException as error:
        return error
    return None


async def _log_in(client: RetryingSMTP) -> None:
    async with client._pool.lend() as connection:  # noqa: SLF001 - next door
        try:
            await connection.prepare()
        except Failed as failed:
            raise exception_of(failed.said.stage, failed.said.reply, failed.said.error) from None


def _outside_of_loops(call: Callable[[], Any]) -> Any:  # noqa: ANN401 - what it returns
    """Call it; in a thread where this one runs an event loop, which waits as it does with Django's own backend.

    The loop that sends cannot wait for itself, as where a log handler sends mail about a mail; there it is an error.
    """
    if asyncio._get_running_loop() is None or sends_here():  # noqa: SLF001 - the one that raises nothing
        return call()
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(contextvars.copy_context().run, call).result()
