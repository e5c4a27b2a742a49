"""From a message and arguments to a delivery: the header stays whole, the bytes suit any server."""

from __future__ import annotations

import email
import email.policy
import re
from email.message import EmailMessage, Message
from email.mime.application import MIMEApplication
from email.mime.base import MIMEBase
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText
from typing import Any

import pytest
from support import ANN, APP, BOB, talk, virtually

import smtpretry
from smtpretry.mime import has_long_line

POLICIES: list[Any] = [email.policy.default, email.policy.compat32]


def prepared(message: Any, **arguments: Any) -> bytes:
    return smtpretry.prepare(message, **{"sender": APP, "recipients": ANN} | arguments).message


def count(name: bytes, written: bytes) -> int:
    header = written[: written.find(b"\r\n\r\n") + 2 or None]
    return len(re.findall(rb"(?im)^" + name + rb"[ \t]*:", header))


# The header


HEADERS = {
    "a patch": b"From 0a0ae3d3 Mon Sep 17 00:00:00 2001\nFrom: app@example.com\nSubject: x\n\nbody\n",
    "from a mailbox": b"From app@example.com  Mon Sep 17 00:00:00 2001\r\nSubject: x\r\n\r\nbody\r\n",
    "from a mailbox, quoted": b">From app@example.com Mon Sep 17\nSubject: x\n\nbody\n",
    "from a mailbox, twice": b"From app@example.com Mon\n>From app@example.com remote from x\nSubject: x\n\nbody\n",
    "space before the colon": b"Subject : x\r\n\r\nbody\r\n",
    "tabs before the colon": b"Subject\t \t: x\r\n\r\nbody\r\n",
    "a From with a space": b"From : app@example.com\r\nSubject: x\r\n\r\nbody\r\n",
    "a byte order mark": b"\xef\xbb\xbfSubject: x\r\n\r\nbody\r\n",
    "a byte order mark and a mailbox": b"\xef\xbb\xbfFrom app@example.com Mon\nSubject: x\n\nbody\n",
    "line feeds": b"Subject: x\n\nbody\n",
    "returns": b"Subject: x\r\rbody\r",
    "folded at once": b"Subject:\r\n x\r\n\r\nbody\r\n",
    "folded with a tab": b"X-Y: a\r\n\tb\r\nSubject: x\r\n\r\nbody\r\n",
    "folded with a blank line": b"X-Y: a\r\n \r\n b\r\nSubject: x\r\n\r\nbody\r\n",
    "8 bits in a value": b"X-Y: \xfc\r\nSubject: x\r\n\r\nbody\r\n",
    "8 bits in a name": b"X-\xdc: y\r\nSubject: x\r\n\r\nbody\r\n",
    "a line that is no field": b"X-Y: a\r\nno field\r\nSubject: x\r\n\r\nbody\r\n",
}


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize(
    "own", [b"", b"message-id : <1@x>\nDATE\t: y\n", b"Message-ID:\n <1@x>\nDate: y\n", b"Date :y\n"]
)
def test_a_header_stays_one(name: str, own: bytes) -> None:
    """Whatever it begins with, a header stays whole, with one Message-ID and one Date in front or of its own."""
    raw = HEADERS[name]
    split = re.search(rb"(?m)^Subject", raw)
    raw = raw.replace(b"Subject", own + b"Subject", 1) if split or b"\xbb" in raw else raw
    written = prepared(raw)
    header, _, body = written.partition(b"\r\n\r\n")
    assert body == b"body\r\n"
    assert re.search(rb"(?m)^Subject[ \t]*:\s+x", header)
    assert (count(b"Message-ID", written), count(b"Date", written)) == (1, 1)
    assert not re.search(rb"(?m)^>?From a|^From 0|\xef\xbb\xbf", written)


@pytest.mark.parametrize(
    "body", [b"only a body\r\n", b"From here on\r\n\r\nall is well\r\n", b" Note: x\r\n", b"Dear Bob: hello\r\n", b""]
)
def test_a_body_alone_stays_a_body(body: bytes) -> None:
    """What begins with no header field is shown as the body, to the last byte."""
    header, _, written = prepared(body).partition(b"\r\n\r\n")
    assert written == body
    assert header.count(b"\r\n") == 1


@pytest.mark.parametrize("raw", [b"\r\nSubject: x\r\n\r\nbody\r\n", b"\nSubject: x\n\nbody\n"])
def test_an_empty_line_ends_an_empty_header(raw: bytes) -> None:
    """A message whose first line is empty has no header: all of it is the body."""
    assert prepared(raw).partition(b"\r\n\r\n")[2] == b"Subject: x\r\n\r\nbody\r\n"


