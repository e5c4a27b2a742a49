"""Logging in: when, how often, over which connections, and that nobody else ever sees what it is done with."""

from __future__ import annotations

import asyncio
import base64
import logging
import re
import socket
import ssl
import traceback
from typing import TYPE_CHECKING, Any

import aiosmtplib
import pytest
import virtual
from aiosmtplib import SMTPReadTimeoutError, SMTPTimeoutError
from support import (
    ANN,
    APP,
    BOB,
    BODY,
    CAT,
    LOG_IN,
    PASSWORD,
    USER,
    letter,
    once,
    patient,
    talk,
    transactions,
    virtually,
)

import smtpretry
from smtpretry import Delivery, RetryingSMTP, RetryPolicy
from smtpretry.testing import ScriptedServer

if TYPE_CHECKING:
    from collections.abc import Callable

MINE = {"username": USER, "password": PASSWORD}
CLEAR = {"start_tls": False}  # a client that does not encrypt of its own accord
AUTH: dict[str, Any] = {"auth": (USER, PASSWORD), "pipelining": False}  # the order of commands is what they hold
MUST_ENCRYPT = "530 5.7.0 Must issue a STARTTLS command first"
RELAY_DENIED = "554 5.7.1 <bob@example.com>: Relay access denied"


def since_ehlo(server: ScriptedServer) -> list[str]:
    """What the server was told after the first EHLO."""
    return server.verbs[1:]


async def deliver(smtp: RetryingSMTP, *recipients: str) -> Delivery:
    """Send the message to these, or to Ann."""
    return await smtp.deliver(BODY, sender=APP, recipients=recipients or [ANN])


# 530


@virtually
async def test_530_to_mail_logs_in_and_goes_on_at_once() -> None:
    """After a 530 to MAIL comes AUTH, then the envelope again: no wait, one attempt, one connection."""
    async with talk(once(), **AUTH, credentials=MINE) as (server, smtp):
        delivery = await deliver(smtp)
        assert since_ehlo(server) == ["MAIL", "RSET", "AUTH", "MAIL", "RCPT", "DATA"]
        assert virtual.clock() == virtual.EPOCH
        assert len(delivery.attempts) == server.connections == 1
        assert server.messages[0].authenticated == USER


@virtually
async def test_530_to_a_recipient_ends_the_transaction_first() -> None:
    """After a 530 to RCPT comes RSET, then AUTH, then the envelope anew, for those too that had been taken."""
    async with talk(once(), **AUTH, auth_required=False, credentials=MINE) as (server, smtp):
        server.on("RCPT", BOB, LOG_IN, times=1)
        delivery = await deliver(smtp, ANN, BOB, CAT)
        assert since_ehlo(server)[:5] == ["MAIL", "RCPT", "RCPT", "RSET", "AUTH"]
        assert transactions(server) == [[ANN, BOB], [ANN, BOB, CAT]]
        assert [mail.recipients for mail in server.messages] == [[ANN, BOB, CAT]]
        assert delivery.accepted == [ANN, BOB, CAT]


@pytest.mark.parametrize("stage", ["DATA", "END_OF_DATA"])
@virtually
async def test_530_to_the_data_logs_in_too(stage: str) -> None:
    """A server that asks for the log-in as late as at DATA gets it, and the message once."""
    async with talk(once(), **AUTH, auth_required=False, credentials=MINE) as (server, smtp):
        server.on(stage, LOG_IN, times=1)
        await deliver(smtp, ANN, BOB)
        assert server.verbs.count("AUTH") == 1
        assert [mail.recipients for mail in server.messages] == [[ANN, BOB]]


@virtually
async def test_encrypts_first_where_the_server_offers_it() -> None:
    """On a clear connection 530 is answered by STARTTLS, EHLO and then AUTH."""
    async with talk(once(), **AUTH, tls=True, client=CLEAR, credentials=MINE) as (server, smtp):
        await deliver(smtp)
        assert since_ehlo(server) == ["MAIL", "RSET", "STARTTLS", "EHLO", "AUTH", "MAIL", "RCPT", "DATA"]
        assert server.messages[0].tls
        assert server.connections == 1


@virtually
async def test_logs_in_where_auth_is_offered_after_starttls_only() -> None:
    """AUTH that EHLO names only on the encrypted connection is found."""
    async with talk(once(), **AUTH, tls=True, auth_requires_tls=True, client=CLEAR, credentials=MINE) as (server, smtp):
        await deliver(smtp)
        assert server.messages[0].authenticated == USER


@virtually
async def test_a_server_that_wants_tls_gets_tls() -> None:
    """A "Must issue a STARTTLS command first" to MAIL is answered by STARTTLS at once, without a log-in."""
    async with talk(once(), tls="required", client=CLEAR, pipelining=False) as (server, smtp):
        await deliver(smtp)
        assert since_ehlo(server) == ["MAIL", "STARTTLS", "EHLO", "MAIL", "RCPT", "DATA"]
        assert server.messages[0].tls


