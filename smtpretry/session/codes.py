"""What a reply's code means to the one who waits for it (RFC 5321 §4.2), as data."""

from __future__ import annotations

from typing import Final

from smtpretry.replies.stage import Stage

NO_EHLO: Final = frozenset({500, 501, 502, 503, 504, 550})
"""To EHLO: the server does not take that command; it may take HELO (RFC 5321 §3.2, §4.1.4)."""

CHALLENGE: Final = 334
"""The server asks for more, in the course of AUTH (RFC 4954 §4)."""

CLOSING: Final = 421
"""The server closes, and says so in place of a reply (RFC 5321 §3.8)."""

GOODBYES: Final = frozenset({220, 221, CLOSING})
"""What a server says of its own accord: that it closes (421, 221), or that another session begins (220)."""

_SUCCESSES: Final = frozenset(range(200, 300)) - GOODBYES  # an unknown one counts by its first digit (RFC 5321 §4.2.1)
_ACCEPTED: Final = {
    Stage.CONNECT: frozenset({220}),
    Stage.EHLO: frozenset({250}),
    Stage.STARTTLS: frozenset({220}),
    Stage.AUTH: frozenset({235}),
    Stage.END_OF_DATA: frozenset(range(250, 260)) - {251, 252},  # these two are about an address
}

MECHANISM_FAILS: Final = frozenset({500, 501, 502, 503, 504, 534})
"""To AUTH: this mechanism does not work here; another may (RFC 4954 §4, §6)."""

WRONG_PASSWORD: Final = 535
"""To AUTH: the credentials are wrong (RFC 4954 §6)."""

LOG_IN_FIRST: Final = 530
"""To a command of the transaction: it needs a log-in (RFC 4954 §6)."""


def accepts(stage: Stage, code: int) -> bool:
    """Whether a code says that what was asked at a stage is done."""
    return code in _ACCEPTED.get(stage, _SUCCESSES)


def agree(stage: Stage, code: int, others: frozenset[int]) -> bool:
    """Whether further replies say the same about the message as the first one. Only at the end of the data can they."""
    if stage is not Stage.END_OF_DATA:
        return False
    if accepts(stage, code):
        return all(accepts(stage, other) for other in others)
    return {one // 100 for one in (code, *others)} <= {4, 5}
