"""From a message and its arguments to a `Delivery`: checked before anything is sent, and the same bytes ever after."""

from __future__ import annotations

import copy
import email.message
import email.policy
import email.utils
import io
import re
import uuid
from collections.abc import Iterable
from datetime import datetime, timedelta
from email.generator import BytesGenerator
from types import NoneType
from typing import TYPE_CHECKING

from aiosmtplib.email import extract_recipients, extract_sender, flatten_message, parse_address
from aiosmtplib.protocol import normalize_message_line_endings

from .delivery import Delivery
from .outcome import Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

_LONGEST_ID = 255
Message = email.message.EmailMessage | email.message.Message

_PLAIN = re.compile(r"[\w.!#$%&'*+/=?^`{|}~-]+@[\w.-]+", re.ASCII)  # a mailbox alone, as nearly all addresses are
_CONTROL = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")  # and what no codec can write
_HEADER_SECTION = re.compile(rb"(?:[!-9;-~]+:[^\n]*\n(?:[ \t][^\n]*\n)*)+")
_HAS = {name: re.compile(rb"^" + name + rb"[ \t]*:", re.IGNORECASE | re.MULTILINE) for name in (b"Message-ID", b"Date")}


def prepare(
    message: Message | str | bytes,
    *,
    sender: str | None = None,
    recipients: str | Sequence[str] | None = None,
    mail_options: Iterable[str] | None = None,
    rcpt_options: Iterable[str] | None = None,
    id: str | None = None,  # noqa: A002 - as the delivery has it
    expires: timedelta | datetime | None = None,
) -> Delivery:
    """Make a `Delivery` of a message and aiosmtplib's arguments, without sending it; `deliver` and `attempt` take it.

    Sender and recipients default to the message's headers.

    A message object is written as 7-bit MIME, which every server takes. A Message-ID (its domain is the sender's) and a
    Date are put in front where there are none (RFC 6409 §8.2-8.3), once: every attempt sends the same bytes.

    Args:
        message: the message.
        sender: the reverse-path; None for the message's Sender or From.
        recipients: whom to send it to; None for the message's To, Cc and Bcc.
        mail_options: ESMTP parameters of MAIL.
        rcpt_options: ESMTP parameters of each RCPT.
        id: the delivery's name, such as "order-17", at most 255 characters; None for a new one. A queue takes the same
            name once.
        expires: when the message is not to be sent any more: a time with its time zone, or how long after it was handed
            over. Who has not got it by then is refused.

    Raises:
        ValueError: no sender, no recipient, an address, an option or an id with a control character, a str outside
            ASCII, a time without a time zone, a duration that is not positive.
        TypeError: a message, an address, options or another argument of another type.
    """
    if isinstance(message, email.message.Message):
        sender = extract_sender(message) if sender is None else sender
        recipients = extract_recipients(message) if recipients is None else recipients
    elif not isinstance(message, (str, bytes)):
        msg = f"message is an email.message.EmailMessage, str or bytes, not {type(message).__name__}"
        raise TypeError(msg)
    if sender is None:
        msg = "no sender: give sender=, or a message object with a From header"
        raise ValueError(msg)
    if not isinstance(recipients, (str, Iterable, NoneType)) or isinstance(recipients, bytes):
        msg = f"recipients is an address or a list of them, not {recipients!r}"
        raise TypeError(msg)
    recipients = [recipients] if isinstance(recipients, str) else list(recipients or ())
    if not recipients:
        msg = "no recipients: give recipients=, or a message object with a To, Cc or Bcc header"
        raise ValueError(msg)
    mailboxes: dict[str, str] = {}
    for recipient in recipients:
        mailbox = mailbox_of(recipient)
        if not mailbox:
            msg = f"no recipient: {recipient!r} holds no address"
            raise ValueError(msg)
        local, _, domain = mailbox.rpartition("@")
        mailboxes.setdefault(f"{local}@{domain.lower()}", recipient)
    _check_expiry(expires)
    mail_options, rcpt_options = _options("mail_options", mail_options), _options("rcpt_options", rcpt_options)
    origin = mailbox_of(sender)
    utf8 = not (origin.isascii() and all(mailbox.isascii() for mailbox in mailboxes))
    if utf8 and not any(option.lower() == "smtputf8" for option in mail_options):
        mail_options = (*mail_options, "SMTPUTF8")
    return Delivery(
        sender=sender,
        outcomes={recipient: Outcome() for recipient in mailboxes.values()},
        message=_identified(_bytes(message, utf8=utf8), origin.rpartition("@")[2]),
        mail_options=mail_options,
        rcpt_options=rcpt_options,
        id=_name(id),
        expires_in=expires.total_seconds() if isinstance(expires, timedelta) else None,
        expires_at=expires.timestamp() if isinstance(expires, datetime) else None,
    )


