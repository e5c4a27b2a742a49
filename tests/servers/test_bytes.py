"""Through Postfix: what lies in the mailbox is what was prepared, byte for byte."""

from __future__ import annotations

import asyncio
import email
import email.policy
import mailbox
from email.message import EmailMessage
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText
from typing import TYPE_CHECKING, Any

import aiosmtplib
import mta
import pytest
from mta import Postfix, Service, require
from rows import ANN, PEOPLE

from smtpretry import RetryingSMTP, prepare

if TYPE_CHECKING:
    from collections.abc import Iterator

SERVICE = Service(name="bytes")
SENDER = "app@sender.test"
AUTHOR = f"From: {SENDER}\n".encode()  # Postfix adds one where there is none


@pytest.fixture(scope="module")
def server(certificate: bytes) -> Iterator[Postfix]:
    """Run it."""
    require(Postfix)
    with mta.workplace() as directory, Postfix(directory / "bytes", [SERVICE], PEOPLE, certificate) as postfix:
        yield postfix


def modern() -> EmailMessage:
    message = EmailMessage()
    message["From"], message["To"], message["Bcc"] = SENDER, f'"Müller, Jörg; ({"x" * 80})" <{ANN}>', "eve@sender.test"
    message["Subject"], message["References"] = "Größe " * 30, f"<{'r' * 120}@x.example> " * 3
    message.set_content(".\n..\nFrom here\n" + "ü" * 2000)
    message.add_attachment(
        bytes(range(256)) * 9, "image", "png", filename="レポート" * 20, cid=f"<{'c' * 90}@x.example>"
    )
    return message


def old() -> MIMEMultipart:
    message = MIMEMultipart()
    message["From"], message["To"] = SENDER, ANN
    message.attach(MIMEText("Grüße\r.\r\n" + "x" * 2000, "plain", "iso-8859-1"))
    return message


def messages() -> dict[str, Any]:
    signed = b"Content-Type: multipart/signed; boundary=s\n\n--s\n\n.Gr\xc3\xbc\xc3\x9fe \n\n--s\n\nAAAA\n--s--\n"
    return {
        "modern": modern(),
        "old": old(),
        "signed": email.message_from_bytes(AUTHOR + signed, policy=email.policy.default),
        "undeclared": email.message_from_bytes(AUTHOR + b"\n\xff\xfe.\n.\n"),
        "bytes": b"From app@x Mon\n" + AUTHOR + b"Subject: Gr\xc3\xbc\xc3\x9fe\r\rlone\r.\n.\r\n..no end.",
        "no body": AUTHOR + b"Message-ID: <no-body@x>\r\nDate: Mon, 01 Jan 2024 00:00:00 +0000\r\n",
    }


@pytest.mark.parametrize("what", messages())
def test_postfix_delivers_the_bytes(server: Postfix, what: str) -> None:
    """Dots, 8 bits, long headers and line ends of every kind come through as they were prepared."""
    delivery = prepare(messages()[what], sender=SENDER, recipients=ANN)

    async def send() -> None:
        client = aiosmtplib.SMTP(
            hostname="localhost", port=server.port("bytes"), local_hostname="client.test", start_tls=False, timeout=10
        )
        async with RetryingSMTP(client) as smtp:
            await smtp.deliver(delivery)

    asyncio.run(send())
    assert delivery.accepted == [ANN]
    message_id = email.message_from_bytes(delivery.message)["Message-ID"]
    assert server.copies(ANN, message_id) == 1
    mails = mailbox.Maildir(server.directory / "mail" / ANN, create=False)
    [got] = [mails.get_bytes(key) for key, mail in mails.iteritems() if mail["Message-ID"] == message_id]
    assert got.endswith(b"\n" + delivery.message.replace(b"\r\n", b"\n").removesuffix(b"\n") + b"\n")
    assert b"eve@" not in got
