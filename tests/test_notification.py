"""A delivery as a delivery status notification, as RFC 3464 has it."""

from __future__ import annotations

import email
from email import policy as email_policy

import pytest
from support import ANN, APP, BOB, CAT, DAN, EVE, PASSWORD, talk, virtually

import smtpretry
from smtpretry import Delivery, Reply, Stage, Status


def settled() -> Delivery:
    """Return a delivery with a recipient for each end, and one who waits."""
    message = b"Subject: h\xc3\xa4llo\r\nMessage-ID: <1@example.com>\r\n\r\nThe body is private.\r\n"
    delivery = smtpretry.prepare(message, sender=f"App <{APP}>", recipients=[ANN, f"Bob <{BOB}>", CAT, DAN, EVE])
    delivery.began_at = 1_700_000_000.0
    ann, bob, cat, dan, _ = delivery.recipients
    delivery.settle([ann], Status.ACCEPTED, Stage.END_OF_DATA, Reply.parse("250 2.0.0 Ok: queued"))
    delivery.settle([bob], Status.REFUSED, Stage.RCPT, Reply.parse("550 5.1.1 No such usér"))
    delivery.settle([cat], Status.UNCERTAIN, Stage.END_OF_DATA, Reply.of(-1, "Connection lost"))
    delivery.settle([dan], Status.DEFERRED, Stage.RCPT, Reply.parse("450 later"))
    return delivery


def groups(delivery: Delivery) -> list[dict[str, str]]:
    """Return the fields that a mail program reads in the notification of a delivery."""
    written = delivery.dsn(reporting_mta="app.example.com").as_bytes()
    report = email.message_from_bytes(written, policy=email_policy.default)
    assert report.get_content_type() == "multipart/report"
    assert report.get_param("report-type") == "delivery-status"
    fields = report.get_payload(1)
    assert fields.get_content_type() == "message/delivery-status"
    return [dict(group.items()) for group in fields.get_payload()]


def test_each_recipient_has_its_group_of_fields() -> None:
    """Who was accepted is relayed, who was refused failed with the reply, who may have it failed with a broken line, and who waits is delayed."""
    message, ann, bob, cat, dan, eve = groups(settled())
    assert message["Reporting-MTA"] == "dns; app.example.com"
    assert message["Arrival-Date"].startswith("Tue, 14 Nov 2023")
    wanted = [
        (ann, ANN, "relayed", "2.0.0", "smtp; 250 2.0.0 Ok: queued"),
        (bob, BOB, "failed", "5.1.1", r"smtp; 550 5.1.1 No such us\xe9r"),
        (cat, CAT, "failed", "4.4.2", "x-smtpretry; no reply (Connection lost)"),
        (dan, DAN, "delayed", "4.0.0", "smtp; 450 later"),
        (eve, EVE, "delayed", "4.0.0", None),
    ]
    for fields, who, action, status, said in wanted:
        assert fields["Final-Recipient"] == f"rfc822; {who}"
        assert (fields["Action"], fields["Status"], fields.get("Diagnostic-Code")) == (action, status, said)


def test_a_person_reads_that_it_may_have_arrived() -> None:
    """The words for an uncertain recipient say so; the header of the message is there, and its body is not."""
    report = email.message_from_bytes(settled().dsn().as_bytes(), policy=email_policy.default)
    words, _, header = (part.get_content() for part in report.iter_parts())
    assert f"{CAT}: It may have been delivered" in words
    assert "Message-ID: <1@example.com>" in header
    assert "Subject: hällo" in header
    assert b"private" not in report.as_bytes()
    assert report["Auto-Submitted"] == "auto-replied"


def test_an_address_that_is_not_ascii() -> None:
    """A recipient outside ASCII is written in the form that RFC 6533 has for mail of seven bits."""
    delivery = smtpretry.prepare(b"\r\n", sender=APP, recipients=["jörg@example.com"])
    assert groups(delivery)[1]["Final-Recipient"] == r"utf-8; j\x{F6}rg@example.com"


def test_the_null_sender_is_not_notified() -> None:
    """A notification is never answered with another one."""
    with pytest.raises(ValueError, match="null sender"):
        smtpretry.prepare(b"\r\n", sender="", recipients=[ANN]).dsn()


@virtually
async def test_it_can_be_sent() -> None:
    """The notification goes to the sender, from the null sender, with no credential in it."""
    credentials = {"username": "app-user", "password": PASSWORD}
    async with talk(credentials=credentials, auth=("app-user", PASSWORD), pipelining=False) as (server, smtp):
        server.on("RCPT", EVE, "550 5.1.1 User unknown", times=1)
        delivery = await smtp.deliver(b"Subject: hello\r\n\r\n", sender=APP, recipients=[EVE])
        await smtp.send_message(delivery.dsn(), sender="")
    [received] = server.received(APP)
    assert received.sender == ""
    assert PASSWORD.encode() not in received.content
    assert b"Diagnostic-Code: smtp; 550 5.1.1 User unknown" in received.content
