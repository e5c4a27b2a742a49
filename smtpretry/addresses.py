"""From what people write, and from a message's headers, to the bare mailboxes of the envelope (RFC 5322 §3.4).

The standard library's parsers differ between Python's versions, and guess where they do not understand. This one takes
every address of a text, or none: what it cannot read is a ValueError that quotes the text.
"""

from __future__ import annotations

import copy
import email.header
import email.policy
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from .replies.patterns import caseless, compiled

if TYPE_CHECKING:
    import re
    from collections.abc import Iterator
    from email.message import Message

# Nearly all addresses are a mailbox alone, a list of such, or one with a simple name. All else is read by tokens.
_MAILBOX = r"[\w.!#$%&'*+/=?^`{|}~-]+@[\w-]+(?:\.[\w-]+)*"
_PLAIN = rf"(?a){_MAILBOX}"
_PLAIN_LIST = rf"(?a){_MAILBOX}(?:, *{_MAILBOX})*"
_PLAIN_NAME = rf"(?a)[\w .'-]*<({_MAILBOX})>"
_CONTROL = "[\x00-\x1f\x7f-\x9f\ud800-\udfff]"  # and what no codec can write
_FOLD = r"(?:\r\n?|\n)(?=[ \t])|(?:\r\n?|\n)\Z"
_WORD = r"=\?[^?\s]+\?[bq]\?[^?\s]*\?="  # RFC 2047, with the commas and dots that some writers leave in it
_ALL_ENCODED = rf"\s*{_WORD}(?:\s*{_WORD})*\s*"
_TOKEN = rf"""(?x)
    (\s+) | {_WORD} | "(?:[^"\\]|\\.)*" | \[[^][\\]*\] | [,;:<>@.(] | [^][\s"\\,;:<>@.()]+"""
_IN_COMMENT = r"[()]|\\."
_ADDRESS_IN_COMMENT = r"\([^()@]*@[^()]*\)\s*\Z"
_SPECIAL = r'[,;:<>@"]'
_LITERAL = r"\[[^][\s\\]+\]"
_IN_TEXT = r"""(?<![^\s<>@,;:"()])([^\s<>@,;:"()]+)@([^\s<>@,;:"()]+)"""
_LABEL = "[a-z0-9_\u0080-\U0010ffff-]+"
_DOMAIN = rf"{_LABEL}(?:\.{_LABEL})*\.?"
_OTHERWISE_IN_2003 = "[ßẞςΣ\u200c\u200d]"  # IDNA 2003 makes another domain of these
_ONE_LINE = email.policy.SMTP.clone(max_line_length=0, utf8=True)


def _order(*names: str) -> dict[str, int]:
    return {name.lower(): place for place, name in enumerate(names)}


_SENDERS = _order("Resent-Date", "Resent-Sender", "Resent-From", "Sender", "From")
_RECIPIENTS = _order("Resent-Date", "Resent-To", "Resent-Cc", "Resent-Bcc", "To", "Cc", "Bcc")
_SHOWN = {f"{prefix}{name}" for prefix in ("", "resent-") for name in ("from", "sender", "reply-to", "to", "cc")}


def mailbox_of(address: str) -> str:
    """The bare mailbox of one address, as it goes into MAIL or RCPT; "" for the null one, which is "" or "<>".

    A domain outside ASCII becomes its A-label where the local part is ASCII: no server has to offer SMTPUTF8 for it.

    Raises:
        ValueError: a control character, which could add a command to the session; no address, or more than one.
        TypeError: it is no str.
    """
    if not isinstance(address, str):
        msg = f"an address is a str, not {address!r}"
        raise TypeError(msg)
    if compiled(_PLAIN).fullmatch(address):
        return address
    if compiled(_CONTROL).search(address):
        msg = f"address {address!r} has a line break or another control character"
        raise ValueError(msg)
    try:
        found = _read(address)
    except ValueError as error:
        msg = f"{address!r} is no address (RFC 5321 §4.1.2): {error}"
        raise ValueError(msg) from None
    if len(found) > 1:
        msg = f"{address!r} is more than one address: give a list of them"
        raise ValueError(msg)
    if not found and address.strip():
        msg = f"{address!r} holds no address"
        raise ValueError(msg)
    return found[0] if found else ""


def sender_of(message: Message) -> str | None:
    """The mailbox in Sender, or else the first in From; "" for ``From: <>``; None where there is none.

    Raises:
        ValueError: the header cannot be read, or the message has several blocks of Resent- fields.
    """
    headers = _resent_or_not(_headers(message, _SENDERS))
    found = _mailboxes(*headers[0]) if headers else []
    return found[0] if found else None