def test_a_header_without_a_body() -> None:
    """It stays a header, whether its last line has an end or not."""
    for raw in (b"Subject: x", b"Subject: x\n", "\ufeffSubject: x\r\n"):
        assert prepared(raw).endswith(b"\r\nSubject: x\r\n")
        assert b"\r\n\r\n" not in prepared(raw)


@pytest.mark.parametrize("make", [EmailMessage, Message])
def test_an_objects_header_is_known(make: type[Message]) -> None:
    """A message object has a header, also where its first field is none by RFC 5322, and where it has no field at all."""
    message = make()
    message["X Y"] = "z"
    message.set_payload("body\n")
    assert prepared(message).endswith(b"\r\nX Y: z\r\n\r\nbody\r\n")
    assert prepared(make()).endswith(b"\r\n\r\n")


# The body


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("declared", ["", "us-ascii", "utf-8", "x-unknown"])
@virtually
async def test_undeclared_bytes_are_kept(declared: str, policy: Any) -> None:
    """A parsed body of 8 bits whose charset is missing or wrong is sent as it is, with 8BITMIME."""
    header = f"Content-Type: text/plain; charset={declared}\nContent-Transfer-Encoding: 8bit\n" if declared else ""
    raw = f"From: {APP}\nTo: {ANN}\nSubject: hello\n{header}\n".encode() + b"Gr\xfc\xdfe\n"
    async with talk() as (server, smtp):
        await smtp.send_message(email.message_from_bytes(raw, policy=policy))
        assert server.messages[0].content.endswith(b"\r\n\r\nGr\xfc\xdfe\r\n")
        assert "BODY=8BITMIME" in server.messages[0].options


@pytest.mark.parametrize("policy", POLICIES)
def test_declared_bytes_are_written_in_7_bits(policy: Any) -> None:
    """A parsed body whose charset is true reads the same, and suits any server."""
    raw = b"Content-Type: text/plain; charset=iso-8859-1\nContent-Transfer-Encoding: 8bit\n\nGr\xfc\xdfe\n"
    written = prepared(email.message_from_bytes(raw, policy=policy))
    assert written.isascii()
    assert email.message_from_bytes(written, policy=email.policy.default).get_content() == "Grüße\r\n"  # type: ignore[attr-defined]


@pytest.mark.parametrize("make", [EmailMessage, Message])
def test_text_that_nobody_encoded(make: type[Message]) -> None:
    """Text outside ASCII without a charset is an error that names the cure."""
    message = make()
    message.set_payload("Grüße")
    with pytest.raises(ValueError, match="set_content") as caught:
        prepared(message)
    assert not isinstance(caught.value, UnicodeError)


SIGNATURE = "v=1; a=rsa-sha256; c=relaxed/simple; h=From : Subject:\n Message-ID:date; bh=x; b=y"


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("parsed", [True, False])
def test_what_dkim_has_signed_is_not_changed(policy: Any, *, parsed: bool) -> None:
    """A message with a DKIM signature goes out as it writes itself, 8 bits and all."""
    message: Message = EmailMessage(policy)
    message["From"], message["Subject"] = APP, "a long one " * 12
    message.set_payload("Grüße\n", "utf-8")
    message.replace_header("Content-Transfer-Encoding", "8bit")
    message.set_payload("Grüße\n".encode().decode("ascii", "surrogateescape"))
    message["DKIM-Signature"] = SIGNATURE.replace("\n", "")
    if parsed:
        message = email.message_from_bytes(message.as_bytes(), policy=policy)
    assert prepared(message) == message.as_bytes().replace(b"\n", b"\r\n")


def test_what_dkim_has_signed_as_missing_is_not_added() -> None:
    """A signature may say that a field is not there: then it stays away."""
    raw = b"DKIM-Signature: " + SIGNATURE.replace("\n", "\r\n").encode() + b"\r\nSubject: x\r\n\r\nbody\r\n"
    assert prepared(raw) == raw
    assert count(b"Date", prepared(raw.replace(b"date;", b"To;"))) == 1


