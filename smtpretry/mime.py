"""A message object as bytes that every server takes: 7-bit MIME, no line too long (RFC 5321 §4.5.3.1.6)."""

from __future__ import annotations

import base64
import binascii
import copy
import email
import email.message
import email.policy
from email.errors import MessageError
from email.header import Header
from email.policy import EmailPolicy
from typing import TYPE_CHECKING, Any

from .addresses import show_in_ascii
from .flatten import flatten

if TYPE_CHECKING:
    from email.message import Message
    from email.policy import Compat32

_LONGEST = 998  # octets in a line, without its CRLF
_DEEPEST = 100  # parts within parts
_SIGNATURE = "DKIM-Signature"
_OLD = email.policy.compat32.clone(mangle_from_=False)
_OLD_7BIT = _OLD.clone(cte_type="7bit")
_POLICIES: dict[bool, tuple[Any, Any]] = {  # by whether the headers are in UTF-8
    utf8: (policy.clone(cte_type="7bit"), policy)
    for utf8, policy in ((False, email.policy.SMTP), (True, email.policy.SMTPUTF8))
}


def as_bytes(message: Message) -> tuple[bytes, bool]:
    """The message without its Bcc, and whether its headers are in UTF-8, for they show an address outside ASCII.

    Text is written as 7-bit MIME. The exceptions are a message with a DKIM-Signature, which goes as it writes itself,
    or as it was parsed; what is within multipart/signed; and a parsed body of 8 bits whose charset is not said, or is
    not true: the bytes of these are kept. A body with a line of more than 998 octets is encoded (quoted-printable, or
    base64), and so is one with a NUL, or one of 8 bits that is no text.

    Raises:
        ValueError: it is no message that can be written; text outside ASCII without a charset; a header with a line
            break; a line too long in a header or in a signed part.
    """
    try:
        return _as_bytes(message)
    except (AttributeError, KeyError, TypeError, RecursionError, MessageError) as error:
        msg = f"the message cannot be written: {_what_is_wrong(message) or error}"
        raise ValueError(msg) from error


def _as_bytes(message: Message) -> tuple[bytes, bool]:
    signed, (shown, utf8) = _SIGNATURE in message, show_in_ascii(message)
    if not signed:
        message = shown
    written = _write(message, utf8=utf8, signed=signed)
    if has_long_line(written) or (not signed and (b"\0" in written or not written.isascii())):
        message = copy.deepcopy(message)
        _encode_bodies(message)
        written = _write(message, utf8=utf8, signed=signed)
        if has_long_line(written):
            msg = "the message has a line of more than 998 octets in a header or a signed part (RFC 5322 §2.1.1)"
            raise ValueError(msg)
    return written, utf8 and not written.isascii()


def _what_is_wrong(message: object, depth: int = 0) -> str | None:
    """What no generator writes, where a message was put together by hand."""
    if not isinstance(message, email.message.Message):
        return f"a part of it is of type {type(message).__name__}, not a message: attach a MIMEText"
    if depth > _DEEPEST:
        return "it is a part of itself"
    for name, value in message.raw_items():
        if not isinstance(value, (str, Header)):
            return f"header {name} is of type {type(value).__name__}, not a str"
    payload: object = message._payload  # type: ignore[attr-defined] # noqa: SLF001 - as it was given
    if isinstance(payload, list):
        return next(filter(None, (_what_is_wrong(part, depth + 1) for part in payload)), None)
    if payload is not None and not isinstance(payload, str):
        return f"a body is of type {type(payload).__name__}, not a str: use set_content"
    return None


def has_long_line(message: bytes) -> bool:
    """Whether a line has more than 998 octets."""
    start, size = 0, len(message)
    while size - start > _LONGEST:
        end = message.rfind(b"\n", start, start + _LONGEST + 2)
        if end < 0:
            return True
        if end == start + _LONGEST + 1 and message[end - 1] != ord("\r") and b"\n" not in message[start:end]:
            return True
        start = end + 1
    return False


def _write(message: Message, *, utf8: bool, signed: bool) -> bytes:
    try:
        if signed:  # what is signed are the bytes that the message itself writes
            own: Any = message.policy.clone(linesep="\r\n", mangle_from_=False)
            if isinstance(own, EmailPolicy) and not _is_signed_here(message):
                own = own.clone(refold_source="none")
            return flatten(message, own)
        if isinstance(message, email.message.EmailMessage):
            return _in_7_bits(message, *_POLICIES[utf8])
        written = flatten(message, _OLD)
        if written.isascii():
            return written
        return _in_7_bits(email.message_from_bytes(written), _OLD_7BIT, _OLD)  # Django's own parts insist on 8 bits
    except UnicodeEncodeError as error:
        msg = f"the message has text outside ASCII without a charset ({error}): use set_content, or a MIMEText in UTF-8"
        raise ValueError(msg) from error


def _is_signed_here(message: Message) -> bool:
    """Whether the signature was set on this object: then it is of what that writes; else, of what was parsed."""
    return any(name.lower() == _SIGNATURE.lower() and hasattr(value, "name") for name, value in message.raw_items())


def _in_7_bits(message: Message, policy: EmailPolicy | Compat32, in_8_bits: EmailPolicy | Compat32) -> bytes:
    if _is_in_a_charset(message):
        try:
            return flatten(message, policy)
        except (LookupError, UnicodeError):
            pass
    return flatten(message, in_8_bits)


def _is_in_a_charset(message: Message) -> bool:
    """Whether each part of 8 bits can be read in the charset that it declares: else it would come out as another."""
    for part in message.walk():
        text = _payload(part)
        if text is not None and not text.isascii():
            try:
                text.encode("ascii", "surrogateescape").decode(part.get_content_charset("ascii"))
            except (LookupError, UnicodeError):
                return False
    return True


def _encode_bodies(message: Message) -> None:
    """Encode the parts that need it, but none that is signed: that would break the signature (RFC 1847 §2.1)."""
    payload: Any = message.get_payload()
    kind = message.get_content_type()
    if kind == "multipart/signed" or _SIGNATURE in message:
        return
    if isinstance(payload, list):
        for part in payload:
            _encode_bodies(part)
        return
    text = _payload(message)
    if text is None or kind.startswith(("multipart/", "message/")):
        return
    is_text, raw = kind.startswith("text/"), text.encode("ascii", "surrogateescape")
    if not (has_long_line(raw) or b"\0" in raw or (not is_text and not raw.isascii())):
        return
    data: Any = message.get_payload(decode=True)
    was = str(message["Content-Transfer-Encoding"]).lower()
    readable = is_text and was != "base64" and b"\0" not in data
    encoded = binascii.b2a_qp(data, istext=True) if readable else base64.encodebytes(data)
    del message["Content-Transfer-Encoding"]
    message.set_payload(encoded.decode("ascii"))
    message["Content-Transfer-Encoding"] = "quoted-printable" if readable else "base64"


def _payload(part: Message) -> str | None:
    payload = part._payload  # type: ignore[attr-defined] # noqa: SLF001 - get_payload() decodes what is not ASCII
    return payload if isinstance(payload, str) else None
