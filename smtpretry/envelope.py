"""From a message and its arguments to a `Delivery`: checked before anything is sent, and the same bytes ever after."""

from __future__ import annotations

import email.message
import email.utils
import os
import re
from collections.abc import Iterable
from datetime import datetime, timedelta
from types import NoneType
from typing import TYPE_CHECKING

from .addresses import mailbox_of, recipients_of, sender_of
from .delivery import Delivery
from .mime import as_bytes
from .outcome import Outcome
from .replies.patterns import compiled

if TYPE_CHECKING:
    from collections.abc import Sequence

_LONGEST_ID = 255
Message = email.message.EmailMessage | email.message.Message

_CONTROL = "[\x00-\x1f\x7f\ud800-\udfff]"  # and what no codec writes
_FIELD = rb"[!-9;-~\x80-\xff]+[ \t]*:"  # with the white space of RFC 5322 §4.5
_BEFORE_THE_HEADER = (  # a byte order mark, and the lines that mailbox files begin a message with
    rb"(?:\xef\xbb\xbf)?(?:>?From[ \t]+[^:\s][^\n]*\n)*(?=%b)"
    rb"|(?:\xef\xbb\xbf)?>?From[ \t]+[^:\s][^\n]{,200}\d:\d\d[^\n]{,40}\d{4}[^\n]{,99}\n(?=\r\n|\Z)" % _FIELD
)


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
    """Make a `Delivery` from a message and aiosmtplib's arguments, without sending it; `deliver` and `attempt` send it.

    Sender and recipients default to the message's headers: Sender, or From; every address of To, Cc and Bcc (of their
    Resent- forms where there is a Resent-Date). The null sender is "" or "<>".

    A message object is written as 7-bit MIME, which every server takes, and lines of more than 998 octets are encoded.
    (A message with a DKIM-Signature keeps its bytes, and so does a parsed 8-bit body without a declared charset.) Bytes
    and str are sent as they are, long lines too: they may be signed, and a server may take longer lines than RFC 5321
    §4.5.3.1.6 asks for. The "From ..." line that a mailbox file puts before the header is left out. Line ends become
    CRLF. A missing Message-ID (with the sender's domain) or Date is added (RFC 6409 §8.2-8.3), unless a DKIM-Signature
    names it. All this is done once: every attempt sends the same bytes.

    Args:
        message: the message.
        sender: the reverse-path; None for the message's Sender or From.
        recipients: whom to send it to; None for the message's To, Cc and Bcc.
        mail_options: ESMTP parameters of MAIL.
        rcpt_options: ESMTP parameters of each RCPT.
        id: the delivery's name, such as "order-17", at most 255 characters; None for a new, unique one. A queue takes
            the same name once.
        expires: when to stop sending it: a datetime with a time zone, or a timedelta from when it is handed over.
            Recipients that have not got it by then are refused.

    Raises:
        ValueError: no sender, no recipient, a header with anything but addresses, an address, an option or an id with a
            control character, a str outside ASCII, an object that cannot be written, a time without a time zone, a
            duration that is not positive.
        TypeError: a message, an address, options or another argument of another type.
    """
    if not isinstance(recipients, (str, NoneType, Iterable)) or isinstance(recipients, bytes):
        msg = f"recipients is an address or a list of them, not {recipients!r}"
        raise TypeError(msg)
    if isinstance(message, email.message.Message):
        sender = sender_of(message) if sender is None else sender
        recipients = recipients_of(message) if recipients is None else recipients
    elif not isinstance(message, (str, bytes)):
        msg = f"message is an email.message.EmailMessage, str or bytes, not {type(message).__name__}"
        raise TypeError(msg)
    if sender is None:
        msg = "no sender: give sender=, or a message object with a From header"
        raise ValueError(msg)
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
    written, utf8 = _bytes(message)
    utf8 = utf8 or not (origin.isascii() and all(mailbox.isascii() for mailbox in mailboxes))
    if utf8 and not any(option.lower() == "smtputf8" for option in mail_options):
        mail_options = (*mail_options, "SMTPUTF8")
    return Delivery(
        sender=sender,
        outcomes={recipient: Outcome() for recipient in mailboxes.values()},
        message=_identified(written, origin.rpartition("@")[2], is_object=isinstance(message, email.message.Message)),
        mail_options=mail_options,
        rcpt_options=rcpt_options,
        id=_name(id),
        expires_in=expires.total_seconds() if isinstance(expires, timedelta) else None,
        expires_at=expires.timestamp() if isinstance(expires, datetime) else None,
    )


