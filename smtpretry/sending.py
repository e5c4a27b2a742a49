"""The sending methods that every client has, and what they have in common: pass after pass, until all have an end."""

from __future__ import annotations

import asyncio
import email.message
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NoReturn

from aiosmtplib.typing import Default

from . import log
from .bulk import Bulk
from .checks import check_messages, check_number, check_seconds, check_timeout, current_task
from .delivery import Delivery
from .envelope import Message, prepare
from .errors import QueueSilent, conclude, tell
from .observer import Observer
from .outcome import Status
from .policy import RetryPolicy

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Iterable, Sequence
    from datetime import datetime, timedelta

    from aiosmtplib import SMTPResponse

    from .attempt import Save
    from .events import Hook
    from .queues.engine import Engine
    from .session.connection import Timeout
    from .stats import Stats

_MANY = 10_000  # messages: what they hold while they wait is a few KB each
_SILENT = 60.0  # seconds that a queue gets to answer
_SLOWLY = 15.0  # seconds between two questions to a queue that does not answer


class Sends(ABC):
    """aiosmtplib's sending methods, and more, for whoever can make an `attempt`.

    Args:
        policy: the rules, the backoff and the limits.
        defer: a durable queue, an `Engine`.
        max_wait: the longest wait in process, in seconds, where there is one.
        hooks: who is told what happens.
    """

    def __init__(self, policy: RetryPolicy, defer: Engine | None, max_wait: float, hooks: tuple[Hook, ...]) -> None:
        if not isinstance(policy, RetryPolicy):
            msg = f"policy is a RetryPolicy, such as RetryPolicy() or RetryPolicy.interactive(), not {policy!r}"
            raise TypeError(msg)
        if defer is not None and not callable(getattr(defer, "submit", None)):
            msg = f"defer is a smtpretry.Engine, such as smtpretry.queues.sqlite.SQLiteEngine('mail.db'), not {defer!r}"
            raise TypeError(msg)
        check_seconds("max_wait", max_wait)
        self.policy = policy
        self._engine, self._max_wait = defer, max_wait
        self._observer = Observer(hooks, policy.clock)

    def __enter__(self) -> NoReturn:
        """Say what to write in place of `with`."""
        msg = "write `async with`, not `with`; for code without an event loop there is smtpretry.Blocking"
        raise TypeError(msg)

    def __exit__(self, *_: object) -> None:  # noqa: B027 - without it, Python does not ask for `__enter__`
        """Never called."""

    @abstractmethod
    async def attempt(
        self, delivery: Delivery, save: Save | None = None, *, timeout: Timeout = Default.token
    ) -> Delivery:
        """Make one pass over the recipients that are due."""

    @abstractmethod
    def stats(self) -> Stats:
        """How the client is doing now, and what became of its recipients so far."""

    @abstractmethod
    def _alarm(self, seconds: float) -> Awaitable[None]:
        """What to await to wait so long."""

    @abstractmethod
    async def _room(self) -> None:
        """Wait until one more message can be sent soon."""

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
        """Send a message object, with retries, until every recipient is accepted, refused, uncertain or deferred.

        Args:
            message: the message; its Bcc header is not sent.
            sender: the reverse-path; None for the message's Sender or From.
            recipients: whom to send it to; None for the message's To, Cc and Bcc.
            mail_options: ESMTP parameters of MAIL.
            rcpt_options: ESMTP parameters of each RCPT.
            timeout: seconds for each command, in place of the client's own.

        Returns:
            The recipients that were not accepted, each with its last reply (the code is -1 if the server did not
            answer), and the text of the server's acceptance. Recipients that the queue took (`defer`) are not among
            them; the text says until when they wait.

        Raises:
            aiosmtplib.SMTPException: nobody was accepted. It is what aiosmtplib raises for the last failure, with
                `delivery` and a note that tells what was tried.
            UncertainDelivery: the connection broke after the final dot, nobody else was accepted, and the policy says
                "raise".
            ClientClosed: `aclose` was called while the send was waiting.
            ValueError, TypeError: an argument is wrong; nothing was sent.
        """
        if not isinstance(message, email.message.Message):
            msg = (
                f"message is an email.message.EmailMessage, not {type(message).__name__}: "
                "for str or bytes call sendmail(sender, recipients, message)"
            )
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
        """Send a message that is bytes, or a str in ASCII. Everything else is as in `send_message`."""
        if not isinstance(message, (str, bytes)):
            msg = (
                f"message is str or bytes, not {type(message).__name__}: for an EmailMessage call send_message(message)"
            )
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
        id: str | None = None,  # noqa: A002 - as the delivery has it
        expires: timedelta | datetime | None = None,
        timeout: Timeout = Default.token,
    ) -> Delivery:
        """Send as `send_message` does, but return the `Delivery`, and raise for no refusal.

        If you pass a `Delivery` that was broken off, the same bytes go to the recipients that are still pending; leave
        out the other arguments then. For `id` and `expires` see `prepare`.
        """
        delivery = _prepared(
            message,
            sender=sender,
            recipients=recipients,
            mail_options=mail_options,
            rcpt_options=rcpt_options,
            id=id,
            expires=expires,
        )
        del message  # what waits, waits as bytes
        return await self._deliver(delivery, timeout)

    def send_many(
        self, messages: Iterable[Message | Delivery] | AsyncIterable[Message | Delivery], concurrency: int | None = None
    ) -> AsyncGenerator[Delivery, None]:
        """Send many messages, and yield a `Delivery` for each, in the order in which they end.

        ``async for delivery in smtp.send_many(messages)``. A message is drawn when it can be sent, so the messages may
        be a generator of any length. A message that waits for its next try does not hold up the others.

        Args:
            messages: an iterable or asynchronous iterable of message objects, or of what `prepare` returns.
            concurrency: how many messages may be under way at a time, including those that wait; None for 10,000.

        Raises:
            ValueError: `concurrency` is below one.
            ExceptionGroup: messages that could not be sent at all, such as a ValueError for one without recipients. It
                is raised at the end, when all others have been yielded.
            Whatever the iterable raises. Nothing more is drawn then, and it is raised, in that group where there is
            one, when the messages under way have ended, and have been yielded.
            ClientClosed: `aclose` was called; the messages under way are yielded first.

        If you leave the loop early (`break`), close the generator, and what is under way is broken off:
        ``async with contextlib.aclosing(smtp.send_many(messages)) as deliveries``. The log names who is still pending.
        """
        check_messages(messages)
        concurrency = _MANY if concurrency is None else concurrency
        check_number("concurrency", concurrency)
        return Bulk(self.deliver, self._room, concurrency).run(messages)

    async def enqueue(
        self,
        message: Message | str | bytes | Delivery,
        /,
        *,
        sender: str | None = None,
        recipients: str | Sequence[str] | None = None,
        mail_options: Iterable[str] | None = None,
        rcpt_options: Iterable[str] | None = None,
        id: str | None = None,  # noqa: A002 - as the delivery has it
        expires: timedelta | datetime | None = None,
        connection: Any = None,  # noqa: ANN401 - each engine's own
    ) -> Delivery:
        """Put a message into the queue at once, without trying it first.

        Args:
            message: what `deliver` takes, also a `Delivery` that was broken off or whose transaction was rolled back.
            sender: the reverse-path; None for the message's Sender or From.
            recipients: whom to send it to; None for the message's To, Cc and Bcc.
            mail_options: ESMTP parameters of MAIL.
            rcpt_options: ESMTP parameters of each RCPT.
            id: the delivery's name, such as "order-17-invoice". The queue takes the same name once, until a week after
                its end (`keep`). This does not promise that the message is never sent twice.
            expires: a timedelta, or a datetime with a time zone. Recipients that have not got the message by then are
                refused, and the worker's `on_end` is called: when a worker comes to it, so not before the end of a
                pause of the server.
            connection: your database connection, if the message is to be part of your transaction: if you roll it back,
                nothing is sent.

        Returns:
            The delivery. It is stored, and its pending recipients are `deferred`.

        Raises:
            ValueError, TypeError: an argument is wrong, the client has no `defer`, or a message from or to others has
                that id.
            Whatever the engine raises, where it has not taken it; with the delivery as `exc.delivery`.
        """
        if self._engine is None:
            msg = "there is no queue: give RetryingSMTP an engine, defer="
            raise ValueError(msg)
        delivery = _prepared(
            message,
            sender=sender,
            recipients=recipients,
            mail_options=mail_options,
            rcpt_options=rcpt_options,
            id=id,
            expires=expires,
        )
        delivery.hand_over(self.policy.clock())
        for who in delivery.deferred:  # by a submission that was rolled back
            delivery.outcomes[who].status = Status.PENDING
        try:
            await self._engine.submit(delivery, connection=connection)
        except BaseException as error:
            tell(error, delivery, self.policy.clock())
            raise
        self._defer(delivery)
        return delivery

    async def _deliver(self, delivery: Delivery, timeout: Timeout) -> Delivery:
        check_timeout(timeout)
        with delivery.sent_by(current_task()):
            try:
                await self.attempt(delivery, timeout=timeout)
                while (when := delivery.next_at) is not None:
                    far = when - self.policy.clock() > self._max_wait
                    if far and self._engine is not None and await self._hand_over(delivery, self._engine, when):
                        break
                    self._observer.waits(delivery, when)
                    await self._alarm(when - self.policy.clock())
                    await self.attempt(delivery, timeout=timeout)
            except BaseException as error:
                tell(error, delivery, self.policy.clock())
                self._observer.broken_off(delivery, error)
                raise
        return delivery

    async def _hand_over(self, delivery: Delivery, engine: Engine, until: float) -> bool:
        """Give the rest to the queue; False where it says that it does not have it.

        Where its answer is lost, nothing is tried in process, for a worker may be sending it: it is asked again, until
        the next try is due.
        """
        wait, untouched = 1.0, True
        while True:
            try:
                async with asyncio.timeout(_SILENT) as limit:
                    await engine.submit(delivery)
            except Exception as error:  # noqa: BLE001 - whatever it is, the queue may have taken it before
                said = str(error).strip().partition("\n")[0]  # what follows may quote what was to be stored
                why = f"no answer in {_SILENT:.0f} s" if limit.expired() else f"{type(error).__name__}: {said}"
                untouched = untouched and getattr(error, "untouched", False)
                has = False if untouched else await _has(engine, delivery)
            else:
                has = True
            if has is not None:
                delivery.cure = None
            if has:
                self._defer(delivery)
                return True
            if has is False:
                log.not_handed_over(delivery.id, why)
                return False
            delivery.cure = f"the queue may have it, and does not answer: {why}"
            log.queue_is_silent(delivery.id, delivery.cure)
            if (left := until - self.policy.clock()) <= 0:
                raise QueueSilent(delivery.cure)
            await self._alarm(min(wait, left))
            wait = min(2 * wait, _SLOWLY)

    def _defer(self, delivery: Delivery) -> None:
        """The queue has taken the rest."""
        rest = delivery.pending
        for who in rest:
            delivery.outcomes[who].status = Status.DEFERRED
        log.handed_over(delivery.id, rest)
        self._observer.ended(delivery, rest)
        self._observer.call_hooks()


def _prepared(message: Message | str | bytes | Delivery, **given: Any) -> Delivery:  # noqa: ANN401 - what `prepare` takes
    """A delivery of the message; or the one that is given, which has all of that already."""
    if not isinstance(message, Delivery):
        return prepare(message, **given)
    if extra := [name for name, value in given.items() if value is not None]:
        msg = f"{extra[0]}= is for a new message: a Delivery keeps what it was prepared with"
        raise TypeError(msg)
    return message


async def _has(engine: Engine, delivery: Delivery) -> bool | None:
    """Whether the queue has the delivery; None where it does not say."""
    has = getattr(engine, "has", None)
    try:
        async with asyncio.timeout(_SILENT):
            return None if has is None else bool(await has(delivery.id))
    except Exception:  # noqa: BLE001 - it is as silent as before
        return None