@virtually
async def test_a_server_that_wants_tls_for_rset_too_gets_it() -> None:
    """Where RSET itself is refused before STARTTLS, the message still goes through, once."""
    async with talk(once(), tls=True, client=CLEAR) as (server, smtp):
        server.on("RCPT", MUST_ENCRYPT, times=1)
        server.on("RSET", MUST_ENCRYPT, times=1)
        await deliver(smtp, ANN, BOB)
        assert [mail.recipients for mail in server.messages] == [[ANN, BOB]]
        assert server.messages[0].tls
        assert virtual.clock() == virtual.EPOCH


@virtually
async def test_a_server_that_wants_first_tls_and_then_a_log_in_gets_both() -> None:
    """530 STARTTLS, then 530 Authentication required: both are done within one attempt."""
    async with talk(once(), **AUTH, tls="required", client=CLEAR, credentials=MINE) as (server, smtp):
        delivery = await deliver(smtp)
        assert server.messages[0].authenticated == USER
        assert server.messages[0].tls
        assert len(delivery.attempts) == 1
        assert server.verbs.count("STARTTLS") == server.verbs.count("AUTH") == 1


@virtually
async def test_tls_that_is_wanted_and_not_offered_is_final() -> None:
    """A server that wants STARTTLS and does not offer it is refused at once, and the note says why."""
    async with talk() as (server, smtp):
        server.on("MAIL", MUST_ENCRYPT)
        with pytest.raises(aiosmtplib.SMTPSenderRefused) as caught:
            await smtp.sendmail(APP, [ANN], BODY)
        assert server.verbs.count("MAIL") == 1
        assert "the server offers no STARTTLS" in caught.value.__notes__[0]


@virtually
async def test_a_second_530_after_the_log_in_is_final() -> None:
    """Once per connection: 530 to a session that is logged in is not answered by another AUTH or a wait."""
    async with talk(**AUTH, credentials=MINE) as (server, smtp):
        server.on("MAIL", LOG_IN)
        with pytest.raises(aiosmtplib.SMTPSenderRefused) as caught:
            await smtp.sendmail(APP, [ANN], BODY)
        assert caught.value.code == 530
        assert since_ehlo(server) == ["MAIL", "RSET", "AUTH", "MAIL", "RSET"]
        assert server.connections == 1
        assert len(caught.value.delivery.attempts) == 1
        assert "logged in already" in caught.value.__notes__[0]


@pytest.mark.parametrize("stage", ["MAIL", "RCPT", "DATA", "END_OF_DATA"])
@virtually
async def test_530_without_credentials_is_final_at_once(stage: str) -> None:
    """Nobody waits for a log-in that cannot come: one offer, and the note names the cure."""
    async with talk(auth=(USER, PASSWORD), auth_required=False) as (server, smtp):
        server.on(stage, LOG_IN)
        with pytest.raises(aiosmtplib.SMTPException) as caught:
            await smtp.sendmail(APP, [ANN], BODY)
        assert server.verbs.count("MAIL") == 1
        assert "AUTH" not in server.verbs
        assert virtual.clock() == virtual.EPOCH
        assert "no credentials are configured" in caught.value.__notes__[0]


@virtually
async def test_530_where_no_auth_is_offered_is_final_at_once() -> None:
    """Credentials are of no use to a server that offers no AUTH: final, and the note says so."""
    async with talk(credentials=MINE, pipelining=False) as (server, smtp):
        server.on("MAIL", LOG_IN)
        with pytest.raises(aiosmtplib.SMTPSenderRefused) as caught:
            await smtp.sendmail(APP, [ANN], BODY)
        assert since_ehlo(server) == ["MAIL", "RSET"]
        assert "the server offers no AUTH on this port" in caught.value.__notes__[0]


@virtually
async def test_does_not_log_in_where_nobody_asks() -> None:
    """The wrapper's credentials are not shown to a server that takes mail without them."""
    async with talk(**AUTH, auth_required=False, credentials=MINE) as (server, smtp):
        await deliver(smtp)
        assert "AUTH" not in server.verbs


@virtually
async def test_what_was_learnt_is_used_on_the_next_connection() -> None:
    """A server that wanted AUTH once gets it at the start of each further connection, without being asked."""
    async with talk(**AUTH, tls=True, client=CLEAR, credentials=MINE) as (server, smtp):
        await deliver(smtp, ANN)
        for who in (BOB, CAT):
            server.disconnect()
            server.commands.clear()
            await deliver(smtp, who)
            assert server.verbs == ["EHLO", "STARTTLS", "EHLO", "AUTH", "MAIL", "RCPT", "DATA"]
        assert all(mail.authenticated == USER for mail in server.messages)
        assert server.connections == 3


@virtually
async def test_logs_in_once_per_connection() -> None:
    """Many messages over one connection share one log-in."""
    async with talk(**AUTH, credentials=MINE) as (server, smtp):
        await asyncio.gather(*[deliver(smtp, f"p{number}@example.com") for number in range(20)])
        assert server.verbs.count("AUTH") == server.connections == 1
        assert len(server.messages) == 20


@virtually
async def test_logs_in_again_after_the_connection_broke() -> None:
    """A break after the log-in is followed by a new connection, and AUTH comes before MAIL there."""
    async with talk(**AUTH, credentials=MINE) as (server, smtp):
        server.on("RCPT", "421 4.3.2 going down", times=1)
        await deliver(smtp)
        assert server.verbs == [
            *["EHLO", "MAIL", "RSET", "AUTH", "MAIL", "RCPT"],
            *["EHLO", "AUTH", "MAIL", "RCPT", "DATA"],
        ]


