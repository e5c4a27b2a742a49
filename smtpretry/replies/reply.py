"""What a server said: `Reply`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from .delays import delay_in
from .patterns import compiled

if TYPE_CHECKING:
    from .stage import Stage

NO_REPLY: Final = -1
"""The code of a `Reply` that stands for silence: the line broke, timed out or was no SMTP (aiosmtplib's own -1)."""

CODES: Final = range(200, 600)
"""The codes that a server's reply can have (RFC 5321 §4.2)."""

READ: Final = 1000
"""How many characters of a text are looked at for a meaning; real replies say it earlier (RFC 5321 §4.5.3.1.5)."""

_SHOWN = 500  # characters of `str(reply)`


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply of a server (RFC 5321 §4.2), its enhanced status (RFC 2034, 3463) taken out of the text.

    Attributes:
        code: 200 to 599, or `NO_REPLY` (-1) where nothing valid was said: then `text` tells what happened instead.
        enhanced: the enhanced status, such as "4.2.0", or None. A status that leads every line is taken out of the
            text; one that stands within it, as in qmail's "no such user (#5.1.1)", is left there as well.
        text: what a person reads, free of control characters; a line feed stands between the lines of a multi-line
            reply.
    """

    code: int
    enhanced: str | None = None
    text: str = ""

    @classmethod
    def of(cls, code: int, message: str | bytes) -> Reply:
        """The reply that aiosmtplib (or smtplib, in bytes) holds as a code and a message. Never raises.

        A code that no server can have sent becomes `NO_REPLY`.
        """
        if isinstance(message, bytes):
            message = message.decode(errors="replace")
        text = _clean(message)
        if code not in CODES:
            return cls(NO_REPLY, None, text)
        lines = text.split("\n")
        enhanced = _status(lines[0])
        if enhanced and (len(lines) == 1 or all(_status(line) == enhanced for line in lines)):
            bare = "\n".join([line[len(enhanced) :].lstrip() for line in lines])
            if _within(bare) is None:
                return cls(int(code), enhanced, bare)
        return cls(int(code), _within(text), text)

    @classmethod
    def parse(cls, line: str) -> Reply:
        r"""Read a reply as it stands in a log: ``"450 4.2.0 Greylisted for 300 seconds"``.

        The lines of a multi-line reply ("550-5.1.1 No such user", "550 5.1.1 See ...") may be given as they came, or
        joined by spaces into one, as mail logs hold them.

        Raises:
            ValueError: the text does not begin with a reply code from 200 to 599; the message says what is wrong.
        """
        line = _clean(line)
        if not line:
            msg = "no reply: the line is empty"
            raise ValueError(msg)
        begin = compiled(_BEGIN).match(line)
        if begin is None:
            msg = f"no reply: {_cut(line, 60)!r} does not begin with a three-digit code, a space and a text"
            raise ValueError(msg)
        code, rest = int(begin[1]), line[begin.end() :]
        if code not in CODES:
            msg = f"no reply: its code is from 200 to 599, not {code}"
            raise ValueError(msg)
        if begin[2] == "-":
            status = _status(rest)
            status = rf"(?={re.escape(status)}(?:\s|$))" if status else ""
            rest = re.sub(rf"\s{code}(?:[ -]|$){status}", "\n", rest)
        return cls.of(code, re.sub(rf"\n{code}(?:[ -]|(?=\n|$))", "\n", rest))

    @property
    def is_transient(self) -> bool:
        """Whether the first digit says "not now" (RFC 5321 §4.2.1)."""
        return self.code // 100 == 4  # noqa: PLR2004

    @property
    def is_permanent(self) -> bool:
        """Whether the first digit says "not so" (RFC 5321 §4.2.1)."""
        return self.code // 100 == 5  # noqa: PLR2004

    @property
    def is_unexpected(self) -> bool:
        """Whether the server does not know the command, or did not expect it now (RFC 5321 §4.1.4, §4.2.4)."""
        return self.code in (500, 502, 503)

    @property
    def message(self) -> str:
        """The text as the server wrote it, with the enhanced status on each line: aiosmtplib's `message`."""
        if self.enhanced is None or _within(self.text) == self.enhanced:
            return self.text
        return "\n".join([f"{self.enhanced} {line}".rstrip() for line in self.text.split("\n")])

    @property
    def retry_after(self) -> float | None:
        """The delay in seconds that the text names ("Greylisted for 300 seconds", "come back in 00:05:00"), or None.

        None as well for zero, for more than five days (the longest that a mail is kept trying, RFC 5321
        §4.5.4.1), and for numbers that are no delay: limits ("10 messages per hour"), times gone by ("in the last 10
        minutes"), the time of day, counters, addresses and links.
        """
        return delay_in(self.text[:READ])

    def __str__(self) -> str:
        """One clean line, for logs and notes; a long text is cut."""
        text = _cut(self.message.replace("\n", " "), _SHOWN)
        if self.code == NO_REPLY:
            return f"no reply ({text})" if text else "no reply"
        return f"{self.code} {text}".rstrip()


class Said(NamedTuple):
    """What came at a stage: a reply, or the error that stands for the one that did not come (`NO_REPLY`)."""

    stage: Stage
    reply: Reply
    error: Exception | None = None


# --- Reading the status -----------------------------------------------------------------------------------------------

_ENHANCED = r"[245]\.\d{1,3}\.\d{1,3}"
_LEADING = rf"(?a)({_ENHANCED})(?=\s|$)"
# "5.7.1: Denied", "'5.1.1 <bob@example.com>... User unknown'", "no such user (#5.1.1)", "denied [5.7.1]"
_INLINE = rf"(?a)(?:^['\"]?|#|[(\[])({_ENHANCED})\b(?!\.\d)"
_BEGIN = r"(?a)(\d{3})([ -]|(?=\n|$))"


def _status(line: str) -> str | None:
    """The enhanced status that leads a line."""
    found = compiled(_LEADING).match(line)
    return found and found[1]


def _within(text: str) -> str | None:
    """The enhanced status that stands within a text."""
    found = compiled(_INLINE).search(text, 0, READ) if "." in text else None
    return found and found[1]


# --- Cleaning ---------------------------------------------------------------------------------------------------------

_ESCAPES = "\x1b\\[[0-?]*[ -/]*[@-~]|\x1b\\][^\x07\x1b]*(?:\x07|\x1b\\\\)?|\x1b[ -/]*[0-~]?"
_CONTROLS = "[\x00-\x09\x0b-\x1f\x7f-\x9f\xa0\u2028\u2029]"  # all but the line feed
_INVISIBLE = "[\xad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]"  # direction marks and kin
_UNDECODED = "[\ud800-\udfff]"


def _clean(text: str) -> str:
    """Text that can neither steer a terminal nor forge a line of a log, and that any codec can write."""
    if text.isascii() and text.isprintable():
        return text.strip()
    text = compiled(_ESCAPES).sub("", text)
    text = compiled(_UNDECODED).sub("\ufffd", compiled(_INVISIBLE).sub("", compiled(_CONTROLS).sub(" ", text)))
    return "\n".join(line.strip() for line in text.strip().split("\n"))


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"
