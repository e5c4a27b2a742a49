"""What a scripted server does in place of its own answer: `Script`; and what it took: `ReceivedMessage`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from email import message_from_bytes
from email import policy as email_policy
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable
    from email.message import EmailMessage

IN_A_TRANSACTION: Final = ("DATA", "BODY", "END_OF_DATA")
VERBS: Final = (
    *("CONNECT", "EHLO", "HELO", "STARTTLS", "AUTH", "CHALLENGE", "MAIL", "RCPT", *IN_A_TRANSACTION),
    *("RSET", "NOOP", "VRFY", "QUIT"),
)
WHOLE: Final = ("bytewise", "late", "unasked", "unasked_before", "noise")  # the whole reply arrives
FAULTS: Final = ("fin", "rst", "stall", "garbage", "half", *WHOLE)


@dataclass(frozen=True, kw_only=True)
class ReceivedMessage:
    """One message that the server took."""

    sender: str  # "" for the null sender
    recipients: list[str]
    content: bytes = field(repr=False)  # as received, without the transparent dots (RFC 5321 §4.5.2)
    options: list[str]  # the parameters of MAIL, such as "BODY=8BITMIME"
    authenticated: str | None  # the user who had logged in
    tls: bool
    connection: int  # on which connection it came, from 1

    @property
    def message(self) -> EmailMessage:
        """The content, parsed."""
        return message_from_bytes(self.content, policy=email_policy.SMTP)


@dataclass(kw_only=True, eq=False)
class Script:
    """What the server does in place of its own answer; `ScriptedServer.on` and `fail_at` make it."""

    verb: str
    pattern: str
    how: str  # "say", or a fault
    reply: bytes | None  # as sent; None: the server's own
    act: bool  # whether the server does what the command asks
    close: str  # "", "fin" or "rst": how the connection ends after it
    times: int | None  # None: for ever
    optional: bool
    delay: float = 0.0  # seconds before the reply
    used: int = 0  # how often it was reached

    def __post_init__(self) -> None:
        """Refuse at once what could never be reached, or said."""
        for name, value, known in (
            ("verb", self.verb, VERBS),
            ("fault", self.how, ("say", *FAULTS)),
            ("close", self.close, ("", "fin", "rst")),
        ):
            if value not in known:
                msg = f"{name} is one of {', '.join(filter(None, known))}, not {value!r}"
                raise ValueError(msg)
        if self.times is not None and self.times < 1:
            msg = f"times is at least 1, or None for ever, not {self.times!r}"
            raise ValueError(msg)

    def matches(self, verb: str, subjects: Iterable[str]) -> bool:
        """Whether this is the place, and not used up."""
        return (
            verb == self.verb
            and (self.times is None or self.used < self.times)
            and (self.pattern == "*" or any(fnmatchcase(one.lower(), self.pattern.lower()) for one in subjects))
        )

    def __str__(self) -> str:
        """Where and what, in one line."""
        said = self.how if self.how != "say" else (self.reply or b"").decode(errors="replace").strip()
        return f"{self.verb} {self.pattern!r}: {said or self.close!r} (reached {self.used} of {self.times} times)"


def wire(reply: str | bytes) -> bytes:
    """Return the bytes of a reply, with its code and enhanced status on each line (RFC 5321 §4.2.1, 2034 §4)."""
    if isinstance(reply, bytes):
        return reply
    if not isinstance(reply, str):
        msg = f'a reply is a str such as "450 4.2.0 Greylisted", or bytes, not {reply!r}'
        raise TypeError(msg)
    match = re.fullmatch(r"([2-5]\d\d)(?:[ -]((?:[245]\.\d{1,3}\.\d{1,3} )?)(.*))?", reply, re.DOTALL)
    if match is None:
        msg = f"a reply begins with a code from 200 to 599 and a space, not {reply!r} (bytes are sent as they are)"
        raise ValueError(msg)
    code, status, text = match[1], match[2] or "", match[3] or ""
    lines = [re.sub(rf"^{code}[ -]", "", line).removeprefix(status) for line in text.split("\n")]
    sent = [f"{code}-{status}{line.rstrip()}\r\n" for line in lines]
    return "".join([*sent[:-1], sent[-1].replace("-", " ", 1)]).encode()
