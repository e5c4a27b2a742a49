"""The exceptions of a send: aiosmtplib's own, and the few that it has no name for.

    aiosmtplib.SMTPException
     ├─ UncertainDelivery             the connection broke after the final dot; each is also aiosmtplib's error:
     │   ├─ UncertainDisconnected       (SMTPServerDisconnected)
     │   ├─ UncertainTimeout            (SMTPReadTimeoutError)
     │   └─ UncertainResponse           (SMTPDataError)
     ├─ SMTPServerDisconnected
     │   └─ ClientClosed              aclose() was called, or `async with` ended, while the send was waiting
     └─ QueueSilent                   the durable queue did not say whether it took the delivery
    Exception
     └─ NotOurs                       raised by a queue's engine, at an attempt: the delivery is another worker's now

Every exception of a send has the `Delivery` as `exc.delivery`, and its story as a note (PEP 678).
"""

from __future__ import annotations

import copy
import smtplib
import ssl
import traceback
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import aiosmtplib
from aiosmtplib import SMTPResponse

from .delivery import Delivery
from .outcome import Outcome, Status
from .replies.reply import NO_REPLY, Reply
from .replies.stage import Stage

if TYPE_CHECKING:
    from collections.abc import Iterator


NOT_CONNECTED = "Server not connected"
"""aiosmtplib's words where there is no connection, or none any more."""

_NEVER_CONNECTED = "please run connect() first"  # smtplib's words for a mistake of the caller's


class UncertainDelivery(aiosmtplib.SMTPException):
    """The server may have the message or not, and the policy says not to send it again (RFC 1047)."""

    delivery: Delivery


class UncertainDisconnected(UncertainDelivery, aiosmtplib.SMTPServerDisconnected):
    """The connection was lost after the final dot."""


class UncertainTimeout(UncertainDelivery, aiosmtplib.SMTPReadTimeoutError):
    """No reply came in time after the final dot."""


class UncertainResponse(UncertainDelivery, aiosmtplib.SMTPDataError):
    """What came after the final dot was no reply."""


class ClientClosed(aiosmtplib.SMTPServerDisconnected):
    """The client was closed while the send was waiting. `exc.delivery` tells who is pending."""

    delivery: Delivery


class QueueSilent(aiosmtplib.SMTPException):
    """The queue does not answer, and may have the delivery: look for `exc.delivery.id` in it before you send again."""

    delivery: Delivery


class NotOurs(Exception):  # noqa: N818 - not a fault: what the fence of a queue says
    """Another worker has the delivery now. An engine's `save` raises this, and the attempt sends nothing more."""


def tell(error: BaseException, delivery: Delivery, now: float) -> None:
    """Attach the delivery and its story to what comes out of a send."""
    error.delivery = delivery  # type: ignore[attr-defined] # as promised for every exception of a send
    error.add_note(delivery.story(now))


def delivery_of(error: BaseException) -> Delivery | None:
    """The delivery of an exception that a send raised, or None; the first of several (see `deliveries_of`)."""
    return next(iter(deliveries_of(error)), None)


def deliveries_of(error: BaseException) -> list[Delivery]:
    """The deliveries of an exception, each once. An ExceptionGroup, such as a TaskGroup's, may have several.

    The exceptions that it was raised from are searched, too: a TimeoutError of asyncio.timeout and a KeyboardInterrupt
    are raised from the cancellation that has the delivery.
    """
    found = dict[int, Delivery]()
    for link in chain(error):
        if isinstance(delivery := getattr(link, "delivery", None), Delivery):
            found.setdefault(id(delivery), delivery)
    return list(found.values())


def chain(error: BaseException) -> Iterator[BaseException]:
    """An exception, those that it is a group of, what it was raised from, and so on."""
    seen = set[int]()
    links: list[BaseException | None] = [error]
    while links:
        link = links.pop()
        if link is not None and id(link) not in seen:
            seen.add(id(link))
            yield link
            links.append(link.__cause__ or link.__context__)
            if isinstance(link, BaseExceptionGroup):
                links += reversed(link.exceptions)


def conclude(delivery: Delivery, now: float) -> tuple[dict[str, SMTPResponse], str]:
    """What aiosmtplib's send methods return for a delivery that has ended.

    Raises what aiosmtplib would have raised, where nobody was accepted.
    """
    failed = {
        who: outcome
        for who, outcome in delivery.outcomes.items()
        if outcome.status in (Status.REFUSED, Status.UNCERTAIN)
    }
    if len(failed) == len(delivery.outcomes):
        error = _exception(delivery.sender, failed)
        tell(error, delivery, now)
        raise error
    said = delivery.response
    if deferred := delivery.deferred:
        until = max(now, min(delivery.outcomes[who].next_at for who in deferred))
        when = datetime.fromtimestamp(until, UTC).isoformat(" ", "seconds")
        told = f"{len(deferred)} of {len(delivery.outcomes)} recipients deferred until {when}"
        said = f"{said}; {told}" if said else told
    return {who: _response(outcome) for who, outcome in failed.items()}, said


def _response(outcome: Outcome) -> SMTPResponse:
    reply = outcome.reply or Reply(NO_REPLY)
    return SMTPResponse(reply.code, reply.message)