@virtually
async def test_the_clients_own_credentials_log_in_at_the_start() -> None:
    """aiosmtplib.SMTP(username=...) logs in at the start of each connection, as aiosmtplib does."""
    async with talk(**AUTH, auth_required=False, client=MINE) as (server, smtp):
        await deliver(smtp)
        server.disconnect()
        await deliver(smtp)
        assert server.verbs == ["EHLO", "AUTH", "MAIL", "RCPT", "DATA"] * 2


@virtually
async def test_own_credentials_and_no_auth_raise_what_aiosmtplib_does() -> None:
    """With credentials of the client's own, a server that offers no AUTH gets no message, and the caller an exception."""
    for send, settings in ((aiosmtplib.send, {}), (smtpretry.send, {"policy": once()})):
        async with ScriptedServer() as server:
            where: dict[str, Any] = {
                "hostname": server.hostname,
                "port": server.port,
                "local_hostname": "client.example",
            }
            with pytest.raises(aiosmtplib.SMTPException):
                await send(letter(), **where, **MINE, **settings)
            assert server.messages == []


@virtually
async def test_send_logs_in_at_the_start() -> None:
    """smtpretry.send(username=...) logs in before MAIL."""
    async with ScriptedServer(**AUTH, auth_required=False) as server:
        where: dict[str, Any] = {"hostname": server.hostname, "port": server.port, "local_hostname": "client.example"}
        await smtpretry.send(letter(), **where, **MINE, policy=patient())
        assert server.verbs == ["EHLO", "AUTH", "MAIL", "RCPT", "DATA", "QUIT"]


@virtually
async def test_450_and_then_530_gets_through() -> None:
    """The main job: greylisted, then asked to log in, then accepted."""
    async with talk(**AUTH, auth_required=False, credentials=MINE) as (server, smtp):
        server.on("RCPT", "450 4.2.0 Greylisted for 2 seconds", times=1)
        server.on("MAIL", LOG_IN, times=1).used = 1
        asyncio.get_running_loop().call_later(1, setattr, server.scripts[-1], "used", 0)
        delivery = await deliver(smtp)
        said = [(step.stage.name, step.reply.code) for attempt in delivery.attempts for step in attempt.steps]
        assert said == [("RCPT", 450), ("MAIL", 530), ("AUTH", 235), ("END_OF_DATA", 250)]
        assert len(delivery.attempts) == 2
        assert len(server.messages) == 1


# 530 in other words


SPELLINGS = [
    ("MAIL", "530 5.5.1 Must issue an AUTH command first"),  # OpenSMTPD
    ("MAIL", "530 Error: authentication Required"),  # nodemailer's smtp-server
    ("RCPT", "554 5.7.1 <unknown[127.0.0.1]>: Client host rejected: Access denied"),  # Postfix, submission
    ("RCPT", "554 5.7.1 <bob@example.com>: Relay access denied"),  # Postfix
    ("RCPT", "454 4.7.1 <bob@example.com>: Relay access denied"),  # Postfix, its default
    ("RCPT", "550 relay not permitted"),  # Exim
    ("RCPT", "550 I cannot deliver mail for bob@example.com"),  # Haraka
    ("RCPT", "553 5.7.1 <app@example.com>: Sender address rejected: not logged in"),  # Postfix, sender_login_maps
    ("MAIL", "553 5.7.1 Authentication required"),
    ("MAIL", "503 5.5.1 Error: authentication required"),
    ("MAIL", "550 5.7.1 Authentication required"),
    ("MAIL", "554 5.7.1 You must authenticate first"),
    ("MAIL", "454 4.7.0 Authentication required"),
    ("DATA", "554 5.7.1 Authentication required"),
    ("END_OF_DATA", "550 5.7.1 Authentication required"),
    ("RCPT", "553 sorry, relaying denied from your location"),
    ("RCPT", "550 5.7.1 Unable to relay"),
    ("RCPT", "503 This mail server requires authentication when attempting to send to a non-local e-mail address"),
]


@pytest.mark.parametrize(("stage", "reply"), SPELLINGS)
@virtually
async def test_other_words_for_530_log_in(stage: str, reply: str) -> None:
    """Where AUTH is offered, credentials are there and unused, "relay denied" and its like mean: log in."""
    async with talk(once(), **AUTH, auth_required=False, credentials=MINE) as (server, smtp):
        server.on(stage, reply, times=1)
        delivery = await deliver(smtp, ANN, BOB)
        assert delivery.accepted == [ANN, BOB]
        assert [mail.recipients for mail in server.messages] == [[ANN, BOB]]
        assert server.messages[0].authenticated == USER
        assert server.verbs.count("AUTH") == 1
        assert len(delivery.attempts) == 1


