"""Whom the headers name: everybody and nobody else, or an error that quotes the header; on every version of Python."""

from __future__ import annotations

import email
import email.policy
import random
import time
from contextlib import suppress
from email.header import Header
from email.headerregistry import Address, Group
from email.message import EmailMessage, Message
from email.mime.text import MIMEText
from email.utils import formataddr
from typing import Any

import pytest
from django.conf import settings
from django.core.mail import EmailMultiAlternatives
from fastapi_mail import MessageSchema, MessageType, NameEmail
from fastapi_mail.msg import MailMsg
from support import ANN, APP, BOB, BODY, CAT, talk, virtually

import smtpretry
from smtpretry.addresses import mailbox_of, sender_of, show_in_ascii

POLICIES: list[Any] = [email.policy.default, email.policy.compat32]
MAKES = ["EmailMessage", "MIMEText", "Header", "Header in UTF-8", "parsed", "parsed, older class"]
LISTS = {
    f"{ANN}, {BOB}": [ANN, BOB],
    f"{ANN}; {BOB}": [ANN, BOB],
    f"{ANN};{BOB};": [ANN, BOB],
    f"{ANN},,{BOB},": [ANN, BOB],
    f" , {ANN} ,": [ANN],
    f"{ANN} (Ann, of course; \\) (yes, {CAT})), {BOB}": [ANN, BOB],
    f"stranger@other.test <{BOB}>": [BOB],
    f"stranger@other.test, <{BOB}>": ["stranger@other.test", BOB],
    f"'{ANN}' <{BOB}>, \"{CAT}\" <{ANN}>": [BOB, ANN],
    f'"Doe, John" <{ANN}>, "Say \\"hi, {CAT}\\"" <{BOB}>': [ANN, BOB],
    f"=?utf-8?q?Doe=2C_=22eve=40x=2Eexample=22=2C?= <{ANN}>, {BOB}": [ANN, BOB],
    f"=?utf-8?Q?Doe,_John?= <{ANN}>": [ANN],
    f"John Q. Public, Jr <{ANN}>": ValueError,
    f"J. R. (Bob) Dobbs <{ANN}>": [ANN],
    f"Dr. Dobbs [Sales] <{ANN}>": [ANN],
    "undisclosed-recipients:;": [],
    "Undisclosed recipients: ;": [],
    "": [],
    f"Friends: {ANN}, Bob <{BOB}>;": [ANN, BOB],
    f"Friends:{ANN};, {BOB}": [ANN, BOB],
    '"a b"@example.com, "a@b"@example.com, "a\\"b,c"@example.com': [
        '"a b"@example.com',
        '"a@b"@example.com',
        '"a\\"b,c"@example.com',
    ],
    "ann.@example.com, bob..smith@example.com": ["ann.@example.com", "bob..smith@example.com"],
    "ann @ example . com": [ANN],
    f"<@relay.example,@other.example:{ANN}>": [ANN],
    "ann@[192.0.2.1], bob@[IPv6:2001:db8::1]": ["ann@[192.0.2.1]", "bob@[IPv6:2001:db8::1]"],
    "o'brien+tag@example.com": ["o'brien+tag@example.com"],
    "jörg@example.com, Jörg <bob@bücher.example>": ["jörg@example.com", "bob@xn--bcher-kva.example"],
    f"{ANN} {BOB}": ValueError,
    f"{ANN}, {BOB} {CAT}": ValueError,
    f"{ANN}, Bob": ValueError,
    f"Doe, John <{ANN}>": ValueError,
    "Ann": ValueError,
    "Bob <>": ValueError,
    f"Bob <>, {ANN}": ValueError,
    (UNCLOSED := f"{ANN}, Bob <{BOB}"): ValueError,
    f"{ANN}, Bob <{BOB}> Bob": ValueError,
    f"<{ANN}> <{BOB}>": ValueError,
    f"{ANN}:{BOB}": ValueError,
    f'"Doe, John <{ANN}>': ValueError,
    f"(Ann {ANN}": ValueError,
    "ann@@example.com": ValueError,
    "ann@example@com": ValueError,
    "@example.com": ValueError,
    "ann@ex ample.com": ValueError,
    f"{ANN}, bob@exam_ple..com": ValueError,
}