def by_hand() -> dict[str, tuple[Message, str]]:
    made = {
        "a list for a header": (MIMEText("x"), "header X-A is of type list"),
        "a number for a header": (MIMEText("x"), "header X-A is of type int"),
        "a str for a part": (MIMEMultipart(), "a part of it is of type str"),
        "nothing for a part": (MIMEMultipart(), "a part of it is of type NoneType"),
        "itself for a part": (MIMEMultipart(), "a part of itself"),
        "a number for a body": (EmailMessage(), "a body is of type int"),
        "a second header in one": (MIMEText("x"), "embedded header"),
        "a line break in a header": (MIMEText("x"), "line break"),
        "an empty line in a header": (MIMEText("x"), "line break"),
        "a line break in the name of a header": (MIMEText("x"), "line break"),
        "a line break in the name of a modern header": (EmailMessage(), "line break"),
        "a name that continues the header before": (MIMEText("x"), "name that is none"),
        "a Bcc that is not left out": (EmailMessage(), "name that is none"),
        "a header without a name": (MIMEText("x"), "name that is none"),
        "a line break in a header of a part": (MIMEMultipart(), "line break"),
    }
    made["a list for a header"][0]["X-A"] = ["b"]
    made["a number for a header"][0]["X-A"] = 5
    made["a str for a part"][0].attach("text")
    made["nothing for a part"][0].attach(None)
    made["itself for a part"][0].attach(made["itself for a part"][0])
    made["a number for a body"][0].set_payload(5)
    made["a second header in one"][0]["Subject"] = "a\nBcc: eve@example.com"
    made["a line break in a header"][0]["Subject"] = "a\nb"
    made["an empty line in a header"][0]["Subject"] = "a\r\n\r\nb"
    made["a line break in the name of a header"][0]["X\n\nbody"] = "a"
    made["a line break in the name of a modern header"][0]["X\r Bcc"] = "a"
    made["a name that continues the header before"][0][" Bcc"] = "a"
    made["a Bcc that is not left out"][0]["Bcc "] = "eve@example.com"
    made["a header without a name"][0][""] = "a"
    made["a line break in a header of a part"][0].attach(part := MIMEText("x"))
    part["Subject"] = "a\nb"
    return made


@pytest.mark.parametrize("what", list(by_hand()))
def test_what_cannot_be_written_is_a_value_error(what: str) -> None:
    """A message that was put together wrongly is told before anything is sent, and what is wrong with it."""
    message, said = by_hand()[what]
    with pytest.raises(ValueError, match=said):
        prepared(message)


@pytest.mark.parametrize("header", [["ann@example.com"], ("ann@example.com", "bob@example.com")])
def test_a_list_is_no_header(header: Any) -> None:
    """What Python would show of it may look like a comment, and is nobody."""
    message = MIMEText("x")
    message["To"], message["Cc"] = header, "cat@example.com"
    with pytest.raises(ValueError, match=r"To: .*not a str"):
        smtpretry.prepare(message, sender=APP)


@pytest.mark.parametrize("cte", ["", "8bit", "binary", "7bit"])
@pytest.mark.parametrize("data", [b"%PDF\xff\r\n\n\x00x", b"\xff\r\n\xfe\n", b"a\0b\n"])
def test_a_file_that_nobody_encoded_arrives_whole(data: bytes, cte: str) -> None:
    """Bytes that are no text are encoded, or their line ends would be changed."""
    message, part = MIMEMultipart(), MIMEBase("application", "pdf")
    part.set_payload(data)
    if cte:
        part["Content-Transfer-Encoding"] = cte
    message.attach(part)
    written = prepared(message)
    assert written.isascii()
    assert email.message_from_bytes(written).get_payload(0).get_payload(decode=True) == data  # type: ignore[union-attr]


def long_lines() -> dict[str, Message]:
    text, modern, mixed = MIMEText("x" * 2000 + "\nshort =\n"), EmailMessage(), MIMEMultipart()
    modern.set_content("x" * 2000 + "\nshort =\n", cte="8bit")
    mixed.attach(MIMEText("short\n"))
    mixed.attach(MIMEText("x" * 2000 + "\nshort =\n"))
    parsed = email.message_from_bytes(text.as_bytes(), policy=email.policy.default)
    return {"MIMEText": text, "EmailMessage": modern, "in a part": mixed, "parsed": parsed}


@pytest.mark.parametrize("make", list(long_lines()))
def test_long_lines_of_an_object_are_encoded(make: str) -> None:
    """A line of more than 998 octets arrives as it was, in lines that every server takes; the object stays as it is."""
    message = long_lines()[make]
    before = message.as_bytes()
    written = prepared(message)
    assert not has_long_line(written)
    assert message.as_bytes() == before
    received: Any = email.message_from_bytes(written, policy=email.policy.default)
    *_, last = received.iter_parts() if received.is_multipart() else [received]
    assert last.get_content().splitlines() == ["x" * 2000, "short ="]