@pytest.mark.parametrize("reply", [reply for stage, reply in SPELLINGS if stage == "RCPT" and reply.startswith("5")])
@pytest.mark.parametrize("why", ["logged in", "no credentials", "no AUTH"])
@virtually
async def test_other_words_for_530_are_final_where_a_log_in_is_no_cure(why: str, reply: str) -> None:
    """Logged in already, without credentials, or without AUTH, the same words are final for that recipient, at once."""
    settings: dict[str, Any] = {
        "logged in": {**AUTH, "auth_required": True, "credentials": MINE},
        "no credentials": {**AUTH, "auth_required": False},
        "no AUTH": {"credentials": MINE},
    }[why]
    async with talk(**settings) as (server, smtp):
        server.on("RCPT", BOB, reply)
        delivery = await deliver(smtp, ANN, BOB)
        assert delivery.accepted == [ANN]
        assert {who: str(said) for who, said in delivery.refused.items()} == {BOB: reply}
        assert len(delivery.attempts) == 1
        assert server.verbs.count("AUTH") == (why == "logged in")


@pytest.mark.parametrize(("credentials", "refusals", "attempts"), [(MINE, 3, 2), (None, 2, 3)])
@virtually
async def test_a_relay_that_is_denied_for_now_is_tried_again(
    credentials: dict[str, Any] | None, refusals: int, attempts: int
) -> None:
    """Where a log-in is no cure, the first digit is believed: the recipient waits, and gets it once that is mended."""
    async with talk(**AUTH, auth_required=False, credentials=credentials) as (server, smtp):
        server.on("RCPT", BOB, "454 4.7.1 <bob@example.com>: Relay access denied", times=refusals)
        delivery = await deliver(smtp, ANN, BOB)
        assert delivery.accepted == [ANN, BOB]
        assert len(delivery.attempts) == attempts


@pytest.mark.parametrize(
    "reply", ["550 5.1.1 User unknown", "554 5.7.1 Spam", "553 5.1.3 bad address", "550 Denied by policy"]
)
@virtually
async def test_other_refusals_do_not_log_in(reply: str) -> None:
    """A refusal that says nothing of log-in or relay is no reason to show the credentials."""
    async with talk(**AUTH, auth_required=False, credentials=MINE) as (server, smtp):
        server.on("RCPT", reply)
        await deliver(smtp)
        assert "AUTH" not in server.verbs


# 535


@pytest.mark.parametrize("mechanisms", [["PLAIN", "LOGIN", "CRAM-MD5"], ["LOGIN"], ["CRAM-MD5"]], ids="-".join)
@pytest.mark.parametrize("tls", [False, True], ids=["clear", "tls"])
@pytest.mark.parametrize("whose", ["credentials", "client"])
@virtually
async def test_a_wrong_password_is_final_after_one_auth(whose: str, tls: bool, mechanisms: list[str]) -> None:
    """535 to PLAIN or LOGIN is final, whatever else is offered: no wait, and SMTPAuthenticationError.

    CRAM-MD5, first in the clear, judges no password where another mechanism is offered.
    """
    wrong = {whose: {"username": USER, "password": "wrong"}}
    async with talk(**AUTH, tls=tls, mechanisms=mechanisms, **wrong) as (server, smtp):
        with pytest.raises(aiosmtplib.SMTPAuthenticationError) as caught:
            await smtp.sendmail(APP, [ANN, BOB], BODY)
        assert caught.value.code == 535
        assert server.verbs.count("AUTH") == (2 if len(mechanisms) > 1 and not tls else 1)
        assert virtual.clock() == virtual.EPOCH
        assert server.connections == 1
        assert [*caught.value.delivery.refused] == [ANN, BOB]
        assert "Check the user name and the password" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    "mechanisms", [["PLAIN"], ["LOGIN"], ["CRAM-MD5"], ["PLAIN", "LOGIN", "CRAM-MD5"]], ids="-".join
)
@pytest.mark.parametrize("password", [PASSWORD, "Pässwört", PASSWORD.encode()], ids=["str", "umlauts", "bytes"])
@virtually
async def test_a_right_password_logs_in_by_each_mechanism(password: str | bytes, mechanisms: list[str]) -> None:
    """Whatever the server offers, the right password is accepted, given as str or bytes."""
    known = password.decode() if isinstance(password, bytes) else password
    mine = {"username": USER, "password": password}
    async with talk(auth=(USER, known), mechanisms=mechanisms, credentials=mine) as (server, smtp):
        await deliver(smtp)
        assert server.messages[0].authenticated == USER


@pytest.mark.parametrize(
    "reply",
    [
        "454 4.7.0 Temporary authentication failure",
        "432 4.7.12 A password transition is needed",
        "435 Unable to authenticate at present",
        "421 4.7.0 try again later",
        "450 4.7.1 Error: too much auth",
        "535 5.7.8 Error: authentication failed: Connection lost to authentication server",  # Postfix with Dovecot
    ],
)
@pytest.mark.parametrize("whose", ["credentials", "client"])
@virtually
async def test_a_log_in_that_fails_for_now_is_tried_again(whose: str, reply: str) -> None:
    """A transient refusal of AUTH is waited out, and the same password then logs in."""
    async with talk(**AUTH, **{whose: MINE}) as (server, smtp):
        server.on("AUTH", reply, times=2)
        delivery = await deliver(smtp)
        assert delivery.accepted == [ANN]
        assert len(delivery.attempts) == 3
        assert server.verbs.count("AUTH") == 3
        assert all(
            later.at - earlier.at >= 60
            for earlier, later in zip(delivery.attempts, delivery.attempts[1:], strict=False)
        )