def exception_of(
    stage: Stage | None, reply: Reply, error: Exception | None, sender: str = "", recipient: str = ""
) -> Exception:
    """The exception that aiosmtplib has for a failure: the one that it raised, or the one for a reply at its stage."""
    if error is not None:
        own = copy.copy(error)  # sends that wait for the same server share it, and each has a story of its own
        own.__cause__ = error
        return own
    code, message = reply.code, reply.message
    if code == NO_REPLY:
        return aiosmtplib.SMTPServerDisconnected(message)
    if stage is Stage.RCPT:
        return aiosmtplib.SMTPRecipientRefused(code, message, recipient)
    if stage is Stage.MAIL:
        return aiosmtplib.SMTPSenderRefused(code, message, sender)
    return _BY_STAGE.get(stage, aiosmtplib.SMTPResponseException)(code, message)


_BY_STAGE: dict[Stage | None, type[aiosmtplib.SMTPResponseException]] = {
    Stage.CONNECT: aiosmtplib.SMTPConnectResponseError,
    Stage.EHLO: aiosmtplib.SMTPHeloError,
    Stage.AUTH: aiosmtplib.SMTPAuthenticationError,
    Stage.DATA: aiosmtplib.SMTPDataError,
    Stage.END_OF_DATA: aiosmtplib.SMTPDataError,
}


def _exception(sender: str, failed: dict[str, Outcome]) -> Exception:
    """The refusals, where every recipient has its own; else what became of a whole transaction."""
    refused = list[aiosmtplib.SMTPRecipientRefused]()
    whole: Exception | None = None
    for who, outcome in failed.items():
        reply = outcome.reply or Reply(NO_REPLY)
        if outcome.status is Status.UNCERTAIN:
            return _uncertain(reply, outcome.error)
        error = exception_of(outcome.stage, reply, outcome.error, sender, who)
        if isinstance(error, aiosmtplib.SMTPRecipientRefused):
            refused.append(error)
        else:
            whole = error
    return whole or aiosmtplib.SMTPRecipientsRefused(refused)


def _uncertain(reply: Reply, error: Exception | None) -> UncertainDelivery:
    if isinstance(error, aiosmtplib.SMTPTimeoutError):
        return UncertainTimeout(reply.message)
    if isinstance(error, aiosmtplib.SMTPResponseException):
        return UncertainResponse(reply.code, reply.message)
    return UncertainDisconnected(reply.message)


def read(error: BaseException) -> list[tuple[Stage, Reply]]:
    """What a server said, in an exception of aiosmtplib or smtplib, or in one that was raised because of it.

    Empty where there is no such thing in it, or where no other attempt would change it. A connection that was lost at a
    moment that the exception does not tell counts as lost after the final dot. A QUIT that fails tells nothing.
    """
    for link in chain(error):
        if isinstance(link, smtplib.SMTPException) and (str(link) == _NEVER_CONNECTED or _came_in(link, "quit")):
            continue  # what came of the message, and why there is no connection, stands behind it
        if isinstance(link, (aiosmtplib.SMTPException, smtplib.SMTPException)):
            try:
                return [] if hasattr(link, "delivery") else _read(link)
            except (AttributeError, TypeError, ValueError):
                return []  # no code and no text in it: somebody else has put it together
        if isinstance(link, OSError) and not isinstance(link, ssl.SSLError) and _came_in(link, "connect"):
            return [(Stage.CONNECT, Reply.of(NO_REPLY, str(link)))]
    return []


def _came_in(error: Exception, method: str) -> bool:
    """Whether smtplib raised it in that method: its exceptions leave out where they come from."""
    frames = (frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(code.co_filename == smtplib.__file__ and code.co_name == method for code in frames)


def _read(  # noqa: PLR0911 - one for each kind
    error: aiosmtplib.SMTPException | smtplib.SMTPException,
) -> list[tuple[Stage, Reply]]:
    match error:
        case aiosmtplib.SMTPRecipientsRefused():
            return [(Stage.RCPT, Reply.of(one.code, one.message)) for one in error.recipients]
        case smtplib.SMTPRecipientsRefused():
            return [(Stage.RCPT, Reply.of(*said)) for said in error.recipients.values()]
        case aiosmtplib.SMTPResponseException():
            return [(_stage(error), Reply.of(error.code, error.message))]
        case smtplib.SMTPResponseException():
            return [(_stage(error), Reply.of(error.smtp_code, error.smtp_error))]
        case aiosmtplib.SMTPConnectError():
            return [(Stage.CONNECT, Reply.of(NO_REPLY, str(error)))]
        case aiosmtplib.SMTPServerDisconnected() | aiosmtplib.SMTPTimeoutError() | smtplib.SMTPServerDisconnected():
            return [(Stage.END_OF_DATA, Reply.of(NO_REPLY, str(error)))]
        case _:
            return []


def _stage(error: Exception) -> Stage:
    return next((stage for kinds, stage in _STAGES.items() if isinstance(error, kinds)), Stage.END_OF_DATA)


_STAGES = {
    (aiosmtplib.SMTPConnectResponseError, smtplib.SMTPConnectError): Stage.CONNECT,
    (aiosmtplib.SMTPHeloError, smtplib.SMTPHeloError): Stage.EHLO,
    (aiosmtplib.SMTPAuthenticationError, smtplib.SMTPAuthenticationError): Stage.AUTH,
    (aiosmtplib.SMTPRecipientRefused,): Stage.RCPT,
    (aiosmtplib.SMTPSenderRefused, smtplib.SMTPSenderRefused): Stage.MAIL,
}
