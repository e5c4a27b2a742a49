"""A message object as bytes: what the standard library's generator writes, in a fraction of its time.

Bodies are written by one replacement of the line ends, plain headers of one line as they are. A message with anything
that is not certain to come out the same is left to `email.generator.BytesGenerator`.
"""

from __future__ import annotations

import copy
import io
import random
import re
import sys
from email import headerregistry
from email._header_value_parser import TokenList
from email.generator import BytesGenerator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from email.message import Message
    from email.policy import Compat32, EmailPolicy

_LINE_END = re.compile(rb"\r\n|\r|\n")
_READ_WHOLE = {  # kinds of headers whose text is the whole of what was read
    headerregistry.UnstructuredHeader,
    headerregistry.UniqueUnstructuredHeader,
    headerregistry.DateHeader,
    headerregistry.UniqueDateHeader,
    headerregistry.MessageIDHeader,
    headerregistry.MIMEVersionHeader,
    headerregistry.ContentTypeHeader,
    headerregistry.ContentTransferEncodingHeader,
}
_WORDS = r"[\w+'-]+(?:\.[\w+'-]+)*"
_MAILBOX = rf"{_WORDS}@[\w-]+(?:\.[\w-]+)*"
_PLAIN_ADDRESS = rf"(?:(?:[\w'-]+ )+<{_MAILBOX}>|{_MAILBOX})"
_PLAIN_ADDRESSES = re.compile(rf"{_PLAIN_ADDRESS}(?:, {_PLAIN_ADDRESS})*", re.ASCII)
_ADDRESSES = {
    headerregistry.AddressHeader,
    headerregistry.UniqueAddressHeader,
    headerregistry.SingleAddressHeader,
    headerregistry.UniqueSingleAddressHeader,
}
_MULTIPART = re.compile(r"multipart/(?!signed)[\w.+-]+ *(?:;|\Z)", re.IGNORECASE | re.ASCII)
_OTHER_THAN_A_LEAF = re.compile("multipart|message", re.IGNORECASE)
_AS_ITS_TOKENS: Any = TokenList.__str__
_AS_ITSELF: Any = str.__str__
_NAME = re.compile("[!-9;-~]+(?: +[!-9;-~]+)*")
_NO_HEADER = re.compile(rb"\A(?!%b:)|\n(?![ \t]|\Z)|\r(?![\n \t])" % _NAME.pattern.encode())  # or not that alone
_UNSEEN = ("bcc", "resent-bcc")


class _NotCertainError(Exception):
    """The standard generator shall write it."""


def flatten(message: Message, policy: EmailPolicy | Compat32) -> bytes:
    """The bytes of a message, without its Bcc, written under a policy that does not change "From " in bodies.

    Raises:
        UnicodeEncodeError: it has text outside ASCII that nobody encoded.
        ValueError: a header has a line break, or a name that is none.
    """
    written: list[bytes] = []
    try:
        # A copy, because a boundary that is missing is put into its header.
        _write(copy.copy(message) if message.is_multipart() else message, policy, written, unseen=_UNSEEN)
    except (_NotCertainError, UnicodeError):
        return _as_the_library_does(message, policy)
    return b"".join(written)


def _as_the_library_does(message: Message, policy: EmailPolicy | Compat32) -> bytes:
    message = copy.copy(message)
    for name in _UNSEEN:
        del message[name]
    written = io.BytesIO()
    _Generator(written, policy=policy).flatten(message)
    return written.getvalue()


class _Generator(BytesGenerator):
    """The library's, which refuses what its newer versions refuse, and more."""

    def _write_headers(self, msg: Message) -> None:
        policy: Any = self.policy
        for name, value in msg.raw_items():
            if _NO_HEADER.search(policy.fold_binary(name, value)):
                why = f"header {name!r} has a line break in it, or a name that is none (RFC 5322 §2.2)"
                raise ValueError(why)
        super()._write_headers(msg)  # type: ignore[misc]

    def _handle_multipart_signed(self, msg: Message) -> None:
        policy: Any = self.policy
        self.policy = policy.clone(cte_type="8bit")  # what is signed are the bytes, these 8 bits too (RFC 1847 §2.1)
        try:
            super()._handle_multipart_signed(msg)  # type: ignore[misc]
        finally:
            self.policy = policy