@virtually
async def test_a_challenge_that_fails_for_now_is_tried_again() -> None:
    """A 454 in the middle of AUTH LOGIN is transient too."""
    async with talk(**AUTH, mechanisms=["LOGIN"], credentials=MINE) as (server, smtp):
        server.on("CHALLENGE", "454 4.7.0 Temporary authentication failure", times=1)
        assert (await deliver(smtp)).accepted == [ANN]


# Tokens


def tokens(*given: str) -> tuple[dict[str, Any], list[str]]:
    """Return credentials with a generator of these tokens, the last of them for ever, and what it has given so far."""
    asked: list[str] = []

    async def generator() -> str:
        asked.append(given[min(len(asked), len(given) - 1)])
        return asked[-1]

    return {"username": USER, "oauth_token_generator": generator}, asked


@pytest.mark.parametrize("whose", ["credentials", "client"])
@virtually
async def test_a_token_logs_in(whose: str) -> None:
    """A good token is asked for once and logs in by XOAUTH2."""
    mine, asked = tokens("good")
    async with talk(token="good", **{whose: mine}) as (server, smtp):
        await deliver(smtp)
        assert asked == ["good"]
        assert [line for line in server.commands if "AUTH" in line] == ["AUTH XOAUTH2 ********"]
        assert server.messages[0].authenticated == USER


@pytest.mark.parametrize("whose", ["credentials", "client"])
@virtually
async def test_a_refused_token_is_asked_for_once_more(whose: str) -> None:
    """535 to a token: the generator is asked again, and the fresh token logs in at once, within the attempt."""
    mine, asked = tokens("old", "new")
    async with talk(once(), token="new", **{whose: mine}) as (server, smtp):
        delivery = await deliver(smtp)
        assert delivery.accepted == [ANN]
        assert asked == ["old", "new"]
        assert server.verbs.count("AUTH") == 2
        assert server.messages[0].authenticated == USER
        assert virtual.clock() == virtual.EPOCH


@virtually
async def test_a_refused_token_is_not_sent_again() -> None:
    """A generator that gives the refused token again ends in SMTPAuthenticationError after a single AUTH."""
    mine, asked = tokens("old")
    async with talk(token="new", credentials=mine) as (server, smtp):
        with pytest.raises(aiosmtplib.SMTPAuthenticationError) as caught:
            await smtp.sendmail(APP, [ANN], BODY)
        assert caught.value.code == 535
        assert asked == ["old", "old"]
        assert server.verbs.count("AUTH") == 1
        assert virtual.clock() == virtual.EPOCH
        assert "token" in caught.value.__notes__[0]


@virtually
async def test_a_refused_token_is_not_sent_again_by_the_next_message_either() -> None:
    """The next send does not send the refused token again, and logs in as soon as there is another."""
    current = "old"

    async def generator() -> str:
        return current

    mine = {"username": USER, "oauth_token_generator": generator}
    async with talk(token="new", credentials=mine) as (server, smtp):
        for _ in range(3):
            with pytest.raises(aiosmtplib.SMTPAuthenticationError) as caught:
                await smtp.sendmail(APP, [ANN], BODY)
            assert caught.value.code == 535
        assert server.verbs.count("AUTH") == 1
        current = "new"
        assert (await deliver(smtp)).accepted == [ANN]


@virtually
async def test_a_second_refused_token_is_final() -> None:
    """Two different tokens refused: two AUTH commands, no third question, no wait."""
    mine, asked = tokens("old", "stale", "older")
    async with talk(token="new", credentials=mine) as (server, smtp):
        with pytest.raises(aiosmtplib.SMTPAuthenticationError):
            await smtp.sendmail(APP, [ANN], BODY)
        assert asked == ["old", "stale"]
        assert server.verbs.count("AUTH") == 2
        assert virtual.clock() == virtual.EPOCH


@virtually
async def test_a_token_that_expires_later_is_renewed() -> None:
    """On a later connection a token that has expired meanwhile is refreshed once again."""
    mine, asked = tokens("first", "first", "second")
    async with talk(token="first", credentials=mine) as (server, smtp):
        await deliver(smtp, ANN)
        server.disconnect()
        server.tokens = {"second"}
        await deliver(smtp, BOB)
        assert asked == ["first", "first", "second"]
        assert [mail.authenticated for mail in server.messages] == [USER, USER]


@virtually
async def test_a_token_that_fails_for_now_is_sent_again() -> None:
    """A 454 to a token is transient: after a wait the same token may go again."""
    mine, _ = tokens("good")
    async with talk(token="good", credentials=mine) as (server, smtp):
        server.on("AUTH", "454 4.7.0 Temporary authentication failure", times=1)
        delivery = await deliver(smtp)
        assert delivery.accepted == [ANN]
        assert len(delivery.attempts) == 2


@virtually
async def test_an_error_of_the_token_generator_is_the_callers() -> None:
    """What the generator raises comes out as it is, with the delivery; nothing is sent, and the next send works."""

    class NoNetworkError(Exception):
        pass

    async def generator() -> str:
        if not failures:
            return "good"
        raise failures.pop()

    failures = [NoNetworkError("no network")]
    async with talk(token="good", credentials={"username": USER, "oauth_token_generator": generator}) as (server, smtp):
        with pytest.raises(NoNetworkError) as caught:
            await smtp.sendmail(APP, [ANN], BODY)
        assert caught.value.delivery.pending == [ANN]
        assert server.messages == []
        assert (await deliver(smtp)).accepted == [ANN]


