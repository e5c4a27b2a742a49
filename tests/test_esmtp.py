"""What is said in MAIL and RCPT: tables, from a delivery and what the server offers."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from support import ANN, APP, BOB, CAT

import smtpretry
from smtpretry import addresses
from smtpretry.esmtp import Commands, commands

JOERG, AT_BUECHER = "jörg@example.com", "bob@bücher.example"
TEXT = b"Message-ID: <1@example.com>\r\nDate: Mon, 01 Jan 2024 00:00:00 +0000\r\n\r\n"
EVERYTHING = {"size": "10000", "8bitmime": "", "smtputf8": "", "dsn": "", "auth": "PLAIN"}
EVERYTHING |= dict.fromkeys(["deliverby", "futurerelease", "mt-priority", "requiretls", "rrvs", "submitter"], "")


def said(
    *recipients: str, offers: Any = EVERYTHING, message: bytes = TEXT, sender: str = APP, **options: Any
) -> Commands:
    delivery = smtpretry.prepare(message, sender=sender, recipients=list(recipients or (ANN,)), **options)
    return commands(delivery, delivery.recipients, offers)


def test_what_a_server_of_1982_is_told() -> None:
    """After HELO nothing is said but the mailboxes."""
    assert said(ANN, f"Bob <{BOB}>", offers={}) == Commands(
        mail=b"MAIL FROM:<app@example.com>",
        rcpts={ANN: b"RCPT TO:<ann@example.com>", f"Bob <{BOB}>": b"RCPT TO:<bob@example.com>"},
        impossible={},
        left_out=(),
        obstacle=None,
    )


@pytest.mark.parametrize("sender", ["", "<>", " <> "])
def test_the_null_sender(sender: str) -> None:
    """It is MAIL FROM:<>, however it was written."""
    assert said(sender=sender, offers={}).mail == b"MAIL FROM:<>"


@pytest.mark.parametrize("where", ["mail_options", "rcpt_options"])
@pytest.mark.parametrize(
    ("option", "extension"),
    [
        ("RET=HDRS", "dsn"),
        ("envid=QQ314159", "dsn"),
        ("NOTIFY=SUCCESS,DELAY", "dsn"),
        ("ORCPT=rfc822;ann@example.com", "dsn"),
        ("MT-PRIORITY=3", "mt-priority"),
        ("BY=120;N", "deliverby"),
        ("AUTH=<>", "auth"),
        ("SUBMITTER=app@example.com", "submitter"),
    ],
)
def test_a_service_that_is_not_offered_is_left_out(option: str, extension: str, where: str) -> None:
    """A parameter goes where its extension is offered, is left out and told elsewhere; the message goes in both cases."""
    with_it = said(**{where: [option]})
    without = said(**{where: [option]}, offers={name: "" for name in EVERYTHING if name != extension})
    line = with_it.mail if where == "mail_options" else with_it.rcpts[ANN]
    assert line.count(b" " + option.encode()) == 1
    assert (with_it.left_out, with_it.obstacle) == ((), None)
    assert option.encode() not in without.mail + without.rcpts[ANN]
    assert (without.left_out, without.obstacle) == ((option,), None)


@pytest.mark.parametrize("option", ["REQUIRETLS", "requiretls", "BY=120;R", "by=120;rt", "HOLDFOR=60", "HOLDUNTIL=x"])
def test_what_must_not_be_broken_stops_the_message(option: str) -> None:
    """What was asked for on condition is not sent without it: the reason names the parameter."""
    assert said(mail_options=[option]).obstacle is None
    refused = said(mail_options=[option], offers={"size": "", "8bitmime": ""})
    assert refused.obstacle is not None
    assert option in refused.obstacle
    assert refused.left_out == ()


def test_a_parameter_that_is_unknown_here_goes_as_it_is() -> None:
    """The server says what it thinks of it."""
    assert said(mail_options=["X-NEW=1"], offers={}).mail.endswith(b" X-NEW=1")


def test_binary_is_not_announced() -> None:
    """A message goes by DATA, which a server refuses after BODY=BINARYMIME (RFC 3030 §3)."""
    offers = {"binarymime": "", "8bitmime": ""}
    assert b"BINARYMIME" not in said(mail_options=["body=binarymime"], offers=offers).mail.upper()


def test_the_message_is_described_where_that_is_offered() -> None:
    """SIZE and BODY are true: whatever the caller said of the body, 8 bits are declared."""
    umlauts = TEXT + "Grüße\r\n".encode()
    assert said().mail == b"MAIL FROM:<app@example.com> SIZE=%d" % len(TEXT)
    for options in ([], ["BODY=7BIT"], ["body=8bitmime"], ["BODY=BINARYMIME"]):
        mail = said(message=umlauts, mail_options=options).mail
        assert mail.count(b"BODY=") == mail.count(b"BODY=8BITMIME") == 1
        assert b"SIZE=%d" % len(umlauts) in mail
    assert said(mail_options=["BODY=8BITMIME"], offers={}).left_out == ("BODY=8BITMIME",)


def test_eight_bits_need_8bitmime() -> None:
    """Without it the message cannot go, and the reason names extension and cure."""
    obstacle = said(message=TEXT + b"\xfc\r\n", offers={"smtputf8": ""}).obstacle
    assert obstacle is not None
    assert "8BITMIME" in obstacle
    assert "EmailMessage" in obstacle
    shown = said(message="To: jörg@x.example\r\n\r\nhi\r\n".encode(), offers={}).obstacle
    assert shown is not None
    assert "EmailMessage" not in shown
    assert "without that address" in shown


@pytest.mark.parametrize(
    ("size", "fits"),
    [
        ("", True),
        ("0", True),
        ("999", False),
        ("1000", True),
        ("1001", True),
        (" 999 ", False),
        ("many", True),
        ("²", True),
    ],
)
def test_a_message_larger_than_the_server_takes(size: str, fits: bool) -> None:
    """It is known before anything is sent; 0, nothing and nonsense are no limit (RFC 1870 §4)."""
    obstacle = said(message=TEXT.ljust(998, b"x"), offers={"size": size}).obstacle
    assert (obstacle is None) is fits
    assert fits or "1000 octets" in str(obstacle)


def test_only_who_needs_smtputf8_is_not_offered() -> None:
    """Where it is not offered the others go without it; a domain alone outside ASCII goes as its A-label."""
    here = said(ANN, JOERG, AT_BUECHER, CAT)
    assert here.mail.count(b" SMTPUTF8") == 1
    assert here.rcpts[JOERG] == "RCPT TO:<jörg@example.com>".encode()
    assert here.rcpts[AT_BUECHER] == b"RCPT TO:<bob@xn--bcher-kva.example>"
    elsewhere = said(ANN, JOERG, AT_BUECHER, CAT, offers={"8bitmime": ""})
    assert elsewhere.mail == b"MAIL FROM:<app@example.com>"
    assert list(elsewhere.rcpts) == [ANN, AT_BUECHER, CAT]
    assert list(elsewhere.impossible) == [JOERG]
    assert "SMTPUTF8" in elsewhere.impossible[JOERG]
    assert (elsewhere.left_out, elsewhere.obstacle) == ((), None)


def test_smtputf8_that_nobody_needs() -> None:
    """It is asked for where the caller does and the server has it, left out elsewhere."""
    assert b" SMTPUTF8" in said(mail_options=["SMTPUTF8"]).mail
    assert b"SMTPUTF8" not in said(AT_BUECHER).mail
    without = said(mail_options=["SMTPUTF8"], offers={})
    assert (without.left_out, without.obstacle, len(without.rcpts)) == (("SMTPUTF8",), None, 1)


def test_a_sender_that_needs_smtputf8() -> None:
    """The whole message cannot go where it is not offered."""
    assert "MAIL FROM:<jörg@example.com>".encode() in said(sender=JOERG).mail
    assert "SMTPUTF8" in str(said(sender=JOERG, offers={}).obstacle)
    assert said(sender=AT_BUECHER, offers={}).mail == b"MAIL FROM:<bob@xn--bcher-kva.example>"


def test_a_stored_address_that_cannot_be_read() -> None:
    """It concerns that recipient alone."""
    delivery = smtpretry.prepare(TEXT, sender=APP, recipients=[ANN])
    told = commands(delivery, ["ann@example.com bob@example.com", ANN], {})
    assert list(told.rcpts) == [ANN]
    assert "no address" in told.impossible["ann@example.com bob@example.com"]


@pytest.mark.parametrize("installed", [True, False])
def test_a_domain_becomes_no_other(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without the package idna a domain is itself: where IDNA 2003 would name another, it has no A-label."""
    if not installed:
        monkeypatch.setitem(sys.modules, "idna", None)
    addresses.a_label.cache_clear()
    assert addresses.a_label("bücher.example") == "xn--bcher-kva.example"
    assert addresses.a_label("BÜCHER。example") == "xn--bcher-kva.example"
    assert addresses.a_label("i❤.ws") == "xn--i-7iq.ws"
    assert addresses.a_label("straße.example") == ("xn--strae-oqa.example" if installed else "straße.example")
    addresses.a_label.cache_clear()