def _write(
    message: Message, policy: EmailPolicy | Compat32, written: list[bytes], *, unseen: tuple[str, ...] = ()
) -> None:
    if hasattr(message, "_write_headers"):  # which the standard generator asks to write itself
        raise _NotCertainError
    payload = message._payload  # type: ignore[attr-defined] # noqa: SLF001 - get_payload() decodes what is not ASCII
    content_type = _content_type(message)
    if isinstance(payload, list):
        if not _MULTIPART.match(content_type):
            raise _NotCertainError
        body = _multipart(message, payload, policy)
    elif not isinstance(payload, str | None) or _OTHER_THAN_A_LEAF.search(content_type):
        raise _NotCertainError
    else:
        body = [_text(payload or "", policy)]
    end = policy.linesep.encode()
    plain = 76 if policy.max_line_length is None else min(76, policy.max_line_length)
    for name, value in message.raw_items():
        if name.lower() not in unseen:
            written.append(_line(name, value, plain, end) or _folded(name, value, policy))
    written.append(end)
    written += body


def _content_type(message: Message) -> str:
    for name, value in message.raw_items():
        if name.lower() == "content-type":
            return str(value)
    return message.get_default_type()


def _line(name: str, value: object, plain: int, end: bytes) -> bytes | None:
    """A header that no policy would fold or encode, for it is short and plain; None for any other."""
    if not isinstance(value, str):
        return None
    text = str(value)
    if not (0 < len(text) <= plain - len(name) and text.isascii() and text.isprintable()) or "=?" in text:
        return None
    if "  " in text or text[0] == " " or text[-1] == " ":
        return None
    if (own := getattr(value, "name", None)) is not None:
        name = own
        kind = type(value).__bases__[0]
        if (kind not in _READ_WHOLE or getattr(value, "defects", True)) and _given(value) != text:
            return None  # what is written is the tree: the comments of addresses are in it alone
    return f"{name}: {text}".encode("ascii") + end if _NAME.fullmatch(name) else None


def _given(value: object) -> str:
    """The text that a header was parsed from: `str` of its tree, in less time."""
    tree: Any = getattr(value, "_parse_tree", None)
    backwards: list[str] = []
    left = [tree]
    while left:
        token = left.pop()
        writes = type(token).__str__
        if writes is _AS_ITS_TOKENS:
            left += token
        elif writes is _AS_ITSELF:
            backwards.append(token)
        else:
            return str(tree)
    return "".join(reversed(backwards))


def _folded(name: str, value: str, policy: EmailPolicy | Compat32) -> bytes:
    folded = _addresses(value, policy) or policy.fold_binary(name, value)
    if _NO_HEADER.search(folded):
        raise _NotCertainError
    return folded


def _addresses(value: str, policy: EmailPolicy | Compat32) -> bytes | None:
    """A header of plain addresses, folded: on one line after the name, or as many on each line as fit. None for others.

    A comma stays behind its address, even where it is one character too many.
    """
    if type(value).__bases__[0] not in _ADDRESSES or policy.max_line_length is None:
        return None
    text, name, longest = _given(value), getattr(value, "name", ""), policy.max_line_length
    if not name.isprintable() or len(name) + 2 > longest or not _PLAIN_ADDRESSES.fullmatch(text):
        return None
    addresses = [text] if len(text) < longest else text.split(", ")
    if max(map(len, addresses)) > longest - 1 - (len(addresses) > 1):
        return None
    lines = [f"{name}:"]
    for address in addresses:
        if len(lines[-1]) + 1 + len(address) <= longest:
            lines[-1] += f" {address},"
        else:
            lines.append(f" {address},")
    lines[-1] = lines[-1][:-1]
    return "".join(line + policy.linesep for line in lines).encode("ascii")


def _text(text: str, policy: EmailPolicy | Compat32) -> bytes:
    written, end = text.encode("ascii"), policy.linesep.encode()
    if "\r" in text:
        return _LINE_END.sub(end, written)
    return written if end == b"\n" else written.replace(b"\n", end)


def _multipart(message: Message, parts: list[Message], policy: EmailPolicy | Compat32) -> list[bytes]:
    """The body of a multipart message (RFC 2046 §5.1.1)."""
    end, bodies = policy.linesep.encode(), list[bytes]()
    for part in parts:
        body = list[bytes]()
        _write(part, policy, body)
        bodies.append(b"".join(body))
    boundary = message.get_boundary()
    if not boundary:
        boundary = _boundary(bodies)
        message.set_boundary(boundary)
    mark = b"--" + boundary.encode("ascii")
    written = [] if message.preamble is None else [_text(message.preamble, policy), end]
    written += [mark, end, (end + mark + end).join(bodies), end, mark, b"--", end]
    if message.epilogue is not None:
        written.append(_text(message.epilogue, policy))
    return written


def _boundary(bodies: list[bytes]) -> str:
    boundary = f"{'=' * 15}{random.randrange(sys.maxsize):019d}=="  # noqa: S311 - no secret
    if any(boundary.encode() in body for body in bodies):
        raise _NotCertainError
    return boundary