# Clear connections


def own_address() -> str | None:
    """Return an address of this machine that is no loopback; nothing is sent to find it."""
    for family, somewhere in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((somewhere, 9))
            except OSError:
                continue
            address: str = probe.getsockname()[0]
            if not address.startswith(("127.", "::1")):
                return address
    return None


class Elsewhere(ScriptedServer):
    """A server on an address that is no loopback."""

    hostname = own_address() or ""  # type: ignore[misc]


class LoopbackSix(ScriptedServer):
    """A server on ::1."""

    hostname = "::1"  # type: ignore[misc]


def six() -> bool:
    """Whether this machine has ::1."""
    with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            return False
        return True


elsewhere = pytest.mark.skipif(not Elsewhere.hostname, reason="this machine has no address but loopback")
PLACES = [
    pytest.param(ScriptedServer, id="127.0.0.1"),
    pytest.param(LoopbackSix, id="::1", marks=pytest.mark.skipif(not six(), reason="this machine has no ::1")),
    pytest.param(Elsewhere, id="elsewhere", marks=elsewhere),
]


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("cleartext_auth", ["never", "loopback", "always", None])
@pytest.mark.parametrize("whose", ["credentials", "client"])
@virtually
async def test_credentials_cross_a_clear_connection_only_where_allowed(
    whose: str, cleartext_auth: str | None, where: type[ScriptedServer]
) -> None:
    """Without TLS, AUTH is sent over loopback by default, nowhere with "never", and everywhere with "always"."""
    allowed = cleartext_auth == "always" or (cleartext_auth in ("loopback", None) and where is not Elsewhere)
    credentials: dict[str, Any] = {} if cleartext_auth is None else {"cleartext_auth": cleartext_auth}
    mine: dict[str, Any] = {"client": {}, "credentials": credentials}
    mine[whose] = mine[whose] | MINE
    async with talk(**AUTH, cls=where, **mine) as (server, smtp):
        delivery = await deliver(smtp)
        assert delivery.accepted == ([ANN] if allowed else [])
        assert ("AUTH" in server.verbs) == allowed
        if not allowed:
            note = delivery.story(0)
            assert "in the clear" in note
            assert "no TLS" in note
            assert server.messages == []
            assert len(delivery.attempts) == 1
            assert set(server.verbs) <= {"EHLO", "MAIL", "RSET"}


@pytest.mark.parametrize("cleartext_auth", ["never", "loopback"])
@pytest.mark.parametrize("tls", [True, "required", "implicit"])
@pytest.mark.parametrize("where", PLACES)
@virtually
async def test_over_tls_credentials_may_go_anywhere(where: type[ScriptedServer], tls: Any, cleartext_auth: str) -> None:
    """With TLS, AUTH is sent whatever `cleartext_auth` says."""
    client = {"validate_certs": False}  # the certificate is for 127.0.0.1
    credentials = {**MINE, "cleartext_auth": cleartext_auth}
    async with talk(**AUTH, cls=where, tls=tls, client=client, credentials=credentials) as (server, smtp):
        await deliver(smtp)
        assert server.messages[0].authenticated == USER
        assert tls == "implicit" or server.messages[0].tls


@pytest.mark.parametrize("whose", ["credentials", "client"])
@pytest.mark.parametrize("start_tls", [None, False, True])
@virtually
async def test_where_starttls_fails_nothing_is_sent_in_the_clear(start_tls: bool | None, whose: str) -> None:
    """A server that offers STARTTLS and then says 454 gets no credentials and no mail on the clear connection."""
    mine: dict[str, Any] = {"client": {"start_tls": start_tls}, "credentials": {}}
    mine[whose] = mine[whose] | MINE
    async with talk(once(), **AUTH, tls=True, **mine) as (server, smtp):
        server.on("STARTTLS", "454 4.7.0 TLS not available")
        delivery = await deliver(smtp)
        assert delivery.accepted == []
        assert "AUTH" not in server.verbs
        assert server.messages == []


@virtually
async def test_tls_that_is_not_available_for_now_is_waited_for() -> None:
    """454 to STARTTLS is transient."""
    async with talk(**AUTH, tls=True, credentials=MINE) as (server, smtp):
        server.on("STARTTLS", "454 4.7.0 TLS not available due to temporary reason", times=1)
        delivery = await deliver(smtp)
        assert delivery.accepted == [ANN]
        assert len(delivery.attempts) == 2
        assert server.messages[0].tls


@pytest.mark.parametrize("tls", [True, "implicit"])
@virtually
async def test_a_certificate_that_does_not_verify_is_final(tls: Any) -> None:
    """A server whose certificate is not trusted gets no credentials and no mail, and is not tried again."""
    client = {**MINE, "tls_context": ssl.create_default_context()}
    async with talk(**AUTH, tls=tls, client=client) as (server, smtp):
        with pytest.raises((ssl.SSLError, aiosmtplib.SMTPException)) as caught:
            await smtp.sendmail(APP, [ANN], BODY)
        assert "certificate" in str(caught.value).lower()
        assert "AUTH" not in server.verbs
        assert server.connections == 1
        assert len(caught.value.delivery.attempts) == 1


