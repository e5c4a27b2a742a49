"""A delivery status notification (RFC 3464): what became of a delivery, for its sender, as mail servers write it."""

from __future__ import annotations

import email.utils
import platform
import re
from email.message import Message
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText
from typing import TYPE_CHECKING, Protocol

from .addresses import mailbox_of
from .outcome import Outcome, Status
from .replies.reply import NO_REPLY
from .replies.stage import Stage

if TYPE_CHECKING:
    from collections.abc import Iterable

# What is done about a recipient (RFC 3464 §2.3.3), and what that means. There is no action for "nobody knows": it is
# reported as failed, for no more attempts are made, with the status of a connection that broke (RFC 3463: 4.4.2).
_ACTIONS = {
    Status.ACCEPTED: ("relayed", "The mail server has taken it."),
    Status.REFUSED: ("failed", "It was not delivered."),
    Status.UNCERTAIN: ("failed", "It may have been delivered: the connection was lost before the server's answer."),
    Status.PENDING: ("delayed", "It has not been delivered yet, and is tried again."),
    Status.DEFERRED: ("delayed", "It has not been delivered yet, and is tried again."),
}
_NO_ANSWER, _BROKEN = "4.4.1", "4.4.2"  # RFC 3463 §3.5


class Notifiable(Protocol):
    """What is known of a delivery."""

    sender: str
    outcomes: dict[str, Outcome]
    message: bytes
    submitted_at: float | None
    began_at: float | None


def notify(delivery: Notifiable, *, reporting_mta: str | None = None) -> Message:
    """See `Delivery.dsn`."""
    if not mailbox_of(delivery.sender):
        msg = "the delivery has the null sender: nobody is to be notified of it (RFC 5321 §4.5.5)"
        raise ValueError(msg)
    host = reporting_mta or platform.node()
    failed = any(_ACTIONS[outcome.status][0] == "failed" for outcome in delivery.outcomes.values())
    notification = MIMEMultipart("report", report_type="delivery-status")
    notification["From"] = f"Mail Delivery System <mailer-daemon@{host}>"
    notification["To"] = delivery.sender
    notification["Subject"] = "Delivery Status Notification" + (" (Failure)" if failed else "")
    notification["Date"] = email.utils.formatdate(localtime=True)
    notification["Message-ID"] = email.utils.make_msgid(domain=host)
    notification["Auto-Submitted"] = "auto-replied"  # RFC 3834 §5: no machine answers it
    for part in (_words(delivery), _fields(delivery, host), _header(delivery)):
        notification.attach(part)
    return notification


def _words(delivery: Notifiable) -> Message:
    lines = ["This is what became of your message.", ""]
    for who, outcome in delivery.outcomes.items():
        lines += [f"{who}: {_ACTIONS[outcome.status][1]}", *([f"    {outcome.reply}"] if outcome.reply else []), ""]
    return MIMEText("\n".join(lines))


def _fields(delivery: Notifiable, host: str) -> Message:
    """The part for machines: a group of fields for the message, and one for each recipient."""
    part = Message()
    part["Content-Type"] = "message/delivery-status"
    per_message = _group(
        [("Reporting-MTA", f"dns; {host}"), ("Arrival-Date", _date(delivery.submitted_at or delivery.began_at))]
    )
    part.set_payload([per_message, *(_group(_recipient(who, one)) for who, one in delivery.outcomes.items())])
    return part


def _recipient(who: str, outcome: Outcome) -> Iterable[tuple[str, str | None]]:
    mailbox = mailbox_of(who)
    if mailbox.isascii():
        yield "Final-Recipient", f"rfc822; {mailbox}"
    else:  # RFC 6533 §3: utf-8-addr-xtext
        yield "Final-Recipient", "utf-8; " + re.sub(r"[^!-~]|[\\+=]", lambda one: rf"\x{{{ord(one[0]):X}}}", mailbox)
    yield "Action", _ACTIONS[outcome.status][0]
    yield "Status", _status(outcome)
    if outcome.reply is not None:
        kind = "x-smtpretry" if outcome.reply.code == NO_REPLY else "smtp"
        said = str(outcome.reply).encode("ascii", "backslashreplace").decode()
        yield "Diagnostic-Code", f"{kind}; {said}"


def _status(outcome: Outcome) -> str:
    """The enhanced status code (RFC 3463), of the class that fits the action."""
    reply = outcome.reply
    if outcome.status is Status.UNCERTAIN:
        return _BROKEN
    if reply is None:
        return "4.0.0"
    if reply.code == NO_REPLY:
        return reply.enhanced or (_NO_ANSWER if outcome.stage is Stage.CONNECT else _BROKEN)
    return reply.enhanced or f"{reply.code // 100}.0.0"


def _header(delivery: Notifiable) -> Message:
    """The header of the message alone (RFC 6522 §4): the sender has the rest."""
    header = re.split(rb"\r?\n\r?\n", delivery.message, maxsplit=1)[0]
    return MIMEText(header.decode(errors="replace").replace("\r\n", "\n") + "\n", "rfc822-headers")


def _group(fields: Iterable[tuple[str, str | None]]) -> Message:
    group = Message()
    for name, value in fields:
        if value is not None:
            group[name] = value
    return group


def _date(at: float | None) -> str | None:
    return None if at is None else email.utils.formatdate(at, localtime=True)