def _name(name: str | None) -> str:
    if name is None:
        return uuid.uuid4().hex
    if not isinstance(name, str):
        msg = f"id is a str, not {name!r}"
        raise TypeError(msg)
    if not 0 < len(name) <= _LONGEST_ID or _CONTROL.search(name):
        msg = f"id is 1 to {_LONGEST_ID} characters, none of them a control character, not {name!r}"
        raise ValueError(msg)
    return name


def _check_expiry(expires: object) -> None:
    if not isinstance(expires, (timedelta, datetime, NoneType)):
        msg = f"expires is a timedelta or a datetime, not {expires!r}"
        raise TypeError(msg)
    if isinstance(expires, timedelta) and expires <= timedelta(0):
        msg = f"expires is a positive timedelta, not {expires!r}"
        raise ValueError(msg)
    if isinstance(expires, datetime) and expires.utcoffset() is None:
        msg = f"expires has no time zone: {expires!r}; datetime.now(UTC) + timedelta(...) has one"
        raise ValueError(msg)


def mailbox_of(address: str) -> str:
    """The bare mailbox; one with a control character could add a command to the session."""
    if isinstance(address, str) and _PLAIN.fullmatch(address):
        return address
    if not isinstance(address, str):
        msg = f"an address is a str, not {address!r}"
        raise TypeError(msg)
    if _CONTROL.search(address):
        msg = f"address {address!r} has a line break or another control character"
        raise ValueError(msg)
    if "," in address and len(email.utils.getaddresses([address])) > 1:
        msg = f"{address!r} is more than one address: give a list of them"
        raise ValueError(msg)
    return parse_address(address)


def _options(name: str, options: Iterable[str] | None) -> tuple[str, ...]:
    options = options if isinstance(options, str) else tuple(options or ())
    if isinstance(options, str) or not all(isinstance(option, str) for option in options):
        msg = f"{name} is a list of str, not {options!r}"
        raise TypeError(msg)
    for option in options:
        if not option.isascii() or _CONTROL.search(option):
            msg = f"{name} has {option!r}, which is no ESMTP parameter"
            raise ValueError(msg)
    return options


def _bytes(message: Message | str | bytes, *, utf8: bool) -> bytes:
    if isinstance(message, email.message.EmailMessage):
        return flatten_message(message, utf8=utf8, cte_type="7bit")
    if isinstance(message, email.message.Message):
        written = _flatten(message, "8bit")
        if written.isascii():
            return written
        return _flatten(email.message_from_bytes(written), "7bit")  # parsed: Django's own parts insist on 8 bits
    if isinstance(message, bytes):
        return message
    if not message.isascii():
        msg = "the message is a str with characters outside ASCII: pass bytes, or an EmailMessage to send_message"
        raise ValueError(msg)
    return message.encode("ascii")


def _flatten(message: email.message.Message, cte_type: str) -> bytes:
    """A message object of the older class, as aiosmtplib writes it, but that no line gets a ">" before its "From "."""
    message = copy.copy(message)
    del message["Bcc"], message["Resent-Bcc"]
    written = io.BytesIO()
    BytesGenerator(written, policy=email.policy.compat32.clone(cte_type=cte_type, mangle_from_=False)).flatten(message)
    return written.getvalue()


def _identified(message: bytes, domain: str) -> bytes:
    """The message with CRLF line ends, a Message-ID and a Date."""
    message = _with_crlf(message)
    section = _HEADER_SECTION.match(message)
    header = section[0] if section else b""
    added = b""
    if not _HAS[b"Message-ID"].search(header):
        name = email.utils.make_msgid(domain=domain if domain and domain.isascii() else "localhost")
        added += f"Message-ID: {name}\r\n".encode()
    if not _HAS[b"Date"].search(header):
        added += f"Date: {email.utils.format_datetime(email.utils.localtime())}\r\n".encode()
    if not section and added and not message.startswith(b"\r\n"):
        added += b"\r\n"  # a body alone: it needs the empty line before it
    return added + message


def _with_crlf(message: bytes) -> bytes:
    """The message with CRLF at the end of each line; itself where it has it already, as nearly all do."""
    lines = message.count(b"\r\n")
    if message.endswith(b"\r\n") and message.count(b"\r") == lines == message.count(b"\n"):
        return message
    return normalize_message_line_endings(message)