@virtually
async def test_a_reply_smuggled_in_before_tls_is_not_believed() -> None:
    """What an attacker appends to the 220 of STARTTLS in the clear is no reply to the EHLO that follows (CVE-2021-38371)."""
    async with talk(**AUTH, tls=True, client=MINE) as (server, smtp):
        server.fail_at("STARTTLS", "unasked", times=1)
        delivery = await deliver(smtp)
        assert delivery.accepted == [ANN]
        assert server.messages[0].tls
        assert server.messages[0].authenticated == USER


@virtually
async def test_auth_that_needs_tls_says_538_and_gets_it() -> None:
    """538 to AUTH is answered by STARTTLS."""
    async with talk(once(), **AUTH, tls=True, client=CLEAR, credentials=MINE) as (server, smtp):
        server.on("MAIL", "538 5.7.11 Encryption required for requested authentication mechanism", times=1)
        delivery = await deliver(smtp)
        assert delivery.accepted == [ANN]
        assert server.messages[0].tls


# Nobody sees it


def secrets(*words: str) -> re.Pattern[str]:
    """Match the words, and every way in which AUTH carries them."""
    forms = set[str]()
    for word in words:
        forms |= {word, base64.b64encode(word.encode()).decode()}
    forms.add(base64.b64encode(f"\0{USER}\0{words[0]}".encode()).decode())
    forms.add(base64.b64encode(f"user={USER}\1auth=Bearer {words[0]}\1\1".encode()).decode())
    return re.compile("|".join(map(re.escape, forms)))


def everything_of(error: BaseException | None, *others: object) -> str:
    """Everything that can be shown of an exception and of these objects."""
    shown = [f"{each!r} {each}" for each in others]
    delivery = getattr(error, "delivery", None)
    if delivery is not None:
        shown += [repr(delivery), str(delivery), delivery.story(0.0)]
        shown += [f"{step!r} {step}" for attempt in delivery.attempts for step in attempt.steps]
    if error is not None:
        shown += [*traceback.format_exception(error), repr(error), str(error), *getattr(error, "__notes__", [])]
    return "\n".join(shown)


ECHO: dict[str, Callable[[ScriptedServer, str], object]] = {
    "accepted": lambda server, secret: None,
    "535": lambda server, secret: server.on("AUTH", "535 5.7.8 wrong"),
    "454": lambda server, secret: server.on("AUTH", "454 4.7.0 later"),
    "530 for ever": lambda server, secret: server.on("MAIL", LOG_IN),
    "drop": lambda server, secret: server.fail_at("AUTH", "fin"),
    "garbage": lambda server, secret: server.fail_at("AUTH", "garbage"),
    "stall": lambda server, secret: server.fail_at("AUTH", "stall"),
    "two replies": lambda server, secret: server.fail_at("AUTH", "unasked"),
    "334": lambda server, secret: server.on("AUTH", "334 abc", accepted=False),
    "RCPT 550": lambda server, secret: server.on("RCPT", "550 5.1.1 who?"),
    "echo": lambda server, secret: server.on("AUTH", f'500 5.5.1 Command unrecognized: "AUTH PLAIN {secret}"'),
    "echo for now": lambda server, secret: server.on("AUTH", f"454 4.7.0 {secret}: try again later"),
    "echo in garbage": lambda server, secret: server.on("AUTH", f"AUTH PLAIN {secret}\r\n".encode(), accepted=False),
    "echo on success": lambda server, secret: server.on("AUTH", f"235 2.7.0 welcome {secret}", accepted=True),
}


@pytest.mark.parametrize("what", ECHO)
@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN", "CRAM-MD5", "XOAUTH2"])
@pytest.mark.parametrize("whose", ["credentials", "client"])
def test_no_credential_is_ever_shown(whose: str, mechanism: str, what: str, caplog: pytest.LogCaptureFixture) -> None:
    """No password or token, in clear or as AUTH carries it, is in a log, a note, a message, a repr or a str of anything."""
    caplog.set_level(logging.DEBUG)
    logging.getLogger("mail.log").setLevel(logging.CRITICAL)  # aiosmtpd's: the other side
    if mechanism == "XOAUTH2":
        mine, _ = tokens(PASSWORD)
        settings: dict[str, Any] = {"token": PASSWORD}
        carried = base64.b64encode(f"user={USER}\1auth=Bearer {PASSWORD}\1\1".encode()).decode()
    else:
        mine = MINE
        settings = {**AUTH, "mechanisms": [mechanism]}
        carried = base64.b64encode(
            f"\0{USER}\0{PASSWORD}".encode() if mechanism == "PLAIN" else PASSWORD.encode()
        ).decode()
        if mechanism == "CRAM-MD5":
            carried = "(nothing that the server knows)"

    async def scenario() -> str:
        caught: BaseException | None = None
        async with talk(patient(max_attempts=2), **settings, **{whose: mine}) as (server, smtp):
            ECHO[what](server, carried)
            delivery = await deliver(smtp)
            try:
                await smtp.sendmail(APP, [ANN], BODY)
            except aiosmtplib.SMTPException as error:
                caught = error
            steps = [step for attempt in delivery.attempts for step in attempt.steps]
            assert steps
            return everything_of(caught, smtp, smtp.policy, delivery, delivery.story(0), *steps)

    shown = virtual.run(scenario()) + caplog.text
    assert "AUTH" in shown
    found = secrets(PASSWORD).search(shown)
    assert found is None