def made(make: str, header: str, value: str) -> Message:
    """A message with this header, in one of the ways in which programs make them."""
    if make.startswith("parsed"):
        policy: Any = email.policy.compat32 if make.endswith("class") else email.policy.default
        return email.message_from_bytes(f"{header}: {value}\n\n".encode(), policy=policy)
    message: Message = EmailMessage() if make == "EmailMessage" else MIMEText("hello")
    charset = "utf-8" if make.endswith("UTF-8") else None
    message[header] = Header(value, charset) if make.startswith("Header") else value
    return message


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("value", LISTS)
def test_everybody_whom_the_header_names(value: str, make: str) -> None:
    """All of a header's addresses are taken, or the error quotes the header: never a part, never somebody else."""
    message = made(make, "To", value)
    message["From"], message["Bcc"] = APP, "bcc@example.com"
    expected = [ANN, BOB] if value == UNCLOSED and make == "EmailMessage" else LISTS[value]  # it closes it
    if isinstance(expected, list):
        assert smtpretry.prepare(message).recipients == [*expected, "bcc@example.com"]
    else:
        with pytest.raises(ValueError, match="To: ") as caught:
            smtpretry.prepare(message)
        assert value.split(maxsplit=1)[0].strip('"') in str(caught.value).replace('\\"', '"')


@pytest.mark.parametrize("value", LISTS)
def test_one_address_as_an_argument(value: str) -> None:
    """A string that holds one address is that address; any other is an error that quotes it."""
    expected = LISTS[value]
    if isinstance(expected, list) and len(expected) == 1:
        assert mailbox_of(value) == expected[0]
        assert smtpretry.prepare(BODY, sender=value, recipients=value).recipients == [value]
    elif value not in ("Ann", "Bob <>"):  # a local part alone may be an argument: the server knows its domain
        with pytest.raises(ValueError, match="address"):
            smtpretry.prepare(BODY, sender=APP, recipients=[value])


NAMES = [
    "",
    "Ann",
    "Doe, John",
    "x@y.example",
    "a; b",
    "Jörg",
    "Müller, Jörg <j@x.example>",
    'say "hi"',
    "(x)",
    "a:b",
    "漢字",
]
LOCALS = ["ann", "bob.smith", "o'brien+x", "a=b/c", "_", "1", "x-y!#$%&*?^`{|}~"]


@pytest.mark.parametrize("seed", range(300))
def test_lists_of_every_make(seed: int) -> None:
    """Names with commas, quotes and addresses in them, groups and encoded words lead to nobody else, and away from nobody."""
    chance = random.Random(seed)  # noqa: S311 - the same every time
    people = [
        Address(chance.choice(NAMES), chance.choice(LOCALS), f"{number}.example")
        for number in range(chance.randrange(1, 9))
    ]
    mailboxes = [person.addr_spec for person in people]
    modern, old = EmailMessage(), MIMEText("hello")
    modern["To"] = [Group("Doe, Inc; <x@y.example>", people)] if chance.random() < 0.3 else people
    old["To"] = chance.choice([", ", ",", " ; ", ",\n "]).join(map(str, people))
    raw = "To: " + chance.choice([", ", ",\n ", ",\r\n\t"]).join(
        formataddr((person.display_name, person.addr_spec)) for person in people
    )
    parsed = [email.message_from_string(raw + "\n\n", policy=policy) for policy in POLICIES]
    for message in (modern, old, *parsed):
        message["From"] = "<>"
        assert smtpretry.prepare(message).recipients == mailboxes, message["To"]


@pytest.mark.parametrize(
    ("headers", "sender"),
    [
        ([("From", APP)], APP),
        ([("From", f"The app <{APP}>"), ("Sender", f"x@y.example <{BOB}>")], BOB),
        ([("From", f"{APP}, {BOB}")], APP),
        ([("From", "<>")], ""),
        ([("From", " <> ")], ""),
        ([("From", f'"App, Inc" <{APP}>')], APP),
        ([("From", APP), ("Resent-Date", "Mon, 01 Jan 2024 00:00:00 +0000"), ("Resent-From", CAT)], CAT),
        ([("From", "App, Inc <app@example.com>")], None),
        ([("From", "app")], None),
        ([("From", "Nobody:;")], None),
        ([("From", "")], None),
    ],
)
@pytest.mark.parametrize("make", [EmailMessage, Message])
def test_who_sends(make: type[Message], headers: list[tuple[str, str]], sender: str | None) -> None:
    """The envelope's sender is Sender, or From, or their Resent- forms; <> is the null one; what cannot be read, an error."""
    message = make()
    for name, value in headers:
        message[name] = value
    if sender is None:
        with pytest.raises(ValueError, match=r"no sender|From: "):
            smtpretry.prepare(message, recipients=ANN)
    else:
        assert smtpretry.prepare(message, recipients=ANN).sender == sender


