"""The table by kinds of reply, for people: what is done about each, and why. How long is told by the rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Kind:
    """Rows of the table that a person thinks of as one thing.

    Attributes:
        title: what the server means.
        done: what is done about it.
        why: the reason.
        rows: the names of the rows.
    """

    title: str
    done: str
    why: str
    rows: tuple[str, ...]


KINDS: Final = (
    Kind(
        "Greylisting",
        "Offered again after the delay that the server names, else after the backoff",
        "Greylisting takes a message that is offered again after some minutes (RFC 6647)",
        ("greylisted",),
    ),
    Kind(
        "Log-in required",
        "Logs in and sends the envelope again; without credentials a 5xx fails",
        "Waiting does not log in; a 4xx may be a mistake that somebody is about to mend",
        (
            "auth-required",
            "auth-required-words",
            "auth-required-exchange",
            "access-denied",
            "relay-denied",
        ),
    ),
    Kind(
        "TLS required",
        "Encrypts the connection and sends the envelope again",
        "Mail and passwords that the server wants encrypted go encrypted",
        ("tls-required", "tls-required-status", "tls-required-code", "closing-without-tls"),
    ),
    Kind(
        "Log-in refused",
        "Fails; with OAuth, asks for a fresh token once",
        "A wrong password does not become right, and repeated tries lock accounts",
        ("log-in-refused", "token-expired", "token-refused"),
    ),
    Kind(
        "Log-in cannot be checked",
        "The whole client waits, then logs in again",
        "The server did not find the password wrong",
        ("log-in-later", "log-in-not-checked"),
    ),
    Kind(
        "Rate limit",
        "The whole client waits, and sends more slowly",
        "A limit per second or minute passes at once; to try harder makes it worse",
        (
            "rate-per-second",
            "rate-per-minute",
            "too-fast",
            "closing-rate-per-second",
            "closing-rate-per-minute",
            "closing-too-fast",
        ),
    ),
    Kind(
        "Quota of an hour or a day",
        "The whole client waits, and sends more slowly",
        "It fills again, bit by bit or at its end",
        ("quota", "closing-quota"),
    ),
    Kind(
        "Too many connections",
        "Goes on with the connections that are open",
        "There are enough; to open more is refused again",
        ("crowded", "closing-crowded"),
    ),
    Kind(
        "Connection used up",
        "Goes on over a new connection, at once",
        "Nothing is wrong with the message or with a new connection",
        (
            "session-used-up",
            "session-used-up-status",
            "session-used-up-words",
            "closing-used-up",
            "closing-idle",
            "postscreen",
        ),
    ),
    Kind(
        "Too many recipients",
        "Those taken so far get it now, the rest in further transactions, at once",
        "The limit is one of the transaction (RFC 5321 §4.5.3.1.10)",
        ("transaction-full", "transaction-full-status", "transaction-full-code"),
    ),
    Kind(
        "Mailbox full or busy, for now",
        "That recipient waits, the others get it",
        "Its owner clears it in hours or days, or the limit passes",
        (
            "mailbox-full",
            "mailbox-full-status",
            "mailbox-count",
            "recipient-rate",
            "closing-mailbox-full",
            "closing-recipient-rate",
        ),
    ),
    Kind(
        "No such user, with a 4xx",
        "That recipient waits for a while, the others get it",
        "The first digit says that it may change: a lookup fails, or a server is being moved",
        ("no-such-user-yet", "status-says-final"),
    ),
    Kind(
        "Mailbox unknown or full for good",
        "That recipient fails, the others get it",
        "The server says that no later attempt is taken",
        (
            "no-such-recipient",
            "no-such-user",
            "bad-address",
            "mailbox-full-for-good",
            "mailbox-full-in-words",
            "mailbox-count-final",
        ),
    ),
    Kind(
        "Client blocked",
        "Fails at 5xx; at 4xx and 421 the whole client waits",
        "It concerns the address of the sending host; whoever keeps the list removes it",
        ("blocked", "blocked-or-spam", "blocked-for-now", "rate-by-reputation", "closing-reputation"),
    ),
    Kind(
        "Client without a name",
        "Fails at 5xx; at 4xx the whole client waits",
        "The PTR record or the HELO name is missing, or the server's DNS is down",
        ("no-name", "no-name-for-good"),
    ),
    Kind(
        "Message too big",
        "Fails",
        "It is as big the next time",
        ("too-big", "too-big-status"),
    ),
    Kind(
        "Sender, content or policy refused",
        "Fails; at 421 it is offered again over a new connection",
        "SPF, DKIM, DMARC, spam filters and rules about senders say the same the next time",
        (
            "sender-unproven",
            "sender-unproven-status",
            "closing-sender-unproven",
            "bad-sender",
            "not-your-sender",
            "content-refused",
            "policy",
            "exchange-internal",
        ),
    ),
    Kind(
        "Server busy, full or closing",
        "The whole client waits where it concerns the server, else the message does",
        "Such trouble passes; a struggling server is left alone",
        (
            "closing",
            "closing-in-words",
            "closing-out-of-service",
            "overloaded",
            "overloaded-status",
            "storage-full",
            "storage-full-status",
            "dns-down",
        ),
    ),
    Kind(
        "Connection lost, or no SMTP",
        "Offered again over a new connection",
        "Nobody has refused the message",
        ("no-reply",),
    ),
    Kind(
        "Never to be mended by waiting",
        "Fails",
        "A certificate that does not verify, a command or bytes that the server does not take, stay as they are",
        (
            "bad-certificate",
            "unknown-command",
            "bad-smtp",
            "bare-line-feed",
            "out-of-sequence",
            "gave-up-elsewhere",
            "status-says-later",
        ),
    ),
    Kind(
        "Final code, words that say “later”",
        "Offered again",
        "The words were written for this case, the code for all",
        ("for-now-in-words",),
    ),
)
"""Each row of the table belongs to one of these."""