def test_base64_in_one_line_is_wrapped() -> None:
    """An attachment whose base64 has no line breaks gets them."""
    attachment = MIMEApplication(b"")
    attachment.set_payload("AAAA" * 1000)
    written = prepared(attachment)
    assert not has_long_line(written)
    assert email.message_from_bytes(written).get_payload(decode=True) == bytes(3000)


def test_a_long_line_of_undeclared_bytes() -> None:
    """It is encoded byte by byte."""
    message = email.message_from_bytes(b"Subject: x\n\n" + b"\xfc" * 1000 + b"\n", policy=email.policy.default)
    written = prepared(message)
    assert not has_long_line(written)
    assert email.message_from_bytes(written).get_payload(decode=True) == b"\xfc" * 1000 + b"\r\n"


def test_what_is_signed_is_not_changed() -> None:
    """A long line in a signed part, or in a header, is an error before anything is sent."""
    signed, header = MIMEMultipart("signed"), MIMEText("hello")
    signed.attach(MIMEText("x" * 999))
    header["X-Token"] = "x" * 1000
    for message in (signed, header):
        with pytest.raises(ValueError, match="998 octets"):
            prepared(message)


def test_bytes_are_the_callers() -> None:
    """A long line in bytes is left alone: they may be signed."""
    raw = b"Message-ID: <1@x>\r\nDate: y\r\n\r\n" + b"x" * 2000 + b"\r\n"
    assert prepared(raw) == raw


@pytest.mark.parametrize(
    ("line", "long"), [(b"x" * 998, False), (b"x" * 999, True), (b"x" * 1000, True), (b"x" * 5000, True), (b"", False)]
)
@pytest.mark.parametrize("before", [b"", b"\r\n", b"x" * 998 + b"\r\n", b"x\r\n" * 700])
@pytest.mark.parametrize("after", [b"", b"\r\n", b"\r\nx\r\n"])
def test_what_a_long_line_is(before: bytes, line: bytes, after: bytes, long: bool) -> None:
    """998 octets without the CRLF, wherever the line stands."""
    assert has_long_line(before + line + after) is long


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_many_short_lines_are_no_long_one(end: bytes) -> None:
    """Wherever lines of 80 octets end, none is too long."""
    for first in range(120):
        assert not has_long_line(b"x" * first + end + (b"y" * 80 + end) * 40)


# Addresses outside ASCII


@virtually
async def test_a_domain_outside_ascii_needs_no_extension() -> None:
    """In envelope and header it is an A-label, for every server; the object stays as it is."""
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = APP, "Bob <bob@bücher.example>, ann@example.com", "hello"
    message.set_content("hello\n")
    async with talk(smtputf8=False, eightbitmime=False) as (server, smtp):
        await smtp.send_message(message)
        assert server.messages[0].recipients == ["bob@xn--bcher-kva.example", ANN]
        assert server.messages[0].message["To"] == "Bob <bob@xn--bcher-kva.example>, ann@example.com"
    assert "bücher" in message["To"]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_domain_of_undeclared_bytes(policy: Any) -> None:
    """A parsed header in UTF-8 (RFC 6532), folded, names the same mailbox in ASCII."""
    raw = "From: app@example.com\nTo: Bob\n <bob@bücher.example>,\n\tann@example.com\n\n".encode()
    delivery = smtpretry.prepare(email.message_from_bytes(raw, policy=policy))
    assert delivery.recipients == ["bob@xn--bcher-kva.example", ANN]
    assert b"<bob@xn--bcher-kva.example>, ann@example.com\r\n" in delivery.message


def test_one_mailbox_in_two_scripts() -> None:
    """A domain and its A-label are one domain: one copy."""
    delivery = smtpretry.prepare(b"", sender=APP, recipients=["bob@bücher.example", "bob@XN--bcher-kva.example", BOB])
    assert delivery.recipients == ["bob@bücher.example", BOB]


def test_utf_8_headers_only_where_an_address_needs_them() -> None:
    """An address outside ASCII in a header is shown in UTF-8; in the envelope alone it leaves the message in 7 bits."""
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = APP, "jörg@example.com", "Grüße"
    assert "To: jörg@example.com\r\nSubject: Grüße".encode() in prepared(message)
    message.replace_header("To", ANN)
    assert prepared(message, recipients=["jörg@example.com"]).isascii()