def recipients_of(message: Message) -> list[str]:
    """Every mailbox in To, Cc and Bcc; in the Resent- fields where there is a Resent-Date (RFC 5322 §3.6.6).

    Raises:
        ValueError: a header cannot be read, or the message has several blocks of Resent- fields.
    """
    found: list[str] = []
    for name, value in _resent_or_not(_headers(message, _RECIPIENTS)):
        mailboxes = _mailboxes(name, value)
        if "" in mailboxes:
            msg = f"{name}: {str(value)!r} names somebody without an address: give recipients="
            raise ValueError(msg)
        found += mailboxes
    return found


def show_in_ascii(message: Message) -> tuple[Message, bool]:
    """The message with the domains of its address headers as A-labels, and whether an address is still not ASCII.

    What is left needs a header in UTF-8 (RFC 6532): a local part outside ASCII has no other form.
    """
    shown, left = message, False
    for name, value in message.raw_items():
        if name.lower() not in _SHOWN or str(value).isascii():
            continue
        text = _in_one_line(str(value))
        written = text if getattr(value, "defects", None) else compiled(_IN_TEXT).sub(_with_a_label, text)
        if written != text and isinstance(value, str) and len(message.get_all(name, ())) == 1:
            if shown is message:
                shown = copy.copy(message)
                del shown["Bcc"], shown["Resent-Bcc"]  # never shown; and the copy has headers of its own from here on
            shown.replace_header(name, written)
        left = left or any(not one[0].isascii() for one in compiled(_IN_TEXT).finditer(written))
    return shown, left


@lru_cache(maxsize=1024)
def a_label(domain: str) -> str:
    """The domain as its A-label (RFC 5890); itself where it has none.

    By the package `idna` where it is installed (the extra `idna`): IDNA 2008 after the mapping of
    UTS 46, as browsers do. Else by Python's codec, which is IDNA 2003, but not where that would name another domain.
    """
    try:
        import idna  # noqa: PLC0415 - an extra, and few need it

        return idna.encode(domain, uts46=True).decode()
    except (ImportError, UnicodeError):  # not installed; or, as in i❤.ws, what 2003 allowed
        pass
    if compiled(_OTHERWISE_IN_2003).search(domain):
        return domain
    try:
        return domain.encode("idna").decode()
    except UnicodeError:
        return domain