def _name(name: str | None) -> str:
    if name is None:
        return os.urandom(16).hex()
    if not isinstance(name, str):
        msg = f"id is a str, not {name!r}"
        raise TypeError(msg)
    if not 0 < len(name) <= _LONGEST_ID or compiled(_CONTROL).search(name):
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


def _options(name: str, options: Iterable[str] | None) -> tuple[str, ...]:
    if options is None:
        return ()
    options = options if isinstance(options, str) else tuple(options)
    if isinstance(options, str) or not all(isinstance(option, str) for option in options):
        msg = f"{name} is a list of str, not {options!r}"
        raise TypeError(msg)
    for option in options:
        if not option.isascii() or compiled(_CONTROL).search(option):
            msg = f"{name} has {option!r}, which is no ESMTP parameter"
            raise ValueError(msg)
    return options


def _bytes(message: Message | str | bytes) -> tuple[bytes, bool]:
    if isinstance(message, email.message.Message):
        return as_bytes(message)
    if isinstance(message, bytes):
        return message, False
    message = message.removeprefix("\ufeff")
    if not message.isascii():
        msg = "the message is a str with characters outside ASCII: pass bytes, or an EmailMessage to send_message"
        raise ValueError(msg)
    return message.encode("ascii"), False


def _identified(message: bytes, domain: str, *, is_object: bool) -> bytes:
    """The message with CRLF line ends, a Message-ID and a Date; without what stands before its first header field."""
    message = _with_crlf(message)
    if not is_object and (before := re.match(_BEFORE_THE_HEADER, message)):
        message = message[before.end() :]
    has_header = is_object or re.match(_FIELD, message)
    header = message[: message.find(b"\r\n\r\n") + 2 or None].lower() if has_header else b""
    if b"\nmessage-id:" in header and b"\ndate:" in header:
        return message  # as most have it
    added, signed = b"", _signed(header)
    if not _has(b"message-id", header) and b"message-id" not in signed:
        name = email.utils.make_msgid(domain=domain if domain and domain.isascii() else "localhost")
        added += f"Message-ID: {name}\r\n".encode()
    if not _has(b"date", header) and b"date" not in signed:
        added += f"Date: {email.utils.format_datetime(email.utils.localtime())}\r\n".encode()
    if not has_header and added and not message.startswith(b"\r\n"):
        added += b"\r\n"  # a body alone: it needs the empty line before it
    return added + message


def _signed(header: bytes) -> set[bytes]:
    """The fields that DKIM signatures name: one that is named and not there must not come later (RFC 6376 §5.4.2)."""
    if b"dkim-signature" not in header:
        return set()
    unfolded = re.sub(rb"\r\n[ \t]+", b" ", header)
    names = re.findall(rb"(?m)^dkim-signature[ \t]*:(?:[^\r\n]*;)?[ \t]*h[ \t]*=([^;\r\n]*)", unfolded)
    return {name.strip() for one in names for name in one.split(b":")}


def _has(name: bytes, header: bytes) -> bool:
    """Whether a field is in the header, both in lower case."""
    if b"\n%b:" % name in header:
        return True
    found = (b"\n" + header).split(b"\n" + name)[1:]
    return any(rest.lstrip(b" \t").startswith(b":") for rest in found)


def _with_crlf(message: bytes) -> bytes:
    """The message with CRLF at the end of each line; itself where it has it already, as nearly all do."""
    lines = message.count(b"\r\n")
    if message.count(b"\r") != lines:
        message = re.sub(rb"\r\n|\r|\n", b"\r\n", message)
    elif message.count(b"\n") != lines:
        message = message.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    return message if message.endswith(b"\r\n") else message + b"\r\n"