@pytest.mark.parametrize("make", [EmailMessage, Message])
def test_a_message_that_is_sent_again_by_hand(make: type[Message]) -> None:
    """With Resent-Date the Resent- fields count, and no other; of two blocks nobody knows which."""
    message = make()
    message["From"], message["To"] = APP, ANN
    message["Resent-From"], message["Resent-Date"] = BOB, "Mon, 01 Jan 2024 00:00:00 +0000"
    message["Resent-To"], message["Resent-Cc"], message["Resent-Bcc"] = (
        f"{CAT};",
        "x@y <dan@example.com>",
        "eve@example.com",
    )
    delivery = smtpretry.prepare(message)
    assert (delivery.sender, delivery.recipients) == (BOB, [CAT, "dan@example.com", "eve@example.com"])
    assert b"eve@" not in delivery.message
    message["Resent-Date"] = "Tue, 02 Jan 2024 00:00:00 +0000"
    with pytest.raises(ValueError, match="more than one block of Resent- fields"):
        smtpretry.prepare(message)


def test_headers_of_bytes_in_no_charset() -> None:
    """A name in Latin-1 does no harm; an address does."""
    raw = b"From: app@example.com\nTo: J\xf6rg <ann@example.com>\n\n"
    for policy in POLICIES:
        parse = email.message_from_bytes
        assert smtpretry.prepare(parse(raw, policy=policy)).recipients == [ANN]
        with pytest.raises(ValueError, match="charset"):
            smtpretry.prepare(parse(raw.replace(b"ann@", b"\xe4nn@"), policy=policy))


PEOPLE = [f'"Doe, John" <{ANN}>', f"stranger@other.test <{BOB}>", f"Jörg <{CAT}>"]


def test_messages_of_djangos() -> None:
    """To, Cc and Bcc of Django's messages are read as Django means them."""
    if not settings.configured:
        settings.configure()
    mail = EmailMultiAlternatives("hello", "text", f'"App, Inc" <{APP}>', [PEOPLE[0]], cc=PEOPLE[2:], bcc=[BOB])
    mail.attach_alternative("<p>text</p>", "text/html")
    delivery = smtpretry.prepare(mail.message(), recipients=mail.recipients(), sender=mail.from_email)
    assert list(map(mailbox_of, delivery.recipients)) == [ANN, CAT, BOB]
    assert mailbox_of(delivery.sender) == APP
    assert smtpretry.prepare(mail.message()).recipients == [ANN, CAT]


async def _of_fastapi_mail() -> Message:
    people = [NameEmail("Doe, John", ANN), NameEmail("stranger@other.test", BOB), NameEmail("Jörg", CAT)]
    schema = MessageSchema(
        subject="hello", recipients=people, bcc=[NameEmail("", "bcc@example.com")], body="hi", subtype=MessageType.plain
    )
    return await MailMsg(schema)._message(f'"App, Inc" <{APP}>')


@virtually
async def test_messages_of_fastapi_mails() -> None:
    """Names with commas and addresses in them, in fastapi-mail's recipients, lead to nobody else."""
    delivery = smtpretry.prepare(await _of_fastapi_mail())
    assert (delivery.sender, delivery.recipients) == (APP, [ANN, BOB, CAT, "bcc@example.com"])


@virtually
async def test_they_arrive() -> None:
    """What the header names is what MAIL and RCPT say."""
    message = MIMEText("hello")
    message["From"], message["To"] = "<>", Header(f"Ann <{ANN}>; bob@bücher.example", "utf-8")
    async with talk(smtputf8=False) as (server, smtp):
        await smtp.send_message(message)
        assert server.messages[0].sender == ""
        assert server.messages[0].recipients == [ANN, "bob@xn--bcher-kva.example"]


@pytest.mark.parametrize(
    "hostile", ["(@", '"', '"@', "ü", "ü@", "(", "<", "a@b ", "=?", "\\", "a@[", "\n ", "ü@ü.", "x<", "[["]
)
def test_a_hostile_header_takes_no_time(hostile: str) -> None:
    """A hundred thousand characters that make no sense, in a parsed message, are an answer at once."""
    message = email.message_from_string(f"From: {hostile * (100_000 // len(hostile))}\nTo: {ANN}\n\n")
    began = time.process_time()
    with suppress(ValueError):
        sender_of(message)
    show_in_ascii(message)
    assert time.process_time() - began < 2