def _resent_or_not(headers: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Of these headers the Resent- forms behind a Resent-Date, or else the others (RFC 5322 §3.6.6)."""
    resent = [header for header in headers if header[0].lower().startswith("resent-")]
    if not resent:
        return headers
    blocks = sum(name.lower() == "resent-date" for name, _ in resent)
    if blocks > 1:
        msg = "the message has more than one block of Resent- fields: give sender= and recipients="
        raise ValueError(msg)
    return resent[1:] if blocks else headers[len(resent) :]  # they are in order: the date, its block, the others


def _headers(message: Message, order: dict[str, int]) -> list[tuple[str, Any]]:
    """The headers of these names, in the order of the names, as they were set or parsed."""
    found = [header for header in message.raw_items() if header[0].lower() in order]
    return sorted(found, key=lambda header: order[header[0].lower()]) if len(found) > 1 else found


def _mailboxes(name: str, value: Any) -> list[str]:  # noqa: ANN401 - str, Header or a header object
    text = str(value)
    if isinstance(value, str) and not getattr(value, "defects", None) and (plain := _plain(text)):
        return plain
    try:
        if not isinstance(value, (str, email.header.Header)):
            msg = f"it is of type {type(value).__name__}, not a str"
            raise ValueError(msg)  # noqa: TRY004, TRY301 - told like the others
        text = _text(value)
        if caseless(_ALL_ENCODED).fullmatch(text):  # addresses and all
            text = str(email.header.make_header(email.header.decode_header(text)))
        found = _read(text)
        if lacking := [one for one in found if one and not _is_whole(one)]:
            msg = f"{lacking[0]!r} has no domain, or bytes of an unknown charset"
            raise ValueError(msg)  # noqa: TRY301 - told like the others
    except (ValueError, LookupError) as error:
        msg = f"{name}: {text!r} is no list of addresses (RFC 5322 §3.4): {error}; mend it, or give the address itself"
        raise ValueError(msg) from None
    return found


def _is_whole(mailbox: str) -> bool:
    return "@" in mailbox.rpartition('"')[2] and "\ufffd" not in mailbox


def _text(value: Any) -> str:  # noqa: ANN401
    """What a header says, in one line: as it goes out, for there a comma in a name stays apart from one between two."""
    if isinstance(value, email.header.Header):
        text = value.encode(maxlinelen=0, linesep="")
    elif getattr(value, "defects", None):  # then Python has read a part of it
        text = value.fold(policy=_ONE_LINE).partition(":")[2]
        names = [getattr(address, "display_name", "") for address in getattr(value, "addresses", ())]
        special = compiled(_SPECIAL)
        if compiled(_ADDRESS_IN_COMMENT).search(text) or any(
            special.search(name) and f'"{name}"' not in text for name in names
        ):
            msg = f"as Python mends it, {text.strip()!r}, a comment may hide an address, or a name may pass for one"
            raise ValueError(msg)
    else:
        text = str(value)
    return _in_one_line(text)


def _in_one_line(text: str) -> str:
    """A header unfolded, its undeclared bytes read as UTF-8 (RFC 6532)."""
    text = compiled(_FOLD).sub("", text).replace("\t", " ").strip()
    return text if text.isascii() else text.encode("utf-8", "surrogateescape").decode(errors="replace")


def _read(text: str) -> list[str]:
    """Every mailbox of a list of addresses, "" for each `<>`. A semicolon separates, as a comma does.

    Raises:
        ValueError: it is no such list; the message says why.
    """
    if plain := _plain(text):
        return plain
    if named := compiled(_PLAIN_NAME).fullmatch(text):
        return [named[1]]
    if compiled(_CONTROL).search(text):
        msg = "it has a line break or another control character"
        raise ValueError(msg)
    found, entry, in_group, in_brackets = list[str](), list[str](), False, False
    for piece in (*_tokens(text), ","):
        if not in_brackets and piece in (",", ";"):
            found += _mailbox(entry)
            entry = []
            in_group = in_group and piece == ","
        elif not in_brackets and piece == ":":
            if in_group or "@" in entry or "<" in entry:
                msg = "a colon stands in the middle of an address"
                raise ValueError(msg)
            entry, in_group = [], True  # the group's name (RFC 5322 §3.4)
        else:
            in_brackets = piece == "<" or (in_brackets and piece != ">")
            entry.append(piece)
    if in_brackets:
        msg = "a < is never closed"
        raise ValueError(msg)
    return found


def _plain(text: str) -> list[str]:
    """The mailboxes of a list of nothing else; none where it is another text."""
    return text.replace(" ", "").split(",") if compiled(_PLAIN_LIST).fullmatch(text) else []


def _tokens(text: str) -> Iterator[str]:
    """Words, specials, and " " for any white space and comment."""
    place = 0
    while place < len(text):
        token = caseless(_TOKEN).match(text, place)
        if token is None:
            msg = f"a quote or bracket has no match, or stands where it may not: {text[place : place + 40]!r}"
            raise ValueError(msg)
        place = token.end()
        if token[0] == "(":
            place = _end_of_comment(text, place)
            yield " "
        else:
            yield " " if token[1] else token[0]


def _end_of_comment(text: str, place: int) -> int:
    depth = 1
    for token in compiled(_IN_COMMENT).finditer(text, place):
        depth += {"(": 1, ")": -1}.get(token[0], 0)
        if not depth:
            return token.end()
    msg = "a comment is never closed"
    raise ValueError(msg)


def _mailbox(entry: list[str]) -> list[str]:
    """The mailbox of one entry of a list; nothing for an empty entry."""
    tokens = _stripped(entry)
    if not tokens:
        return []
    if "<" in tokens:
        start = tokens.index("<")
        if tokens.index(">") != len(tokens) - 1 or "<" in tokens[start + 1 :]:
            msg = f"{''.join(tokens)!r} goes on after its address"
            raise ValueError(msg)
        tokens = _stripped(tokens[start + 1 : -1])
        if not tokens:
            return [""]
        if tokens[0] == "@" and ":" in tokens:  # a source route, to be ignored (RFC 5321 appendix C)
            tokens = _stripped(tokens[len(tokens) - tokens[::-1].index(":") :])
    return [_addr_spec(tokens)]


def _stripped(tokens: list[str]) -> list[str]:
    start, end = 0, len(tokens)
    while start < end and tokens[start] == " ":
        start += 1
    while start < end and tokens[end - 1] == " ":
        end -= 1
    return tokens[start:end]


def _addr_spec(tokens: list[str]) -> str:
    """``local@domain``, or a local part alone; white space may stand around "." and "@" (RFC 5322 §4.4)."""
    written, words = "".join(tokens), list[str]()
    for piece in tokens:
        if piece == " ":
            continue
        if words and not {piece, words[-1]} & {".", "@"}:
            msg = f"{written!r} is more than a mailbox: a comma, a quote or a < is missing"
            raise ValueError(msg)
        words.append(piece)
    at = words.index("@") if "@" in words else len(words)
    local, domain = words[:at], words[at + 1 :]
    if not local or any(word[0] in "[<>:;,@" or caseless(_WORD).fullmatch(word) for word in local):
        msg = f"{written!r} has no local part"
        raise ValueError(msg)
    if at == len(words):
        return "".join(local)
    name = "".join(domain)
    if not caseless(_DOMAIN).fullmatch(name) and not (len(domain) == 1 and compiled(_LITERAL).fullmatch(name)):
        msg = f"{written!r} has no domain that could be one"
        raise ValueError(msg)
    return f"{''.join(local)}@{a_label(name) if not name.isascii() and ''.join(local).isascii() else name}"


def _with_a_label(address: re.Match[str]) -> str:
    return f"{address[1]}@{a_label(address[2]) if address[1].isascii() else address[2]}"
