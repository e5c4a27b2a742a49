"""What is signed arrives as it was signed, octet for octet."""

from __future__ import annotations

import email
import email.policy
from email.message import EmailMessage
from email.mime.message import MIMEMessage
from email.mime.multipart import MIMEMultipart
from typing import Any

import pytest
from support import ANN, APP, talk, virtually

import smtpretry

POLICIES: list[Any] = [email.policy.default, email.policy.SMTPUTF8, email.policy.compat32]
PARTS = {
    "8 bits": "Content-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: 8bit\r\n\r\n.Grüße\r\n".encode(),
    "of latin-1": b"Content-Type: text/plain; charset=iso-8859-1\r\n\r\nGr\xfc\xdfe\r\n",
    "8 bits in a header": "Content-Type: text/plain\r\nContent-Description: Grüße\r\n\r\nx\r\n".encode(),
    "parts of 8 bits": "Content-Type: multipart/mixed; boundary=q\r\n\r\n--q\r\n"
    "Content-Type: text/plain; charset=utf-8\r\n\r\nGrüße\r\n--q--\r\n".encode(),
    "folds and blanks": b"Content-Type: text/plain;\r\n\tcharset=utf-8;\r\n   format=flowed\r\nX: "
    + b"z" * 90
    + b"\r\n\r\nhello \r\n-- \r\n\r\n",
    "a mail": b"Content-Type: message/rfc822\r\n\r\nSubject: x\r\nReferences: <" + b"a" * 90 + b"@x>\r\n\r\nbody\r\n",
}


def signed(part: bytes) -> bytes:
    return (
        f"From: {APP}\r\nTo: {ANN}\r\nSubject: Grüße\r\n".encode()
        + b"MIME-Version: 1.0\r\nContent-Type: multipart/signed; micalg=sha-256; boundary=s\r\n\r\n--s\r\n"
        + part
        + b"\r\n--s\r\nContent-Type: application/pkcs7-signature\r\n\r\nAAAA\r\n--s--\r\n"
    )


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("what", PARTS)
@virtually
async def test_a_signed_part_is_not_changed(what: str, policy: Any) -> None:
    """8 bits too, which go by 8BITMIME (RFC 1847 §2.1); the header around it is written in 7 bits."""
    async with talk() as (server, smtp):
        await smtp.send_message(email.message_from_bytes(signed(PARTS[what]), policy=policy))
        [got] = server.messages
        assert b"--s\r\n" + PARTS[what] + b"\r\n--s\r\n" in got.content
        assert got.content.partition(b"\r\n\r\n")[0].isascii()
        assert ("BODY=8BITMIME" in got.options) is not got.content.isascii()


@pytest.mark.parametrize("what", PARTS)
def test_nor_in_a_forwarded_message(what: str) -> None:
    """A signed message may be a part of another."""
    outer = MIMEMultipart()
    outer.attach(MIMEMessage(email.message_from_bytes(signed(PARTS[what]))))
    written = smtpretry.prepare(outer, sender=APP, recipients=ANN).message
    assert b"--s\r\n" + PARTS[what] + b"\r\n--s\r\n" in written


def test_a_parsed_message_with_dkim_keeps_its_headers() -> None:
    """A line that is too long for a policy was signed as it is."""
    raw = signed(PARTS["a mail"]).replace(
        b"Subject:",
        b"DKIM-Signature: v=1; h=From:References; bh=x; b=y\r\nReferences: <" + b"r" * 90 + b"@x>\r\nSubject:",
    )
    for policy in POLICIES[:2]:
        assert smtpretry.prepare(email.message_from_bytes(raw, policy=policy), sender=APP).message.endswith(raw)


def test_one_that_was_signed_as_it_writes_itself() -> None:
    """A signature that was set on the object is of what the object writes, long lines folded."""
    raw = b"From: app@example.com\nReferences: <" + b"r" * 90 + b"@x>\nDate: y\nMessage-ID: <1@x>\n\nx\n"
    message = email.message_from_bytes(raw, policy=email.policy.SMTP)
    message["DKIM-Signature"] = "v=1; h=From:References; bh=x; b=y"
    assert isinstance(message, EmailMessage)
    assert smtpretry.prepare(message, recipients=ANN).message == message.as_bytes()