@pytest.mark.parametrize(
    "arguments",
    [
        {"username": USER, "password": PASSWORD, "oauth_token_generator": lambda: None},
        {"password": PASSWORD},
        {"username": USER, "password": PASSWORD, "cleartext_auth": "perhaps"},
        {"username": USER, "password": PASSWORD, "idle_timeout": -1},
    ],
)
def test_no_credential_is_shown_by_bad_input(arguments: dict[str, Any]) -> None:
    """The error about a wrong argument does not repeat the password."""
    with pytest.raises(ValueError, match=r"\w") as caught:
        RetryingSMTP(aiosmtplib.SMTP(), **arguments)
    assert PASSWORD not in everything_of(caught.value)


@virtually
async def test_no_message_body_is_ever_shown() -> None:
    """What a message says is in no log, note, message, repr or str of what a send leaves behind."""
    async with talk(once()) as (server, smtp):
        server.on("END_OF_DATA", "554 5.6.0 no")
        plan = f"the-{'secret'}-plan"  # so that it stands in no line of the traceback
        with pytest.raises(aiosmtplib.SMTPDataError) as caught:
            await smtp.sendmail(APP, [ANN], BODY + plan.encode())
        assert plan not in everything_of(caught.value, smtp)


@virtually
async def test_a_client_that_has_logged_in_by_itself_is_not_logged_in_again() -> None:
    """A connected client with credentials of its own is taken as it is: no second AUTH, which servers refuse (503)."""
    async with ScriptedServer(**AUTH) as server, server.client(username=USER, password=PASSWORD) as client:
        async with RetryingSMTP(client, patient()) as smtp:
            assert (await smtp.deliver(BODY, sender=APP, recipients=[ANN])).accepted == [ANN]
        assert server.verbs.count("AUTH") == 1


@virtually
async def test_who_needs_no_log_in_does_not_depend_on_it() -> None:
    """A recipient whom the server takes from strangers gets the mail, though the log-in that another needs is refused."""
    async with talk(**AUTH, auth_required=False, credentials={"username": USER, "password": "wrong"}) as (server, smtp):
        server.on("RCPT", BOB, "554 5.7.1 Relay access denied")
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN, BOB])
        assert (delivery.accepted, list(delivery.refused)) == ([ANN], [BOB])
        assert (await smtp.deliver(BODY, sender=APP, recipients=[ANN])).accepted == [ANN]
        assert server.verbs.count("AUTH") == 1


@pytest.mark.parametrize("stuck", ["AUTH", "token"])
@virtually
async def test_a_log_in_without_an_answer_holds_up_no_other(stuck: str) -> None:
    """Where the first log-in gets no answer, the other connections give up with it, and not one after the other."""
    secret: dict[str, Any] = {"password": PASSWORD}
    if stuck == "token":
        secret = {"oauth_token_generator": lambda: asyncio.sleep(10_000)}
    async with ScriptedServer(auth=(USER, PASSWORD), token="token") as server:
        server.fail_at("AUTH", "stall", optional=True)
        policy = RetryPolicy.interactive(clock=virtual.clock)
        async with RetryingSMTP(server.client, policy, username=USER, max_connections=8, **secret) as smtp:
            sends = [smtp.sendmail(APP, [ANN], BODY) for _ in range(8)]
            failures = await asyncio.gather(*sends, return_exceptions=True)
        assert virtual.clock() - virtual.EPOCH == pytest.approx(30, abs=1)
        assert {type(failure) for failure in failures} <= {SMTPTimeoutError, SMTPReadTimeoutError}


@virtually
async def test_a_slow_log_in_is_waited_for_once() -> None:
    """When one connection has logged in, the others do so at the same time."""
    async with ScriptedServer(auth=(USER, PASSWORD)) as server:
        server.fail_at("AUTH", "late", delay=20)
        policy = RetryPolicy.interactive(clock=virtual.clock)
        async with RetryingSMTP(server.client, policy, username=USER, password=PASSWORD, max_connections=8) as smtp:
            await asyncio.gather(*(smtp.sendmail(APP, [ANN], BODY) for _ in range(8)))
        assert virtual.clock() - virtual.EPOCH == pytest.approx(40, abs=1)


@virtually
async def test_a_token_generator_that_hangs_is_given_up_on() -> None:
    """A token generator gets no more time than a command: the client is not stuck behind it."""

    async def hang() -> str:
        await asyncio.sleep(1e6)
        return "never"

    mine = {"username": USER, "oauth_token_generator": hang}
    async with talk(once(), token="other", client={"timeout": 5}, credentials=mine) as (_, smtp):
        with pytest.raises(aiosmtplib.SMTPTimeoutError, match="no token"):
            await smtp.sendmail(APP, [ANN], BODY)
