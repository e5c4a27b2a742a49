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
        "Retried after the delay that the server names, else after the backoff",
        "The server takes the message if it comes again after some minutes (RFC 6647)",
        ("greylisted",),
    ),
    Kind(
        "Log-in required",
        "Logs in and sends the envelope again; without credentials a 5xx fails",
        "Waiting does not log in. A 4xx is retried for a while: somebody may be fixing it",
        (
            "auth-required",
            "auth-required-words",
            "auth-required-exchange",
            "access-denied",
            "client-denied",
            "relay-denied",
        ),
    ),
    Kind(
        "TLS required",
        "Encrypts the connection and sends the envelope again",
        "The server takes mail and passwords over TLS only",
        ("tls-required", "tls-required-status", "tls-required-code", "closing-without-tls"),
    ),
    Kind(
        "Log-in refused",
        "Fails; with OAuth, asks for a fresh token once",
        "A wrong password does not become right, and repeated tries lock accounts",
        ("log-in-refused", "log-in-refused-late", "log-in-refused-otherwise", "token-expired", "token-refused"),
    ),
    Kind(
        "Log-in cannot be checked",
        "The whole client waits, then logs in again",
        "The server did not find the password wrong",
        ("log-in-later", "log-in-not-checked", "too-many-log-ins"),
    ),
    Kind(
        "Rate limit",
        "The whole client waits, and sends more slowly",
        "A limit per second or minute passes soon, and more tries prolong it",
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
        "It fills up again, gradually or all at once",
        ("quota", "closing-quota"),
    ),
    Kind(
        "Too many connections",
        "Continues with the connections that are open",
        "The server would refuse more of them",
        ("crowded", "closing-crowded"),
    ),
    Kind(
        "Connection used up",
        "Continues over a new connection, at once",
        "Nothing is wrong with the message or with a new connection",
        (
            "session-used-up",
            "session-used-up-status",
            "session-used-up-words",
            "closing-used-up",
            "closing-idle",
            "idle-in-words",
            "session-out-of-step",
            "postscreen",
        ),
    ),
    Kind(
        "Too many recipients",
        "Sends to those accepted so far, then to the rest in further transactions, at once",
        "The limit is per transaction (RFC 5321 §4.5.3.1.10)",
        ("transaction-full", "transaction-full-status", "transaction-full-code"),
    ),
    Kind(
        "Mailbox full or busy, for now",
        "That recipient waits, the others get it",
        "Its owner clears it within hours or days, or the limit passes",
        (
            "mailbox-full",
            "mailbox-full-status",
            "mailbox-count",
            "mailbox-not-now",
            "mailbox-busy",
            "recipient-rate",
            "recipient-rate-status",
            "closing-mailbox-full",
            "closing-recipient-rate",
            "recipient-unverified",
            "about-recipient-yet",
        ),
    ),
    Kind(
        "No such user, with a 4xx",
        "That recipient waits for a while, the others get it",
        "A 4xx may change: a lookup fails, or a server is being moved",
        ("no-such-user-yet", "recipient-undeliverable-yet", "status-says-final"),
    ),
    Kind(
        "Mailbox unknown or full for good",
        "That recipient fails, the others get it",
        "The server says that this is final",
        (
            "no-such-recipient",
            "no-such-user",
            "recipient-undeliverable",
            "bad-address",
            "about-recipient",
            "recipient-refuses",
            "mailbox-full-for-good",
            "mailbox-full-in-words",
            "mailbox-count-final",
        ),
    ),
    Kind(
        "Client or its account blocked",
        "Fails at 5xx; at 4xx and 421 the whole client waits",
        "The host is on a block list, or the account may not send; ask whoever blocked it",
        (
            "account",
            "account-status",
            "account-for-now",
            "closing-account",
            "blocked",
            "blocked-status",
            "blocked-or-spam",
            "blocked-for-now",
            "about-client",
            "about-client-yet",
            "rate-by-reputation",
            "closing-reputation",
        ),
    ),
    Kind(
        "Client without a name",
        "Fails at 5xx; at 4xx the whole client waits",
        "The PTR record or the HELO name is missing, or the server's DNS is down",
        ("no-name", "no-name-for-good", "greeting-refused"),
    ),
    Kind(
        "Message too big",
        "Fails",
        "It is just as big the next time",
        ("too-big", "too-big-status"),
    ),
    Kind(
        "Sender, content or policy refused",
        "Fails; a 4xx is retried for a while",
        "SPF, DKIM, DMARC, spam filters and sender rules mostly give the same answer the next time",
        (
            "sender-unproven",
            "sender-unproven-status",
            "closing-sender-unproven",
            "closing-sender",
            "sender-unproven-for-now",
            "bad-sender",
            "sender-refused",
            "not-verified",
            "not-your-sender",
            "not-your-sender-words",
            "long-line",
            "bare-line-feed",
            "content-refused",
            "policy",
            "exchange-internal",
            "exchange-internal-status",
        ),
    ),
    Kind(
        "Server busy, full or closing",
        "The whole client waits if it concerns the server, else only the message",
        "Such trouble passes, and more connections make it worse",
        (
            "closing",
            "closing-in-words",
            "closing-at-greeting",
            "closing-out-of-service",
            "closing-system-status",
            "closing-at-mail",
            "overloaded",
            "overloaded-status",
            "unavailable",
            "storage-full",
            "storage-full-status",
            "dns-down",
            "sender-not-found",
            "sender-not-now",
        ),
    ),
    Kind(
        "Connection lost, or no SMTP",
        "Retried over a new connection",
        "The server has not refused the message",
        ("no-reply",),
    ),
    Kind(
        "Waiting does not help",
        "Fails",
        "The certificate does not verify, or the server does not take the command or the bytes",
        (
            "bad-certificate",
            "not-smtp",
            "unknown-command",
            "bad-client",
            "bad-smtp",
            "out-of-sequence",
            "gave-up-elsewhere",
            "status-says-later",
        ),
    ),
    Kind(
        "Final code, words that say “later”",
        "Retried",
        "The words are about this case; the code is general",
        ("for-now-in-words", "cut-off"),
    ),
)
"""Each row of the table belongs to one of these."""
