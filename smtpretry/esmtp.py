"""What to say in MAIL and RCPT, given what the server offers: a table of ESMTP parameters, and a function without I/O.

What becomes of a parameter whose extension is not offered:

    left out      it asks for a service that the message can do without, such as NOTIFY (RFC 3461) or MT-PRIORITY
                  (RFC 6710 §4.1: the message goes without it). The caller is told
    an obstacle   to send without it would break what was asked for: REQUIRETLS (RFC 8689 §4.1: bounced, not relayed),
                  BY with the mode R (RFC 2852 §4.1.3: returned rather than late), HOLDFOR and HOLDUNTIL (RFC 4865: it
                  would go at once), RRVS (RFC 7293: the mailbox may be another's by now)
    as it is      it is unknown here, and the server says what it thinks of it
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from .addresses import mailbox_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from .delivery import Delivery

_EXTENSIONS = {  # parameter → the extension that has it, as EHLO names it
    "AUTH": "auth",  # RFC 4954 §5
    "BODY": "8bitmime",  # RFC 6152
    "BY": "deliverby",
    "ENVID": "dsn",
    "HOLDFOR": "futurerelease",
    "HOLDUNTIL": "futurerelease",
    "MT-PRIORITY": "mt-priority",
    "NOTIFY": "dsn",
    "ORCPT": "dsn",
    "REQUIRETLS": "requiretls",
    "RET": "dsn",
    "RRVS": "rrvs",
    "SIZE": "size",
    "SMTPUTF8": "smtputf8",
    "SUBMITTER": "submitter",  # RFC 4405
}
_INDISPENSABLE = ("HOLDFOR", "HOLDUNTIL", "REQUIRETLS", "RRVS")
_NO_SMTPUTF8 = "the address is not ASCII, and the server does not offer SMTPUTF8 (RFC 6531)"


class Commands(NamedTuple):
    """What to say for one transaction.

    Attributes:
        mail: the MAIL command, without line end.
        rcpts: the RCPT command of each recipient that can be offered, in their order.
        impossible: why each of the others cannot be.
        left_out: the parameters, as given, that are not sent for their extension is not offered.
        obstacle: why the message cannot go to this server at all; None where it can.
    """

    mail: bytes
    rcpts: dict[str, bytes]
    impossible: dict[str, str]
    left_out: tuple[str, ...]
    obstacle: str | None


def commands(delivery: Delivery, recipients: Iterable[str], offers: Mapping[str, str]) -> Commands:
    """The commands of a transaction with these recipients. It raises nothing.

    BODY=8BITMIME and SIZE are added where they are due and offered, SMTPUTF8 where an address needs it; an address
    needs it where its local part is outside ASCII, for the domain goes as its A-label.

    Args:
        delivery: sender, message and options.
        recipients: whom to offer, as given.
        offers: the server's extensions by name, in small letters, each with its parameters (RFC 5321 §4.1.1.1), as
            `aiosmtplib.SMTP.esmtp_extensions` has them; empty after HELO.
    """
    rcpt_options, left_out, obstacles = _offered(delivery.rcpt_options, offers)
    mail_options, more_left_out, more_obstacles = _offered(delivery.mail_options, offers)
    obstacles += more_obstacles
    tail = "".join([f" {option}" for option in rcpt_options.values()])
    utf8_offered, utf8_needed = "smtputf8" in offers, False
    rcpts: dict[str, bytes] = {}
    impossible: dict[str, str] = {}
    for recipient in recipients:
        try:
            mailbox = mailbox_of(recipient)
        except ValueError as error:
            impossible[recipient] = str(error)
            continue
        if mailbox.isascii() or utf8_offered:
            rcpts[recipient] = f"RCPT TO:<{mailbox}>{tail}".encode()
        else:
            impossible[recipient] = _NO_SMTPUTF8
        utf8_needed = utf8_needed or not mailbox.isascii()
    sender, obstacle = _sender(delivery.sender, utf8_offered=utf8_offered)
    if utf8_needed or not sender.isascii():
        if utf8_offered:
            mail_options.setdefault("SMTPUTF8", "SMTPUTF8")
        else:  # told already, to those who need it
            more_left_out = [option for option in more_left_out if option.upper() != "SMTPUTF8"]
    _describe(delivery.message, mail_options, offers)
    mail = f"MAIL FROM:<{sender}>" + "".join([f" {option}" for option in mail_options.values()])
    obstacles += filter(None, [obstacle, _too_much(delivery.message, offers)])
    return Commands(
        mail.encode(), rcpts, impossible, (*more_left_out, *left_out), "; ".join(obstacles) if obstacles else None
    )


def _offered(options: tuple[str, ...], offers: Mapping[str, str]) -> tuple[dict[str, str], list[str], list[str]]:
    """The parameters that may be sent, by name; those left out; and what speaks against sending at all."""
    kept: dict[str, str] = {}
    left_out: list[str] = []
    obstacles: list[str] = []
    for option in options:
        name, _, value = option.partition("=")
        name = name.upper()
        extension = _EXTENSIONS.get(name)
        if extension is None or extension in offers:
            kept[name] = option
        elif name in _INDISPENSABLE or (name == "BY" and value.partition(";")[2].upper().startswith("R")):
            obstacles.append(f"{option} was asked for, and the server does not offer {extension.upper()}")
        else:
            left_out.append(option)
    return kept, left_out, obstacles


def _sender(address: str, *, utf8_offered: bool) -> tuple[str, str | None]:
    try:
        sender = mailbox_of(address)
    except ValueError as error:
        return "", f"sender: {error}"
    return sender, None if sender.isascii() or utf8_offered else f"sender: {_NO_SMTPUTF8}"


def _describe(message: bytes, options: dict[str, str], offers: Mapping[str, str]) -> None:
    """Say what the message is like, where the server wants to know."""
    if "8bitmime" in offers and (not message.isascii() or options.get("BODY", "").upper() == "BODY=BINARYMIME"):
        options["BODY"] = "BODY=8BITMIME"  # whatever was said: 7BIT is not true, and BINARYMIME is for BDAT (RFC 3030)
    if "size" in offers:
        options.setdefault("SIZE", f"SIZE={len(message)}")


def _too_much(message: bytes, offers: Mapping[str, str]) -> str | None:
    """Why the server cannot take the message, by what it says of itself."""
    if "8bitmime" not in offers and not message.isascii():
        if message.partition(b"\r\n\r\n")[2].isascii():
            return (
                "the header of the message is not ASCII, as where it shows such an address, and the server offers "
                "neither SMTPUTF8 (RFC 6531) nor 8BITMIME: send a message without that address to the others"
            )
        return (
            "the message has 8-bit bytes, and the server does not offer 8BITMIME (RFC 6152): "
            "give send_message an EmailMessage, which it writes as 7-bit MIME, except for what is signed"
        )
    limit = offers.get("size", "").strip()
    if limit.isdecimal() and 0 < int(limit) < len(message):  # 0: no limit is known (RFC 1870 §4)
        return f"the message has {len(message)} octets, and the server takes {int(limit)} (SIZE, RFC 1870 §6.1)"
    return None
